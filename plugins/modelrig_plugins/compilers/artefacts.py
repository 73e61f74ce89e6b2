"""Where compiled code is kept, so that another process starts at once.

    $XDG_CACHE_HOME/modelrig/compiled/<key>/step.so     native code
                                            about.json  its size and digest, what it was made for, and which inputs it takes

`~/.cache` stands in for `$XDG_CACHE_HOME`. A folder appears whole or not at all. It is native code: what somebody else owns or may
write to is refused. Removing the folder `compiled` is safe at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

from attrs import frozen

from modelrig.errors import LoadError
from modelrig.planning.kept import kept_folder

CODE, ABOUT = "step.so", "about.json"
MOST_ABOUT_BYTES = 1 << 20
log = getLogger(__name__)


@frozen
class Artefact:
    """`code` is a shared library; `inputs` are the numbers of the lifted tensors that it takes, in its order."""

    code: Path
    inputs: tuple[int, ...]


def default_folder() -> Path:
    return kept_folder() / "compiled"


class Store:
    """The artefacts of one folder. Where it cannot be written, they live as long as this object.

    Raises:
        LoadError: LD-STORE, the folder belongs to somebody else, or others may write to it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = default_folder() if folder is None else folder
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            cause = None if os.access(self.folder, os.W_OK | os.X_OK) else "it cannot be written to"
        except OSError as error:
            cause = error.strerror
        if cause is None:
            _require_own(self.folder)
        else:
            log.warning("compiled code cannot be kept in %s: %s", self.folder, cause)
            self.folder = Path(tempfile.mkdtemp(prefix="modelrig-compiled-"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def find(self, key: str) -> Artefact | None:
        """What is kept under `key`; None if nothing is, or it is damaged.

        Raises:
            LoadError: LD-STORE, it belongs to somebody else, or others may write to it.
        """
        place = self.folder / key
        if not place.is_dir():
            return None
        for path in (self.folder, place, place / CODE, place / ABOUT):
            if path.exists():
                _require_own(path)
        try:
            return _read(place)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the compiled code in %s is damaged (%s) and is made again", place, error)
            return None

    def make(self, key: str, build: Callable[[Path], tuple[Path, tuple[int, ...]]], about: Mapping[str, Any]) -> Artefact:
        """Build and keep. `build(workplace)` returns a shared library in that folder, and the inputs it takes.

        Another process may do the same at the same time: who comes last finds the other's, which is as good.
        """
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".making-") as workplace:
            code, inputs = build(Path(workplace))
            new = Path(workplace) / "whole"
            new.mkdir(mode=0o700)
            code.replace(new / CODE)
            (new / CODE).chmod(0o600)
            digest, size = _digest(new / CODE)
            text = json.dumps({**about, "inputs": list(inputs), "bytes": size, "sha256": digest}, indent=1)
            (new / ABOUT).write_text(text, encoding="utf-8")
            (new / ABOUT).chmod(0o600)
            place = self.folder / key
            try:
                new.rename(place)
            except OSError:
                other = self.find(key)
                if other is not None:
                    return other
                damaged = Path(workplace) / "damaged"
                place.rename(damaged)
                new.rename(place)
        return Artefact(place / CODE, inputs)

    def drop(self, key: str) -> None:
        """Forget what cannot be loaded."""
        shutil.rmtree(self.folder / key, ignore_errors=True)


def _read(place: Path) -> Artefact:
    with (place / ABOUT).open("rb") as file:
        about = json.loads(file.read(MOST_ABOUT_BYTES))
    inputs = tuple(about["inputs"])
    if not all(type(number) is int and number >= 0 for number in inputs):
        raise ValueError("inputs are not numbers")
    digest, size = _digest(place / CODE)
    if (digest, size) != (about["sha256"], about["bytes"]):
        raise ValueError(f"{CODE} is not what {ABOUT} says")
    return Artefact(place / CODE, inputs)


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def _require_own(path: Path) -> None:
    found = path.lstat()
    is_plain = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    if is_plain and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
        return
    what = "is a link or no plain file" if not is_plain else f"belongs to user {found.st_uid} with mode {found.st_mode & 0o777:o}"
    raise LoadError(
        "LD-STORE",
        f"compiled code is only loaded from where nobody else can write, and this {what}",
        path=path,
        hint=f"remove it, or chmod go-w it, or set XDG_CACHE_HOME to a folder of yours (user {os.geteuid()})",
    )
