"""Weights that do not stay in memory: each unit of them is brought just before it computes, while the one before it does.

A unit is a block, or a module with parameters of its own. What can be viewed in its mapped file is: its pages are asked for ahead
(`MADV_POPULATE_READ`) and dropped afterwards, so that nothing is copied and a file that the page cache holds is used at the speed
of memory (benchmarks/LOG.md). Everything else, cast weights, files on a network, GPUs, goes through slots: fixed buffers that units
take turns in. A parameter is the same tensor throughout, so kernels may close over it.

The order of units is learned: after each, what came next the last time is fetched.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from modelrig.loading.filling import Filler, Wanted, num_readers
from modelrig.loading.pieces import Piece, pieces
from modelrig.loading.transport import drop_pages, fetch_pages

SLOTS = 2  # one computes, one is filled
ALIGNMENT = 64  # bytes, of each tensor in a slot


@frozen(eq=False)
class Unit:
    """Tensors that are needed at the same time, and the modules that need them.

    Attributes:
        name: that of the module, for errors.
        wanted: the tensors as they are used: their dtype and the device that computes.
        sites: the modules during whose forward they must be there.
        gathered: names of those that are looked up by rows, of which fetching all would be a waste.
        held: those that lie in main memory already (a tier for GPUs), by name.
    """

    name: str
    wanted: tuple[Wanted, ...]
    sites: tuple[nn.Module, ...]
    gathered: frozenset[str] = frozenset()
    held: Mapping[str, Tensor] = field(factory=dict)


@define(eq=False)
class _State:
    """What happens to one unit."""

    unit: Unit
    slot: int
    paged: tuple[Tensor, ...] = ()  # views of mapped files to fetch ahead
    dropped: tuple[Tensor, ...] = ()  # views of mapped files whose pages go after use
    pieces: tuple[tuple[int, Piece], ...] = ()  # file number and what to read into the slot
    copies: tuple[tuple[Tensor, Tensor], ...] = ()  # (in the slot, in main memory)
    hidden: tuple[tuple[dict[str, Any], str, Tensor, Tensor], ...] = ()  # (where it is held, name, itself, a stand-in)
    ready: Future[None] | None = None
    users: int = 0
    used: Any = None  # the GPU's event after the last use

    @property
    def is_slotted(self) -> bool:
        return bool(self.pieces or self.copies)


class Streamer:
    """Brings units to where they compute. `tensors` are the parameters; `close` ends its threads and closes files.

    Raises, from a forward:
        FileError: a file cannot be read any more.
    """

    def __init__(self, units: Sequence[Unit], filler: Filler, device: torch.device) -> None:
        self.filler, self.device = filler, device
        self.tensors: dict[str, Tensor] = {}
        self.slot_bytes = 0
        self._states = [_State(unit, slot) for unit, slot in zip(units, _turns(units), strict=True)]
        self._place()
        self._filled: list[_State | None] = [None] * (1 + max((state.slot for state in self._states), default=0))
        self._next: dict[int, int] = {}
        self._sites: list[_State] = []
        self._last: int | None = None
        self._turn = threading.Condition()
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="modelrig-offload")
        self._readers = ThreadPoolExecutor(num_readers(), thread_name_prefix="modelrig-read")
        self._handles: list[Any] = []

    # ------------------------------------------------------------------------------------------ set up

    def _place(self) -> None:
        """Views where they serve; the rest gets a place in its unit's slot."""
        places: list[tuple[_State, Wanted, int]] = []
        sizes = [0] * (1 + max((state.slot for state in self._states), default=0))
        for state in self._states:
            offset = 0
            paged, dropped = [], []
            for one in state.unit.wanted:
                view = None if one.name in state.unit.held else self.filler.view(one)
                if view is not None:
                    self.tensors[one.name] = view
                    dropped.append(view)
                    if one.name not in state.unit.gathered:
                        paged.append(view)
                    continue
                places.append((state, one, offset))
                count = one.dtype.itemsize
                for size in one.shape:
                    count *= size
                offset += -(-count // ALIGNMENT) * ALIGNMENT
            state.paged, state.dropped = tuple(paged), tuple(dropped)
            sizes[state.slot] = max(sizes[state.slot], offset)
        self.slot_bytes = sum(sizes)
        with torch.inference_mode(False):
            slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes]
        for state, one, offset in places:
            numel = 1
            for size in one.shape:
                numel *= size
            tensor = slots[state.slot][offset : offset + numel * one.dtype.itemsize].view(one.dtype).view(one.shape)
            self.tensors[one.name] = tensor
            if one.name in state.unit.held:
                state.copies += ((tensor, state.unit.held[one.name]),)
                continue
            for part in one.sources:
                entry = self.filler.catalog.entries[part.name]
                state.pieces += tuple((entry.file, piece) for piece in pieces(entry, part, tensor))
        for state in self._states:
            state.pieces = tuple(sorted(state.pieces, key=lambda item: (item[0], item[1].entry.offset)))

    @property
    def slotted(self) -> list[str]:
        """Names of the tensors whose values are only there while their modules are called."""
        return [one.name for state in self._states if state.is_slotted for one in state.unit.wanted]

    def attach(self, holders: Mapping[str, Sequence[tuple[dict[str, Any], str]]] | None = None) -> None:
        """From now on the units' modules get their tensors when they are called.

        `holders` says where tensors in slots are held by name; between calls they are then replaced by empty ones, so that whoever
        uses them otherwise gets an error and not another unit's weights.
        """
        for state in self._states:
            held = [place for one in state.unit.wanted for place in (holders or {}).get(one.name, ())]
            state.hidden = tuple((place, leaf, place[leaf], _stand_in(place[leaf])) for place, leaf in held)
            for place, leaf, _, empty in state.hidden:
                place[leaf] = empty
            for module in state.unit.sites:
                site = len(self._sites)
                self._sites.append(state)
                self._handles.append(module.register_forward_pre_hook(self._before(site), prepend=True))
                self._handles.append(module.register_forward_hook(self._after(site), always_call=True))
        count = len(self._sites)
        self._next = {site: (site + 1) % count for site in range(count)}

    def close(self) -> None:
        """Let go of threads, files and slots; the modules cannot compute any more."""
        for handle in self._handles:
            handle.remove()
        self._fetcher.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)
        self.filler.close()
        self.tensors.clear()
        self._states, self._sites, self._filled = [], [], []

    # ------------------------------------------------------------------------------------------ in a forward

    def _before(self, site: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:  # noqa: ARG001 - the hook's signature
            state = self._sites[site]
            with self._turn:
                while not self._may_take_slot(state):  # another thread computes with what is in it
                    self._turn.wait()
                state.users += 1
                if self._last is not None:
                    self._next[self._last] = site
                self._last = site
                ready = self._ask(state)
            try:
                ready.result()
            except BaseException:
                with self._turn:
                    state.users -= 1
                    state.ready = None
                    self._turn.notify_all()
                raise
            with self._turn:
                for place, leaf, tensor, _ in state.hidden:
                    place[leaf] = tensor
                self._look_ahead(site)

        return hook

    def _after(self, site: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 - the hook's signature
            state = self._sites[site]
            with self._turn:
                state.users -= 1
                if state.users == 0:
                    for place, leaf, _, empty in state.hidden:
                        place[leaf] = empty
                if self.device.type == "cuda":
                    state.used = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    state.used.record()
                if state.users == 0 and not state.is_slotted and len(self._states) > SLOTS:
                    self._let_go(state)
                self._look_ahead(site)
                self._turn.notify_all()

        return hook

    def _look_ahead(self, site: int) -> None:
        """Fetch what will be needed next, unless its slot is still in use; what was fetched and is not next does not stay."""
        following = self._sites[self._next[site]]
        for state in self._states:
            idle = state.ready is not None and state.users == 0 and not state.is_slotted
            if idle and state is not following and len(self._states) > SLOTS:
                self._let_go(state)
        if self._may_take_slot(following):
            self._ask(following)

    def _may_take_slot(self, state: _State) -> bool:
        holder = self._filled[state.slot] if state.is_slotted else None
        return holder is None or holder is state or holder.users == 0

    def _ask(self, state: _State) -> Future[None]:
        """The future of the unit being there. Called with the lock held, for a unit that may take its slot."""
        if state.ready is None:
            busy = None
            if state.is_slotted:
                holder, self._filled[state.slot] = self._filled[state.slot], state
                if holder is not None and holder is not state:
                    busy = holder.used
                    self._let_go(holder)
            state.ready = self._fetcher.submit(self._fetch, state, busy)
        return state.ready

    def _let_go(self, state: _State) -> None:
        state.ready = None
        if state.dropped:
            self._fetcher.submit(self._drop, state)

    # ------------------------------------------------------------------------------------------ in the background

    def _fetch(self, state: _State, busy: Any) -> None:
        if busy is not None:
            busy.synchronize()
        with torch.inference_mode(False), torch.no_grad():
            for target, source in state.copies:
                target.copy_(source, non_blocking=True)
            if state.copies and self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
        if state.pieces:
            waiting = iter(state.pieces)
            lock = threading.Lock()

            def work() -> None:
                while True:
                    with lock:
                        item = next(waiting, None)
                    if item is None:
                        return
                    self.filler.bring(self.filler.file(item[0]), item[1])

            futures = [self._readers.submit(work) for _ in range(min(num_readers(), len(state.pieces)))]
            for future in futures:
                future.result()
        for view in state.paged:
            fetch_pages(view)

    def _drop(self, state: _State) -> None:
        if state.users == 0 and state.ready is None:
            for view in state.dropped:
                drop_pages(view)


def _turns(units: Sequence[Unit]) -> list[int]:
    """The slot of each unit: two in turn, and one of its own for a unit that is in use while others inside it are."""
    inside = [{part for site in unit.sites for part in site.modules()} - set(unit.sites) for unit in units]
    found, turn, own = [], 0, SLOTS
    for unit, parts in zip(units, inside, strict=True):
        if any(site in parts for other in units if other is not unit for site in other.sites):
            found.append(own)
            own += 1
        else:
            found.append(turn)
            turn = (turn + 1) % SLOTS
    return found


def _stand_in(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
