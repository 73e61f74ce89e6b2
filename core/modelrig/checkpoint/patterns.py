"""Names of tensors as rules write them: `{i}` stands for one name between dots, `{*rest}` for one or more."""

from __future__ import annotations

import re
from collections.abc import Mapping

from modelrig.errors import quoted

_FIELD = re.compile(r"\{(\*?)([a-z_]+)\}")


class MisfitError(Exception):
    """A rule cannot be applied to the tensor `name`."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{quoted(name)}: {text}")
        self.name = name


def match(pattern: str, name: str) -> dict[str, str] | None:
    """What the fields of `pattern` stand for in `name`; None if it does not match."""
    found = _compiled(pattern).fullmatch(name)
    return None if found is None else found.groupdict()


_COMPILED: dict[str, re.Pattern[str]] = {}


def _compiled(pattern: str) -> re.Pattern[str]:
    if pattern not in _COMPILED:
        text, end = "", 0
        for found in _FIELD.finditer(pattern):
            part = r"[^.]+(?:\.[^.]+)*" if found[1] else r"[^.]+"
            seen = f"(?P<{found[2]}>" in text
            text += re.escape(pattern[end : found.start()]) + (f"(?P={found[2]})" if seen else f"(?P<{found[2]}>{part})")
            end = found.end()
        _COMPILED[pattern] = re.compile(text + re.escape(pattern[end:]))
    return _COMPILED[pattern]


def fill(pattern: str, fields: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        if found[2] not in fields:
            raise MisfitError(pattern, f"no source has the field {found[0]}")
        return fields[found[2]]

    return _FIELD.sub(value, pattern)
