"""A folder in which a save is prepared, and what a dead one left behind.

`.model.stage-<id>/` holds `tree`, which becomes the checkpoint, and an empty file whose name says the inode of `tree`. That file
proves that we made the stage; and where another folder is called `tree` now, it is the one the checkpoint was exchanged with.
"""

from __future__ import annotations

import contextlib
import errno
import re
import stat
from pathlib import Path

from attrs import frozen

from modelrig.checkpoint.saving.names import is_stage
from modelrig.checkpoint.saving.tree import remove, sync_folder
from modelrig.checkpoint.saving.vfs import OperationError, Vfs

_MARKER = re.compile(r"modelrig-stage\.([0-9]+)")


@frozen
class Stage:
    """A stage; `inode` is that of the tree it was made with."""

    folder: Path
    inode: int

    @property
    def tree(self) -> Path:
        return self.folder / "tree"

    @property
    def scratch(self) -> Path:
        """A free path for one file at a time."""
        return self.folder / "scratch"

    @property
    def marker(self) -> Path:
        return self.folder / f"modelrig-stage.{self.inode}"

    def was_exchanged(self, vfs: Vfs) -> bool:
        """Whether `tree` is the folder whose place ours has taken."""
        status = vfs.status(self.tree)
        return status is not None and status.st_ino != self.inode

    def remove(self, vfs: Vfs) -> None:
        """With all that is in it; the proof that it is ours goes last."""
        for name in vfs.listdir(self.folder):
            if name != self.marker.name:
                remove(vfs, self.folder / name)
        vfs.unlink(self.marker)
        vfs.rmdir(self.folder)


def make_stage(vfs: Vfs, folder: Path, *, durable: bool) -> Stage:
    """A new stage at `folder`. What fails leaves nothing."""
    vfs.mkdir(folder)
    try:
        vfs.mkdir(folder / "tree")
        stage = Stage(folder, vfs.lstat(folder / "tree").st_ino)
        vfs.close(vfs.create(stage.marker), stage.marker)
        if durable:
            sync_folder(vfs, folder)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(vfs, folder)
        raise
    return stage


def find_stages(vfs: Vfs, parent: Path, prefix: str) -> tuple[list[Stage], list[Path]]:
    """Stages in `parent` that we made, and folders that are only called so. One that holds nothing yet is removed at once."""
    ours, others = [], []
    for name in vfs.listdir(parent):
        status = vfs.status(parent / name) if is_stage(name, prefix) else None
        if status is None or not stat.S_ISDIR(status.st_mode):
            continue
        found = [Stage(parent / name, int(one[1])) for inner in vfs.listdir(parent / name) if (one := _MARKER.fullmatch(inner))]
        if found:
            ours.append(found[0])
        elif not _remove_unused(vfs, parent / name):
            others.append(parent / name)
    return ours, others


def _remove_unused(vfs: Vfs, folder: Path) -> bool:
    """Remove a stage whose maker was killed before it could mark it, or after it had removed the mark: no file is in it."""
    try:
        if "tree" in vfs.listdir(folder):
            vfs.rmdir(folder / "tree")
        vfs.rmdir(folder)
    except OperationError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    return True
