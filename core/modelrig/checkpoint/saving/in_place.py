"""The other way to commit, for a folder that must stay the folder it is: all its files change in one operation.

A folder that is a mount point, or in which a shell stands, cannot change places with another. So the new files are written into
a stage inside of it, and what they replace becomes links through one pointer:

    config.json        → .modelrig.current/config.json
    model.safetensors  → .modelrig.current/model.safetensors
    .modelrig.current  → .modelrig.stage-<id>/old          first the same files under other names: nothing changes
                       → .modelrig.stage-<id>/tree         one rename, the commit: all of them change

Afterwards the links become plain files again, one by one, which changes nothing either. At every instant config, index, shards and
manifest are those of one save, for every reader that follows links; names that only one of both saves has point to nothing while
it is the other's turn, which readers take for absent (`os.path.isfile`, and `modelrig.checkpoint.paths`). A listing shows them.

What cannot be had: a foreign reader that opened some files before the commit and opens others after it sees both. That holds for
the exchange of folders too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from modelrig.checkpoint.paths import CURRENT
from modelrig.checkpoint.saving.exchange import Progress, skipper, tolerant_manifest
from modelrig.checkpoint.saving.manifest import SavedFile
from modelrig.checkpoint.saving.names import MANIFEST, stage_prefix
from modelrig.checkpoint.saving.stage import Stage, find_stages, make_stage
from modelrig.checkpoint.saving.tree import duplicate, remove, sync_folder
from modelrig.checkpoint.saving.vfs import OperationError, Vfs
from modelrig.checkpoint.saving.writing import Job, Written, write_files, write_manifest

_POINTER = re.compile(rf"{re.escape(stage_prefix(''))}[0-9a-f]{{32}}/(old|tree)")


def save_in_place(
    vfs: Vfs, job: Job, folder: Path, progress: Progress, prepared: tuple[Stage, Written] | None = None
) -> tuple[SavedFile, ...]:
    """Write the checkpoint into `folder`, which exists. Raises like `save_by_exchange`.

    Args:
        prepared: a stage beside the folder and what was written into it, to be used here.
    """
    place, written = folder / f"{stage_prefix('')}{job.id}", None
    if prepared and (moved := _move_inside(vfs, *prepared, place)):
        stage, written = moved, prepared[1]
    else:
        stage = make_stage(vfs, place, durable=job.durable)
    try:
        has_links = _has_links(vfs, stage)
        old = tolerant_manifest(folder, progress.notes)
        if written is None or not has_links:
            for name in vfs.listdir(stage.tree):
                remove(vfs, stage.tree / name)
            written = write_files(vfs, job, stage.tree, folder, None if has_links else job.id[:12])
        remove(vfs, stage.tree / MANIFEST)
        manifest_row = write_manifest(vfs, job, stage.tree, written, old, folder)
        is_ours = skipper(job.ownership(progress.manifests(old)), written.names)
        replaced = [
            name for name in vfs.listdir(folder) if (status := vfs.status(folder / name)) is not None and is_ours(name, status)
        ]
        new = vfs.listdir(stage.tree)
        if job.durable:
            progress.is_durable = sync_folder(vfs, stage.tree)
        if has_links:
            _point_to_old(vfs, stage, folder, replaced, new, job.durable)
            _point(vfs, stage, folder, stage.tree.name)
        else:
            progress.notes.append("the file system has no links: config and tensor files change one after the other")
            _replace_one_by_one(vfs, job, stage, folder, written, replaced, progress)
        progress.committed = "uncertain"
        if job.durable:
            progress.is_durable &= sync_folder(vfs, folder)
        progress.committed = "yes"
        _settle(vfs, folder, durable=job.durable)
        stage.remove(vfs)
    except BaseException:
        with contextlib.suppress(OSError):
            _recover(vfs, stage, folder, progress)
        raise
    return (*written.files, manifest_row)


def _move_inside(vfs: Vfs, stage: Stage, written: Written, place: Path) -> Stage | None:
    """The stage at `place`, without the files of others that were carried into it; None where it cannot be moved there."""
    try:
        for name in vfs.listdir(stage.tree):
            if name not in written.names:
                remove(vfs, stage.tree / name)
        vfs.rename(stage.folder, place)
    except BaseException as error:
        with contextlib.suppress(OSError):
            stage.remove(vfs)
        if isinstance(error, OperationError) and error.operation == "rename" and error.errno in (errno.EXDEV, errno.EBUSY):
            return None
        raise
    return Stage(place, stage.inode)


# ------------------------------------------------------------------------------------------------ links


def _has_links(vfs: Vfs, stage: Stage) -> bool:
    """Whether the file system has hard and symbolic links, and a name can be replaced by another."""
    first, second = stage.folder / "first", stage.folder / "second"
    try:
        vfs.symlink(stage.marker.name, first)
        vfs.link(stage.marker, second)
        vfs.rename(first, second)
        is_link = stat.S_ISLNK(vfs.lstat(second).st_mode)
    except OperationError:
        is_link = False
    remove(vfs, first)
    remove(vfs, second)
    return is_link


def _point_to_old(vfs: Vfs, stage: Stage, folder: Path, replaced: Iterable[str], new: Iterable[str], durable: bool) -> None:
    """Every name that changes becomes a link through the pointer, which leads to what the name has stood for."""
    old, kept = stage.folder / "old", stage.folder / "kept"
    vfs.mkdir(old)
    vfs.mkdir(kept)
    for name in replaced:
        status = vfs.lstat(folder / name)
        if stat.S_ISLNK(status.st_mode):  # a relative one would lead elsewhere from another folder
            vfs.symlink(os.path.realpath(folder / name), old / name)
            vfs.link(folder / name, kept / name)
        else:
            duplicate(vfs, folder / name, old / name, status)
    if durable:
        sync_folder(vfs, old)
    _point(vfs, stage, folder, old.name)
    for name in sorted({*replaced, *new}):
        vfs.symlink(f"{CURRENT}/{name}", stage.scratch)
        vfs.rename(stage.scratch, folder / name)
    if durable:
        sync_folder(vfs, folder)


def _point(vfs: Vfs, stage: Stage, folder: Path, to: str) -> None:
    vfs.symlink(f"{stage.folder.name}/{to}", stage.scratch)
    vfs.rename(stage.scratch, folder / CURRENT)


def _settle(vfs: Vfs, folder: Path, *, durable: bool) -> None:
    """Make plain files of the links again, of whatever the pointer leads to. Nothing changes for a reader."""
    status = vfs.status(folder / CURRENT)
    if status is None or not stat.S_ISLNK(status.st_mode):
        return
    text = vfs.readlink(folder / CURRENT)
    if not _POINTER.fullmatch(text):  # none of ours
        return
    source = folder / text
    for name in vfs.listdir(folder):
        status = vfs.status(folder / name)
        if status is None or not stat.S_ISLNK(status.st_mode) or vfs.readlink(folder / name) != f"{CURRENT}/{name}":
            continue
        origin = source / name
        if source.name == "old" and vfs.status(source.parent / "kept" / name) is not None:
            origin = source.parent / "kept" / name
        found = vfs.status(origin)
        if found is None:
            vfs.unlink(folder / name)
            continue
        scratch = source.parent / "scratch"
        remove(vfs, scratch)
        duplicate(vfs, origin, scratch, found)
        vfs.rename(scratch, folder / name)
    if durable:
        sync_folder(vfs, folder)
    vfs.unlink(folder / CURRENT)


def _recover(vfs: Vfs, stage: Stage, folder: Path, progress: Progress) -> None:
    status = vfs.status(folder / CURRENT)
    if status is not None:
        is_new = vfs.readlink(folder / CURRENT) == f"{stage.folder.name}/{stage.tree.name}"
        if is_new and progress.committed != "yes":
            progress.committed = "uncertain"
            return  # both are kept until the next save
        if not is_new:
            progress.committed = "no"
        _settle(vfs, folder, durable=False)
    if progress.committed != "uncertain":  # else its manifest says to the next save which files are whose
        stage.remove(vfs)


def sweep_inside(vfs: Vfs, folder: Path, progress: Progress, *, durable: bool) -> None:
    """Finish or undo what killed saves left in `folder`."""
    if durable and vfs.status(folder / CURRENT) is not None:
        sync_folder(vfs, folder)
    _settle(vfs, folder, durable=durable)
    ours, others = find_stages(vfs, folder, stage_prefix(""))
    progress.notes += [f"left alone, it is none of ours: {path}" for path in others]
    for stage in ours:
        if manifest := tolerant_manifest(stage.tree):
            progress.unfinished.append(manifest)
        stage.remove(vfs)


# ------------------------------------------------------------------------------------------------ without links


def _replace_one_by_one(
    vfs: Vfs, job: Job, stage: Stage, folder: Path, written: Written, replaced: list[str], progress: Progress
) -> None:
    """For file systems without links. Shards are called like no others, so the file a reader starts from decides.

    Readers look for `model.safetensors`, its index, `pytorch_model.bin`, its index, in this order. If the new checkpoint starts
    from the same file as the old one, or from an earlier one, its rename is the commit; else removing the old one's is.
    What cannot be had here: a changed config.json comes one rename before the commit.
    """
    order = [name for names in job.formats for name in (names.single(job.variant), names.index(job.variant))]
    entry = written.layout.entry
    present = [name for name in order if name in replaced]
    is_later = bool(present) and order.index(present[0]) < order.index(entry)
    shards = [shard.name for shard in written.layout.shards if shard.name != entry]
    small = [name for name in vfs.listdir(stage.tree) if name not in (*shards, entry, MANIFEST)]
    for name in shards:
        vfs.rename(stage.tree / name, folder / name)
    if is_later:  # whatever lies between the two would be found when the first is gone
        for name in present[1:]:
            if name != entry:
                vfs.unlink(folder / name)
        vfs.rename(stage.tree / entry, folder / entry)
    kept = stage.folder / "kept"
    vfs.mkdir(kept)
    for name in small:
        if (status := vfs.status(folder / name)) is not None:
            duplicate(vfs, folder / name, kept / name, status)
    try:
        for name in small:
            vfs.rename(stage.tree / name, folder / name)
        if is_later:
            vfs.unlink(folder / present[0])
        else:
            vfs.rename(stage.tree / entry, folder / entry)
    except BaseException:
        with contextlib.suppress(OSError):
            _take_back(vfs, stage, folder, small, kept, progress, present[0] if is_later else None, entry)
        raise
    progress.committed = "uncertain"
    if job.durable:
        sync_folder(vfs, folder)
    written_names = {*shards, *small, entry, MANIFEST, *(present if is_later else ())}
    for name in sorted(set(replaced) - written_names):
        vfs.unlink(folder / name)
    vfs.rename(stage.tree / MANIFEST, folder / MANIFEST)


def _take_back(
    vfs: Vfs,
    stage: Stage,
    folder: Path,
    small: list[str],
    kept: Path,
    progress: Progress,
    first: str | None,
    entry: str,
) -> None:
    """The small files as they were, unless the commit has happened though it was reported as failed."""
    progress.committed = "uncertain"
    is_committed = vfs.status(folder / first) is None if first else vfs.status(stage.tree / entry) is None
    if is_committed:
        return
    for name in small:
        if vfs.status(stage.tree / name) is None:
            if vfs.status(kept / name) is not None:
                vfs.rename(kept / name, folder / name)
            else:
                vfs.unlink(folder / name)
    progress.committed = "no"
