"""Where a save goes: the real folder behind links, folders that must not be replaced, and those that cannot be exchanged."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from modelrig.checkpoint.mounts import mount_points_in
from modelrig.checkpoint.saving.vfs import Vfs
from modelrig.errors import SaveError

_SHOWN = 3


def locate(target: Path, vfs: Vfs) -> Path:
    """The real folder that a save to `target` writes, existing or not. Raises `SaveError` (SV-TARGET)."""
    given = Path(os.path.abspath(target))  # noqa: PTH100 - links are judged before they are followed
    folder = Path(os.path.realpath(given))
    for path in (given, folder):
        if cache := _hub_cache(path):
            hint = "save to a folder of your own; the hub's cache holds what was downloaded, shared by all revisions"
            raise SaveError("SV-TARGET", f"lies in the hub's cache at {cache}", path=target, hint=hint)
    status = vfs.status(folder)
    if status is not None and folder.is_symlink():
        raise SaveError("SV-TARGET", "a link that leads back to itself", path=target)
    if status is not None and not folder.is_dir():
        raise SaveError("SV-TARGET", "is a file; a folder is needed", path=target)
    if not folder.name:
        raise SaveError("SV-TARGET", "is the root of the file system", path=target)
    return folder


def _hub_cache(path: Path) -> Path | None:
    """The repository in a hub's cache that `path` lies in: a folder with `snapshots` beside `blobs` or `refs`."""
    for folder in (path, *path.parents):
        if (folder / "snapshots").is_dir() and ((folder / "blobs").is_dir() or (folder / "refs").is_dir()):
            inside = path.relative_to(folder).parts
            if not inside or inside[0] in ("snapshots", "blobs", "refs"):
                return folder
    return None


def why_in_place(folder: Path, vfs: Vfs) -> str | None:
    """Why the existing `folder` must stay the folder it is, and only its files may be exchanged; None if it may be exchanged."""
    if points := mount_points_in(folder):
        where = "it is" if points[0] == str(folder) else "it holds"
        return f"{where} a mount point"
    if vfs.stat(folder).st_dev != vfs.stat(folder.parent).st_dev:
        return "it is a mount point"
    if not vfs.is_writable(folder.parent):
        return f"{folder.parent} is not writable"
    if processes := standing_in(folder):
        shown = ", ".join(map(str, processes[:_SHOWN])) + (" …" if len(processes) > _SHOWN else "")
        return f"it holds the working directory of process {shown}"
    return None


def standing_in(folder: Path) -> list[int]:
    """Processes whose working directory is `folder` or lies in it, as far as the system shows us."""
    try:
        status = folder.stat()
    except OSError:
        return []
    below = f"{folder}{os.sep}"
    found = []
    try:
        names = os.listdir("/proc")  # noqa: PTH208 - names are all we need
    except OSError:
        names = []
    if "self" not in names:  # not Linux: we know our own only
        with contextlib.suppress(OSError):
            here = str(Path.cwd().resolve())
            return [os.getpid()] if here == str(folder) or here.startswith(below) else []
        return []
    for name in names:
        if name.isdecimal():
            with contextlib.suppress(OSError):  # another user's process, or one that has ended
                link = Path("/proc", name, "cwd")
                text = str(link.readlink())
                if text == str(folder) or text.startswith(below) or _is_same(link, status):
                    found.append(int(name))
    return found


def _is_same(link: Path, status: os.stat_result) -> bool:
    found = link.stat()
    return (found.st_ino, found.st_dev) == (status.st_ino, status.st_dev)
