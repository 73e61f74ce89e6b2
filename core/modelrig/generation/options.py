"""The options of `generate`: names, defaults, accepted ranges and help, in one place.

The command line derives its flags from the fields of `GenerateOptions`; `docs/reference` its table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import attrs

from modelrig.errors import GenerateError, nearest, quoted

__all__ = ["DEFAULT_NEW_TOKENS", "GenerateOptions", "Grammar"]

DEFAULT_NEW_TOKENS = 256  # what `max_new_tokens=None` means, or less where the context has less room
LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**63 - 1
LARGEST_BIAS = 1e9  # float32 logits stay finite after it
LONGEST_GRAMMAR = 1 << 20  # characters


class _RefusedError(Exception):
    """A rule does not take the value."""


Rule = Callable[[Any], Any]


def _whole(low: int, high: int = LARGEST_COUNT) -> Rule:
    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
            raise _RefusedError
        return int(value)

    return convert


def _number(low: float, high: float, *, above: bool = False) -> Rule:
    """A finite real number in [low, high], or in (low, high] with `above`."""

    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise _RefusedError
        try:
            number = float(value)
        except OverflowError:
            raise _RefusedError from None
        if not math.isfinite(number) or not low <= number <= high or (above and number == low):
            raise _RefusedError
        return number

    return convert


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _RefusedError
    return value


def _optional(rule: Rule) -> Rule:
    return lambda value: None if value is None else rule(value)


def _listed(value: Any, rule: Rule) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise _RefusedError
    return tuple(rule(item) for item in value)


def _stop(value: Any) -> tuple[str, ...]:
    def text(item: Any) -> str:
        if not isinstance(item, str) or not item:
            raise _RefusedError
        return item

    return (text(value),) if isinstance(value, str) else () if value is None else _listed(value, text)


def _stop_ids(value: Any) -> tuple[int, ...]:
    token = _whole(0)
    return (token(value),) if isinstance(value, Integral) else _listed(value, token)


def _seed(value: Any) -> int | tuple[int, ...]:
    seed = _whole(0, LARGEST_SEED)
    if isinstance(value, Integral):
        return int(seed(value))
    seeds = _listed(value, seed)
    if not seeds:
        raise _RefusedError
    return seeds


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _RefusedError
    token, number = _whole(0), _number(-LARGEST_BIAS, LARGEST_BIAS)
    return {token(key): number(bias) for key, bias in value.items()}


@attrs.frozen
class Grammar:
    """A constraint in words: `text` in `language`, for the component called `name` or the first that serves the language."""

    language: str
    text: str
    name: str | None = None


def _constraint(value: Any) -> Any:
    if callable(value) or isinstance(value, Grammar):
        return value
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _RefusedError
    name = value.get("name")
    languages = [key for key in value if key != "name"]
    if len(languages) != 1 or not (name is None or isinstance(name, str)):
        raise _RefusedError
    return Grammar(languages[0], _grammar(value[languages[0]]), name)


def _grammar(value: Any) -> str:
    """A text as it is; what JSON can say, such as a schema, as JSON."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        raise _RefusedError from None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number or value is None or len(text) > LONGEST_GRAMMAR:
        raise _RefusedError
    return text


def _option(default: Any, rule: Rule, accepts: str, help: str) -> Any:  # noqa: A002 - the word click uses
    return attrs.field(default=default, metadata={"rule": rule, "accepts": accepts, "help": help})


@attrs.frozen(kw_only=True)
class GenerateOptions:
    """How to generate. Values are checked and normalised when the object is made, whichever way.

    Each field's `metadata` has `help` and `accepts` (the accepted range, in words).

    Raises:
        GenerateError: GN-ARGS, with every option that is out of its range.
    """

    max_new_tokens: int | None = _option(
        None,
        _optional(_whole(1)),
        f"a whole number from 1 to {LARGEST_COUNT}",
        f"new tokens at most (default: as the checkpoint says, else {DEFAULT_NEW_TOKENS}; cut to the context)",
    )
    min_new_tokens: int = _option(
        0, _whole(0), f"a whole number from 0 to {LARGEST_COUNT}", "no end-of-text or stop id before this many new tokens"
    )
    temperature: float | None = _option(
        None, _optional(_number(0, 1e6)), "a number from 0 (greedy) to 1e6", "sample with this temperature (default: greedy)"
    )
    top_k: int | None = _option(
        None, _optional(_whole(1)), f"a whole number from 1 to {LARGEST_COUNT}", "sample among the k most likely tokens"
    )
    top_p: float | None = _option(
        None,
        _optional(_number(0, 1, above=True)),
        "a number above 0, at most 1",
        "sample among the most likely tokens that together have this probability",
    )
    min_p: float | None = _option(
        None, _optional(_number(0, 1)), "a number from 0 to 1", "drop tokens less likely than this share of the most likely one"
    )
    repetition_penalty: float | None = _option(
        None,
        _optional(_number(1e-3, 1e3)),
        "a number from 0.001 to 1000 (1 changes nothing)",
        "divide positive and multiply negative logits of tokens in prompt and text",
    )
    presence_penalty: float | None = _option(
        None, _optional(_number(-1e3, 1e3)), "a number from -1000 to 1000", "subtract this from tokens the text already has"
    )
    frequency_penalty: float | None = _option(
        None, _optional(_number(-1e3, 1e3)), "a number from -1000 to 1000", "subtract this for every time the text has the token"
    )
    logit_bias: Mapping[int, float] | None = _option(
        None, _optional(_bias), "a mapping of token ids to numbers from -1e9 to 1e9", "add to the logits of these token ids"
    )
    stop: tuple[str, ...] = _option(
        (), _stop, "a text or a list of texts, none of them empty", "end before the first of these texts"
    )
    stop_ids: tuple[int, ...] | None = _option(
        None,
        _optional(_stop_ids),
        "a token id or a list of them",
        "end at these token ids, besides the model's own end-of-text ids",
    )
    seed: int | tuple[int, ...] | None = _option(
        None,
        _optional(_seed),
        f"a whole number from 0 to {LARGEST_SEED}, or a list of one per prompt",
        "draw the same tokens again (default: fresh entropy)",
    )
    ignore_eos: bool = _option(False, _flag, "true or false", "do not end at the model's end-of-text ids")
    num_return_sequences: int = _option(
        1,
        _whole(1, 4096),
        "a whole number from 1 to 4096",
        "continuations per prompt; copy j of a seeded prompt draws with seed + j",
    )
    pad_to_multiple_of: int | None = _option(
        None,
        _optional(_whole(1, 1 << 20)),
        "a whole number from 1 to 1048576",
        "pad prompts on the left to a multiple of this, where it fits, so that what is compiled for a length serves for others",
    )
    constraint: Callable[[], Any] | Grammar | None = _option(  # noqa: RUF009 - attrs, and the same call as above
        None,
        _optional(_constraint),
        'a language with its text (at most a million characters), such as {"regex": "[0-9]+"} or {"json_schema": {...}}, and '
        'perhaps the "name" of the component to serve it; or a function that makes a modelrig.components.TokenMask',
        "let only text come that this allows",
    )

    def __attrs_post_init__(self) -> None:
        problems = []
        for field in attrs.fields(type(self)):
            value = getattr(self, field.name)
            try:
                # frozen, so this is the one place that may set a normalised value
                object.__setattr__(self, field.name, field.metadata["rule"](value))
            except _RefusedError:
                problems.append(f"{field.name}={quoted(value)}: accepted is {field.metadata['accepts']}")
        if not problems and self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            problems.append(
                f"min_new_tokens={self.min_new_tokens}: accepted is at most max_new_tokens, which is {self.max_new_tokens}"
            )
        if problems:
            locus = problems[0].partition("=")[0] if len(problems) == 1 else None
            raise GenerateError("GN-ARGS", "; ".join(problems), locus=locus)

    @classmethod
    def make(cls, **given: Any) -> GenerateOptions:
        """The options `given` by name.

        Raises:
            GenerateError: GN-UNKNOWN with the nearest name, or GN-ARGS with all values that are out of range.
        """
        known = [field.name for field in attrs.fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown:
            told = "; ".join(f"there is no option {quoted(name)}{nearest(name, known)}" for name in unknown)
            raise GenerateError("GN-UNKNOWN", told, locus=unknown[0], hint=f"options: {', '.join(known)}")
        return cls(**given)

    def limit(self, prompt: int, held: int, capacity: int, longest: int, *, unfed: int, usual: int = DEFAULT_NEW_TOKENS) -> int:
        """New tokens at most; an explicit number that does not fit is an error, the `usual` one is cut to what fits.

        `unfed` new tokens need no room: the last one is chosen but not fed, except to a cache that keeps the answer. `longest` is
        what the config allows, for the hint. Raises `GenerateError` (GN-CONTEXT).
        """
        room = capacity + unfed - held - prompt
        wanted = self.max_new_tokens
        least = max(1, self.min_new_tokens if wanted is None else wanted)
        if room < least:
            asked = "" if least == 1 and wanted is None else f" and {least} new tokens"
            before = f" after {held} in the cache" if held else ""
            raise GenerateError(
                "GN-CONTEXT",
                f"{prompt} prompt tokens{asked}{before} do not fit into a context of {capacity}",
                locus=None if room < 1 else "min_new_tokens" if wanted is None else "max_new_tokens",
                hint=f"plan a longer context, or make a larger cache (the config allows {longest})",
            )
        return min(max(usual, least), room) if wanted is None else wanted

    @property
    def is_greedy(self) -> bool:
        """No temperature, or a temperature of 0."""
        return not self.temperature

    def check_ids(self, vocab_size: int) -> None:
        """Refuse ids of `stop_ids` and `logit_bias` that a model with `vocab_size` logits does not have (GN-ARGS)."""
        for name, ids in (("stop_ids", self.stop_ids or ()), ("logit_bias", self.logit_bias or {})):
            beyond = [token for token in ids if token >= vocab_size]
            if beyond:
                raise GenerateError("GN-ARGS", f"{name} has id {beyond[0]}: accepted is 0 to {vocab_size - 1}", locus=name)
