"""One saver at a time for each folder: a lock file that says who, and that is gone afterwards."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelrig.checkpoint.saving.vfs import UNSUPPORTED, OperationError, Vfs
from modelrig.errors import SaveInProgress

_ATTEMPTS = 100
_NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}


@contextmanager
def locked(vfs: Vfs, path: Path, folder: Path) -> Iterator[bool]:
    """Hold the lock file `path` while `folder` is written; False where the file system has no locks.

    The kernel lets go of the lock when its process ends, however it ends. The file a killed process left is taken over.

    Raises:
        SaveInProgress: another process, or another thread of this one, holds it.
    """
    descriptor, is_locked = _acquire(vfs, path, folder)
    try:
        yield is_locked
    finally:
        _leave(vfs, descriptor, path, True)


def _acquire(vfs: Vfs, path: Path, folder: Path) -> tuple[int, bool]:
    for _ in range(_ATTEMPTS):
        descriptor = _open(vfs, path)
        is_ours = False
        try:
            is_ours = vfs.lock(descriptor, path)
            if not is_ours:
                raise _in_progress(vfs, descriptor, path, folder)
            status = vfs.status(path)
            if status is not None and os.path.samestat(status, os.fstat(descriptor)):
                _sign(vfs, descriptor, path)
                return descriptor, True
        except BaseException as error:
            if isinstance(error, OperationError) and error.operation == "lock" and error.errno in _NO_LOCKS:
                return descriptor, False
            _leave(vfs, descriptor, path, is_ours)
            raise
        _leave(vfs, descriptor, path, False)  # its last holder removed it after we had opened it
    raise SaveInProgress("SV-BUSY", "its lock changes hands all the time", path=folder)


def _leave(vfs: Vfs, descriptor: int, path: Path, is_ours: bool) -> None:
    if is_ours:  # removed while it is still held: whoever opened it before finds out that it is not the file of that name any more
        with contextlib.suppress(OSError):
            vfs.unlink(path)
    with contextlib.suppress(OSError):
        vfs.close(descriptor, path)


def _open(vfs: Vfs, path: Path) -> int:
    try:
        return vfs.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0))
    except OperationError as error:
        if error.errno != errno.EACCES or vfs.status(path) is None:
            raise
        return vfs.open(path, os.O_RDONLY)  # another user's: enough to lock it


def _sign(vfs: Vfs, descriptor: int, path: Path) -> None:
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
    try:
        vfs.truncate(descriptor, 0, path)
        vfs.write(descriptor, text.encode(), path)
    except OperationError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL):  # opened for reading only
            raise


def _in_progress(vfs: Vfs, descriptor: int, path: Path, folder: Path) -> SaveInProgress:
    said: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        read = json.loads(vfs.read(descriptor, 4096, path))
        said = read if isinstance(read, dict) else {}
    pid, host, since = said.get("pid"), said.get("host"), said.get("since")
    who = f"process {pid} on {host}" if isinstance(pid, int) and isinstance(host, str) else "another process"
    return SaveInProgress(
        "SV-BUSY",
        f"{who} is saving to it",
        path=folder,
        hint="wait for it, or save to another folder",
        pid=pid if isinstance(pid, int) else None,
        host=host if isinstance(host, str) else None,
        since=float(since) if isinstance(since, int | float) else None,
    )
