"""The filters and methods a chat template may use, each with the check that comes before it. What is not listed is not offered."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import filters as jinja
from jinja2.runtime import Undefined
from jinja2.utils import pass_context
from markupsafe import escape

from modelrig.generation.template_budget import BYTES_PER_PIECE, Budget, BudgetError

WIDEST = 999
MOST_GROUPS = 1_000
DEEPEST_PRECISION = 100
_PRINTF = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")

#: (budget, the value or self, arguments, keyword arguments) → the value and arguments to go on with
Check = Callable[[Budget, Any, tuple[Any, ...], dict[str, Any]], tuple[Any, tuple[Any, ...]]]


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _free(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:  # noqa: ARG001
    return value, args


def _lazy(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:  # noqa: ARG001
    return (iter(budget.each(value)) if isinstance(value, Iterator) else value), args


def _items(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:  # noqa: ARG001
    return budget.items(value), args


def _text(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:  # noqa: ARG001
    budget.size(budget.weigh(value))
    return value, args


def _escape(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    budget.size(5 * budget.weigh(value))
    return _text(budget, value, args, kwargs)


def _pieces(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    budget.charge(BYTES_PER_PIECE * budget.weigh(value) // 2)
    return _text(budget, value, args, kwargs)


def _at_least(value: Any, default: int = 0) -> int:
    return value if isinstance(value, int) else default


def _width(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    budget.size(max(_at_least(_argument(args, kwargs, 0, "width", 80)), budget.weigh(value)))
    return value, args


def _groups(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    for given in (*args[:1], *kwargs.values()):
        if _at_least(given) > MOST_GROUPS:
            raise BudgetError(f"batch and slice make at most {MOST_GROUPS:,} groups")
    return _items(budget, value, args, kwargs)


def _replace(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    text = value if isinstance(value, str) else str(_text(budget, value, args, kwargs)[0])
    old, new = str(_argument(args, kwargs, 0, "old", "")), str(_argument(args, kwargs, 1, "new", ""))
    most = _at_least(_argument(args, kwargs, 2, "count", None), -1)
    times = text.count(old) if most < 0 else min(text.count(old), most)
    budget.size(len(text) + times * max(0, len(new) - len(old)))
    return value, args


def _joined(budget: Budget, separator: str, values: Any) -> Any:
    values = budget.items(values)
    if isinstance(values, list | tuple | dict | str):
        budget.size(budget.weigh(values) + len(separator) * len(values))
    return values


def _join(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    return _joined(budget, str(_argument(args, kwargs, 0, "d", "")), value), args


def _join_method(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:  # noqa: ARG001
    return value, (_joined(budget, value, args[0]), *args[1:]) if args else args


def _indent(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    width = _argument(args, kwargs, 0, "width", 4)
    columns = len(width) if isinstance(width, str) else _at_least(width)
    budget.size(budget.weigh(value) + columns * (len(str(value).splitlines()) + 1))
    return _pieces(budget, value, args, kwargs)


def _round(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:  # noqa: ARG001
    if abs(_at_least(_argument(args, kwargs, 0, "precision", 0))) > DEEPEST_PRECISION:
        raise BudgetError(f"round takes at most {DEEPEST_PRECISION} digits")
    return value, args


def _strip(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    chars = _argument(args, kwargs, 0, "chars", None)
    if isinstance(chars, str) and isinstance(value, str):
        budget.comparisons(len(value) * len(chars))
    return _text(budget, value, args, kwargs)


def _from_the_right(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """Python searches forwards in linear time, but not backwards."""
    if isinstance(wanted := _argument(args, kwargs, 0, "sep", None), str):
        budget.comparisons(len(value) * len(wanted))
    return value, args


def _split(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    separator, most = _argument(args, kwargs, 0, "sep", None), _at_least(_argument(args, kwargs, 1, "maxsplit", -1), -1)
    pieces = value.count(separator) if isinstance(separator, str) and separator else len(value) // 2
    budget.charge(BYTES_PER_PIECE * (1 + (min(pieces, most) if most >= 0 else pieces)))
    return _from_the_right(budget, value, args, kwargs)


def _expandtabs(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    budget.size(len(value) + value.count("\t") * _at_least(_argument(args, kwargs, 0, "tabsize", 8)))
    return value, args


def printf(budget: Budget, template: str, values: Any) -> None:
    """Check `template % values`."""
    specs = _PRINTF.findall(template)
    numbers = [number for spec in specs for number in spec if number]
    if any(number == "*" or len(number) > len(str(WIDEST)) for number in numbers):
        raise BudgetError(f"a format is at most {WIDEST} characters wide")
    # A mapping's values may be named many times, those of a tuple come once
    times = len(specs) if isinstance(values, dict) else 1
    budget.size(len(template) + times * budget.weigh(values) + sum(int(number) for number in numbers))


def _printf(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    budget.size(budget.weigh(value))
    printf(budget, str(value), kwargs or args)
    return value, args


def _to_json(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: no HTML escapes. Encoded piece by piece, so that it can stop."""
    columns = len(indent) if isinstance(indent, str) else indent
    if columns is not None and _at_least(columns) > 64:
        raise BudgetError("tojson indents by at most 64 characters")
    encoder = json.JSONEncoder(ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators, sort_keys=bool(sort_keys))
    budget.weigh(value)
    written, parts = 0, []
    for part in encoder.iterencode(value):
        written += len(part)
        budget.size(written)
        parts.append(part)
    return "".join(parts)


def _plain_escape(value: Any) -> str:
    return str(escape(value))


FILTERS: dict[str, tuple[Callable[..., Any], Check]] = {
    **{
        name: (jinja.FILTERS[name], check)
        for check, names in (
            (_free, "abs attr count d default first float int last length"),
            (_lazy, "items map reject rejectattr select selectattr"),
            (_items, "dictsort groupby list max min reverse sort unique"),
            (_text, "capitalize lower string truncate upper"),
        )
        for name in names.split()
    },
    "batch": (jinja.FILTERS["batch"], _groups),
    "center": (jinja.FILTERS["center"], _width),
    "e": (_plain_escape, _escape),
    "escape": (_plain_escape, _escape),
    "format": (jinja.FILTERS["format"], _printf),
    "indent": (jinja.FILTERS["indent"], _indent),
    "join": (jinja.FILTERS["join"], _join),
    "replace": (jinja.FILTERS["replace"], _replace),
    "round": (jinja.FILTERS["round"], _round),
    "safe": (jinja.FILTERS["string"], _text),  # nothing is escaped, so nothing needs to be marked
    "slice": (jinja.FILTERS["slice"], _groups),
    "title": (jinja.FILTERS["title"], _pieces),
    "trim": (jinja.FILTERS["trim"], _strip),
}

METHODS: dict[type, dict[str, Check]] = {
    str: {
        **dict.fromkeys(
            (
                "capitalize",
                "casefold",
                "count",
                "endswith",
                "find",
                "index",
                "isalnum",
                "isalpha",
                "isascii",
                "isdecimal",
                "isdigit",
                "isidentifier",
                "islower",
                "isnumeric",
                "isprintable",
                "isspace",
                "istitle",
                "isupper",
                "lower",
                "partition",
                "removeprefix",
                "removesuffix",
                "startswith",
                "swapcase",
                "title",
                "upper",
            ),
            _free,
        ),
        **dict.fromkeys(("rfind", "rindex", "rpartition"), _from_the_right),
        **dict.fromkeys(("strip", "lstrip", "rstrip"), _strip),
        **dict.fromkeys(("split", "rsplit"), _split),
        **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _width),
        "splitlines": _pieces,
        "expandtabs": _expandtabs,
        "join": _join_method,
        "replace": _replace,
    },
    dict: dict.fromkeys(("copy", "get", "items", "keys", "values"), _free),
    list: dict.fromkeys(("copy", "count", "index"), _free),
    tuple: dict.fromkeys(("count", "index"), _free),
}


def bounded_filters(budget: Budget, add: Callable[[Any, Any], Any]) -> dict[str, Callable[..., Any]]:
    """The filters on offer, within `budget`. `add` is the template's `+`."""
    offered = {name: _bounded(budget, function, check) for name, (function, check) in FILTERS.items()}

    def to_json(value: Any, *args: Any, **kwargs: Any) -> Any:
        return budget.made(_to_json(budget, value, *args, **kwargs))

    @pass_context
    def total(context: Any, values: Any, attribute: Any = None, start: Any = 0) -> Any:
        if attribute is not None:
            values = offered["map"](context, values, attribute=attribute)
        for value in budget.each(values):
            start = add(start, value)
        return start

    return {**offered, "tojson": to_json, "sum": total}


def _bounded(budget: Budget, function: Callable[..., Any], check: Check) -> Callable[..., Any]:
    passed = getattr(function, "jinja_pass_arg", None)  # some take the environment or the context before the value
    first = 0 if passed is None else 1

    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget.step()
        value, rest = args[first], args[first + 1 :]
        if not isinstance(value, Undefined):
            budget.arguments(rest, kwargs)
            value, rest = check(budget, value, rest, kwargs)
        result = function(*args[:first], value, *rest, **kwargs)
        return result if isinstance(result, Undefined) else budget.made(result)

    if passed is not None:
        bounded.jinja_pass_arg = passed  # type: ignore[attr-defined]
    return bounded
