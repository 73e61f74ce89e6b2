"""Weights that do not stay in memory: each unit of them is brought just before it computes, while the one before it does.

A unit is a block, or a module with parameters of its own. What can be viewed in its mapped file is: its pages are asked for ahead
(`MADV_POPULATE_READ`), so that nothing is copied and a file that the page cache holds is used at the speed of memory
(benchmarks/LOG.md). Whether they stay or are dropped afterwards is decided in `paging`. Units that memory has no room to cache are
read around the page cache into slots instead: fixed buffers that units take turns in. Everything else, cast weights, files on a
network, GPUs, goes through slots too. A parameter is the same tensor throughout, so kernels may close over it.

The order of units is learned: after each, what came next the last time is fetched.

What holds, with the lock `_turn` held:

* a slot is written by one thread only, in the order in which it was asked for, and never while its unit has users;
* a unit has users from before its module's hooks run until the call has ended, however it ends (Ctrl-C as well);
* every unit that has users was asked for (`ready`), and its slot is filled with it (`_filled`);
* a slot that is filled anew counts as written to, so autograd refuses to go back through what lay in it before.
"""

from __future__ import annotations

import mmap
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from modelrig.checkpoint.in_place import is_whole
from modelrig.errors import LoadError
from modelrig.loading.filling import READERS_ON_NETWORK, Filler, Wanted, num_readers
from modelrig.loading.paging import SLOTS, Paging
from modelrig.loading.pieces import Piece, pieces
from modelrig.loading.ring import PinnedRing
from modelrig.loading.runs import Laid, lay_out_runs
from modelrig.loading.transport import allocate_pages, drop_pages, fetch_pages

ALIGNMENT = 64  # bytes, of each tensor in a slot
DIRECT_BYTES = 16 << 20  # read around the page cache at a time: smaller ones leave the disk idle in between
DIRECT_READERS = 2


@frozen(eq=False)
class Unit:
    """Tensors that are needed at the same time, and the modules that need them.

    Attributes:
        name: that of the module, for errors.
        wanted: the tensors as they are used: their dtype and the device that computes.
        sites: the modules during whose forward they must be there.
        gathered: names of those that are looked up by rows, of which fetching all would be a waste.
        held: those that lie in main memory already (a tier for GPUs), by name.
        paging: what becomes of what can be viewed in its mapped file.
    """

    name: str
    wanted: tuple[Wanted, ...]
    sites: tuple[nn.Module, ...]
    gathered: frozenset[str] = frozenset()
    held: Mapping[str, Tensor] = field(factory=dict)
    paging: Paging = Paging.DROPPED


@frozen(eq=False)
class Run:
    """Whole pages of file number `file` from `offset` on, and where they go."""

    file: int
    offset: int
    into: Tensor


@define(eq=False)
class _State:
    """What happens to one unit."""

    unit: Unit
    slot: int
    paged: tuple[Tensor, ...] = ()  # views of mapped files to fetch ahead
    dropped: tuple[Tensor, ...] = ()  # views of mapped files whose pages go after use
    pieces: tuple[tuple[int, Piece], ...] = ()  # file number and what to read into the slot
    runs: tuple[Run, ...] = ()  # what goes there byte by byte, around the page cache
    copies: tuple[tuple[Tensor, Tensor], ...] = ()  # (in the slot, in main memory)
    hidden: tuple[tuple[dict[str, Any], str, Tensor, Tensor], ...] = ()  # (where it is held, name, itself, a stand-in)
    ready: Future[None] | None = None
    users: dict[object, int] = field(factory=dict)  # calls that compute with it → their thread
    arrived: torch.cuda.Event | None = None  # of the GPU, after which the slot is filled
    used: torch.cuda.Event | None = None  # of the GPU, after the last use

    @property
    def is_slotted(self) -> bool:
        return bool(self.pieces or self.copies or self.runs)

    @property
    def is_dropped(self) -> bool:
        """Whether it is fetched for each use, though in no slot."""
        return not self.is_slotted and self.unit.paging is not Paging.KEPT


class Streamer:
    """Brings units to where they compute. `tensors` are the parameters; `close` ends its threads and closes files.

    Raises, from a forward:
        FileError: a file cannot be read any more. (One that shrinks while it is mapped is SIGBUS, as for any mapped file.)
        LoadError: LD-STREAM for a unit whose turn can never come.
    """

    def __init__(self, units: Sequence[Unit], filler: Filler, device: torch.device) -> None:
        self.filler, self.device = filler, device
        self.tensors: dict[str, Tensor] = {}
        self.slot_bytes = 0
        viewed = [self._viewed(unit) for unit in units]
        turns = _turns(units, [len(views) < len(unit.wanted) for unit, (views, _) in zip(units, viewed, strict=True)])
        self._states = [_State(unit, slot) for unit, slot in zip(units, turns, strict=True)]
        # Weights travel to a GPU on a stream of their own, while it computes on others.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ring: PinnedRing | None = None
        self._place(viewed)
        self._filled: list[_State | None] = [None] * (1 + max((state.slot for state in self._states), default=0))
        self._next: dict[int, int] = {}
        self._sites: list[_State] = []
        self._last: int | None = None
        self._fetched: dict[int, _State] = {}  # those whose pages were asked for and not yet let go, by id
        # Units that stay compute without a wait: the disk is not to be idle meanwhile.
        slotted = sum(state.is_slotted for state in self._states)
        self._passed_over = len(self._states) - slotted if slotted else 0
        self._is_closed = False
        self._turn = threading.Condition()
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="modelrig-offload")
        self._readers = ThreadPoolExecutor(READERS_ON_NETWORK, thread_name_prefix="modelrig-read")

    # ------------------------------------------------------------------------------------------ set up

    def _viewed(self, unit: Unit) -> tuple[dict[str, Tensor], list[Wanted]]:
        """What is used as it lies in its mapped file, and what could be but is read around the page cache."""
        views, around = {}, []
        for one in unit.wanted:
            view = None if one.name in unit.held else self.filler.view(one)
            if view is None:
                continue
            if unit.paging is not Paging.AROUND or not view.numel() or one.name in unit.gathered:
                views[one.name] = view
            elif is_whole(one.sources[0]):
                around.append(one)
        return views, around

    def _place(self, viewed: Sequence[tuple[dict[str, Tensor], list[Wanted]]]) -> None:
        """Each tensor that is no view gets a place in its unit's slot."""
        places: list[tuple[_State, Wanted, int]] = []
        runs: list[tuple[_State, list[Laid]]] = []
        sizes = [0] * (1 + max((state.slot for state in self._states), default=0))
        for state, (views, around) in zip(self._states, viewed, strict=True):
            self.tensors.update(views)
            offset = 0
            for one in state.unit.wanted:
                if one.name in views or one in around:
                    continue
                places.append((state, one, offset))
                offset += -(-one.nbytes // ALIGNMENT) * ALIGNMENT
            state.paged = _merged([view for name, view in views.items() if name not in state.unit.gathered])
            state.dropped = () if state.unit.paging is Paging.KEPT else _merged([*views.values()])
            laid, offset = lay_out_runs([(one, self.filler.catalog.entries[one.sources[0].name]) for one in around], offset)
            runs.append((state, laid))
            sizes[state.slot] = max(sizes[state.slot], offset)
        self.slot_bytes = sum(sizes)
        with torch.inference_mode(False):
            self._slots = slots = [self._slot_of(size) for size in sizes]
        for state, laid in runs:
            for one, entry, run, start, length in laid:
                slot = slots[state.slot]
                if run is not None:
                    steps = range(0, length, DIRECT_BYTES)
                    state.runs += tuple(
                        Run(entry.file, run + step, slot[start + step : start + min(step + DIRECT_BYTES, length)]) for step in steps
                    )
                    continue
                data = slot[start : start + entry.nbytes]
                self.tensors[one.name] = self.filler.reader.decode(data, entry)
        for state, one, offset in places:
            tensor = slots[state.slot][offset : offset + one.nbytes].view(one.dtype).view(one.shape)
            self.tensors[one.name] = tensor
            if one.name in state.unit.held:
                state.copies += ((tensor, state.unit.held[one.name]),)
                continue
            for part in one.sources:
                entry = self.filler.catalog.entries[part.name]
                state.pieces += tuple((entry.file, piece) for piece in pieces(entry, part, tensor))
        for state in self._states:
            state.pieces = tuple(sorted(state.pieces, key=lambda item: (item[0], item[1].entry.offset)))

    def _slot_of(self, size: int) -> Tensor:
        """Memory that begins at a page."""
        if self.device.type != "cpu" or not size:
            return torch.empty(size, dtype=torch.uint8, device=self.device)
        return allocate_pages(size)

    @property
    def slotted(self) -> list[str]:
        """Names of the tensors whose values are only there while their modules are called."""
        return [one.name for state in self._states if state.is_slotted for one in state.unit.wanted]

    def attach(self, holders: Mapping[str, Sequence[tuple[dict[str, Any], str]]] | None = None) -> None:
        """From now on the units' modules get their tensors when they are called.

        `holders` says where tensors in slots are held by name; between calls they are then replaced by empty ones, so that whoever
        uses them otherwise gets an error and not another unit's weights.
        """
        empty: dict[int, Tensor] = {}  # one for what several modules share
        for state in self._states:
            held = [place for one in state.unit.wanted for place in (holders or {}).get(one.name, ())]
            for place, leaf in held:
                if id(place[leaf]) not in empty:
                    empty[id(place[leaf])] = _stand_in(place[leaf])
            state.hidden = tuple((place, leaf, place[leaf], empty[id(place[leaf])]) for place, leaf in held)
            for place, leaf, _, stand_in in state.hidden:
                place[leaf] = stand_in
            for module in state.unit.sites:
                # Not with hooks: those after a forward are not called when it is interrupted.
                module.__dict__["_call_impl"] = _Call(self, len(self._sites), module, module._call_impl)
                self._sites.append(state)
        count = len(self._sites)
        self._next = {site: (site + 1) % count for site in range(count)}

    def close(self) -> None:
        """Let go of threads, files and slots; the modules cannot compute any more."""
        with self._turn:
            self._is_closed = True
            self._turn.notify_all()
        for state in self._states:
            for module in state.unit.sites:
                module.__dict__.pop("_call_impl", None)
        self._fetcher.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)
        if self._stream is not None:
            self._stream.synchronize()
        self.filler.close()
        self.tensors.clear()
        self._states, self._sites, self._filled, self._slots = [], [], [], []
        self._fetched.clear()

    # ------------------------------------------------------------------------------------------ in a forward

    def enter(self, site: int, call: object) -> None:
        """`call` begins to compute with the unit of this site: wait until it is there, and ask for the next one."""
        with self._turn:
            self._require_open()
            state = self._sites[site]
            while not self._may_take_slot(state):
                self._require_progress(state)
                self._turn.wait()
                self._require_open()
            state.users[call] = threading.get_ident()
            if self._last is not None:
                self._next[self._last] = site
            self._last = site
            if state.ready is not None and state.ready.done() and state.ready.exception() is not None:
                self._forget(state)  # it failed when nobody needed it yet
            ready = self._ask(state)
        try:
            ready.result()
        except CancelledError:
            self._require_open()
            raise
        except BaseException:
            with self._turn:
                if ready.done() and state.ready is ready:  # the next call tries again
                    self._forget(state)
            raise
        if state.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(state.arrived)
        with self._turn:
            self._require_open()
            for place, leaf, tensor, _ in state.hidden:
                place[leaf] = tensor
            self._look_ahead(site)

    def leave(self, site: int, call: object) -> None:
        """`call` has ended, or did not get so far as to begin."""
        with self._turn:
            if self._is_closed or self._sites[site].users.pop(call, None) is None:
                return
            state = self._sites[site]
            if not state.users:
                for place, leaf, _, empty in state.hidden:
                    place[leaf] = empty
            if self.device.type == "cuda":
                state.used = torch.cuda.current_stream(self.device).record_event()
            if not state.users and state.is_dropped and len(self._states) > SLOTS:
                self._let_go(state)
            self._look_ahead(site)
            self._turn.notify_all()

    def _require_open(self) -> None:
        if self._is_closed:
            raise LoadError("LD-STREAM", "the model was closed while it computed: its weights are gone")

    def _require_progress(self, state: _State) -> None:
        """Raise `LoadError` (LD-STREAM) if what `state` waits for ends only after this thread has gone on."""
        holder = self._filled[state.slot]
        if holder is not None and threading.get_ident() in holder.users.values():
            reason = f"was called by {holder.unit.name}, of which it is no part, and both take turns in the same memory"
            raise LoadError("LD-STREAM", reason, locus=state.unit.name, hint="keep one of them in memory: device_map")

    def _look_ahead(self, site: int) -> None:
        """Fetch what will be needed next, unless its slot is still in use; what was fetched and is not next does not stay."""
        following = self._sites[self._next[site]]
        if len(self._states) > SLOTS:
            for state in [*self._fetched.values()]:
                if state is not following and not state.users:
                    self._let_go(state)
        for _ in range(1 + self._passed_over):
            if self._may_take_slot(following):
                self._ask(following)
            if following.is_slotted or following.is_dropped:
                break
            site = self._next[site]
            following = self._sites[self._next[site]]

    def _may_take_slot(self, state: _State) -> bool:
        holder = self._filled[state.slot] if state.is_slotted else None
        return holder is None or holder is state or not holder.users

    def _ask(self, state: _State) -> Future[None]:
        """The future of the unit being there. Called with the lock held, for a unit that may take its slot."""
        if state.ready is None:
            busy = None
            if state.is_slotted:
                holder, self._filled[state.slot] = self._filled[state.slot], state
                if holder is not None and holder is not state:
                    busy = holder.used
                    self._let_go(holder)
            elif state.is_dropped:
                self._fetched[id(state)] = state
            state.ready = self._fetcher.submit(self._fetch, state, busy)
        return state.ready

    def _forget(self, state: _State) -> None:
        state.ready = None
        self._fetched.pop(id(state), None)

    def _let_go(self, state: _State) -> None:
        self._forget(state)
        if state.dropped:
            self._fetcher.submit(self._drop, state)

    # ------------------------------------------------------------------------------------------ in the background

    def _fetch(self, state: _State, busy: torch.cuda.Event | None) -> None:
        if busy is not None and self._stream is not None:
            self._stream.wait_event(busy)
        if state.is_slotted:  # reads go past torch, which would count what it writes itself
            torch.autograd.graph.increment_version(self._slots[state.slot])
        with torch.inference_mode(False), torch.no_grad():
            for target, source in state.copies:
                if self._ring is None:
                    self._ring = PinnedRing(self._stream)
                self._ring.send(source, target)
        if state.pieces or state.runs:
            todo: list[Run | tuple[int, Piece]] = [*state.runs, *state.pieces]
            waiting = iter(todo)
            lock = threading.Lock()

            def work() -> None:
                with torch.cuda.stream(self._stream):  # does nothing for None
                    while True:
                        with lock:
                            item = next(waiting, None)
                        if item is None:
                            return
                        if isinstance(item, Run):
                            self.filler.file(item.file).read_around(item.offset, item.into)
                        else:
                            self.filler.bring(self.filler.file(item[0]), item[1])

            count = num_readers(self.filler.file(state.pieces[0][0])) if state.pieces else DIRECT_READERS
            futures = [self._readers.submit(work) for _ in range(min(count, len(todo)))]
            wait(futures)  # also after an error: whoever still wrote would spoil what comes into the slot next
            for future in futures:
                future.result()
        for view in state.paged:
            fetch_pages(view)
        if self._stream is not None:
            state.arrived = self._stream.record_event()

    def _drop(self, state: _State) -> None:
        if not state.users and state.ready is None:
            for view in state.dropped:
                drop_pages(view)


class _Call:
    """What calls a module whose weights are streamed, in place of its `_call_impl`."""

    def __init__(self, streamer: Streamer, site: int, module: nn.Module, inner: Callable[..., Any]) -> None:
        self.streamer, self.site, self.inner = streamer, site, inner
        self.name = type(module).__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = object()
        try:
            self.streamer.enter(self.site, call)
            return self.inner(*args, **kwargs)
        finally:
            self.streamer.leave(self.site, call)

    def __deepcopy__(self, memo: Any) -> Any:
        raise LoadError("LD-STREAM", "its weights are streamed: it can be neither copied nor pickled", locus=self.name)

    def __reduce__(self) -> Any:
        return self.__deepcopy__(None)


def _turns(units: Sequence[Unit], need_slot: Sequence[bool]) -> list[int]:
    """The slot of each unit: two in turn for those that need one, and one of its own for a unit that is in use while others are,
    those of modules inside its own or of the same module."""
    uses = Counter(site for unit in units for site in unit.sites)
    found, turn, own = [], 0, SLOTS
    for unit, needs_slot in zip(units, need_slot, strict=True):
        inside = {part for site in unit.sites for part in site.modules()} - set(unit.sites)
        if not inside.isdisjoint(uses) or any(uses[site] > 1 for site in unit.sites):
            found.append(own)
            own += 1
        else:
            found.append(turn)
            turn = (turn + needs_slot) % SLOTS
    return found


def _stand_in(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _merged(views: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The bytes of views of mapped files, neighbours as one: a block is a handful of ranges, and each costs system calls."""
    ranges: list[tuple[Any, int, int]] = []  # storage, first byte, end
    for view in sorted((view for view in views if view.numel()), key=lambda view: view.data_ptr()):
        storage = view.untyped_storage()
        start = view.data_ptr() - storage.data_ptr()
        end = start + view.numel() * view.element_size()
        if ranges and ranges[-1][0].data_ptr() == storage.data_ptr() and 0 <= start - ranges[-1][2] < mmap.PAGESIZE:
            ranges[-1] = (storage, ranges[-1][1], end)
        else:
            ranges.append((storage, start, end))
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=torch.uint8, device="cpu")
        return tuple(empty.new_empty(0).set_(storage, start, (end - start,), (1,)) for storage, start, end in ranges)
