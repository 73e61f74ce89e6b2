"""What a process still holds of a folder: open files and mappings."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path


def open_files(folder: Path | str = "") -> list[str]:
    """Paths behind this process's file descriptors that lie in `folder`."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of this listing itself
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return [path for path in found if path.startswith(str(folder))]


def mappings(folder: Path | str = "") -> list[tuple[int, int, str]]:
    """(first address, address after the last, path) of every mapped file in `folder`."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        if path.startswith(str(folder)) and path.startswith("/"):
            first, last = (int(address, 16) for address in span.split("-"))
            found.append((first, last, path))
    return found


def held(folder: Path | str) -> tuple[list[str], list[tuple[int, int, str]]]:
    """Both, once the garbage collector has run; two empty lists where nothing is left."""
    gc.collect()
    return open_files(folder), mappings(folder)


def resident_bytes(what: str = "VmRSS") -> int:
    """VmRSS, RssAnon, RssFile or VmHWM of this process."""
    status = Path("/proc/self/status").read_text().split(f"{what}:")[1]
    return int(status.split()[0]) * 1024
