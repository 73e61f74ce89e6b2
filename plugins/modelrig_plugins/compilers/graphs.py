"""From a function of tensors to native code that runs: found in the store, or traced, compiled and put there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import getLogger
from threading import RLock
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor

from modelrig.errors import LoadError, ModelrigError
from modelrig.registry.ledger import cause
from modelrig_plugins.compilers.artefacts import Artefact, Store
from modelrig_plugins.compilers.fingerprint import machine, sources
from modelrig_plugins.compilers.tracing import compile_library

#: sizes that a graph is traced with where they may change: any other sizes serve, but hints of how much there is to do are taken
#: from them, and what is in use must be less than what there is room for
USED, ROOM = 510, 640
log = getLogger("modelrig.compiler")


@frozen
class Input:
    """One input of a graph, as an example: `changing` maps the dimensions whose sizes change to the size they are traced with."""

    example: Tensor
    changing: Mapping[int, int] = {}

    def traced(self) -> Tensor:
        """What the graph is traced with: the tensor itself, or an empty one of the sizes to trace with."""
        if not self.changing:
            return self.example
        sizes = [self.changing.get(dim, size) for dim, size in enumerate(self.example.shape)]
        return torch.zeros(sizes, dtype=self.example.dtype, device=self.example.device)

    def described(self) -> str:
        sizes = ["*" if dim in self.changing else str(size) for dim, size in enumerate(self.example.shape)]
        strides = "*" if self.changing else str(self.example.stride())
        return f"{self.example.dtype} {','.join(sizes)} {strides} {self.example.device}"


@frozen
class Graph:
    """Native code. `run` takes the tensors numbered `inputs`, in this order, and may write to them."""

    run: Callable[[list[Tensor]], list[Tensor]]
    inputs: tuple[int, ...]


@define
class Graphs:
    """The graphs of one model.

    Attributes:
        compiled: how many had to be compiled.
        loaded: how many were found compiled.
    """

    compiled: int = 0
    loaded: int = 0
    _store: Store | None = None
    _kept: dict[str, Graph] = field(factory=dict)
    _lock: Any = field(factory=RLock)

    def get(
        self,
        what: str,
        function: Callable[[Sequence[Tensor]], Tensor],
        inputs: Sequence[Input],
        structure: Iterable[str],
        homes: Iterable[str],
        *,
        is_kept: bool = True,
    ) -> Graph:
        """The graph of `function(inputs)`.

        Args:
            what: for the log.
            structure: everything the function does that does not follow from its inputs.
            homes: names of the Python modules it is written in.
            is_kept: whether equal structures stand for equal functions in other processes.

        Raises:
            LoadError: LD-COMPILE, LD-STORE.
        """
        with self._lock:
            key = _key(inputs, structure, homes)
            if key not in self._kept:
                self._kept[key] = self._load(what, key, is_kept) or self._make(what, key, function, inputs)
            return self._kept[key]

    @property
    def store(self) -> Store:
        if self._store is None:
            self._store = Store()
        return self._store

    def _load(self, what: str, key: str, is_kept: bool) -> Graph | None:
        found = self.store.find(key) if is_kept else None
        graph = None if found is None else self._open(found, key)
        if graph is not None:
            self.loaded += 1
            log.info("loaded %s", what)
        return graph

    def _open(self, found: Artefact, key: str) -> Graph | None:
        try:
            return _graph(found)
        except RuntimeError as error:
            log.warning("the compiled code in %s cannot be loaded (%s) and is made again", found.code.parent, cause(error))
            self.store.drop(key)
            return None

    def _make(self, what: str, key: str, function: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Input]) -> Graph:
        started = time.perf_counter()
        examples, changing = [one.traced() for one in inputs], [frozenset(one.changing) for one in inputs]
        try:
            made = self.store.make(key, lambda place: compile_library(function, examples, changing, place), {"what": what})
            graph = _graph(made)
        except (ModelrigError, MemoryError):
            raise
        except Exception as error:
            raise LoadError("LD-COMPILE", f"{what}: {cause(error)}", hint="plan with compiler=None") from error
        self.compiled += 1
        log.info("compiled %s in %.1f s", what, time.perf_counter() - started)
        return graph


def _graph(artefact: Artefact) -> Graph:
    return Graph(torch._C._aoti.AOTIModelContainerRunnerCpu(str(artefact.code), 1).run, artefact.inputs)


def _key(inputs: Sequence[Input], structure: Iterable[str], homes: Iterable[str]) -> str:
    settings = (
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )
    ours = {__name__, "modelrig_plugins.compilers.steps", "modelrig_plugins.compilers.tracing"}
    parts = [machine(), sources({*homes, *ours}), repr(settings), *structure, *(one.described() for one in inputs)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]
