"""Typed reading of a JSON object that reports everything wrong with it in one error.

    with ConfigReader(load_json(path, error=ConfigError, prefix="CF"), path) as read:
        heads = read.integer("num_attention_heads", 1, 4096)
        theta = read.number("rope_theta", 0, 1e12, default=10_000.0, exclusive=True)
        read.require(width % heads == 0, "CF-REL", "hidden_size", f"{width} is not a multiple of num_attention_heads ({heads})")

Nothing is coerced: `"64"`, `64.0` and `true` are no integers. After a problem a getter returns a stand-in that is in range, so
that the rest can still be checked; leaving the `with` block (or `finish()`) raises if there was any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar, overload

from attrs import frozen

from modelrig.errors import ConfigError, nearest, quoted

T = TypeVar("T")
V = TypeVar("V")


class _Required:
    """The absence of a default."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = _Required()


@frozen
class Problem:
    """One thing wrong with a config: its code, the key (dotted for nested objects), and what was seen and what is accepted."""

    code: str
    key: str
    text: str


class ConfigReader:
    """Reads `values`, the JSON object in the file `path`; `prefix` is put before its keys in messages.

    In every getter `aliases` are further spellings of the key, tried in order when it is absent, and `null` counts as absent
    where there is a default.
    """

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.values, self.path, self.prefix = values, path, prefix
        self.problems: list[Problem] = []
        self._children: dict[str, ConfigReader] = {}

    # ------------------------------------------------------------------------------------------- values

    @overload
    def integer(self, key: str, low: int, high: int, *, aliases: Sequence[str] = ()) -> int: ...
    @overload
    def integer(self, key: str, low: int, high: int, default: T, aliases: Sequence[str] = ()) -> int | T: ...
    def integer(self, key: str, low: int, high: int, default: Any = REQUIRED, aliases: Sequence[str] = ()) -> Any:
        """A whole number from `low` to `high`, both included."""
        return self._get(key, default, aliases, _integer(low, high), low)

    @overload
    def number(self, key: str, low: float, high: float, *, exclusive: bool = False, aliases: Sequence[str] = ()) -> float: ...
    @overload
    def number(
        self, key: str, low: float, high: float, default: T, exclusive: bool = False, aliases: Sequence[str] = ()
    ) -> float | T: ...
    def number(
        self, key: str, low: float, high: float, default: Any = REQUIRED, exclusive: bool = False, aliases: Sequence[str] = ()
    ) -> Any:
        """A finite number from `low` to `high`, both included; with `exclusive`, `low` itself is refused."""
        return self._get(key, default, aliases, _number(low, high, exclusive), float(high if exclusive else low))

    @overload
    def boolean(self, key: str, *, aliases: Sequence[str] = ()) -> bool: ...
    @overload
    def boolean(self, key: str, default: T, aliases: Sequence[str] = ()) -> bool | T: ...
    def boolean(self, key: str, default: Any = REQUIRED, aliases: Sequence[str] = ()) -> Any:
        """`true` or `false`."""
        return self._get(key, default, aliases, _instance(bool, "true or false"), False)

    @overload
    def string(self, key: str, *, aliases: Sequence[str] = ()) -> str: ...
    @overload
    def string(self, key: str, default: T, aliases: Sequence[str] = ()) -> str | T: ...
    def string(self, key: str, default: Any = REQUIRED, aliases: Sequence[str] = ()) -> Any:
        """Any text."""
        return self._get(key, default, aliases, _instance(str, "a string"), "")

    @overload
    def choice(self, key: str, allowed: Collection[str], *, aliases: Sequence[str] = ()) -> str: ...
    @overload
    def choice(self, key: str, allowed: Collection[str], default: T, aliases: Sequence[str] = ()) -> str | T: ...
    def choice(self, key: str, allowed: Collection[str], default: Any = REQUIRED, aliases: Sequence[str] = ()) -> Any:
        """One of the strings `allowed`, a closed list."""
        return self._get(key, default, aliases, _choice(allowed), next(iter(allowed)))

    # ------------------------------------------------------------------------------------------- lists

    @overload
    def integers(self, key: str, low: int, high: int, *, single: bool = False, aliases: Sequence[str] = ()) -> tuple[int, ...]: ...
    @overload
    def integers(
        self, key: str, low: int, high: int, default: T, single: bool = False, aliases: Sequence[str] = ()
    ) -> tuple[int, ...] | T: ...
    def integers(
        self, key: str, low: int, high: int, default: Any = REQUIRED, single: bool = False, aliases: Sequence[str] = ()
    ) -> Any:
        """A list of whole numbers; with `single`, one number alone is a list of one (as `eos_token_id` is written)."""
        return self._get(key, default, aliases, _list(_integer(low, high), int if single else None), ())

    @overload
    def numbers(self, key: str, low: float, high: float, *, aliases: Sequence[str] = ()) -> tuple[float, ...]: ...
    @overload
    def numbers(self, key: str, low: float, high: float, default: T, aliases: Sequence[str] = ()) -> tuple[float, ...] | T: ...
    def numbers(self, key: str, low: float, high: float, default: Any = REQUIRED, aliases: Sequence[str] = ()) -> Any:
        """A list of finite numbers."""
        return self._get(key, default, aliases, _list(_number(low, high, False)), ())

    @overload
    def strings(self, key: str, *, single: bool = False, aliases: Sequence[str] = ()) -> tuple[str, ...]: ...
    @overload
    def strings(self, key: str, default: T, single: bool = False, aliases: Sequence[str] = ()) -> tuple[str, ...] | T: ...
    def strings(self, key: str, default: Any = REQUIRED, single: bool = False, aliases: Sequence[str] = ()) -> Any:
        """A list of texts; with `single`, one text alone is a list of one."""
        return self._get(key, default, aliases, _list(_instance(str, "a string"), str if single else None), ())

    @overload
    def choices(self, key: str, allowed: Collection[str], *, aliases: Sequence[str] = ()) -> tuple[str, ...]: ...
    @overload
    def choices(self, key: str, allowed: Collection[str], default: T, aliases: Sequence[str] = ()) -> tuple[str, ...] | T: ...
    def choices(self, key: str, allowed: Collection[str], default: Any = REQUIRED, aliases: Sequence[str] = ()) -> Any:
        """A list of strings out of `allowed`, such as `layer_types`."""
        return self._get(key, default, aliases, _list(_choice(allowed)), ())

    # ------------------------------------------------------------------------------------------- structure

    def __contains__(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def child(self, key: str) -> ConfigReader | None:
        """A reader of the nested object `key`, or None when it is absent or null. Its problems are this reader's problems."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.require(False, "CF-TYPE", key, f"{quoted(value)}; an object is needed")  # once, however often it is asked for
            return None
        if key not in self._children:
            reader = ConfigReader(value, self.path, f"{self.prefix}{key}.")
            reader.problems = self.problems
            self._children[key] = reader
        return self._children[key]

    def has_problem(self, *keys: str) -> bool:
        """Whether one of these keys was already found wrong: relations between stand-ins mean nothing."""
        wrong = {problem.key for problem in self.problems}
        return any(self.prefix + key in wrong for key in keys)

    def problem(self, code: str, key: str, text: str) -> None:
        """Note that `key` is wrong; `text` says what was seen and what is accepted."""
        self.problems.append(Problem(code, self.prefix + key, text))

    def require(self, condition: bool, code: str, key: str, text: str, *, uses: Sequence[str] = ()) -> None:
        """Note a problem with `key` unless `condition` holds. Silent when `key` or a key it `uses` is already wrong."""
        if not condition and not self.has_problem(key, *uses):
            self.problem(code, key, text)

    def finish(self) -> None:
        """Raise one `ConfigError` that lists every problem, if there is any. Its code and locus are those of the first one."""
        if not self.problems:
            return
        problems = sorted(self.problems, key=lambda problem: problem.code != "CF-MISSING")  # stable: missing keys first
        first = problems[0]
        if len(problems) == 1:
            raise ConfigError(first.code, first.text, path=self.path, locus=first.key)
        lines = "".join(f"\n  - {quoted(problem.key)[1:-1]}: {problem.text} [{problem.code}]" for problem in problems)
        raise ConfigError(first.code, f"{len(problems)} problems:{lines}", path=self.path, locus=first.key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # An ordinary exception after a problem may come from a stand-in; the problem is what the user can mend.
        if kind is None or issubclass(kind, Exception):
            self.finish()

    def _get(self, key: str, default: Any, aliases: Sequence[str], check: Callable[[Any], Any], stand_in: Any) -> Any:
        found = next((name for name in (key, *aliases) if self.values.get(name) is not None), None)
        if found is None:
            if default is not REQUIRED:
                return default
            null = next((name for name in (key, *aliases) if name in self.values), None)
            if null is None:
                self.problem("CF-MISSING", key, "required key is missing")
                return stand_in
            found = null
        try:
            return check(self.values[found])
        except _Unacceptable as problem:
            self.problem(problem.code, found, problem.text)
            return stand_in if default is REQUIRED else default


class _Unacceptable(Exception):  # noqa: N818 - never leaves this module
    def __init__(self, code: str, text: str) -> None:
        self.code, self.text = code, text


def _instance(kind: type[V], needed: str) -> Callable[[Any], V]:
    def check(value: Any) -> V:
        if not isinstance(value, kind):
            raise _Unacceptable("CF-TYPE", f"{quoted(value)}; {needed} is needed")
        return value

    return check


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _Unacceptable("CF-TYPE", f"{quoted(value)}; a whole number is needed")
        if not low <= value <= high:
            raise _Unacceptable("CF-RANGE", f"{quoted(value)}; {low} to {high} is accepted")
        return value

    return check


def _number(low: float, high: float, exclusive: bool) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _Unacceptable("CF-TYPE", f"{quoted(value)}; a number is needed")
        if not math.isfinite(value) or not low <= value <= high or (exclusive and value == low):
            accepted = f"more than {low:g} up to {high:g}" if exclusive else f"{low:g} to {high:g}"
            raise _Unacceptable("CF-RANGE", f"{quoted(value)}; {accepted} is accepted")
        return float(value)

    return check


def _choice(allowed: Collection[str]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise _Unacceptable("CF-TYPE", f"{quoted(value)}; one of {', '.join(allowed)} is needed")
        if value not in allowed:
            raise _Unacceptable("CF-ENUM", f"{quoted(value)} is not one of {', '.join(allowed)}{nearest(value, allowed)}")
        return value

    return check


def _list(check_item: Callable[[Any], V], single: type | None = None) -> Callable[[Any], tuple[V, ...]]:
    def check(value: Any) -> tuple[V, ...]:
        items = [value] if single is not None and isinstance(value, single) else value
        if not isinstance(items, list):
            raise _Unacceptable("CF-TYPE", f"{quoted(value)}; a list is needed")
        checked = []
        for position, item in enumerate(items):
            try:
                checked.append(check_item(item))
            except _Unacceptable as problem:
                where = f"item {position}: " if items is value else ""
                raise _Unacceptable(problem.code, where + problem.text) from None
        return tuple(checked)

    return check
