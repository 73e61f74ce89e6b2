"""What a graph of a callable depends on: its tensors, which become the graph's inputs, and everything else, which is its structure.

    lifted = lift(block)
    lifted.tensors                      weights, each once
    lifted.rebuild(others)              the same block around other tensors of these shapes
    lifted.signature                    equal for blocks of which one graph serves both

Modules, kernels that close over their weights, bound methods and plain objects are taken apart down to tensors and constants. What
cannot be taken apart is kept as it is; then no other structure equals this one, and nothing compiled of it is kept.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from itertools import count
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from modelrig.components import AttentionSpec

Build = Callable[[Sequence[Any], dict[int, Any]], Any]  # (tensors, what was built already) -> the object around them

CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
#: what every module has that says nothing of what it computes; hooks are not part of a graph
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules", "training"}
_numbers = count()


@frozen(eq=False)
class Lifted:
    """Attributes:
    tensors: each once, in the order in which they were met.
    signature: hexadecimal digest of the structure, tensors as dtype, shape, strides and device.
    opaque: where something lies that could not be taken apart; empty as a rule.
    homes: names of the Python modules whose classes and functions are part of it.
    specs: the attention specs in it.
    """

    tensors: tuple[Tensor, ...]
    signature: str
    opaque: tuple[str, ...]
    homes: frozenset[str]
    specs: tuple[AttentionSpec, ...]
    build: Build

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """A copy around `tensors`; parts without tensors are shared with the original."""
        return self.build(tensors, {})


def lift(root: Any, name: str = "block") -> Lifted:
    """Take `root` apart."""
    walk = _Walk()
    build = walk.visit(root, name)
    digest = hashlib.sha256("\n".join(walk.words).encode()).hexdigest()
    return Lifted(tuple(walk.tensors), digest, tuple(walk.opaque), frozenset(walk.homes), tuple(walk.specs), build)


class _Walk:
    def __init__(self) -> None:
        self.words: list[str] = []
        self.tensors: list[Tensor] = []
        self.opaque: list[str] = []
        self.homes: set[str] = set()
        self.specs: dict[AttentionSpec, None] = {}
        self.seen: dict[int, tuple[int, Build | None, Any]] = {}  # id → (number, how it is built once that is known, it)
        self.places = count()
        self.references = 0  # to tensors, and to what was met before and may hold some

    def visit(self, it: Any, path: str) -> Build:
        if isinstance(it, CONSTANTS):
            self.words.append(f"{type(it).__name__} {it!r}")
            return _same(it)
        if id(it) in self.seen:
            number, build, _ = self.seen[id(it)]
            if build is None:  # it holds itself
                if not isinstance(it, types.FunctionType) and _fields(it) is None:
                    return self._keep(it, path)
                build = lambda _, built: built[id(it)]  # noqa: E731
            self.words.append(f"again {number}")
            self.references += 1
            return build
        number, before = next(self.places), self.references
        self.seen[id(it)] = (number, None, it)
        build = self._part(it, path)
        self.seen[id(it)] = (number, build, it)
        if self.references == before:  # of what holds no tensor only the value counts, wherever it is met
            del self.seen[id(it)]
        return build

    def _part(self, it: Any, path: str) -> Build:
        if isinstance(it, Tensor):
            return self._tensor(it, path)
        if isinstance(it, dict):
            return self._mapping(it, path)
        if isinstance(it, list | tuple):
            return self._sequence(it, path)
        if isinstance(it, set | frozenset):
            return self._set(it, path)
        if isinstance(it, types.FunctionType):
            return self._function(it, path)
        if isinstance(it, types.MethodType):
            return self._method(it, path)
        if isinstance(it, functools.partial):
            return self._partial(it, path)
        if isinstance(it, type | types.ModuleType | types.BuiltinFunctionType) or _is_of_torch(it):
            return self._named(it)
        return self._object(it, path)

    def _tensor(self, it: Tensor, path: str) -> Build:
        if type(it) not in (Tensor, nn.Parameter) or it.layout != torch.strided:
            return self._keep(it, path)
        place = len(self.tensors)
        self.tensors.append(it)
        self.references += 1
        self.words.append(f"tensor {place} {it.dtype} {tuple(it.shape)} {it.stride()} {it.device}")
        return lambda tensors, _: tensors[place]

    def _mapping(self, it: dict[Any, Any], path: str) -> Build:
        if type(it).__module__ not in ("builtins", "collections"):
            return self._keep(it, path)
        self.words.append(f"dict {len(it)}")
        parts = []
        for key, value in it.items():
            if not isinstance(key, CONSTANTS):
                return self._keep(it, path)
            self.words.append(f"key {key!r}")
            parts.append((key, self.visit(value, f"{path}.{key!s}")))
        return self._made(it, lambda tensors, built: {key: part(tensors, built) for key, part in parts})

    def _sequence(self, it: list[Any] | tuple[Any, ...], path: str) -> Build:
        is_named = hasattr(it, "_fields")
        if type(it) not in (list, tuple) and not is_named:
            return self._keep(it, path)
        self._class(type(it))
        self.words.append(f"length {len(it)}")
        parts = [self.visit(value, f"{path}[{i}]") for i, value in enumerate(it)]
        make: Any = (lambda values: type(it)(*values)) if is_named else type(it)
        return self._made(it, lambda tensors, built: make([part(tensors, built) for part in parts]))

    def _set(self, it: Any, path: str) -> Build:
        if not all(isinstance(value, CONSTANTS) for value in it):
            return self._keep(it, path)
        self.words.append(f"set {sorted(map(repr, it))}")
        return _same(it)

    def _function(self, it: types.FunctionType, path: str) -> Build:
        self.homes.add(it.__module__)
        self.words.append(f"function {it.__module__} {it.__qualname__} {_code(it.__code__)}")
        held = self.visit([_contents(cell) for cell in it.__closure__ or ()], f"{path}()")
        defaults = self.visit((it.__defaults__, it.__kwdefaults__), f"{path}()")

        def build(tensors: Sequence[Any], built: dict[int, Any]) -> Any:
            cells = tuple(types.CellType() for _ in it.__closure__ or ())
            made = built[id(it)] = types.FunctionType(it.__code__, it.__globals__, it.__name__, None, cells)
            for cell, value in zip(cells, held(tensors, built), strict=True):
                cell.cell_contents = value
            made.__defaults__, made.__kwdefaults__ = defaults(tensors, built)
            made.__module__, made.__qualname__ = it.__module__, it.__qualname__
            return made

        return self._made(it, build) if it.__closure__ else _same(it)

    def _method(self, it: types.MethodType, path: str) -> Build:
        self.words.append(f"method {it.__func__.__qualname__}")
        self.homes.add(it.__func__.__module__)
        owner = self.visit(it.__self__, path)
        return lambda tensors, built: types.MethodType(it.__func__, owner(tensors, built))

    def _partial(self, it: functools.partial[Any], path: str) -> Build:
        self.words.append("partial")
        whole = self.visit((it.func, it.args, it.keywords), path)

        def build(tensors: Sequence[Any], built: dict[int, Any]) -> Any:
            function, args, keywords = whole(tensors, built)
            return functools.partial(function, *args, **keywords)

        return build

    def _named(self, it: Any) -> Build:
        """Something of which there is one in every process."""
        if isinstance(it, type):
            self._class(it)
        else:
            self.words.append(f"named {type(it).__name__} {getattr(it, '__module__', '')} {getattr(it, '__qualname__', it)}")
        return _same(it)

    def _object(self, it: Any, path: str) -> Build:
        fields = _fields(it)
        if fields is None:
            return self._keep(it, path)
        self._class(type(it))
        if isinstance(it, AttentionSpec):
            self.specs[it] = None
        parts = []
        before = self.references
        for name, value in fields:
            self.words.append(f"field {name}")
            parts.append((name, self.visit(value, f"{path}.{name}")))
        if self.references == before and not isinstance(it, nn.Module):
            return _same(it)
        others = {name: value for name, value in vars(it).items() if name in _OF_EVERY_MODULE} if isinstance(it, nn.Module) else {}

        def build(tensors: Sequence[Any], built: dict[int, Any]) -> Any:
            made = built[id(it)] = object.__new__(type(it))
            for name, value in others.items():
                object.__setattr__(made, name, value)
            for name, part in parts:
                object.__setattr__(made, name, part(tensors, built))
            return made

        return self._made(it, build)

    def _made(self, it: Any, build: Build) -> Build:
        """`build`, once for every copy of the whole, so that what was shared is shared again."""

        def once(tensors: Sequence[Any], built: dict[int, Any]) -> Any:
            if id(it) not in built:
                built[id(it)] = build(tensors, built)
            return built[id(it)]

        return once

    def _class(self, kind: type) -> None:
        self.words.append(f"class {kind.__module__} {kind.__qualname__}")
        self.homes.update(one.__module__ for one in kind.__mro__)

    def _keep(self, it: Any, path: str) -> Build:
        self.opaque.append(f"{path}: {type(it).__qualname__}")
        self.words.append(f"opaque {next(_numbers)} {id(self)}")
        return _same(it)


def _same(it: Any) -> Build:
    return lambda _tensors, _built: it


def _is_of_torch(it: Any) -> bool:
    """Operators and the like: objects of torch that are no modules and hold no data of a model."""
    home = type(it).__module__
    return home.startswith(("torch._ops", "torch.jit")) or isinstance(it, types.MethodDescriptorType | types.WrapperDescriptorType)


def _fields(it: Any) -> list[tuple[str, Any]] | None:
    """Names and values of an object's attributes, or of those it says a graph of it depends on (`traced`); None if there may be
    more than Python shows."""
    kind = type(it)
    if "traced" in vars(kind):
        return [(name, getattr(it, name)) for name in kind.traced]
    if any(one is not object and _is_native(one) for one in kind.__mro__):
        return None
    hidden = ("__weakref__", "__dict__")
    slots = [name for one in kind.__mro__ for name in _names(vars(one).get("__slots__", ())) if name not in hidden]
    own = getattr(it, "__dict__", None)
    found = [(name, getattr(it, name)) for name in slots if hasattr(it, name)]
    skipped = _OF_EVERY_MODULE if isinstance(it, nn.Module) else ()
    return found + [(name, value) for name, value in (own or {}).items() if name not in skipped]


def _is_native(kind: type) -> bool:
    """Whether it is written in C, so that its instances hold what Python does not show."""
    is_made_by_python = kind.__flags__ & 1 << 9
    return not is_made_by_python or type(kind).__name__ == "pybind11_type"


def _names(slots: Any) -> Iterator[str]:
    yield from (slots,) if isinstance(slots, str) else slots


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _code(code: types.CodeType) -> str:
    """What a function does, for those whose source may not be in a file."""
    inner = [_code(one) if isinstance(one, types.CodeType) else repr(one) for one in code.co_consts]
    return hashlib.sha256(code.co_code + "\n".join([*inner, *code.co_names]).encode()).hexdigest()
