"""The manifest: what it lists, how it is read, and what comparing files with it finds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelrig.checkpoint.saving.manifest import Manifest, SavedFile, read_manifest
from modelrig.checkpoint.saving.names import HUGGING_FACE, Ownership
from modelrig.checkpoint.saving.verify import verify
from modelrig.errors import IntegrityError
from saves import save

GOOD = {"schema": 1, "tool": "modelrig 1", "save_id": "a" * 32, "files": {"x.bin": {"bytes": 3, "sha256": "0" * 64}}, "ties": {}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "model", 1)
    return tmp_path / "model"


def test_it_lists_every_file_with_size_and_hash(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    expected = {
        name: SavedFile(name, (folder / name).stat().st_size, hashlib.sha256((folder / name).read_bytes()).hexdigest())
        for name in os.listdir(folder)
        if name != "modelrig.json"
    }
    assert expected == manifest.files


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    manifest = Manifest(
        save_id="0" * 32, tool="modelrig 9", files={"a.bin": SavedFile("a.bin", 7, "f" * 64)}, ties={"head": "embedding"}
    )
    (tmp_path / "modelrig.json").write_bytes(manifest.encode())
    assert manifest == read_manifest(tmp_path)


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "code", "locus"),
    [
        ({"schema": 2}, "IT-MANIFEST", "schema"),
        ({"schema": True}, "IT-MANIFEST", "schema"),
        ({"save_id": "../../x"}, "IT-MANIFEST", "save_id"),
        ({"tool": None}, "IT-MANIFEST", "tool"),
        ({"files": []}, "IT-MANIFEST", "files"),
        ({"files": {"../x.bin": {"bytes": 1, "sha256": "0" * 64}}}, "IT-MANIFEST", "files"),
        ({"files": {"sub/x.bin": {"bytes": 1, "sha256": "0" * 64}}}, "IT-MANIFEST", "files"),
        ({"files": {"modelrig.json": {"bytes": 1, "sha256": "0" * 64}}}, "IT-MANIFEST", "files"),
        ({"files": {"x": {"bytes": -1, "sha256": "0" * 64}}}, "IT-MANIFEST", "files.x.bytes"),
        ({"files": {"x": {"bytes": 1, "sha256": "short"}}}, "IT-MANIFEST", "files.x.sha256"),
        ({"files": {"x": {"bytes": 1}}}, "IT-MANIFEST", "files.x"),
        ({"files": {"x": {"bytes": 1, "sha256": "0" * 64, "more": 1}}}, "IT-MANIFEST", "files.x"),
        ({"ties": {"a": 1}}, "IT-MANIFEST", "ties.a"),
        ("[]", "IT-JSON", None),
        ("{", "IT-JSON", None),
        ('{"schema": 1, "schema": 1}', "IT-JSON", "schema"),
    ],
)
def test_a_bad_one_is_an_error_that_names_the_key(tmp_path: Path, change: Any, code: str, locus: str | None) -> None:
    text = change if isinstance(change, str) else json.dumps({**GOOD, **change})
    (tmp_path / "modelrig.json").write_text(text)
    with pytest.raises(IntegrityError) as caught:
        read_manifest(tmp_path)
    assert (code, locus) == (caught.value.code, caught.value.locus)
    assert [code] == [problem.code for problem in verify(tmp_path).problems]


# ------------------------------------------------------------------------------------------------ comparing


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_files_as_they_were_saved_are_verified(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = verify(folder, lambda done, total: seen.append((done, total)))
    assert ("verified", (), 5) == (found.state, found.problems, len(found.checked))
    assert seen[-1][0] == seen[-1][1] == sum((folder / name).stat().st_size for name in found.checked)


@pytest.mark.parametrize(
    ("harm", "file", "codes"),
    [
        (flip, "model-00002-of-00003.safetensors", ["IT-HASH", "IT-MIXED"]),
        (cut, "model-00001-of-00003.safetensors", ["IT-SIZE", "IT-MIXED"]),
        (os.unlink, "model-00003-of-00003.safetensors", ["IT-MISSING", "IT-MIXED"]),
        (flip, "config.json", ["IT-HASH"]),
    ],
)
def test_every_change_is_found(folder: Path, harm: Callable[[Path], None], file: str, codes: list[str]) -> None:
    harm(folder / file)
    found = verify(folder)
    assert ("damaged", codes) == (found.state, [problem.code for problem in found.problems])
    assert file == found.problems[0].file


def test_shards_of_two_saves_are_mixed(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "other", 3)
    name = "model-00002-of-00003.safetensors"
    (tmp_path / "other" / name).replace(folder / name)
    assert ["IT-HASH", "IT-MIXED"] == [problem.code for problem in verify(folder).problems]


def test_a_tensor_file_of_another_program_is_mixed_in(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x")  # readers would take it instead of the index
    (folder / "model.fp16.safetensors").write_bytes(b"x")  # another variant, which no reader takes for this one
    assert [("IT-MIXED", "model.safetensors")] == [(one.code, one.file) for one in verify(folder).problems]


def test_without_a_manifest_nothing_is_known(folder: Path) -> None:
    (folder / "modelrig.json").unlink()
    assert ("unverified", ()) == (verify(folder).state, verify(folder).problems)


def test_blobs_of_the_hub_are_called_by_their_hash(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    large, small = b"weights", b"{}"
    names = {
        "model.safetensors": (hashlib.sha256(large).hexdigest(), large),
        "config.json": (hashlib.sha1(b"blob 2\0" + small).hexdigest(), small),  # as git counts
    }
    for name, (digest, data) in names.items():
        (blobs / digest).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{digest}")
    assert ("verified", ("config.json", "model.safetensors")) == (verify(snapshot).state, verify(snapshot).checked)
    (blobs / names["model.safetensors"][0]).write_bytes(b"wEights")
    assert [("IT-HASH", "model.safetensors")] == [(one.code, one.file) for one in verify(snapshot).problems]


# ------------------------------------------------------------------------------------------------ whose file it is


@pytest.mark.parametrize(
    ("name", "is_ours"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model-0123456789ab-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("pytorch_model.bin", True),
        ("pytorch_model-00001-of-00002.bin", True),
        ("pytorch_model.bin.index.json", True),
        ("modelrig.json", True),
        ("listed.json", True),
        ("edited.json", False),
        ("config.json", False),
        ("model.fp16.safetensors", False),
        ("model.safetensors.index.fp16.json", False),
        ("adapter_model.safetensors", False),
        ("my-model.safetensors", False),
        ("model-final.safetensors", False),
        ("training_args.bin", False),
        ("model.safetensors.bak", False),
    ],
)
def test_what_a_save_may_delete(name: str, is_ours: bool) -> None:
    ownership = Ownership(HUGGING_FACE, frozenset({""}), {("listed.json", 5), ("edited.json", 6)})
    assert is_ours == ownership.owns(name, 5)
