"""local: a folder on this machine, plain or a snapshot in the cache of the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from modelrig.components import Snapshot
from modelrig.errors import SourceError

NAME = "local"


def existing_path(reference: str) -> Path | None:
    """The absolute path `reference` names on this machine, if there is something. A path goes before every other reading."""
    if not reference:
        return None
    expanded = _expanded(reference)
    return Path(os.path.abspath(expanded)) if os.path.lexists(expanded) else None  # noqa: PTH100 - links are kept as given


def _expanded(reference: str) -> str:
    return os.path.expanduser(reference)  # noqa: PTH111 - Path.expanduser raises where there is no such user


class LocalPlanner:
    @staticmethod
    def claims(reference: str) -> str | None:
        """The path, if it exists or can be nothing but a path."""
        path = existing_path(reference)
        if path is not None:
            return str(path)
        return f"{reference} is written as a path" if reference.startswith(("/", "./", "../", "~/")) else None

    @staticmethod
    def resolve(reference: str) -> Snapshot:
        """The folder as it is. Raises `SourceError` (SR-UNKNOWN) unless it is one."""
        path = existing_path(reference)
        if path is None or not path.exists():
            problem = "there is no such folder" if path is None else "a link that points to nothing"
            raise SourceError("SR-UNKNOWN", problem, path=_expanded(reference))
        if not path.is_dir():
            hint = f"give its folder, {path.parent}" if path.is_file() else None
            raise SourceError("SR-UNKNOWN", "not a folder; a checkpoint is a folder", path=path, hint=hint)
        if (path / "snapshots").is_dir() and (path / "blobs").is_dir():
            found = ", ".join(sorted(folder.name for folder in (path / "snapshots").iterdir())[:5])
            hint = f"give one of its snapshots: {path / 'snapshots'}/… with {found}" if found else None
            raise SourceError("SR-UNKNOWN", "a repository of the hub's cache, not a checkpoint", path=path, hint=hint)
        blobs = blobs_of(path)
        return Snapshot(
            reference=reference,
            root=path,
            source=NAME,
            revision=path.resolve().name if blobs else None,
            link_roots=blobs,
        )


def blobs_of(folder: Path) -> tuple[Path, ...]:
    """The blobs folder that the links of a hub-cache snapshot point into: `…/snapshots/<revision>` → `…/blobs`.

    One that is a link itself is none of the hub's: it could make the whole disk part of the checkpoint.
    """
    real = folder.resolve()
    blobs = real.parent.parent / "blobs"
    return (blobs,) if real.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink() else ()
