"""Bytes of a tensor file: viewed in place where the file can be mapped, read into memory elsewhere.

A mapping of a file on a network file system turns every page fault into a round trip and a vanished server into SIGBUS, so
those files are only read. What is converted on the way is read too: a file that shrinks meanwhile is then an error and not a
SIGBUS, and reading in pieces is as fast as touching mapped pages.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import weakref
from functools import cache
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from modelrig.checkpoint.files import identity, open_regular
from modelrig.checkpoint.mounts import is_on_network
from modelrig.components import TensorEntry, TensorFile
from modelrig.errors import FileError

READ_SIZE = 16 << 20
_FIXED = 0x10  # MAP_FIXED, the same on all architectures that torch is built for
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


class TensorFileReader:
    """One open tensor file; a context manager. A mapping lives as long as a tensor that views it, also when this is closed, and
    takes no file descriptor: a model of thousands of shards needs no higher limit on them.

    Raises:
        FileError: IO-CHANGED if the file is not the one that was catalogued, IO-READ if it cannot be opened.
    """

    def __init__(self, file: TensorFile, *, for_paging: bool = False) -> None:
        self.file, self.for_paging = file, for_paging
        self._mapped: Tensor | None = None  # uint8, the whole file
        self._opening, self._is_closed = threading.Lock(), False
        self._direct: int | None = None  # a descriptor that goes around the page cache; -1 where there is none
        self._open()
        self.is_on_network = is_on_network(file.path)
        self._can_map = file.size > 0 and not self.is_on_network

    def view(self, entry: TensorEntry) -> Tensor | None:
        """uint8 [entry.nbytes] in a copy-on-write mapping of the file; None where files are not mapped."""
        if self._mapped is None and self._can_map:
            self._map()
            if self.for_paging:  # may well be all that is wanted of one of very many files
                self._release()
        return None if self._mapped is None else self._mapped[entry.offset : entry.offset + entry.nbytes]

    def read(self, offset: int, buffer: Tensor) -> Tensor:
        """Fill `buffer`, uint8 and contiguous, from byte `offset` on; returns it.

        Raises:
            FileError: IO-CHANGED if the file ends before, IO-READ if the system cannot read it.
        """
        self._require_open()
        window, done = memoryview(buffer.numpy().data), 0
        while done < len(window):
            try:
                count = os.preadv(self._descriptor, [window[done : done + READ_SIZE]], offset + done)
            except OSError as error:
                reason = f"cannot be read at byte {offset + done}: {error.strerror or error}"
                raise FileError("IO-READ", reason, path=self.file.path) from error
            if count == 0:
                raise _changed(self.file)
            done += count
        return buffer

    def announce(self, offset: int, size: int) -> None:
        """Let the system begin to read these bytes of the file: a hint, of which it heeds no more than its own read-ahead."""
        self._require_open()
        os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def read_around(self, offset: int, buffer: Tensor) -> None:
        """Like `read`, but past the page cache, which then has nothing to make room for.

        Offset, size and address of `buffer` are multiples of a page; what lies beyond the end of the file is left as it is.
        """
        self._require_open()
        with self._opening:
            if self._direct is None:
                self._direct = self._reopen_direct()
        needed = min(buffer.numel(), self.file.size - offset)
        window, done = memoryview(buffer.numpy().data), 0
        while self._direct >= 0 and done < needed:
            try:
                count = os.preadv(self._direct, [window[done:]], offset + done)
            except OSError:  # a file system that takes the flag and not the read
                break
            if count == 0:
                raise _changed(self.file)
            done += count
            if done % mmap.PAGESIZE:
                break
        if done < needed:
            self.read(offset + done, buffer[done:needed])
            os.posix_fadvise(self._descriptor, offset + done, needed - done, os.POSIX_FADV_DONTNEED)

    def _reopen_direct(self) -> int:
        """The same file without the page cache in between; -1 on a file system that cannot."""
        try:
            descriptor = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            return -1
        self._closing_direct = weakref.finalize(self, os.close, descriptor)
        return descriptor

    def close(self) -> None:
        if self._direct is not None and self._direct >= 0:
            self._closing_direct()
        self._direct = -1
        self._release()
        self._mapped, self._can_map, self._is_closed = None, False, True

    def __enter__(self) -> TensorFileReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self) -> None:
        with open_regular(self.file.path) as (descriptor, status):
            if self.file.identity is not None and identity(status) != self.file.identity:
                raise _changed(self.file)
            self._descriptor = os.dup(descriptor)
        self._closing = weakref.finalize(self, os.close, self._descriptor)  # also when whoever held this is forgotten

    def _require_open(self) -> None:
        with self._opening:
            if self._descriptor < 0 and not self._is_closed:
                self._open()

    def _release(self) -> None:
        with self._opening:
            self._closing()
            self._descriptor = -1

    def map_at(self, address: int, offset: int, size: int) -> bool:
        """Replace the pages at `address` by copy-on-write ones of the file; False, and they are as before, where that cannot be."""
        if not self._can_map or not size:
            return False
        self._require_open()
        if os.fstat(self._descriptor).st_size < offset + size:
            raise _changed(self.file)
        flags = mmap.MAP_PRIVATE | _FIXED
        if _libc.mmap(address, size, _READ_WRITE, flags, self._descriptor, offset) == address:
            return True
        if _libc.mmap(address, size, _READ_WRITE, flags | mmap.MAP_ANONYMOUS, -1, 0) != address:  # it may have left a hole
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return False

    def _map(self) -> None:
        if os.fstat(self._descriptor).st_size < self.file.size:  # it has become shorter
            raise _changed(self.file)
        # RLIMIT_DATA counts a copy-on-write mapping, though nobody writes to it; what is paged in and out may do with less.
        for access in (_READ_WRITE, mmap.PROT_READ) if self.for_paging else (_READ_WRITE,):
            mapping = _map_file(self._descriptor, self.file.size, access)
            if mapping is not None:
                break
        else:  # a file system that cannot, or no address space left: reading may still do
            self._can_map = False
            return
        with torch.inference_mode(False):
            self._mapped = torch.frombuffer(mapping, dtype=torch.uint8)
        with _lock:
            _mappings[self._mapped.data_ptr()] = mapping


def check_unchanged(file: TensorFile) -> None:
    """Raise `FileError` (IO-CHANGED) if the file is no longer what it was when it was catalogued."""
    with open_regular(file.path) as (_, status):
        if file.identity is not None and identity(status) != file.identity:
            raise _changed(file)


def _changed(file: TensorFile) -> FileError:
    return FileError(
        "IO-CHANGED",
        "changed since the plan was made (size, time of change or inode differ)",
        path=file.path,
        hint="make the plan again, and do not write to a checkpoint while it is in use",
    )


# ------------------------------------------------------------------------------------------------ pages

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value

Mapping = ctypes.Array[ctypes.c_ubyte]
#: address → mapping, for those that tensors still view
_mappings: weakref.WeakValueDictionary[int, Mapping] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _map_file(descriptor: int, size: int, access: int) -> Mapping | None:
    """A private mapping of a whole file, until nobody holds it; None if the system refuses.

    Python's own would keep a descriptor open for each mapping, and hold up every other thread in `madvise`.
    """
    address = _libc.mmap(None, size, access, mmap.MAP_PRIVATE, descriptor, 0)
    if address == _FAILED:
        return None
    mapping = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(mapping, _libc.munmap, address, size).atexit = False  # tensors may be used until the very end
    return mapping


#: address of what `allocate_pages` gave → how many parts of files are mapped over it
_mapped_over: dict[int, int] = {}


def allocate_pages(size: int, begin: int = 0) -> Tensor:
    """uint8 [size] that begins at byte `begin` of a page and goes back to the system when freed.

    At byte 0 it can be read into around the page cache.
    """
    pages = mmap.mmap(-1, begin + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(pages, dtype=torch.uint8, offset=begin)
    weakref.finalize(pages, _mapped_over.pop, memory.data_ptr(), None).atexit = False
    return memory


def map_over(pages: Tensor, file: TensorFileReader, offset: int) -> bool:
    """Make whole pages of what `allocate_pages` gave copy-on-write pages of the file from `offset` on, where that is possible."""
    address, memory = pages.data_ptr(), pages.untyped_storage().data_ptr()
    if sum(_mapped_over.values()) >= _max_mapped_over() or not file.map_at(address, offset, pages.nbytes):
        return False
    _mapped_over[memory] = _mapped_over.get(memory, 0) + 1
    return True


@cache
def _max_mapped_over() -> int:
    """A third of the mappings a process may have: between two of them there is often one more, and others need some."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii")) // 3
    except (OSError, ValueError):
        return 0


_POPULATE_READ, _POPULATE_WRITE = 22, 23  # MADV_POPULATE_READ and _WRITE, from Linux 5.14 on
HUGE_PAGE = 2 << 20
_POPULATED = 16 << 20  # bytes asked for at a time


def fetch_pages(tensor: Tensor) -> None:
    """Bring the pages behind a view of a mapped file into memory, read from the disk where the page cache lacks them.

    A hint: what cannot be fetched (an older kernel, a file that shrank) is left to the first use. What is read from the disk is
    read into huge pages where the file system can: mapping and dropping those takes less (docs/decisions/0012).
    """
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = tensor.data_ptr() + tensor.nbytes
    _libc.madvise(start, end - start, mmap.MADV_HUGEPAGE)
    for address in range(start, end, _POPULATED):
        size = min(_POPULATED, end - address)
        if _libc.madvise(address, size, _POPULATE_READ):
            return


def populate_pages(tensor: Tensor, *, huge: bool = False) -> None:
    """Give memory that is about to be written its pages, with one call instead of a fault for each; a hint."""
    if huge:  # what shares the first or last huge page is advised as well, which only concerns pages it has not got yet
        first = tensor.data_ptr() // HUGE_PAGE * HUGE_PAGE
        _libc.madvise(first, -(-(tensor.data_ptr() + tensor.nbytes - first) // HUGE_PAGE) * HUGE_PAGE, mmap.MADV_HUGEPAGE)
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:
        _libc.madvise(start, end - start, _POPULATE_WRITE)


def drop_pages(tensor: Tensor) -> None:
    """Drop the memory pages behind a view of a mapped file; its next use reads them again.

    Does nothing for any other tensor, nor where a page of it was written to: such a page exists only in memory.
    """
    if not tensor.is_contiguous():
        return
    address = tensor.data_ptr()
    with _lock:
        mappings = list(_mappings.items())
    for start, mapping in mappings:
        if start <= address < start + len(mapping):
            # Whole pages only: those at the edges belong to neighbours too.
            first = -(-(address - start) // mmap.PAGESIZE) * mmap.PAGESIZE
            size = (address - start + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
            if size > 0 and not _is_written(start + first, size):
                _libc.madvise(start + first, size, mmap.MADV_DONTNEED)


def _is_written(address: int, size: int) -> bool:
    """Whether some page was copied on a write. True where the kernel does not tell.

    A tensor's version counter would not do: it misses writes through `.data`, NumPy, or another view.
    """
    try:
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        raw = os.pread(descriptor, size // mmap.PAGESIZE * 8, address // mmap.PAGESIZE * 8)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    if len(raw) != size // mmap.PAGESIZE * 8:
        return True
    pages = np.frombuffer(raw, dtype=np.uint64)  # bits 63 and 62: in memory, in swap; bit 61: a page of the file
    return bool(((pages >> np.uint64(62) != 0) & (pages >> np.uint64(61) & np.uint64(1) == 0)).any())
