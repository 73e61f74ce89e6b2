"""On which file system a file lies: those on a network are read rather than mapped."""

from __future__ import annotations

import os
import re
from pathlib import Path

NETWORK_FILE_SYSTEMS = (
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "ceph", "gpfs", "glusterfs", "9p", "beegfs", "afs", "fuse",
)  # fmt: skip


def is_on_network(path: Path) -> bool:
    """Whether the file system that holds `path` is a network or user-space one."""
    mounts = _mounts()
    real = Path(path).resolve()
    kind = next((mounts[str(folder)] for folder in (real, *real.parents) if str(folder) in mounts), "")
    return kind.partition(".")[0] in NETWORK_FILE_SYSTEMS


def mount_points_in(folder: Path) -> list[str]:
    """Mount points at or below `folder`, which must be a real path."""
    below = f"{folder}{os.sep}"
    return sorted(point for point in _mounts() if point == str(folder) or point.startswith(below))


def _mounts() -> dict[str, str]:
    """Mount point → file system type, from the kernel; empty where there is no /proc."""
    try:
        lines = os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines()
    except OSError:
        return {}
    mounts = {}
    for line in lines:
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split(" ")[4])  # a space is written as \040
        mounts[point] = after.split(" ")[0]
    return mounts
