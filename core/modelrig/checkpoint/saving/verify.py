"""Whether the files of a folder are those that were saved or downloaded, byte for byte."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from attrs import frozen

from modelrig.checkpoint.files import open_regular
from modelrig.checkpoint.paths import is_pending
from modelrig.checkpoint.saving.manifest import Manifest, read_manifest
from modelrig.checkpoint.saving.names import HUGGING_FACE, MANIFEST, tensor_file_variant
from modelrig.errors import FileError, IntegrityError

_READ_SIZE = 4 << 20
_GIT_BLOB, _LFS_BLOB = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


@frozen
class Problem:
    """What is wrong with a file, with a code of `modelrig.errors.CODES`; `file` is None for the folder as a whole."""

    code: str
    file: str | None
    text: str


@frozen(kw_only=True)
class Verification:
    """What was found. Without a manifest, and outside of the hub's cache, there is nothing to compare with."""

    #: names of the files whose bytes were compared
    checked: tuple[str, ...]
    problems: tuple[Problem, ...]
    save_id: str | None = None

    @property
    def state(self) -> str:
        """`verified`, `damaged`, or `unverified` where nothing says what the files should be."""
        if self.problems:
            return "damaged"
        return "verified" if self.checked else "unverified"


def verify(folder: Path, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Compare every file with the manifest of `folder`, or with the name of its blob in the hub's cache.

    Args:
        progress: called with (bytes read, bytes to be read).

    Raises:
        FileError: the folder cannot be read. What is wrong with files is a `Problem`.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except (IntegrityError, FileError) as error:
        where = f"{error.locus}: " if error.locus else ""
        return Verification(checked=(), problems=(Problem(error.code, MANIFEST, where + error.reason),))
    if manifest is None:
        return _verify_blobs(folder, progress)
    return _verify_listed(folder, manifest, progress)


def _verify_listed(folder: Path, manifest: Manifest, progress: Callable[[int, int], None] | None) -> Verification:
    problems: list[Problem] = []
    right: list[str] = []
    wrong: list[str] = []
    total, done = sum(file.bytes for file in manifest.files.values()), 0
    for name, file in manifest.files.items():
        found = _problem(folder / name, name, file.bytes, file.sha256)
        problems += found
        (wrong if found else right).append(name)
        done += file.bytes
        if progress:
            progress(done, total)
    problems += _mixed(folder, right, wrong)
    return Verification(checked=tuple(manifest.files), problems=tuple(problems), save_id=manifest.save_id)


def _problem(path: Path, name: str, size: int, sha256: str) -> list[Problem]:
    if not os.path.lexists(path):
        return [Problem("IT-MISSING", name, "is not there")]
    try:
        with open_regular(path) as (descriptor, status):
            if status.st_size != size:
                return [Problem("IT-SIZE", name, f"has {status.st_size:,} bytes; {size:,} were saved")]
            found = _digest(descriptor, path, "sha256")
    except FileError as error:
        return [Problem(error.code, name, error.reason)]
    return [] if found == sha256 else [Problem("IT-HASH", name, f"has SHA-256 {found}; {sha256} was saved")]


def _mixed(folder: Path, right: list[str], wrong: list[str]) -> Iterator[Problem]:
    """A save that knows nothing of manifests leaves some of our tensor files beside some of its own."""
    variant = {name: tensor_file_variant(name, HUGGING_FACE) for name in (*right, *wrong)}
    bad = [name for name in wrong if variant[name] is not None]
    if bad and any(variant[name] is not None for name in right):
        yield Problem("IT-MIXED", None, f"{', '.join(bad[:5])}: not of the save the other tensor files are of, or damaged")
    saved = {one for one in variant.values() if one is not None}
    for name in _names(folder):
        if name not in variant and tensor_file_variant(name, HUGGING_FACE) in saved:
            yield Problem("IT-MIXED", name, "a tensor file or index that the manifest does not list: another program wrote it")


def _verify_blobs(folder: Path, progress: Callable[[int, int], None] | None) -> Verification:
    """Blobs of the hub's cache are called by their hash: SHA-256 of large files, git's SHA-1 of the others."""
    blobs = {}
    for name in _names(folder):
        path = folder / name
        if path.is_symlink():
            blob = Path(path.readlink()).name
            if _LFS_BLOB.fullmatch(blob) or _GIT_BLOB.fullmatch(blob):
                blobs[name] = blob
    problems: list[Problem] = []
    total, done = sum((folder / name).stat().st_size for name in blobs if (folder / name).exists()), 0
    for name, blob in blobs.items():
        try:
            with open_regular(folder / name) as (descriptor, status):
                kind, prefix = ("sha256", b"") if len(blob) == 64 else ("sha1", b"blob %d\0" % status.st_size)
                found = _digest(descriptor, folder / name, kind, prefix)
                done += status.st_size
        except FileError as error:
            problems.append(Problem(error.code, name, error.reason))
            continue
        if found != blob:
            problems.append(Problem("IT-HASH", name, f"has {kind.upper()} {found}; its blob is called {blob}"))
        if progress:
            progress(done, total)
    return Verification(checked=tuple(blobs), problems=tuple(problems))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if not is_pending(entry.path))
    except OSError as error:
        raise FileError("IO-READ", f"the folder cannot be read: {error.strerror}", path=folder) from error


def _digest(descriptor: int, path: Path, kind: str, prefix: bytes = b"") -> str:
    digest = hashlib.new(kind, prefix, usedforsecurity=kind == "sha256")
    offset = 0
    while True:
        try:
            part = os.pread(descriptor, _READ_SIZE, offset)
        except OSError as error:
            raise FileError("IO-READ", f"cannot be read at byte {offset}: {error.strerror}", path=path) from error
        if not part:
            return digest.hexdigest()
        digest.update(part)
        offset += len(part)
