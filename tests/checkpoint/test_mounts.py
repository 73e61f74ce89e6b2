"""Network file systems are told from local ones by the kernel's table of mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelrig.checkpoint import mounts
from modelrig.checkpoint.mounts import is_on_network

MOUNTS = rb"""
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /mnt/share rw - nfs4 server:/x rw
31 22 0:41 / /mnt/with\040space rw shared:1 - fuse.sshfs host: rw
32 30 0:42 / /mnt/share/local rw - xfs /dev/vdb rw
33 22 0:43 / /mnt/donn\303\251es rw - cifs //server/x rw
34 22 0:44 / /mnt/ntfs rw - fuseblk /dev/vdc rw
""".strip().replace(b"\\303\\251", "é".encode())


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/home/x/model.safetensors", False),
        ("/mnt/share/model.safetensors", True),
        ("/mnt/shared/model.safetensors", False),
        ("/mnt/share", True),
        ("/mnt/share/local/deep/model.safetensors", False),
        ("/mnt/with space/model.safetensors", True),
        ("/mnt/données/model.safetensors", True),
        ("/mnt/ntfs/model.safetensors", False),
    ],
)
def test_the_nearest_mount_point_tells_network_from_local(monkeypatch: pytest.MonkeyPatch, path: str, answer: bool) -> None:
    monkeypatch.setattr(mounts.Path, "read_bytes", lambda self: MOUNTS)
    assert answer == is_on_network(Path(path))


def test_a_link_counts_as_what_it_points_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/mnt/share/model.safetensors")
    monkeypatch.setattr(mounts.Path, "read_bytes", lambda self: MOUNTS)
    assert is_on_network(tmp_path / "link")


def test_without_proc_files_are_taken_for_local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(self: Path) -> bytes:
        raise FileNotFoundError

    monkeypatch.setattr(mounts.Path, "read_bytes", missing)
    assert not is_on_network(tmp_path)
