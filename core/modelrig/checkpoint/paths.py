"""Which files a checkpoint may name. Names in its JSON files are foreign text: they are judged before anything is opened."""

from __future__ import annotations

import os
import re
from pathlib import Path

from modelrig.components import Snapshot
from modelrig.errors import FileError

#: while a save exchanges the files of a folder in place, this link in it points to the set that counts
CURRENT = ".modelrig.current"

_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(1, 10))})


def name_problem(name: str) -> str | None:
    """Why `name` cannot name a file of the folder itself, on POSIX or on Windows; None if it can."""
    if not name or name in (".", ".."):
        return "names no file"
    if found := _FORBIDDEN.search(name):
        return f"has the character {found[0]!r}; a plain file name is needed"
    if name[-1] in " .":
        return "ends in a space or a dot"
    if name.split(".", 1)[0].rstrip(" ").lower() in _DEVICES:
        return "is the name of a device on Windows"
    if len(name.encode("utf-8", "surrogatepass")) > 255:
        return "is longer than 255 bytes"
    return None


def inside(snapshot: Snapshot, name: str) -> Path:
    """The path of file `name` in the snapshot's folder, which may be a link to somewhere inside it or inside its `link_roots`.

    Whoever opens a file of a snapshot, tensors or not, asks here for its path. The file need not exist. Raises `FileError`
    (IO-PATH) for a link that leads out.
    """
    path = snapshot.root / name
    if "/" not in name and not path.is_symlink():  # thousands of shards are asked for; a folder on the way may be a link too
        return path
    try:
        target = Path(os.path.realpath(path))
    except OSError as error:
        raise FileError("IO-PATH", f"a link that cannot be followed: {error.strerror}", path=path) from error
    if not any(target.is_relative_to(os.path.realpath(root)) for root in (snapshot.root, *snapshot.link_roots)):
        raise FileError("IO-PATH", "a link that leaves the checkpoint's folder", path=path, hint="put a copy in its place")
    return path


def optional(snapshot: Snapshot, name: str) -> Path | None:
    """`inside`, or None if there is nothing of that name. A link that points to nothing is there: opening it says what is wrong."""
    path = inside(snapshot, name)
    return path if os.path.lexists(path) and not is_pending(path) else None


def is_pending(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a name that a save in place has made for its own files, or kept of the old ones, while the others count.

    It is a link through the pointer of such a save (`modelrig.checkpoint.saving.in_place`) to nothing, and stands for nothing.
    """
    try:
        text = os.readlink(path)  # noqa: PTH115
    except OSError:
        return False
    return text == f"{CURRENT}/{os.path.basename(path)}" and not os.path.exists(path)  # noqa: PTH110, PTH119 - called for each file
