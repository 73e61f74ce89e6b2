"""Opening the files of a checkpoint without surprises: regular files only, nothing that can hang, nothing read unbounded."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelrig.errors import FileError

#: (size, mtime_ns, inode, device): equal before and after means nobody replaced, truncated or rewrote the file
Identity = tuple[int, int, int, int]

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def identity(status: os.stat_result) -> Identity:
    """What tells one state of a file from another."""
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def unreadable(path: Path, error: OSError) -> FileError:
    """The typed error for a failed system call on `path`."""
    if isinstance(error, FileNotFoundError):
        return FileError("IO-READ", "a link that points to nothing" if path.is_symlink() else "does not exist", path=path)
    return FileError("IO-READ", f"cannot be read: {error.strerror or error}", path=path)


def _refuse_special(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((text for is_kind, text in _KINDS if is_kind(status.st_mode)), "something else")
        raise FileError("IO-TYPE", f"is {kind}; a regular file is needed", path=path)


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """A read-only file descriptor of `path` and its status; both belong to the same file even if `path` is exchanged meanwhile.

    Raises:
        FileError: IO-TYPE for anything but a regular file (never waits for a writer), IO-READ when it cannot be opened.
    """
    try:
        _refuse_special(path, path.stat())  # first by name: opening some devices already does something
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:  # a NUL in the name
        raise FileError("IO-READ", "not a possible file name", path=path) from error
    try:
        status = os.fstat(descriptor)
        _refuse_special(path, status)
        yield descriptor, status
    finally:
        os.close(descriptor)


def read_at(descriptor: int, count: int, offset: int, path: Path) -> bytes:
    """Up to `count` bytes from `offset`, fewer only at the end of the file. `count` must have been checked against the size."""
    parts = []
    try:
        while count > 0:
            part = os.pread(descriptor, min(count, 1 << 30), offset)
            if not part:
                break
            parts.append(part)
            count -= len(part)
            offset += len(part)
    except OSError as error:
        raise FileError("IO-READ", f"cannot be read at byte {offset}: {error.strerror or error}", path=path) from error
    return parts[0] if len(parts) == 1 else b"".join(parts)
