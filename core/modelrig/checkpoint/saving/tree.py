"""Trees of files: what is foreign is carried from one to another, what is ours is removed. Links are never followed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

from attrs import frozen

from modelrig.checkpoint.saving.vfs import UNSUPPORTED, OperationError, Vfs

_READ_SIZE = 4 << 20
_ROUNDS = 50
#: answers of `link` where a copy will do
_NO_LINKS = UNSUPPORTED | {errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV}

#: whether the entry of this name, at the top of a tree, is left where it is
Skip = Callable[[str, os.stat_result], bool]


@frozen
class Carried:
    """A file that was carried: what it was, and the inode it has in its new place."""

    source: tuple[int, int, int]  # inode, mtime_ns, size
    placed: int


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_mtime_ns, status.st_size


def walk(vfs: Vfs, folder: Path, skip: Skip) -> Iterator[tuple[PurePath, os.stat_result]]:
    """Every entry of `folder` that is not to be skipped, by its path in it; folders before what they hold."""
    waiting = [PurePath()]
    while waiting:
        inside = waiting.pop()
        try:
            names = vfs.listdir(folder / inside)
        except OperationError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR) and inside.parts:  # it went meanwhile
                continue
            raise
        for name in names:
            status = vfs.status(folder / inside / name)
            if status is None or (not inside.parts and skip(name, status)):
                continue
            yield inside / name, status
            if stat.S_ISDIR(status.st_mode):
                waiting.append(inside / name)


def states(vfs: Vfs, folder: Path, skip: Skip) -> dict[PurePath, tuple[int, int, int] | None]:
    """What tells whether somebody changes files of `folder`."""
    return {inside: None if stat.S_ISDIR(status.st_mode) else _state(status) for inside, status in walk(vfs, folder, skip)}


def carry(vfs: Vfs, source: Path, destination: Path, skip: Skip) -> dict[PurePath, Carried]:
    """Everything of `source` that is not there yet into `destination`: as hard links, or as copies where there are none.

    A file under two names of one inode shows what is written to it under both, also by a process that has it open now.
    """
    carried = {}
    for inside, status in walk(vfs, source, skip):
        place = destination / inside
        if stat.S_ISDIR(status.st_mode):
            _make_folder(vfs, place, status)
        elif vfs.status(place) is None and duplicate(vfs, source / inside, place, status):
            carried[inside] = Carried(_state(status), vfs.lstat(place).st_ino)
    return carried


def _make_folder(vfs: Vfs, place: Path, status: os.stat_result) -> bool:
    try:
        vfs.mkdir(place)
    except OperationError as error:
        if error.errno != errno.EEXIST:
            raise
        return False
    vfs.set_mode(place, stat.S_IMODE(status.st_mode) | stat.S_IRWXU)
    like(vfs, place, status)
    return True


def duplicate(vfs: Vfs, source: Path, place: Path, status: os.stat_result) -> bool:
    """Whether `place` is another name or a copy of `source` now; False if either changed meanwhile."""
    try:
        try:
            vfs.link(source, place)
        except OperationError as error:
            if error.errno not in _NO_LINKS:
                raise
            _copy(vfs, source, place, status)
    except OperationError as error:
        if error.errno not in (errno.ENOENT, errno.EEXIST):
            raise
        return False
    return True


def _copy(vfs: Vfs, source: Path, place: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        vfs.symlink(vfs.readlink(source), place)
        return
    if not stat.S_ISREG(status.st_mode):
        raise OperationError("copy", source, OSError(errno.EINVAL, "neither a file nor a folder, and cannot be linked"))
    reading = vfs.open(source, os.O_RDONLY)
    try:
        writing = vfs.create(place)
        try:
            while part := vfs.read(reading, _READ_SIZE, source):
                vfs.write(writing, part, place)
            vfs.fsync(writing, place)
        finally:
            vfs.close(writing, place)
    finally:
        vfs.close(reading, source)
    vfs.set_mode(place, stat.S_IMODE(status.st_mode))
    like(vfs, place, status)
    vfs.set_times(place, status.st_atime_ns, status.st_mtime_ns)


def like(vfs: Vfs, place: Path, status: os.stat_result) -> None:
    """Give `place` the owner and group of `status`, as far as we may."""
    with contextlib.suppress(OSError):
        mine = vfs.lstat(place)
        if (mine.st_uid, mine.st_gid) != (status.st_uid, status.st_gid):
            vfs.set_owner(place, status.st_uid, status.st_gid)


@frozen
class Settling:
    """`old`, of which `new` took the place. What others wrote into `old` until now goes into `new` before `old` is removed.

    Attributes:
        skip: what is removed without a look: it is ours, or the save replaced it.
        carried: what `carry` took from `old` to `new` before.
        scratch: a free path on the same file system.
    """

    vfs: Vfs
    old: Path
    new: Path
    skip: Skip
    carried: dict[PurePath, Carried]
    scratch: Path

    def run(self) -> bool:
        """False if somebody writes into `old` faster than it is emptied."""
        return any(self._round() for _ in range(_ROUNDS))

    def catch_up(self) -> bool:
        """Only bring what others wrote, and say whether there was something. Nothing is removed from `old`."""
        found = False
        for inside, status in walk(self.vfs, self.old, self.skip):
            if stat.S_ISDIR(status.st_mode):
                found |= _make_folder(self.vfs, self.new / inside, status)
            else:
                found |= self._keep(inside, status)
        return self._take_away() or found

    def _round(self) -> bool:
        folders = [PurePath()]
        for inside, status in walk(self.vfs, self.old, lambda _name, _status: False):
            if stat.S_ISDIR(status.st_mode):
                folders.append(inside)
                if len(inside.parts) > 1 or not self.skip(inside.name, status):
                    _make_folder(self.vfs, self.new / inside, status)
                continue
            if len(inside.parts) > 1 or not self.skip(inside.name, status):
                self._keep(inside, status)
            again = self.vfs.status(self.old / inside)
            if again is not None and _state(again) == _state(status):
                self.carried.pop(inside, None)  # first: should we come back, it was not somebody else who took it away
                self.vfs.unlink(self.old / inside)
        self._take_away()
        are_gone = [self._remove_folder(inside) for inside in reversed(folders)]
        return all(are_gone)

    def _keep(self, inside: PurePath, status: os.stat_result) -> bool:
        """Whoever wrote last is right: in the old folder, or in the new one since."""
        there, known = self.vfs.status(self.new / inside), self.carried.get(inside)
        if there is None:
            is_newer = known is None or known.source != _state(status)  # else it was taken away in its new place
        elif there.st_ino == status.st_ino or stat.S_ISDIR(there.st_mode):
            is_newer = False
        elif known is None:
            is_newer = status.st_mtime_ns > there.st_mtime_ns
        else:
            is_newer = known.source != _state(status) and known.placed == there.st_ino
        if is_newer and duplicate(self.vfs, self.old / inside, self.scratch, status):
            placed = self.vfs.lstat(self.scratch).st_ino
            self.vfs.rename(self.scratch, self.new / inside)
            self.carried[inside] = Carried(_state(status), placed)
        return is_newer

    def _take_away(self) -> bool:
        """What went from the old folder after it was carried, as the temporary files of a writer do."""
        gone = [path for path in self.carried if self.vfs.status(self.old / path) is None]
        for inside in gone:
            known, there = self.carried.pop(inside), self.vfs.status(self.new / inside)
            if there is not None and there.st_ino == known.placed:
                self.vfs.unlink(self.new / inside)
        return bool(gone)

    def _remove_folder(self, inside: PurePath) -> bool:
        try:
            self.vfs.rmdir(self.old / inside)
        except OperationError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        return True


def remove(vfs: Vfs, path: Path) -> None:
    """Remove `path` and everything below it. Nothing there is fine."""
    status = vfs.status(path)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        vfs.unlink(path)
        return
    for name in vfs.listdir(path):
        remove(vfs, path / name)
    vfs.rmdir(path)


def sync_folder(vfs: Vfs, path: Path) -> bool:
    """Make the names in a folder last. False where the file system has no such operation."""
    descriptor = vfs.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        vfs.fsync(descriptor, path)
    except OperationError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    finally:
        vfs.close(descriptor, path)
    return True
