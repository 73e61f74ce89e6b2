"""Saving a checkpoint: all or nothing at every instant, and everything that is not ours stays.

locate → lock → sweep → look ahead → exchange of folders, or of files in place → unlock
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from attrs import frozen

from modelrig.checkpoint.layout import FileNames
from modelrig.checkpoint.paths import CURRENT, name_problem
from modelrig.checkpoint.saving.exchange import CannotExchange, Progress, save_by_exchange, sweep
from modelrig.checkpoint.saving.in_place import save_in_place, sweep_inside
from modelrig.checkpoint.saving.lock import locked
from modelrig.checkpoint.saving.manifest import SavedFile
from modelrig.checkpoint.saving.names import HUGGING_FACE, MANIFEST, lock_name, new_id, tensor_file_variant
from modelrig.checkpoint.saving.shards import shard_bytes
from modelrig.checkpoint.saving.surroundings import locate, why_in_place
from modelrig.checkpoint.saving.vfs import OperationError, Vfs
from modelrig.checkpoint.saving.writing import Job, Read
from modelrig.components import DTYPE_BITS, FormatPlanner, StoredTensor
from modelrig.errors import ModelrigError, SaveError, quoted

_SAID = {
    "no": "the folder is as it was",
    "yes": "the new checkpoint is in place",
    "uncertain": "the new checkpoint is in place, but may not outlive a power failure",
}


@frozen(kw_only=True)
class SaveReport:
    """What a save did.

    `durability` is `atomic+durable`; `atomic` where nothing was, or could be, forced to the disk; or `in place`, where the folder
    had to stay the folder it is and its files changed together, for the reason among the notes.
    """

    path: Path  # the real folder
    files: tuple[SavedFile, ...]
    bytes: int
    seconds: float
    durability: str
    notes: tuple[str, ...]


def save_checkpoint(
    target: str | os.PathLike[str],
    tensors: Sequence[StoredTensor],
    read: Read,
    format: FormatPlanner,  # noqa: A002
    *,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    metadata: Mapping[str, str] | None = None,
    files: Mapping[str, bytes | Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
    durable: bool = True,
    overwrite: bool = True,
    problem: Callable[[StoredTensor], str | None] | None = None,
    vfs: Vfs | None = None,
) -> SaveReport:
    """Write a checkpoint to the folder `target`, in place of what is there.

    Args:
        tensors: in the order in which they are laid out in files.
        read: yields the bytes of a tensor, as `FormatPlanner.write` asks for them. Where the first way to commit turns out to be
            closed, everything is read once more.
        format: a format's planner that has `files`, `size` and `write`.
        variant: a mark such as "fp16" for the tensor files' names. The files of other variants stay.
        metadata: of each tensor file; `{"format": "pt"}` by default, which other tools look for.
        files: what else belongs to the checkpoint: name → bytes, or the file to copy them from.
        progress: called with (bytes of tensors written, bytes in all).
        durable: force everything to the disk, in the order that outlives a power failure.
        overwrite: whether a folder that holds something may be the target.
        problem: says why a tensor cannot be read, before anything is written.

    Raises:
        SaveError: SV-ARGS, SV-TARGET, SV-TENSOR, SV-READ, SV-SPACE, SV-IO; `committed` says what became of the target.
        SaveInProgress: another save of this folder is running.
        FormatError: the format cannot hold a tensor.
    """
    vfs, began = vfs or Vfs(), time.perf_counter()
    job = _check(
        tensors,
        read,
        format,
        max_shard_size=max_shard_size,
        variant=variant,
        metadata=metadata,
        files=files,
        progress=progress,
        durable=durable,
    )
    _refuse_unreadable(tensors, problem)
    state = Progress()
    try:
        folder = locate(Path(target), vfs)
        saved, durability = _save(vfs, job, folder, overwrite, state)
    except OperationError as error:
        raise _failed(error, Path(target), state) from error
    except SaveError as error:
        error.committed = state.committed
        raise
    except Exception as error:
        reason = f"{error}" if isinstance(error, ModelrigError) else f"{type(error).__name__}: {error}"
        reason = f"what was to be saved could not be read: {reason}; {_SAID[state.committed]}"
        raise SaveError("SV-READ", reason, path=Path(target), committed=state.committed) from error
    return SaveReport(
        path=folder,
        files=saved,
        bytes=sum(file.bytes for file in saved),
        seconds=time.perf_counter() - began,
        durability=durability,
        notes=tuple(state.notes),
    )


def _save(vfs: Vfs, job: Job, folder: Path, overwrite: bool, state: Progress) -> tuple[tuple[SavedFile, ...], str]:
    made = _make_parents(vfs, folder.parent)
    try:
        with ExitStack() as locks:
            _lock(vfs, locks, folder, job, state)
            _look_ahead(vfs, job, folder, overwrite)
            reason, prepared = why_in_place(folder, vfs) if vfs.status(folder) is not None else None, None
            if reason is None:
                try:
                    saved = save_by_exchange(vfs, job, folder, state)
                except CannotExchange as error:
                    reason, prepared = error.reason, error.prepared
                else:
                    return saved, "atomic+durable" if job.durable and state.is_durable else "atomic"
            state.notes.append(f"its files were exchanged in place: {reason}")
            return save_in_place(vfs, job, folder, state, prepared), "in place"
    except BaseException:
        if state.committed == "no":
            _remove_folders(vfs, made)
        raise


def _lock(vfs: Vfs, locks: ExitStack, folder: Path, job: Job, state: Progress) -> None:
    """Lock the folder, and then clean up what killed saves left: without a lock, a stage may be that of a living one.

    The lock lies beside the folder. Where nothing can be written there, it lies inside; one that lies inside is respected anyway.
    """
    beside, inside = folder.parent / lock_name(folder.name), folder / lock_name("")
    exists = vfs.status(folder) is not None
    is_beside = not exists or vfs.is_writable(folder.parent)
    paths = [beside] if is_beside else []
    if not is_beside or vfs.status(inside) is not None:
        paths.append(inside)
    are_locked = [locks.enter_context(locked(vfs, path, folder)) for path in paths]
    if not all(are_locked):
        state.notes.append("the file system has no locks: nothing keeps two saves of this folder apart")
        return
    if is_beside:
        sweep(vfs, folder, durable=job.durable, notes=state.notes)
    if exists:
        sweep_inside(vfs, folder, state, durable=job.durable)


def _look_ahead(vfs: Vfs, job: Job, folder: Path, overwrite: bool) -> None:
    """What can be known to fail fails here, before anything is written."""
    exists = vfs.status(folder) is not None
    if exists:
        names = set(vfs.listdir(folder))
        if not overwrite and names - {lock_name("")}:
            raise SaveError("SV-TARGET", "is not empty, and overwriting was not asked for", path=folder)
        if not vfs.is_writable(folder):
            raise SaveError("SV-TARGET", "is not writable", path=folder, operation="access")
        layout = job.layout()
        for name in (*(shard.name for shard in layout.shards), *job.files, layout.entry, MANIFEST):
            if name in names and stat.S_ISDIR(vfs.stat(folder / name).st_mode):
                raise SaveError("SV-TARGET", "is a folder, and a file of this name is to be saved", path=folder / name)
    needed, free = job.bytes_needed(), vfs.free_bytes(folder if exists else folder.parent)
    if needed > free:
        hint = "old and new files are there at the same time until the save is complete"
        reason = f"{needed:,} bytes are needed and {free:,} are free; {_SAID['no']}"
        raise SaveError("SV-SPACE", reason, path=folder, operation="statvfs", hint=hint)


def _make_parents(vfs: Vfs, folder: Path) -> list[Path]:
    """Make `folder` and its parents where they are missing; those that were made, outermost first."""
    missing = []
    while vfs.status(folder) is None:
        missing.append(folder)
        folder = folder.parent
    made: list[Path] = []
    try:
        for one in reversed(missing):
            vfs.mkdir(one)
            made.append(one)
    except BaseException:
        _remove_folders(vfs, made)
        raise
    return made


def _remove_folders(vfs: Vfs, made: list[Path]) -> None:
    for folder in reversed(made):
        with suppress(OSError):
            vfs.rmdir(folder)


# ------------------------------------------------------------------------------------------------ arguments and errors


def _check(
    tensors: Sequence[StoredTensor],
    read: Read,
    format_: FormatPlanner,
    *,
    max_shard_size: int | str,
    variant: str | None,
    metadata: Mapping[str, str] | None,
    files: Mapping[str, bytes | Path] | None,
    progress: Callable[[int, int], None] | None,
    durable: bool,
) -> Job:
    from modelrig import __version__

    names = getattr(format_, "files", None)
    if not isinstance(names, FileNames):
        raise SaveError("SV-ARGS", f"{quoted(format_)} only reads: it has no `files`, `size` and `write`", locus="format")
    if variant is not None and (not variant or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", variant)):
        raise SaveError("SV-ARGS", f"{quoted(variant)}; letters and digits are accepted", locus="variant")
    job = Job(
        id=new_id(),
        tensors=tuple(tensors),
        read=read,
        format=format_,
        names=names,
        formats=HUGGING_FACE if names in HUGGING_FACE else (names, *HUGGING_FACE),
        limit=shard_bytes(max_shard_size),
        variant=variant,
        metadata={"format": "pt"} if metadata is None else dict(metadata),
        files=dict(files or {}),
        progress=progress,
        durable=durable,
        tool=f"modelrig {__version__}",
    )
    _check_names(job)
    return job


def _check_names(job: Job) -> None:
    seen: set[str] = set()
    for tensor in job.tensors:
        if tensor.dtype not in DTYPE_BITS:  # the format says it better, if it knows none either
            job.format.size((tensor,), job.metadata)
            raise SaveError("SV-ARGS", f"{quoted(tensor.dtype)} is no dtype", locus=tensor.name)
        for name in (tensor.name, *tensor.aliases):
            if name in seen:
                raise SaveError("SV-ARGS", "is given twice", locus=name)
            seen.add(name)
    for name, data in job.files.items():
        problem = name_problem(name)
        if problem is None and (name == MANIFEST or tensor_file_variant(name, job.formats) is not None):
            problem = "is the name of a file that a save writes itself"
        if problem is None and name.startswith(CURRENT.rpartition(".")[0]):
            problem = "is the name of a working file of a save"
        if problem is None and not isinstance(data, bytes) and not Path(data).is_file():
            problem = f"is to be copied from {quoted(str(data))}, which is no file"
        if problem is not None:
            raise SaveError("SV-ARGS", f"{quoted(name)} {problem}", locus="files")
    job.sizes()  # raises for what the format cannot hold


def _refuse_unreadable(tensors: Sequence[StoredTensor], problem: Callable[[StoredTensor], str | None] | None) -> None:
    found = [(tensor.name, text) for tensor in tensors if problem and (text := problem(tensor))]
    if found:
        more = f", and {len(found) - 1:,} more: {', '.join(name for name, _ in found[1:6])}" if len(found) > 1 else ""
        raise SaveError("SV-TENSOR", f"{found[0][1]}{more}; nothing was written", locus=found[0][0])


def _failed(error: OperationError, target: Path, state: Progress) -> SaveError:
    """What the system refused, and what became of the target."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return SaveError(
        "SV-SPACE" if full else "SV-IO",
        f"{error.operation} of {quoted(str(error.path))} failed: {error.strerror}; {_SAID[state.committed]}",
        path=target,
        committed=state.committed,
        operation=error.operation,
        hint="make room, or save to another disk" if full else None,
    )
