"""While a plugin registers, an import of torch is refused.

torch takes seconds to import, and a listing must not pay that for a plugin nobody asked for. The guard is a finder at the head of
`sys.meta_path`; as a torch that is loaded already is served from `sys.modules` without asking finders, it also stands before
`builtins.__import__` and `importlib.import_module`. So whether a plugin is accepted does not depend on who imported torch before.

It acts in the registering thread only. `importlib.util.find_spec("torch")` keeps answering: asking whether torch is there is fine.
What it raises derives from `BaseException`, so that `try: import torch / except ImportError: torch = None` cannot leave a plugin
half alive; if a plugin swallows even that, `tripped` still tells.
"""

from __future__ import annotations

import builtins
import importlib
import sys
import threading
from collections.abc import Collection, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

REFUSED = "torch"
_one_at_a_time = threading.RLock()  # guards nest like parentheses, or taking one down would leave another's doors behind


class TorchRefused(BaseException):
    """torch was about to be imported while a plugin registered."""


class TorchGuard(MetaPathFinder, Loader):
    """`with TorchGuard() as guard:` refuses torch to this thread; `guard.tripped` says whether it was asked for."""

    tripped = False

    def __enter__(self) -> TorchGuard:
        _one_at_a_time.acquire()
        self._thread: int | None = threading.get_ident()
        self._before = import_, import_module = builtins.__import__, importlib.import_module

        def guarded_import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:  # noqa: A002
            if level == 0:
                self._refuse(name)
            return import_(name, globals, locals, fromlist, level)

        def guarded_import_module(name: str, package: str | None = None) -> ModuleType:
            self._refuse(name)  # a relative name begins with a dot
            return import_module(name, package)

        builtins.__import__, importlib.import_module = self._doors = guarded_import, guarded_import_module
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread = None  # whoever kept one of the doors passes freely from now on
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if builtins.__import__ is self._doors[0]:  # else a plugin has put its own before ours
            builtins.__import__ = self._before[0]
        if importlib.import_module is self._doors[1]:
            importlib.import_module = self._before[1]
        _one_at_a_time.release()

    def _refuse(self, name: str) -> None:
        if isinstance(name, str) and name.partition(".")[0] == REFUSED and threading.get_ident() == self._thread:
            self.tripped = True
            raise TorchRefused(f"import of {name} while a plugin registers")

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REFUSED or threading.get_ident() != self._thread:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None:
            spec.loader = self  # a real answer, but importing it comes back to us
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        self._refuse(spec.name)
        raise ImportError(f"the spec of {spec.name} was found while a plugin registered; look it up again")


def forget(package: str, before: Collection[str]) -> None:
    """Drop the modules of `package` imported since `before`, so that nothing half-made is found by a later import."""
    for name in [name for name in sys.modules if name not in before and name.partition(".")[0] == package]:
        module = sys.modules.pop(name)
        parent, _, child = name.rpartition(".")
        if getattr(sys.modules.get(parent), child, None) is module:
            delattr(sys.modules[parent], child)
