"""The options of one call: what the caller gave, over what generation_config.json says, over the usual."""

from __future__ import annotations

from typing import Any

from attrs import frozen

from modelrig.generation.options import DEFAULT_NEW_TOKENS, GenerateOptions
from modelrig.planning.generation_config import SAMPLING, GenerationConfig

__all__ = ["Call"]


@frozen
class Call:
    """Made by `make`.

    Attributes:
        options: all of them; what generation works by.
        asked: those that the caller gave, the others as usual. Only what was asked for must fit into a context.
    """

    options: GenerateOptions
    asked: GenerateOptions
    _config: GenerationConfig
    _leaves_length: bool

    @classmethod
    def make(cls, config: GenerationConfig, given: dict[str, Any]) -> Call:
        """An option that is `given` counts, None too; what is left out is what `config` says.

        Raises:
            GenerateError: GN-UNKNOWN, GN-ARGS, as `GenerateOptions.make`.
        """
        asked = GenerateOptions.make(**given)
        usual = {"repetition_penalty": config.get("repetition_penalty"), "min_new_tokens": config.get("min_new_tokens") or 0}
        if not asked.is_greedy:
            usual |= {name: config.get(name) for name in SAMPLING}
            usual["top_k"] = usual["top_k"] or None  # 0 in the file: all tokens
        leaves_length = "max_new_tokens" not in given
        if asked.max_new_tokens is not None:  # what the file says of the least gives way to what the caller says of the most
            usual["min_new_tokens"] = min(usual["min_new_tokens"], asked.max_new_tokens)
        return cls(GenerateOptions.make(**{**usual, **given}), asked, config, leaves_length)

    def limit(self, prompt: int, held: int, capacity: int, longest: int, *, unfed: int) -> int:
        """`GenerateOptions.limit`; what the caller leaves open is as the file says, cut to what fits."""
        most = self._config.new_tokens(prompt + held) if self._leaves_length else None
        usual = max(DEFAULT_NEW_TOKENS, self.options.min_new_tokens) if most is None else most
        return self.asked.limit(prompt, held, capacity, longest, unfed=unfed, usual=usual)
