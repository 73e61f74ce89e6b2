"""Reading a folder that a save may exchange meanwhile: what is read comes from one generation of it, or is read again.

A save commits in one operation, so a reader that finds the folder unchanged after it has read cannot have seen two generations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from attrs import frozen

from modelrig.checkpoint.files import Identity, identity
from modelrig.checkpoint.paths import CURRENT
from modelrig.checkpoint.saving.names import MANIFEST
from modelrig.errors import FileError

T = TypeVar("T")

ATTEMPTS = 20


@frozen
class Generation:
    """What changes whenever a save commits: the folder itself, or the manifest in it."""

    folder: tuple[int, int] | None  # inode, device
    manifest: Identity | None
    pointer: str | None  # of a save in place that is going on

    def is_still(self, now: Generation) -> bool:
        """Whether it is this one `now`, and no names become links or files again: what fails then, fails by itself."""
        return self == now and self.pointer is None


@contextmanager
def held(folder: Path) -> Iterator[Generation]:
    """The generation of `folder` now. While the block runs, its inode numbers are not given to anything else."""
    descriptors = []
    try:
        for path in (folder, folder / MANIFEST):
            try:
                descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            except OSError:
                descriptors.append(-1)
        first, second = (os.fstat(one) if one >= 0 else None for one in descriptors)
        yield Generation(first and (first.st_ino, first.st_dev), second and identity(second), _pointer(folder))
    finally:
        for one in descriptors:
            if one >= 0:
                os.close(one)


def _pointer(folder: Path) -> str | None:
    try:
        return os.readlink(folder / CURRENT)  # noqa: PTH115
    except OSError:
        return None


def generation(folder: Path) -> Generation:
    """The generation of `folder` now."""
    with held(folder) as found:
        return found


def consistently(folder: Path, read: Callable[[], T], *, attempts: int = ATTEMPTS) -> T:
    """What `read()` returns, or raises, when no save of `folder` has committed while it ran. It may run several times.

    Raises:
        FileError: IO-CHANGED if saves follow each other so fast that `read` never finishes between two.
    """
    for attempt in range(1, attempts + 1):
        with held(folder) as before:
            try:
                value = read()
            except Exception:  # two generations at once may look wrong in any way
                if attempt == attempts or before.is_still(generation(folder)):
                    raise
            else:
                if generation(folder) == before:
                    return value
    reason = "is replaced again and again while it is read"
    raise FileError("IO-CHANGED", reason, path=folder, hint="wait for the saves to end")


def again_if_exchanged(folder: Path, load: Callable[[], T], *, attempts: int = ATTEMPTS) -> T:
    """What `load()` returns; it runs again when it failed and a save of `folder` has committed meanwhile.

    For what is consistent when it succeeds: a plan whose files are opened and found to be those that were planned.
    """
    for _ in range(attempts - 1):
        with held(folder) as before:
            try:
                return load()
            except Exception:
                if before.is_still(generation(folder)):
                    raise
    return load()
