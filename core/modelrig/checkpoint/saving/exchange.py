"""The usual way to commit: the new folder is made beside the old one, and the two change places in one operation.

Stage → files → manifest → foreign files linked → fsync → exchange → fsync of the parent → what others wrote into the old folder
meanwhile is carried over → the old folder is removed. Whoever holds the old folder open keeps it until the last step.

A process that was seen writing files of its own into the folder while we wrote ours is not to find it exchanged between two of its
steps (a temporary file made in the one folder, renamed in the other): then the files are exchanged in place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path, PurePath

from attrs import define, field

from modelrig.checkpoint.saving.manifest import Manifest, SavedFile, read_manifest
from modelrig.checkpoint.saving.names import HUGGING_FACE, Ownership, stage_prefix, tensor_file_variant
from modelrig.checkpoint.saving.stage import Stage, find_stages, make_stage
from modelrig.checkpoint.saving.surroundings import why_in_place
from modelrig.checkpoint.saving.tree import Carried, Settling, Skip, carry, like, states, sync_folder
from modelrig.checkpoint.saving.vfs import UNSUPPORTED, OperationError, Vfs
from modelrig.checkpoint.saving.writing import Job, Written, listed_in, write_files, write_manifest
from modelrig.errors import CheckpointError

_ACTIVE = "another process writes into it"
_NOT_THIS_FOLDER = UNSUPPORTED | {errno.EXDEV, errno.EBUSY}


class CannotExchange(Exception):  # noqa: N818 - not an error: there is another way
    """The folder cannot, or should not, change places with another. What was written until then is of use all the same."""

    def __init__(self, reason: str, prepared: tuple[Stage, Written] | None = None) -> None:
        super().__init__(reason)
        self.reason, self.prepared = reason, prepared


@define
class Progress:
    """How far a save has come: what an error must say, and what must be cleaned up."""

    committed: str = "no"
    notes: list[str] = field(factory=list)
    is_durable: bool = True
    #: of saves that were killed in the folder while its files changed one by one
    unfinished: list[Manifest] = field(factory=list)

    def manifests(self, old: Manifest | None) -> list[Manifest]:
        """Of all saves that may have left files in the folder."""
        return [*self.unfinished, *([old] if old else [])]


def tolerant_manifest(folder: Path, notes: list[str] | None = None) -> Manifest | None:
    """The manifest of a folder that is about to be replaced. One that is no manifest lists nothing."""
    try:
        return read_manifest(folder)
    except CheckpointError as error:
        if notes is not None:
            notes.append(f"the old manifest was not followed: {error.reason}")
        return None


def skipper(ownership: Ownership, replaced: frozenset[str]) -> Skip:
    """Which files at the top of the old folder are not carried over."""

    def skip(name: str, status: os.stat_result) -> bool:
        return not stat.S_ISDIR(status.st_mode) and (name in replaced or ownership.owns(name, status.st_size))

    return skip


def save_by_exchange(vfs: Vfs, job: Job, folder: Path, progress: Progress) -> tuple[SavedFile, ...]:
    """Write the checkpoint and put it at `folder`.

    Raises:
        CannotExchange: the folder must stay what it is. Nothing was changed.
        OperationError and whatever reading raises: `progress.committed` says what that means.
    """
    stage = make_stage(vfs, folder.parent / f"{stage_prefix(folder.name)}{job.id}", durable=job.durable)
    carried: dict[PurePath, Carried] = {}
    skip = skipper(job.ownership(()), frozenset())
    written = None
    try:
        before = vfs.status(folder)
        if before is not None:
            _probe(vfs, stage)
        old = tolerant_manifest(folder, progress.notes)
        skip = skipper(job.ownership(progress.manifests(old)), job.names_written())
        foreign = states(vfs, folder, skip) if before is not None else {}
        written = write_files(vfs, job, stage.tree, folder)
        manifest_row = write_manifest(vfs, job, stage.tree, written, old, folder)
        if before is not None:
            if foreign != states(vfs, folder, skip):
                raise CannotExchange(_ACTIVE)
            carried = carry(vfs, folder, stage.tree, skip)
            vfs.set_mode(stage.tree, stat.S_IMODE(before.st_mode))
            like(vfs, stage.tree, before)
        if job.durable:
            progress.is_durable = _sync_tree(vfs, stage.tree, carried)
        progress.committed = "uncertain"
        _commit(vfs, stage, folder, carried, skip)
        if job.durable:
            progress.is_durable &= sync_folder(vfs, folder.parent)
        progress.committed = "yes"
        _clean_up(vfs, stage, folder, skip, carried, progress.notes)
    except CannotExchange as error:
        progress.committed = "no"
        if written is None:
            stage.remove(vfs)
            raise
        raise CannotExchange(error.reason, (stage, written)) from error
    except BaseException:
        with contextlib.suppress(OSError):
            _recover(vfs, stage, folder, skip, carried, progress)
        raise
    return (*written.files, manifest_row)


def _probe(vfs: Vfs, stage: Stage) -> None:
    """Whether the file system can exchange folders at all: asked before gigabytes are written."""
    other = stage.folder / "other"
    vfs.mkdir(other)
    try:
        vfs.exchange(stage.tree, other)
        vfs.exchange(stage.tree, other)
    except OperationError as error:
        if error.errno in UNSUPPORTED:
            raise CannotExchange("its file system cannot exchange two folders") from error
        raise
    vfs.rmdir(other)


def _sync_tree(vfs: Vfs, tree: Path, carried: dict[PurePath, Carried]) -> bool:
    folders = {tree / inside.parent for inside in carried} | {tree}
    results = [sync_folder(vfs, one) for one in sorted(folders, reverse=True)]
    return all(results)


def _commit(vfs: Vfs, stage: Stage, folder: Path, carried: dict[PurePath, Carried], skip: Skip) -> None:
    if vfs.status(folder) is None:
        try:
            vfs.rename(stage.tree, folder)
        except OperationError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
    if reason := why_in_place(folder, vfs):
        raise CannotExchange(reason)
    # A process that writes files of its own and renames them sees its work torn apart when that happens around an exchange.
    if Settling(vfs, folder, stage.tree, skip, carried, stage.scratch).catch_up():
        raise CannotExchange(_ACTIVE)
    try:
        vfs.exchange(stage.tree, folder)
    except OperationError as error:
        if error.errno in _NOT_THIS_FOLDER:
            raise CannotExchange(f"the system does not exchange it: {error.strerror}") from error
        raise
    Settling(vfs, stage.tree, folder, skip, carried, stage.scratch).catch_up()


def _clean_up(
    vfs: Vfs, stage: Stage, folder: Path, skip: Skip, carried: dict[PurePath, Carried], notes: list[str] | None = None
) -> None:
    """Remove the old folder. What cannot be removed is left to the next save, and said."""
    if vfs.status(stage.tree) is not None:
        settling = Settling(vfs, stage.tree, folder, skip, carried, stage.scratch)
        if not settling.run():
            if notes is not None:
                notes.append(f"somebody keeps writing into the old folder; the next save removes {stage.folder}")
            return
    stage.remove(vfs)


def _recover(vfs: Vfs, stage: Stage, folder: Path, skip: Skip, carried: dict[PurePath, Carried], progress: Progress) -> None:
    """After an error: look what is in place, and leave nothing that is not needed."""
    status = vfs.status(folder)
    if status is None or status.st_ino != stage.inode:
        progress.committed = "no"
        stage.remove(vfs)
    elif progress.committed == "yes":
        _clean_up(vfs, stage, folder, skip, carried)
    # Else it is in place, though something failed: after a power failure the old folder may be, so both are kept for now.


def sweep(vfs: Vfs, folder: Path, *, durable: bool, notes: list[str]) -> None:
    """Finish or remove what killed saves of `folder` left beside it."""
    ours, others = find_stages(vfs, folder.parent, stage_prefix(folder.name))
    notes += [f"left alone, it is none of ours: {path}" for path in others]
    for stage in ours:
        if not stage.was_exchanged(vfs):
            stage.remove(vfs)
        elif vfs.status(folder) is None:
            notes.append(f"left alone, its checkpoint is not there any more: {stage.folder}")
        else:
            if durable:
                sync_folder(vfs, folder.parent)
            _clean_up(vfs, stage, folder, _skip_of_the_dead(stage, folder), {}, notes)


def _skip_of_the_dead(stage: Stage, folder: Path) -> Skip:
    """What a killed save, whose checkpoint is in place at `folder`, was about to remove from the old folder."""
    new, old = tolerant_manifest(folder), tolerant_manifest(stage.tree)
    variants = None
    if new is not None:
        variants = frozenset(one for name in new.files if (one := tensor_file_variant(name, HUGGING_FACE)) is not None)
    listed = listed_in([old] if old else [])
    return skipper(Ownership(HUGGING_FACE, variants, listed), frozenset(new.files if new else ()))
