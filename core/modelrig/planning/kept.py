"""Where what was found out of this machine is kept between processes, and how it is written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def kept_folder(environ: Mapping[str, str] | None = None) -> Path:
    """`$XDG_CACHE_HOME/modelrig`, by default `~/.cache/modelrig`; a relative variable does not count, as the freedesktop rule says.

    Raises:
        RuntimeError: there is no home.
    """
    cache = Path((os.environ if environ is None else environ).get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "modelrig"


def replace_text(path: Path, text: str) -> None:
    """Write the file whole or not at all, and its folder if that is missing. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
