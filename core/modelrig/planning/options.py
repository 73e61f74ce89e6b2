"""Options of a component: what the user wrote, as the attrs class `Options` of the component's planner.

Nothing is coerced: `"64"` is no whole number and `1` is no truth value. All problems are reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from modelrig.errors import nearest, quoted


class OptionsError(ValueError):
    """The options do not fit; the text has every problem, and `is_unknown` says whether the first is a name nobody knows."""

    def __init__(self, problems: list[str], is_unknown: bool) -> None:
        super().__init__("; ".join(problems))
        self.is_unknown = is_unknown


def structure(planner: Any, given: Mapping[str, Any]) -> Any:
    """`given` as the planner's `Options`; None for a planner without options.

    Raises:
        OptionsError: unknown names, values of the wrong type, and what the class itself refuses.
    """
    kind = getattr(planner, "Options", None)
    if kind is None:
        if given:
            raise OptionsError([f"{quoted(name)} is unknown: the component has no options" for name in given], True)
        return None
    known = [field.alias for field in attrs.fields(kind) if field.init]
    unknown = [
        f"{quoted(name)} is unknown; known are {', '.join(known)}{nearest(name, known)}" for name in given if name not in known
    ]
    if unknown:
        raise OptionsError(unknown, True)
    if not given:
        try:
            return kind()
        except Exception as error:  # a field without a default, or a default its own validator refuses
            raise OptionsError([f"cannot do without options ({error}); known are {', '.join(known)}"], False) from error
    from cattrs import transform_error

    try:
        return _converter().structure(dict(given), kind)
    except Exception as error:
        problems = transform_error(error, path="", format_exception=_sentence)
        raise OptionsError([_path_first(problem) for problem in problems], False) from error


def _sentence(error: BaseException, kind: type | None) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    text = error.args[0] if error.args else ""  # attrs' validators put the field and the value behind their sentence
    return text if isinstance(text, str) and text else f"not a {getattr(kind, '__name__', kind)}"


def _path_first(problem: str) -> str:
    """`"text @ .path"`, as cattrs writes it, as `"path: text"`."""
    text, _, path = problem.rpartition(" @ ")
    path = path.removeprefix(".")
    return f"{path}: {text}" if path else text


def _converter() -> Any:
    from cattrs import Converter

    converter = Converter(forbid_extra_keys=True, use_alias=True)
    for kind in (bool, int, float, str):
        converter.register_structure_hook(kind, _strict(kind))
    return converter


def _strict(kind: type) -> Any:
    def check(value: Any, _: Any) -> Any:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        raise ValueError(f"{quoted(value)}; {_NAMES[kind]} is needed")

    return check


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
