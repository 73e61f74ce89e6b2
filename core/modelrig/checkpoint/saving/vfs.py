"""Every operation on files that a save makes, in one place, so that a test can make the n-th of them fail or the last."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from typing_extensions import Buffer

try:
    import fcntl as _fcntl
except ImportError:  # not POSIX
    fcntl: ModuleType | None = None
else:
    fcntl = _fcntl

T = TypeVar("T")

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_WRITE_SIZE = 1 << 30
_SYNC_FILE_RANGE_WRITE = 2

#: what a file system answers that does not know an operation
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY})


class OperationError(OSError):
    """An operation that failed: `errno` and `strerror` of the system, which operation it was, and on what."""

    def __init__(self, operation: str, path: Path, error: OSError) -> None:
        super().__init__(error.errno, error.strerror or str(error))
        self.operation, self.path = operation, path


class Vfs:
    """Operations on files. All of them pass through `call`, which is what a test overrides.

    Raises `OperationError`, whatever the operation.
    """

    def call(self, operation: str, path: Path, action: Callable[..., T], *arguments: Any) -> T:
        """Do `action(*arguments)`, which is `operation` on `path`."""
        try:
            return action(*arguments)
        except OSError as error:
            raise OperationError(operation, path, error) from error

    # what is there

    def lstat(self, path: Path) -> os.stat_result:
        return self.call("stat", path, os.lstat, path)

    def stat(self, path: Path) -> os.stat_result:
        return self.call("stat", path, os.stat, path)

    def status(self, path: Path) -> os.stat_result | None:
        """`lstat`, or None where nothing is."""
        try:
            return self.lstat(path)
        except OperationError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise

    def listdir(self, path: Path) -> list[str]:
        return sorted(self.call("list", path, os.listdir, path))

    def readlink(self, path: Path) -> str:
        return self.call("readlink", path, os.readlink, path)

    def is_writable(self, path: Path) -> bool:
        return self.call("access", path, os.access, path, os.W_OK | os.X_OK)

    def free_bytes(self, path: Path) -> int:
        found = self.call("statvfs", path, os.statvfs, path)
        return found.f_bavail * found.f_frsize

    # files

    def create(self, path: Path) -> int:
        """A new file, open for writing; its mode is what the umask leaves of 0666."""
        return self.call("create", path, os.open, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def open(self, path: Path, flags: int) -> int:
        return self.call("open", path, os.open, path, flags | os.O_CLOEXEC, 0o666)

    def read(self, descriptor: int, count: int, path: Path) -> bytes:
        return self.call("read", path, os.read, descriptor, count)

    def write(self, descriptor: int, data: Buffer, path: Path) -> None:
        """All of `data`."""
        window = memoryview(data).cast("B")
        while window:
            window = window[self.call("write", path, os.write, descriptor, window[:_WRITE_SIZE]) :]

    def truncate(self, descriptor: int, size: int, path: Path) -> None:
        self.call("truncate", path, os.ftruncate, descriptor, size)

    def reserve(self, descriptor: int, size: int, path: Path) -> None:
        """Room for `size` bytes, where the file system can promise it."""
        try:
            self.call("fallocate", path, _fallocate, descriptor, size)
        except OperationError as error:
            if error.errno not in UNSUPPORTED:
                raise

    def begin_sync(self, descriptor: int, start: int, size: int) -> None:
        """Let the system begin to bring these bytes of a file to the disk; a hint, of which no error is told before `fsync`."""
        with contextlib.suppress(AttributeError, OSError, TypeError):
            _libc().sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)

    def fsync(self, descriptor: int, path: Path) -> None:
        self.call("fsync", path, os.fsync, descriptor)

    def close(self, descriptor: int, path: Path) -> None:
        self.call("close", path, os.close, descriptor)

    def lock(self, descriptor: int, path: Path) -> bool:
        """Whether this descriptor's lock is ours now; False where somebody else holds it."""
        try:
            self.call("lock", path, _lock, descriptor)
        except OperationError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def set_mode(self, path: Path, mode: int) -> None:
        self.call("chmod", path, os.chmod, path, mode)

    def set_owner(self, path: Path, user: int, group: int) -> None:
        self.call("chown", path, os.chown, path, user, group)

    def set_times(self, path: Path, accessed_ns: int, changed_ns: int) -> None:
        self.call("utime", path, lambda: os.utime(path, ns=(accessed_ns, changed_ns)))

    # names

    def mkdir(self, path: Path) -> None:
        self.call("mkdir", path, os.mkdir, path)

    def link(self, source: Path, path: Path) -> None:
        """A further name for `source` itself, be it a symbolic link."""
        self.call("link", path, lambda: os.link(source, path, follow_symlinks=False))

    def symlink(self, text: str, path: Path) -> None:
        self.call("symlink", path, os.symlink, text, path)

    def rename(self, source: Path, path: Path) -> None:
        self.call("rename", path, os.rename, source, path)

    def exchange(self, source: Path, path: Path) -> None:
        """`source` and `path` change places, atomically."""
        self.call("exchange", path, _exchange, source, path)

    def unlink(self, path: Path) -> None:
        self.call("unlink", path, os.unlink, path)

    def rmdir(self, path: Path) -> None:
        self.call("rmdir", path, os.rmdir, path)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _exchange(source: Path, path: Path) -> None:
    try:
        renameat2 = _libc().renameat2
    except (AttributeError, OSError, TypeError):  # a C library without it, or no such library
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _fallocate(descriptor: int, size: int) -> None:
    # Not posix_fallocate: where the file system cannot, that one writes to every block.
    try:
        fallocate = _libc().fallocate64
    except (AttributeError, OSError, TypeError):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _lock(descriptor: int) -> None:
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
