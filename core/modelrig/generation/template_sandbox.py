"""jinja2's sandbox, closed further: a template can only use what is listed, and pays for it from a budget.

The template's syntax tree is rewritten before it is compiled, so that loops, comparisons, literals, slices, `~` and output pass
through the budget; calls, operators, attributes and filters pass through methods of the environment.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from datetime import datetime
from types import CodeType
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace, pass_context
from jinja2.visitor import NodeTransformer

from modelrig.generation.template_budget import LARGEST_INTEGER_BITS, Budget, BudgetError
from modelrig.generation.template_filters import METHODS, WIDEST, bounded_filters, printf

LONGEST_RANGE = 100_000
LONGEST_DATE_FORMAT = 256

#: public attributes of what a template meets besides plain values
ATTRIBUTES: dict[type, frozenset[str]] = {
    LoopContext: frozenset(
        (
            "index",
            "index0",
            "revindex",
            "revindex0",
            "first",
            "last",
            "length",
            "depth",
            "depth0",
            "previtem",
            "nextitem",
            "cycle",
            "changed",
        )
    ),
    Macro: frozenset({"name", "arguments"}),
    Cycler: frozenset({"next", "reset", "current"}),
}
_LONG_NUMBER = re.compile(rf"\d{{{len(str(WIDEST)) + 1},}}")


class RaisedError(Exception):
    """The template called `raise_exception`."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering.

    Args:
        budget: what the template may cost.
        now: what `strftime_now` formats; the time of the call if None.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, budget: Budget, now: datetime | None = None) -> None:
        # Without the optimizer, and with a `finalize` that wants the context, nothing is computed while compiling
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, GenerationTag],
            finalize=pass_context(lambda _, value: self._text(value)),
            optimized=False,
            cache_size=0,
        )
        self.budget = budget
        self.globals = {
            "range": _range,
            "dict": self._dict,
            "namespace": TemplateNamespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": lambda layout: _format_date(now or datetime.now(), layout),
        }
        self._callable = tuple(self.globals.values())
        self.filters = bounded_filters(budget, lambda left, right: self._operate("+", left, right))
        self.filters |= {EACH: budget.each, STEP: self._step, MADE: budget.made, CONCATENATE: self._concatenate}

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        rewritten = Metering().visit(source)
        rewritten.set_environment(self)
        return super()._generate(rewritten, *args, **kwargs)

    # -------------------------------------------------------------------------------------------- attributes and calls

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: ARG002 - jinja's signature
        if attr.startswith("_"):
            return False
        if isinstance(obj, Namespace):
            return True
        for kind, names in (*METHODS.items(), *ATTRIBUTES.items()):
            if isinstance(obj, kind) and attr in names:
                return True
        return isinstance(obj, tuple) and attr in ("grouper", "list")  # what `groupby` yields

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        # jinja hands out something undefined here, which prints as nothing
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__} is not offered")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        owner = getattr(value, "__self__", None)
        if isinstance(owner, str) and isinstance(value, types.BuiltinMethodType) and value.__name__ in ("format", "format_map"):
            return _Format(self, owner, takes_map=value.__name__ == "format_map")
        return None

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.budget.step()
        self.budget.arguments(args, {name: value for name, value in kwargs.items() if not name.startswith("_")})
        if isinstance(obj, types.BuiltinMethodType):
            check = next((checks.get(obj.__name__) for kind, checks in METHODS.items() if isinstance(obj.__self__, kind)), None)
            if check is None:
                raise SecurityError(f"calling {obj.__name__!r} is not offered")
            _, args = check(self.budget, obj.__self__, args, kwargs)
        elif not self._is_callable(obj):
            raise SecurityError(f"calling something of type {type(obj).__name__!r} is not offered")
        return self.budget.made(super().call(context, obj, *args, **kwargs))

    def _is_callable(self, obj: Any) -> bool:
        if isinstance(obj, types.MethodType) and obj != self._dict:
            return isinstance(obj.__self__, LoopContext | Cycler)
        return isinstance(obj, Macro | Joiner | Undefined | _Format) or any(obj == offered for offered in self._callable)

    # -------------------------------------------------------------------------------------------- operators and output

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ARG002
        return self._operate(operator, left, right)

    def _operate(self, operator: str, left: Any, right: Any) -> Any:
        budget = self.budget
        if isinstance(left, int) and isinstance(right, int):
            budget.integer(max(left.bit_length(), right.bit_length()))
            if operator == "**" and right > 0:
                budget.integer(left.bit_length() * min(right, LARGEST_INTEGER_BITS + 1))
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    budget.size((len(value) if isinstance(value, str) else budget.weigh(value)) * max(times, 0))
        elif operator == "%" and isinstance(left, str):
            printf(budget, left, right)
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            budget.size(len(left) + len(right))
        elif operator == "+" and isinstance(left, list | tuple) and isinstance(right, list | tuple):
            weight = budget.weigh(left) + budget.weigh(right)
            budget.size(weight)
            added = self.binop_table["+"](left, right)
            budget.step()
            budget.note(added, weight)
            return added
        return budget.made(self.binop_table[operator](left, right))

    def _text(self, value: Any) -> str:
        """What is written for `value`."""
        self.budget.size(self.budget.weigh(value) if not isinstance(value, str) else len(value))
        text = value if isinstance(value, str) else str(value)
        self.budget.made(text)
        return text

    def _concatenate(self, values: list[Any]) -> str:
        texts = [self._text(value) for value in values]
        self.budget.size(sum(map(len, texts)))
        return "".join(texts)

    def _step(self, value: Any) -> Any:
        self.budget.step()
        return value

    def _dict(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*(self.budget.items(arg) for arg in args), **kwargs)


class TemplateNamespace(Namespace):
    """jinja's, without names that begin with an underscore: those are how Python's internals are reached."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        given = dict(*args, **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # its values may hold itself


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace takes no attribute {name!r}")


def _range(*args: Any) -> range:
    values = range(*args)
    try:
        length = len(values)
    except OverflowError:
        length = LONGEST_RANGE + 1
    if length > LONGEST_RANGE:
        raise BudgetError(f"a range has at most {LONGEST_RANGE:,} numbers")
    return values


def _raise_exception(message: Any) -> None:
    raise RaisedError(message if isinstance(message, str) else type(message).__name__)


def _format_date(when: datetime, layout: Any) -> str:
    if not isinstance(layout, str) or len(layout) > LONGEST_DATE_FORMAT:
        raise BudgetError(f"a date format is a text of at most {LONGEST_DATE_FORMAT} characters")
    return when.strftime(layout)


class _Format(SandboxedFormatter):
    """`str.format` of one text, with widths within bounds."""

    def __init__(self, environment: Sandbox, text: str, takes_map: bool) -> None:
        super().__init__(environment)
        self._budget, self._template, self._takes_map = environment.budget, text, takes_map
        self._written = len(text)

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return self.vformat(self._template, (), args[0]) if self._takes_map else self.vformat(self._template, args, kwargs)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._budget.size(self._budget.weigh(value))
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        if _LONG_NUMBER.search(format_spec):
            raise BudgetError(f"a format is at most {WIDEST} characters wide")
        self._budget.step()
        self._written += self._budget.weigh(value) + WIDEST * bool(format_spec)
        self._budget.size(self._written)
        return str(super().format_field(value, format_spec))


# ------------------------------------------------------------------------------------------------ the syntax tree

# Names no template can write as a filter
EACH, STEP, MADE, CONCATENATE = "#each", "#step", "#made", "#concatenate"


class Metering(NodeTransformer):
    """Sends what a template does through the budget, and refuses what reaches for other templates."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        if node.recursive:
            raise SecurityError(f"line {node.lineno}: recursive loops are not offered")
        self.generic_visit(node)
        node.iter = _through(EACH, node.iter)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        for operand in node.ops:
            operand.expr = _through(STEP, operand.expr)
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.args:
            node.node = _through(STEP, node.node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(CONCATENATE, nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(MADE, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(MADE, node) if node.ctx == "load" else node

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(MADE, node)

    visit_Dict = visit_List  # noqa: N815

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        return nodes.Const(node.data, lineno=node.lineno)  # a constant is counted whenever it is written

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        raise SecurityError(f"line {node.lineno}: {type(node).__name__.lower()} is not offered")

    visit_Extends = visit_Include = visit_Import = visit_FromImport = visit_Block = _refuse  # noqa: N815
    visit_ScopedEvalContextModifier = visit_EvalContextModifier = _refuse  # noqa: N815


def _through(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja's way

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def takes_parts(tree: nodes.Template) -> bool:
    """Whether a template loops over the parts of a message's content; the others write the content as one text."""
    return any(_is_content(loop.iter) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node | None) -> bool:
    if isinstance(node, nodes.Filter):
        return _is_content(node.node)
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return (isinstance(node, nodes.Getattr) and node.attr == "content") or (isinstance(node, nodes.Name) and "content" in node.name)


def compiled(source: str) -> tuple[CodeType, bool]:
    """(the code of a template, whether it `takes_parts`). Raises `TemplateSyntaxError`, `SecurityError` or `RecursionError`."""
    environment = Sandbox(Budget())
    try:
        tree = environment.parse(source)
        looks_into_parts = takes_parts(tree)
        return environment.compile(tree), looks_into_parts
    except ValueError as problem:  # an integer of too many digits
        raise TemplateSyntaxError(str(problem), 1) from problem
