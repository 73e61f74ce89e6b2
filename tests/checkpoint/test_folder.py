"""A reader sees one generation of a folder that is saved to meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from modelrig.checkpoint.catalog import file_names
from modelrig.checkpoint.folder import ATTEMPTS, again_if_exchanged, consistently, generation
from modelrig.checkpoint.paths import is_pending, optional
from modelrig.checkpoint.saving import protocol
from modelrig.checkpoint.saving.manifest import read_manifest
from modelrig.components import Snapshot
from modelrig.errors import CheckpointError, FileError
from saves import our_state, save


@pytest.fixture(params=["exchange", "in place"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save(tmp_path / "model", 1)
    if request.param == "in place":
        monkeypatch.setattr(protocol, "why_in_place", lambda folder, vfs: "a test asks for it")
    return tmp_path / "model"


def halves(folder: Path, between: Callable[[], object]) -> Callable[[], tuple[str, int | str]]:
    """A reader that is interrupted once, between the config and the tensors."""
    left = [between]

    def read() -> tuple[str, int | str]:
        config = (folder / "config.json").read_text()
        if left:
            left.pop()()
        return config, our_state(folder)

    return read


def test_a_save_between_two_files_is_noticed_and_all_is_read_again(folder: Path) -> None:
    read = halves(folder, lambda: save(folder, 2, "2 shards"))
    assert ('{"generation": 2}', 2) == consistently(folder, read)


def test_an_error_that_a_save_caused_is_not_the_readers(folder: Path) -> None:
    calls = []

    def read() -> int:
        calls.append(1)
        if len(calls) == 1:
            save(folder, 2)
            raise FileError("IO-READ", "does not exist", path=folder)
        return len(calls)

    assert 2 == consistently(folder, read)
    calls.clear()
    assert 2 == again_if_exchanged(folder, read)


def test_any_other_error_comes_through_at_once(folder: Path) -> None:
    calls = []

    def read() -> None:
        calls.append(1)
        raise FileError("IO-READ", "does not exist", path=folder)

    for attempt in (consistently, again_if_exchanged):
        with pytest.raises(FileError, match="IO-READ"):
            attempt(folder, read)
    assert 2 == len(calls)


def test_a_reader_that_never_finds_it_still_gives_up(folder: Path) -> None:
    generations = iter(range(2, 100))
    with pytest.raises(CheckpointError, match="IO-CHANGED"):
        consistently(folder, lambda: save(folder, next(generations), durable=False))
    assert 2 + ATTEMPTS == next(generations)


def test_what_others_write_into_the_folder_is_no_new_generation(folder: Path) -> None:
    before = generation(folder)
    (folder / "log.txt").write_text("x")
    assert before == generation(folder)
    save(folder, 3)
    assert before != generation(folder)


def test_a_folder_that_is_not_there_has_a_generation_too(tmp_path: Path) -> None:
    assert generation(tmp_path / "none") == generation(tmp_path / "none")
    with pytest.raises(FileError):
        consistently(tmp_path / "none", lambda: file_names(Snapshot(reference="", root=tmp_path / "none", source="local")))


def test_no_descriptor_is_left_open(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    consistently(folder, lambda: None)
    assert before == len(os.listdir("/proc/self/fd"))


# ------------------------------------------------------------------------------------------------ names of one save only


def test_a_name_that_waits_for_its_save_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / ".modelrig.current").symlink_to(".modelrig.stage-1/old")
    for name in ("tokenizer.json", "model.safetensors", "modelrig.json"):
        (tmp_path / name).symlink_to(f".modelrig.current/{name}")
    snapshot = Snapshot(reference="", root=tmp_path, source="local")
    assert ([".modelrig.current"], None, None) == (
        file_names(snapshot),
        optional(snapshot, "tokenizer.json"),
        read_manifest(tmp_path),
    )
    (tmp_path / ".modelrig.stage-1/old").mkdir(parents=True)
    (tmp_path / ".modelrig.stage-1/old/tokenizer.json").write_text("{}")
    assert (["tokenizer.json"], tmp_path / "tokenizer.json") == (file_names(snapshot), optional(snapshot, "tokenizer.json"))


@pytest.mark.parametrize("text", ["nowhere", ".modelrig.current/other", "../.modelrig.current/name", "/.modelrig.current/name"])
def test_any_other_link_to_nothing_is_there_and_wrong(tmp_path: Path, text: str) -> None:
    (tmp_path / "name").symlink_to(text)
    assert not is_pending(tmp_path / "name")
    assert ["name"] == file_names(Snapshot(reference="", root=tmp_path, source="local"))
