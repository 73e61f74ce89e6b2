"""What `generation_config.json` says of how to generate, each value with the file it comes from.

Decoding stays greedy unless a call gives a temperature, so what is `RECOMMENDED` only recommends. The rest is the default of an
option that a call leaves out: those in `SAMPLING` only if the call samples. Of config.json only `eos_token_id` counts, where the
other file has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attrs import Factory, frozen

from modelrig.checkpoint.config import ConfigReader
from modelrig.checkpoint.paths import optional
from modelrig.checkpoint.strict_json import load_json
from modelrig.components import Snapshot
from modelrig.errors import ConfigError, quoted
from modelrig.planning.identify import CONFIG, GENERATION_CONFIG

LARGEST_COUNT = 2**31 - 1
MAX_DIGITS = 40  # of a whole number, which the range then refuses by its key
USUAL_MAX_LENGTH = 20  # transformers' default, which older versions wrote down: nobody's wish
LISTED = 20  # keys that are not honoured, in a note

SAMPLING = ("top_k", "top_p", "min_p")
RECOMMENDED = ("do_sample", "temperature")
IDS = ("eos_token_id", "bos_token_id", "pad_token_id")

#: how each value is read; the ranges are those of `generate`, but that 0 switches top_k off, as transformers writes it
READ: dict[str, Callable[[ConfigReader, str], Any]] = {
    **dict.fromkeys(IDS, lambda read, key: read.integers(key, -1, LARGEST_COUNT, default=None, single=True)),
    "max_new_tokens": lambda read, key: read.integer(key, 1, LARGEST_COUNT, default=None),
    "max_length": lambda read, key: read.integer(key, 1, LARGEST_COUNT, default=None),
    "min_new_tokens": lambda read, key: read.integer(key, 0, LARGEST_COUNT, default=None),
    "repetition_penalty": lambda read, key: read.number(key, 1e-3, 1e3, default=None),
    "do_sample": lambda read, key: read.boolean(key, default=None),
    "temperature": lambda read, key: read.number(key, 0, 1e6, default=None),
    "top_k": lambda read, key: read.integer(key, 0, LARGEST_COUNT, default=None),
    "top_p": lambda read, key: read.number(key, 0, 1, default=None, exclusive=True),
    "min_p": lambda read, key: read.number(key, 0, 1, default=None),
}

#: further keys that change no token here: what is returned, how it is computed, beams and drafts that nobody asked for
WITHOUT_EFFECT = frozenset({
    "transformers_version", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache",
    "prefill_chunk_size", "compile_config", "disable_compile", "return_dict_in_generate", "early_stopping", "length_penalty",
    "renormalize_logits", "remove_invalid_values", "low_memory", "decoder_start_token_id", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "max_matching_ngram_size",
})  # fmt: skip
#: values with which a key changes nothing
NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "typical_p"), 1),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "diversity_penalty"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha"), 0),
}


@frozen
class Sourced:
    """A value, and the file that says it."""

    value: Any
    origin: str


@frozen(kw_only=True)
class GenerationConfig:
    """How the checkpoint wants to generate.

    Attributes:
        values: what is said → the value and its origin, for the keys of `READ`.
        notes: what the file asks for beyond that, and is not honoured.
    """

    values: Mapping[str, Sourced] = Factory(dict)
    notes: tuple[str, ...] = ()

    def get(self, key: str) -> Any:
        """The value of `key`, None where nothing says any."""
        return self.values[key].value if key in self.values else None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return self.get("eos_token_id") or ()

    def new_tokens(self, total: int) -> int | None:
        """New tokens at most after `total` tokens, where a call does not say; None where the file says nothing that could hold.

        As in transformers `max_new_tokens` comes before `max_length`, which counts the prompt. One that the prompt has used up
        already limits nothing.
        """
        most, length = self.get("max_new_tokens"), self.get("max_length")
        if most is not None:
            return int(most)
        return length - total if length is not None and length > total else None

    def to_json(self) -> dict[str, dict[str, Any]]:
        """`{key: {"value": ..., "origin": ...}}`."""
        return {
            key: {"value": list(one.value) if isinstance(one.value, tuple) else one.value, "origin": one.origin}
            for key, one in self.values.items()
        }


def read_generation(config: Mapping[str, Any], snapshot: Snapshot) -> GenerationConfig:
    """`generation_config.json` of the checkpoint whose config.json is `config`.

    Raises:
        ConfigError: CF-TYPE or CF-RANGE, with every key whose value cannot be used, or what `load_json` finds.
        FileError: the file cannot be read.
    """
    path = optional(snapshot, GENERATION_CONFIG)
    values: dict[str, Sourced] = {}
    notes: list[str] = []
    if path is not None:
        said = load_json(path, error=ConfigError, prefix="CF", max_digits=MAX_DIGITS)
        with ConfigReader(said, path) as read:
            found = {key: parse(read, key) for key, parse in READ.items()}
        if found["max_length"] == USUAL_MAX_LENGTH:
            found["max_length"] = None
            notes.append(f"{GENERATION_CONFIG}: max_length={USUAL_MAX_LENGTH} is transformers' own default, and not honoured")
        values = {key: Sourced(_plain(key, value), GENERATION_CONFIG) for key, value in found.items() if value is not None}
        notes += _notes(said, values)
    if "eos_token_id" not in values:
        with ConfigReader(config, snapshot.root / CONFIG) as read:
            ids = READ["eos_token_id"](read, "eos_token_id")
        if ids is not None:
            values = {"eos_token_id": Sourced(_plain("eos_token_id", ids), CONFIG), **values}
    return GenerationConfig(values=values, notes=tuple(notes))


def _plain(key: str, value: Any) -> Any:
    """Ids without -1, which stands for none; those that are no list by nature, as one number."""
    if key not in IDS:
        return value
    ids = tuple(token for token in value if token >= 0)
    return ids[0] if key != "eos_token_id" and len(ids) == 1 else ids


def _notes(said: Mapping[str, Any], values: Mapping[str, Sourced]) -> Iterator[str]:
    least, most = values.get("min_new_tokens"), values.get("max_new_tokens")
    if least is not None and most is not None and least.value > most.value:
        yield f"{GENERATION_CONFIG}: min_new_tokens={least.value} is beyond max_new_tokens={most.value}, which ends a text anyway"
    ignored = [f"{quoted(key)[1:-1]}={quoted(value)}" for key, value in said.items() if _matters(key, value)]
    if ignored:
        more = f" and {len(ignored) - LISTED} more" if len(ignored) > LISTED else ""
        yield f"{GENERATION_CONFIG}: not honoured: {', '.join(ignored[:LISTED])}{more}"


def _matters(key: str, value: Any) -> bool:
    """Whether the value of a key that is not read could change a result. One that nobody knows could."""
    if key in READ or key in WITHOUT_EFFECT or key.startswith(("_", "output_")):
        return False
    return value not in (None, False, "", [], {}) and value != NEUTRAL.get(key)
