"""Bytes of a tensor file: mapped copy-on-write on a local file system, read into memory elsewhere.

A mapping of a file on a network file system turns every page fault into a round trip and a vanished server into SIGBUS, so
those files are read with positional reads instead.
"""

from __future__ import annotations

import mmap
import os
import weakref
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from modelrig.checkpoint.files import identity, open_regular
from modelrig.components import TensorEntry, TensorFile
from modelrig.errors import FileError

READ_SIZE = 16 << 20
NETWORK_FILE_SYSTEMS = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "lustre",
    "ceph",
    "gpfs",
    "glusterfs",
    "9p",
    "beegfs",
    "afs",
    "fuse",
)


class TensorFileReader:
    """One open tensor file. The mapping lives as long as a tensor that views it."""

    def __init__(self, file: TensorFile) -> None:
        self.file = file
        self.mapping: mmap.mmap | None = None
        self.descriptor = -1
        with open_regular(file.path) as (descriptor, status):
            if file.identity is not None and identity(status) != file.identity:
                raise _changed(file)
            if status.st_size and not is_on_network(file.path):
                self.mapping = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_COPY)
                self.data = torch.frombuffer(self.mapping, dtype=torch.uint8)
                _mappings[self.data.data_ptr()] = self.mapping
            else:
                self.descriptor = os.dup(descriptor)

    def bytes_of(self, entry: TensorEntry) -> Tensor:
        """uint8 [entry.nbytes]: a view of the mapping, or freshly read memory."""
        if self.mapping is not None:
            return self.data[entry.offset : entry.offset + entry.nbytes]
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        window, done = memoryview(buffer.numpy().data), 0
        while done < entry.nbytes:
            count = os.preadv(self.descriptor, [window[done : done + READ_SIZE]], entry.offset + done)
            if count == 0:
                raise _changed(self.file)
            done += count
        return buffer

    def release(self, entry: TensorEntry) -> None:
        """Drop the pages of a tensor that has been copied elsewhere from this process's memory."""
        if self.mapping is not None:
            _drop(self.mapping, entry.offset, entry.nbytes)

    def check_unchanged(self) -> None:
        """Raise `FileError` (IO-CHANGED) if the file is no longer what it was when it was catalogued."""
        with open_regular(self.file.path) as (_, status):
            if self.file.identity is not None and identity(status) != self.file.identity:
                raise _changed(self.file)

    def close(self) -> None:
        """Let go of the file; a mapping that tensors still view stays until they go."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        self.mapping = None
        self.data = torch.empty(0, dtype=torch.uint8)


#: address → mapping, for those that tensors still view
_mappings: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()


def drop_pages(tensor: Tensor) -> None:
    """Drop the memory pages behind a view of a mapped file; its next use reads them again.

    Does nothing for any other tensor, or for one that was written to, whose pages exist only in memory.
    """
    if tensor._version or not tensor.is_contiguous():
        return
    address = tensor.data_ptr()
    for start, mapping in _mappings.items():
        if start <= address < start + len(mapping):
            _drop(mapping, address - start, tensor.nbytes)


def _drop(mapping: mmap.mmap, offset: int, size: int) -> None:
    """Drop the whole pages inside [offset, offset + size); those at the edges belong to neighbours too."""
    first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (offset + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        mapping.madvise(mmap.MADV_DONTNEED, first, last - first)


def _changed(file: TensorFile) -> FileError:
    return FileError(
        "IO-CHANGED",
        "changed since the plan was made (size, time of change or inode differ)",
        path=file.path,
        hint="make the plan again, and do not write to a checkpoint while it is in use",
    )


def is_on_network(path: Path) -> bool:
    """Whether the file system that holds `path` is a network or user-space one."""
    real = os.path.realpath(path)
    mounts = _mounts()
    while real not in mounts and real != os.path.dirname(real):  # noqa: PTH120 - strings, thousands of times
        real = os.path.dirname(real)  # noqa: PTH120
    kind = mounts.get(real, "")
    return kind.partition(".")[0] in NETWORK_FILE_SYSTEMS


@cache
def _mounts() -> dict[str, str]:
    """Mount point → file system type, from the kernel; empty where there is no /proc."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    mounts = {}
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")  # spaces are written as \040
        mounts[point] = after.split()[0]
    return mounts
