"""Masks of tokens by llguidance.

Its tokenizer is given a token that the model's does not have, as the one that ends a text. Where it allows that one, the text is
complete; which of the model's ids may end it there is the call's matter. So one tokenizer serves all calls, and no id of the
model's has a meaning that the grammar did not give it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import tokenizers
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from modelrig.errors import GenerateError, quoted
from modelrig.generation.constraints import allow
from modelrig.generation.tokenizer import Tokenizer

END = "<|modelrig: a constraint is complete|>"
GRAMMARS: dict[str, Callable[[str], str]] = {
    "regex": LLMatcher.grammar_from_regex,
    "json_schema": LLMatcher.grammar_from_json_schema,
    "lark": LLMatcher.grammar_from_lark,
}


class GuidanceCompiler:
    """Created once per model: the tokens as llguidance sorts them, which takes up to a second for a large vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        with_end = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        with_end.add_special_tokens([END])
        end = with_end.token_to_id(END)
        assert end is not None
        self._end = end
        try:
            self._tokens = LLTokenizer(with_end.to_str(), n_vocab=max(vocab_size, self._end + 1), eos_token=self._end)
        except ValueError as error:
            text = f"llguidance cannot read this tokenizer: {quoted(str(error))}"
            hint = "it reads byte-level tokenizers, and those with byte fallback"
            raise GenerateError("GN-CONSTRAINT", text, locus="constraint", hint=hint) from error
        spelled = [tokenizer.id_to_token(token) for token in range(vocab_size)]
        special = tokenizer.special_tokens
        self._known = self._words(token for token, text in enumerate(spelled) if text is not None)
        self._special = self._words(token for token, text in enumerate(spelled) if text in special)

    def compile(self, language: str, text: str, end_ids: Sequence[int]) -> Callable[[], GuidanceMask]:
        """A matcher to copy for each row. llguidance bounds time and memory; what goes beyond is an error with its reason."""
        try:
            grammar = GRAMMARS[language](text)
        except ValueError as error:
            raise _refused(language, str(error)) from error
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(language, matcher.get_error())
        # Only Lark has a way to ask for special tokens, which are no text
        special = torch.zeros_like(self._special) if language == "lark" else self._special
        return lambda: GuidanceMask(matcher.deep_copy(), self._known, special, self._end, tuple(end_ids))

    def _words(self, tokens: Iterable[int]) -> Tensor:
        """int32 [numbers] with the bits of `tokens`."""
        words = torch.zeros(-(-self._tokens.vocab_size // 32), dtype=torch.int32)
        allow(words, tokens)
        return words


class GuidanceMask:
    """One row's `modelrig.components.TokenMask`.

    Args:
        known, special: int32 [numbers] with the bits of ids that stand for tokens, and of those that are no text.
        end: the id with which the matcher says that the text may end.
        end_ids: those that end it in this call.
    """

    def __init__(self, matcher: LLMatcher, known: Tensor, special: Tensor, end: int, end_ids: Sequence[int]) -> None:
        self._matcher, self._known, self._special, self._end, self._end_ids = matcher, known, special, end, end_ids
        self._words: Tensor | None = None  # int32 [numbers] of where the matcher is

    def fill(self, bits: Tensor) -> None:
        words = self._allowed()
        bits |= (words & self._known)[: len(bits)]
        if self._is_complete(words):
            allow(bits, self._end_ids)

    def accept(self, token: int) -> None:
        self._words = None
        if not self._matcher.consume_token(token):
            raise self._failed()

    def rollback(self, count: int) -> None:
        self._words = None
        if not self._matcher.rollback(count):
            raise self._failed()

    @property
    def is_over(self) -> bool:
        if self._matcher.is_stopped():
            return not self._matcher.is_error()
        if self._end_ids:
            return False
        # Nothing says the end here, so it must be seen that nothing else may follow
        words = self._allowed()
        return self._is_complete(words) and int(words.count_nonzero()) == 1 and int(words[self._end // 32]) == _bit(self._end)

    def _allowed(self) -> Tensor:
        """Tokens that may follow, and `_end` where the text may end."""
        if self._words is None:
            words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
            if self._matcher.is_error():
                raise self._failed()
            ends = words[self._end // 32] & _bit(self._end)
            words = words & self._known
            if bool((words & self._special).any()):  # it insists on the one token that is spelled like a constant text
                text = "what must follow is spelled like a special token, which is no text"
                raise GenerateError("GN-CONSTRAINT", text, locus="constraint", hint="Lark grammars can name special tokens")
            words[self._end // 32] |= ends
            self._words = words
        return self._words

    def _is_complete(self, words: Tensor) -> bool:
        return bool(int(words[self._end // 32]) & _bit(self._end))

    def _failed(self) -> GenerateError:
        return GenerateError("GN-CONSTRAINT", f"llguidance gave up: {_first(self._matcher.get_error())}", locus="constraint")


def _bit(token: int) -> int:
    """Bit `token % 32` of an int32."""
    return (1 << token % 32) - (1 << 32 if token % 32 == 31 else 0)


def _refused(language: str, reason: str) -> GenerateError:
    return GenerateError("GN-CONSTRAINT", f"not a {language} that llguidance takes: {_first(reason)}", locus="constraint")


def _first(reason: str) -> str:
    """What llguidance says, without the dump of its state."""
    return quoted(reason.partition("\n<state>")[0].strip())
