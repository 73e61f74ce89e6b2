"""JSON of a checkpoint, read strictly.

What Python's `json` lets pass is refused here: duplicate keys (where the last would silently win), NaN and Infinity, integers
of more than 19 digits, nesting that would exhaust the stack, lone surrogates, and files larger than expected, in bytes or in
the lists and objects they would become.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from attrs import frozen

from modelrig.checkpoint.files import open_regular, read_at
from modelrig.checkpoint.paths import is_pending
from modelrig.errors import CODES, CheckpointError, FileError, quoted

MAX_BYTES = 16 << 20
MAX_DEPTH = 64
MAX_DIGITS = 19
MAX_CONTAINERS = 200_000  # lists and objects: "[]," is 3 bytes in the file and 64 in memory

_NO_BRACKETS_OR_QUOTES = bytes(set(range(256)) - set(b'[]{}"'))
_BRACES_AS_BRACKETS = bytes.maketrans(b"{}", b"[]")
_DIGITS_AS_ZERO = bytes(ord("0") if byte in b"0123456789" else byte for byte in range(256))
_PIECE = 1 << 20
_LARGE_EXPONENT = re.compile(rb"[eE]\+?[0-9]{3}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class DuplicateKeyError(ValueError):
    """An object names a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"duplicate key {quoted(key)}")
        self.key = key


class NestingError(ValueError):
    """Lists and objects are nested more deeply than allowed."""


class TooManyError(ValueError):
    """There are more lists and objects than allowed."""


class NumberError(ValueError):
    """A number that is none, or that no number of ours can hold. `key` says where, as in `rope_scaling.factor` or `ids[3]`."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


def is_deeper(data: bytes, limit: int) -> bool:
    """Whether lists and objects are nested more than `limit` levels deep, without parsing and in linear time.

    Exact for JSON. Of anything else, False is certain up to the first syntax error, which is as far as a parser gets.
    """
    return _is_deeper(_brackets_of(data), limit)


def _brackets_of(data: bytes) -> bytes:
    """`data` without everything but the brackets that are not part of a text, braces written as brackets."""
    data = data.replace(b"\\\\", b"").replace(b'\\"', b"")  # an escaped quote ends no text; the backslash before it may be escaped
    marks = data.translate(_BRACES_AS_BRACKETS, _NO_BRACKETS_OR_QUOTES).replace(b'""', b"")  # two quotes leave the rest in or out
    return _outside_texts(marks)


def _is_deeper(brackets: bytes, limit: int) -> bool:
    for _ in range(limit):
        shorter = brackets.replace(b"[]", b"")  # takes away exactly the innermost level
        if len(shorter) == len(brackets):
            break
        brackets = shorter
    opened = len(brackets) - len(brackets.lstrip(b"["))
    if opened < len(brackets):  # a pair is left after `limit` levels were taken away, unless a stray "]" comes first
        return opened > 0
    return opened > limit


def _outside_texts(marks: bytes) -> bytes:
    """The brackets that an even number of quotes precedes. In pieces: a list of millions of parts would need gigabytes."""
    outside, is_inside = [], 0
    for begin in range(0, len(marks), _PIECE):
        parts = marks[begin : begin + _PIECE].split(b'"')
        outside.append(b"".join(parts[is_inside::2]))
        is_inside ^= (len(parts) - 1) & 1
    return b"".join(outside)


def parse(data: bytes, *, max_depth: int = MAX_DEPTH, max_digits: int = MAX_DIGITS, max_containers: int = MAX_CONTAINERS) -> Any:
    """`data` as Python objects.

    Raises:
        UnicodeError: not UTF-8, or half of a surrogate pair.
        DuplicateKeyError, NestingError, TooManyError, NumberError: as their names say.
        ValueError: anything else; a `json.JSONDecodeError` where there is a position.
    """
    text = data.decode("utf-8")
    brackets = _brackets_of(data)
    if _is_deeper(brackets, max_depth):
        raise NestingError(f"nested more than {max_depth} levels deep")
    if len(brackets) > 2 * max_containers:
        raise TooManyError(f"made of {len(brackets) // 2:,} lists and objects; at most {max_containers:,} are accepted")
    numbers = _Numbers(max_digits)
    has_long_digits = b"0" * (max_digits + 1) in data.translate(_DIGITS_AS_ZERO)
    value = json.loads(
        text,
        object_pairs_hook=_object,
        parse_constant=numbers.constant,
        parse_int=numbers.integer if has_long_digits else None,
        parse_float=numbers.fraction if has_long_digits or _LARGE_EXPONENT.search(data) else None,
    )
    if numbers.refused:
        raise NumberError(_key_of(numbers.refused[0], value), numbers.refused[0].text)
    if _SURROGATE.search(data):
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises on a lone half
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key)
            seen.add(key)
    return values


@frozen(eq=False)
class _Refused:
    """Stands where a number is that cannot be accepted, until all is parsed and its key can be told."""

    text: str


class _Numbers:
    """Turns the text of numbers into numbers, and notes those that cannot be."""

    def __init__(self, max_digits: int) -> None:
        self.max_digits = max_digits
        self.refused: list[_Refused] = []

    def constant(self, name: str) -> Any:
        return self._refuse(f"{name} is not a number JSON knows")

    def integer(self, digits: str) -> Any:
        count = len(digits.lstrip("-"))
        if count > self.max_digits:
            return self._refuse(f"an integer of {count} digits; at most {self.max_digits} are accepted")
        return int(digits)

    def fraction(self, text: str) -> Any:
        value = float(text)
        return value if math.isfinite(value) else self._refuse(f"{quoted(text)[1:-1]} is too large for a number")

    def _refuse(self, text: str) -> _Refused:
        self.refused.append(_Refused(text))
        return self.refused[-1]


def _key_of(wanted: _Refused, value: Any) -> str:
    waiting = [("", value)]
    while waiting:
        key, value = waiting.pop()
        if value is wanted:
            break
        if isinstance(value, dict):
            waiting += [(f"{key}.{name}" if key else name, item) for name, item in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{key}[{position}]", item) for position, item in enumerate(value)]
    return key


def load_json(
    path: Path, *, error: type[CheckpointError], prefix: str, max_bytes: int = MAX_BYTES, max_digits: int = MAX_DIGITS
) -> dict[str, Any]:
    """The JSON object in the file `path`, by `load_json_value`."""
    value = load_json_value(path, error=error, prefix=prefix, max_bytes=max_bytes, max_digits=max_digits)
    if not isinstance(value, dict):
        raise error(f"{prefix}-JSON", f"a JSON object is needed, this is {quoted(value)}", path=path)
    return value


def load_json_value(
    path: Path, *, error: type[CheckpointError], prefix: str, max_bytes: int = MAX_BYTES, max_digits: int = MAX_DIGITS
) -> Any:
    """What is in the JSON file `path`.

    Args:
        error: the class to raise.
        prefix: family of the codes: `CF`, `IX` or `TK`; `<prefix>-DUPKEY` and `-LIMIT` are used where they exist.
        max_digits: how long an integer may be; tokenizer_config.json writes 1e30 as one.

    Raises:
        error: the content is not acceptable JSON; `<prefix>-MISSING` for a `CF` or `TK` file that is not there.
        FileError: not a regular readable file.
    """

    def refuse(kind: str, reason: str, locus: str | None = None) -> CheckpointError:
        code = f"{prefix}-{kind}"
        return error(code if code in CODES else f"{prefix}-JSON", reason, path=path, locus=locus)

    if prefix != "IX" and not path.exists() and (is_pending(path) or not path.is_symlink()):
        raise refuse("MISSING", "the file does not exist")
    with open_regular(path) as (descriptor, status):
        if status.st_size > max_bytes:
            raise refuse("LIMIT", f"{status.st_size:,} bytes; at most {max_bytes:,} are accepted")
        data = read_at(descriptor, status.st_size + 1, 0, path)
        if len(data) != status.st_size:
            raise FileError("IO-CHANGED", f"had {status.st_size:,} bytes and has another number now", path=path)
    try:
        value = parse(data, max_digits=max_digits)
    except DuplicateKeyError as problem:
        raise refuse("DUPKEY", str(problem), problem.key) from problem
    except (NestingError, TooManyError) as problem:
        raise refuse("LIMIT", str(problem)) from problem
    except NumberError as problem:
        raise refuse("JSON", f"not JSON: {problem}", problem.key or None) from problem
    except MemoryError as problem:
        raise refuse("LIMIT", f"there is not enough memory to read its {len(data):,} bytes") from problem
    except UnicodeDecodeError as problem:
        raise refuse("JSON", f"not UTF-8 at byte {problem.start}") from problem
    except UnicodeError as problem:
        raise refuse("JSON", "an escape that is half of a surrogate pair") from problem
    except json.JSONDecodeError as problem:
        raise refuse("JSON", f"not JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}") from problem
    except ValueError as problem:
        raise refuse("JSON", f"not JSON: {problem}") from problem
    return value
