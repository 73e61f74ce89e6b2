"""Read stored tensors into tensors: viewed in place where that serves, else in parallel, in pieces, cast on the way.

    with Filler(catalog, reader) as filler:
        tensors = filler.fill([Wanted("lm_head.weight", shape, torch.float32, cpu, sources)], progress)

Reads go through the files from front to back. What is in flight is bounded by one piece for each thread, whatever the tensors'
sizes, so the peak is the final tensors and a few megabytes.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor

from modelrig.checkpoint.in_place import run_of
from modelrig.components import DTYPE_BITS, Catalog, FormatReader, Part, Region, TensorEntry
from modelrig.errors import LoadError
from modelrig.loading.pieces import PIECE_BYTES, Piece, pieces
from modelrig.loading.progress import Progress
from modelrig.loading.stitching import allocate_to_stitch, stitch
from modelrig.loading.transport import TensorFileReader, allocate_pages, check_unchanged, populate_pages

if TYPE_CHECKING:
    from modelrig.components import TensorFile

READERS = 4  # threads at most: two fill a local disk's queue, and casting wants a core each
READERS_ON_NETWORK = 8  # these mostly wait
SMALL_BYTES = 32 << 10  # pieces below are read together
MAPPED_FROM_BYTES = 4 << 20  # a tensor this large has pages of its own, which go back to the system with it
POPULATED_FROM_BYTES = 256 << 10  # one call for all pages of a piece is cheaper than a fault for each
AHEAD_BYTES = 32 << 20  # that the system reads while what was read before is cast
_SMALL_PAGES_SECONDS = 1 / 4e9  # for each byte of new small pages, about
_LOST_SECONDS = 0.02  # before they are given up
_REPORT_SECONDS = 0.1
_SERIAL = 32_767  # elements torch copies without starting threads of its own, of which there are enough


@frozen(eq=False)
class Wanted:
    """A tensor to be made of stored ones, or, with `buffer`, one to be filled: then dtype and device are those of the buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    sources: tuple[Part, ...]
    buffer: Tensor | None = None
    may_view: bool = True  # a copy-on-write view of the mapped file serves as well

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@frozen
class Tally:
    """Bytes of the files: viewed in place, and copied into memory of their own."""

    mapped_bytes: int = 0
    copied_bytes: int = 0


class Filler:
    """Reads from the files of one catalog; a context manager. A file is open while its tensors are read, or with `keep_open`, for
    those that are read again and again, until the end.

    Raises:
        FileError: IO-CHANGED, IO-READ.
        LoadError: LD-DTYPE for a stored dtype that cannot become what is wanted.
    """

    def __init__(self, catalog: Catalog, reader: FormatReader, *, keep_open: bool = False) -> None:
        self.catalog, self.reader, self.keep_open = catalog, reader, keep_open
        self.tally = Tally()
        self._files: dict[int, TensorFileReader] = {}
        self._read: set[int] = set()  # numbers of the files that were opened
        self._opening = threading.Lock()
        self._stop = threading.Event()
        self._stagings = threading.local()
        self._lost_seconds = 0.0  # to huge pages, compared with small ones

    def __enter__(self) -> Filler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def check_unchanged(self) -> None:
        """Raise `FileError` (IO-CHANGED) if a file that was read is no longer what was catalogued."""
        for number in sorted(self._read):
            check_unchanged(self.catalog.files[number])

    def file(self, number: int) -> TensorFileReader:
        """The open file `number` of the catalog."""
        found = self._files.get(number)
        if found is not None:
            return found
        with self._opening:
            found = self._files.get(number)
            if found is None:
                found = self._files[number] = TensorFileReader(self.catalog.files[number], for_paging=self.keep_open)
                self._read.add(number)
            return found

    # ------------------------------------------------------------------------------------------ the whole job

    def fill(self, wanted: Sequence[Wanted], progress: Progress | None = None) -> dict[str, Tensor]:
        """name → tensor, for all that is wanted. One error, or an interruption, ends all of it."""
        tensors: dict[str, Tensor] = {}
        entries = self.catalog.entries
        jobs = [(entries[part.name], part, one) for one in wanted for part in one.sources]
        jobs.sort(key=lambda job: (job[0].file, job[0].offset))
        counter = _Counter(sum(_taken_bytes(entry, part) for entry, part, _ in jobs), progress)
        mapped = 0
        viewed = _Claims()
        to_stitch: set[str] = set()
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))  # tensors outlive the mode of whoever asks for them
            pool: ThreadPoolExecutor | None = None
            for number, group in _by_file(jobs):
                todo: list[Piece] = []
                for entry, part, one in group:
                    view = self._view(number, entry, part, one)
                    if view is not None and viewed.claim(number, entry, part):
                        tensors[one.name] = view
                        mapped += view.nbytes
                        counter.tell(view.nbytes)
                        continue
                    if one.name not in tensors:
                        stitched = allocate_to_stitch(one, entries)
                        if stitched is not None:
                            to_stitch.add(one.name)
                        tensors[one.name] = _allocate(one) if stitched is None else stitched
                    tensor = tensors[one.name]
                    edges = stitch(self.file(number), entry, part, one, tensor) if one.name in to_stitch else None
                    if edges is None:
                        todo += pieces(entry, part, tensor)
                        continue
                    todo += edges
                    mapped_here = entry.nbytes - sum(edge.entry.nbytes for edge in edges)
                    mapped += mapped_here
                    counter.tell(mapped_here)
                if todo and pool is None:
                    pool = stack.enter_context(ThreadPoolExecutor(READERS_ON_NETWORK, thread_name_prefix="modelrig-read"))
                if todo and pool is not None:
                    self._run(pool, self.file(number), todo, counter)
                if not self.keep_open and number in self._files:
                    self._files.pop(number).close()
            for one in wanted:  # made of nothing, such as a stack of no tensors
                if one.name not in tensors:
                    tensors[one.name] = _allocate(one)
        self.tally = Tally(self.tally.mapped_bytes + mapped, self.tally.copied_bytes + counter.done - mapped)
        return tensors

    def view(self, one: Wanted) -> Tensor | None:
        """What is wanted as a view of its mapped file; None where it must be copied."""
        if len(one.sources) != 1:
            return None
        entry = self.catalog.entries[one.sources[0].name]
        with torch.inference_mode(False):
            return self._view(entry.file, entry, one.sources[0], one)

    def _view(self, number: int, entry: TensorEntry, part: Part, one: Wanted) -> Tensor | None:
        """The stored bytes as they lie in the file, where they are all that is wanted."""
        stored = stored_dtype(entry, self.catalog.files[number])
        require_castable(entry, stored, one, self.catalog.files[number])
        serves = (
            one.buffer is None
            and one.may_view
            and stored == one.dtype
            and one.device.type == "cpu"
            and entry.strides is None
            and entry.offset % stored.itemsize == 0
        )
        run = run_of(entry, part, one.shape) if serves else None
        data = None if run is None else self.file(number).view(run)
        if run is None or data is None:
            return None
        tensor = self.reader.decode(data, run)
        return tensor if entry.nbytes == 0 or tensor.data_ptr() == data.data_ptr() else None  # else decoding copied it

    # ------------------------------------------------------------------------------------------ pieces

    def _run(self, pool: ThreadPoolExecutor, file: TensorFileReader, todo: list[Piece], counter: _Counter) -> None:
        """Bring all pieces of one file to their places, several at a time."""
        total = sum(piece.entry.nbytes for piece in todo)
        # Not worth waking anybody, or so small that threads would take turns in Python rather than read.
        if (len(todo) < 64 and total < PIECE_BYTES) or (total < len(todo) * SMALL_BYTES and not file.is_on_network):
            for batch in _batches(todo):
                for piece in self._bring(file, batch):
                    counter.tell(piece.entry.nbytes)
            return
        waiting, lock = _batches(todo if file.is_on_network else _announced(todo, file)), threading.Lock()

        def work() -> None:
            while not self._stop.is_set():
                with lock:
                    batch = next(waiting, None)
                if batch is None:
                    return
                self._populate(batch[0].into)  # more than one are small
                counter.add(sum(piece.entry.nbytes for piece in self._bring(file, batch)))

        futures: set[Future[None]] = set()
        try:
            for _ in range(min(num_readers(file), len(todo))):
                futures.add(pool.submit(work))
            while futures:
                finished, futures = wait(futures, _REPORT_SECONDS, FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                counter.report()
        except BaseException:  # Ctrl-C, a progress function that raises: nobody reads on
            self._stop.set()
            wait(futures)
            self._stop.clear()
            raise

    def bring(self, file: TensorFileReader, piece: Piece) -> None:
        """Read one piece, and cast it into its place."""
        for _ in self._bring(file, [piece]):
            pass

    def _bring(self, file: TensorFileReader, batch: list[Piece]) -> Iterator[Piece]:
        """Read the pieces with one call, and cast them into their places; each is passed on when it is there."""
        first, last = batch[0].entry, batch[-1].entry
        if len(batch) == 1 and batch[0].cut is None and first.strides is None and _takes_bytes(first, batch[0].into):
            file.read(first.offset, batch[0].into.view(-1).view(torch.uint8))
            yield batch[0]
            return
        data = file.read(first.offset, self._staging(last.offset + last.nbytes - first.offset, batch[0].into.device))
        for piece in batch:
            start = piece.entry.offset - first.offset
            values = piece.shaped(self.reader.decode(data[start : start + piece.entry.nbytes], piece.entry))
            with torch.inference_mode() if piece.into.is_inference() else nullcontext():
                _copy(values, piece.into)
            yield piece

    def _populate(self, memory: Tensor) -> None:
        """Give memory that is about to be written its pages: huge ones, as long as they do not take more time than small ones.

        Of a virtual machine's large free blocks some may be with its host, and to get those back takes ten times as long.
        """
        if memory.nbytes < POPULATED_FROM_BYTES or memory.device.type != "cpu" or not memory.is_contiguous():
            return
        large = self._lost_seconds < _LOST_SECONDS and memory.untyped_storage().nbytes() >= MAPPED_FROM_BYTES
        start = time.perf_counter()
        populate_pages(memory, huge=large)
        if large:
            self._lost_seconds += time.perf_counter() - start - memory.nbytes * _SMALL_PAGES_SECONDS

    def _staging(self, count: int, device: torch.device) -> Tensor:
        """Memory of this thread to read into; pinned for a GPU. One for what is larger than a piece is not kept."""
        key = "cpu" if device.type == "cpu" else "pinned"
        kept: Tensor | None = getattr(self._stagings, key, None)
        if kept is None:
            kept = torch.empty(PIECE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=key == "pinned")
            setattr(self._stagings, key, kept)
        return kept[:count] if count <= kept.numel() else torch.empty(count, dtype=torch.uint8, device="cpu")


def _batches(todo: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces in their order; small ones that lie one after the other in the file together."""
    batch: list[Piece] = []
    start, end = 0, math.inf
    for piece in todo:
        entry = piece.entry
        joins = entry.nbytes < SMALL_BYTES and 0 <= entry.offset - end <= SMALL_BYTES
        if not (batch and joins and entry.offset + entry.nbytes - start <= PIECE_BYTES):
            if batch:
                yield batch
            batch, start = [], entry.offset
        batch.append(piece)
        # nothing joins what is not small itself
        end = entry.offset + entry.nbytes if entry.nbytes < SMALL_BYTES else math.inf
    if batch:
        yield batch


def _announced(todo: Sequence[Piece], file: TensorFileReader) -> Iterator[Piece]:
    """The pieces, while the system is told of those that come next."""
    position = 0
    for piece in todo:
        while position < len(todo) and todo[position].entry.offset < piece.entry.offset + AHEAD_BYTES:
            file.announce(todo[position].entry.offset, todo[position].entry.nbytes)
            position += 1
        yield piece


def _copy(values: Tensor, into: Tensor) -> None:
    """Cast and copy, without threads of torch's own and holding up Python's others as rarely as can be."""
    if into.device.type == "cpu" and into.dim() == 1 and into.shape[0] > _SERIAL:
        torch._foreach_copy_(torch.split(into, _SERIAL), torch.split(values, _SERIAL))
    else:
        into.copy_(values)


def num_readers(file: TensorFileReader) -> int:
    """How many threads read from one file."""
    if file.is_on_network:
        return READERS_ON_NETWORK
    return max(1, min(READERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def stored_dtype(entry: TensorEntry, file: TensorFile) -> torch.dtype:
    """torch's dtype of what is stored. Raises `LoadError` (LD-DTYPE) where torch has none."""
    dtype: torch.dtype | None = getattr(torch, entry.dtype, None)
    if dtype is None or DTYPE_BITS[entry.dtype] < 8:
        reason = (
            f"is stored as {entry.dtype}, which has no dtype in torch with one value per element; only a quantizer could read it"
        )
        raise LoadError("LD-DTYPE", reason, path=file.path, locus=entry.name)
    return dtype


def require_castable(entry: TensorEntry, stored: torch.dtype, one: Wanted, file: TensorFile) -> None:
    """Floats become floats; anything else stays what it is. Raises `LoadError` (LD-DTYPE)."""
    if stored != one.dtype and not (stored.is_floating_point and one.dtype.is_floating_point):
        reason = f"is stored as {entry.dtype}, and {one.name} is {str(one.dtype).removeprefix('torch.')}: such values are not cast"
        raise LoadError("LD-DTYPE", reason, path=file.path, locus=entry.name)


def _takes_bytes(entry: TensorEntry, into: Tensor) -> bool:
    """Whether the stored bytes can be read straight into `into`. Those of bool may not: a stored 2 must become 1."""
    stored = getattr(torch, entry.dtype)
    return bool(stored == into.dtype and stored != torch.bool and into.device.type == "cpu" and into.is_contiguous())


def _allocate(one: Wanted) -> Tensor:
    if one.buffer is not None:
        return one.buffer
    if one.device.type == "cpu" and one.nbytes >= MAPPED_FROM_BYTES:  # malloc may keep what is freed
        return allocate_pages(one.nbytes).view(one.dtype).view(one.shape)
    return torch.empty(one.shape, dtype=one.dtype, device=one.device)


def _taken_bytes(entry: TensorEntry, part: Part) -> int:
    """Of a tensor of which several parts are taken, each counts its share."""
    if part.taken is None:
        return entry.nbytes
    count = 1
    for start, stop in part.taken:
        count *= stop - start
    return (count * DTYPE_BITS[entry.dtype] + 7) // 8


class _Claims:
    """Which bytes are viewed by a tensor, so that no two share memory. Stored tensors with bytes in common are the same range."""

    def __init__(self) -> None:
        self._taken: dict[tuple[int, int], list[Region | None]] = {}

    def claim(self, file: int, entry: TensorEntry, part: Part) -> bool:
        """Whether nobody has what `part` takes of `entry`; then somebody has it now."""
        key = (file, entry.offset if entry.nbytes else -1)  # an empty one begins where another does
        others = self._taken.get(key)
        if others is None:
            self._taken[key] = [part.taken]
            return True
        if any(_overlap(part.taken, taken) for taken in others):
            return False
        others.append(part.taken)
        return True


def _overlap(one: Region | None, other: Region | None) -> bool:
    """Whether two regions of a tensor have an element in common; None is all of it."""
    if one is None or other is None:
        return True
    return all(start < end and begin < stop for (start, stop), (begin, end) in zip(one, other, strict=True))


Job = tuple[TensorEntry, Part, Wanted]


def _by_file(jobs: Sequence[Job]) -> Iterator[tuple[int, Sequence[Job]]]:
    start = 0
    for end in range(1, len(jobs) + 1):
        if end == len(jobs) or jobs[end][0].file != jobs[start][0].file:
            yield jobs[start][0].file, jobs[start:end]
            start = end


class _Counter:
    """Bytes done, counted from several threads and reported from one."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self.progress = total, 0, progress
        self._reported = -1
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.done = min(self.total, self.done + count)

    def tell(self, count: int) -> None:
        """Both, from the thread that reports."""
        self.add(count)
        self.report()

    def report(self) -> None:
        if self.progress is not None and self.done != self._reported:
            self._reported = self.done
            self.progress(self.done, self.total)
