"""A save that is killed, or refused by the disk, at every single operation it makes, in every way it can commit."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelrig.checkpoint.saving import exchange, in_place, protocol
from modelrig.errors import SaveError
from saves import ERRNOS, Faulty, Kill, Killed, Recording, leftovers, our_state, save, save_bin, state

#: how a save commits; in the fourth way it was about to exchange the folder, and another process writes into it
WAYS = ("exchange", "links", "one by one", "links after all")
#: layout of the old save, layout of the new one
CHANGES = (
    ("3 shards", "3 shards"),
    ("3 shards", "2 shards"),
    ("2 shards", "3 shards"),
    ("single", "3 shards"),
    ("3 shards", "single"),
    ("bin 3 shards", "2 shards"),
    ("3 shards", "bin single"),
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a file system: thousands of saves."""
    root = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    yield root / "model"
    shutil.rmtree(root)


def choose(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "links after all":
        monkeypatch.setattr(exchange, "states", lambda vfs, folder, skip: {Path("log"): time.monotonic_ns()})
    elif way != "exchange":
        monkeypatch.setattr(protocol, "why_in_place", lambda folder, vfs: "a test asks for it")
    if way == "one by one":
        monkeypatch.setattr(in_place, "_has_links", lambda vfs, stage: False)


def saver(layout: str) -> tuple[Callable[..., object], str]:
    return (save_bin, layout.removeprefix("bin ")) if layout.startswith("bin ") else (save, layout)


def start(folder: Path, old: str | None) -> None:
    """An old save, number 1, and what somebody else keeps beside it."""
    if folder.parent.exists():
        shutil.rmtree(folder.parent)
    folder.parent.mkdir()
    if old is None:
        return
    make, layout = saver(old)
    make(folder, 1, layout)
    (folder / "notes").mkdir()
    (folder / "notes/one.txt").write_text("mine")
    (folder / "README.md").write_text("mine too")


def assert_foreign_kept(folder: Path, old: str | None) -> None:
    if old is not None:
        assert ("mine", "mine too") == ((folder / "notes/one.txt").read_text(), (folder / "README.md").read_text())


def count(folder: Path, old: str | None, new: str) -> int:
    start(folder, old)
    recorded = Recording()
    make, layout = saver(new)
    make(folder, 2, layout, vfs=recorded)
    assert 2 == state(folder)
    return len(recorded.operations)


@pytest.mark.parametrize("way", ["exchange", "links", "links after all"])
@pytest.mark.parametrize(("old", "new"), [(None, "3 shards"), *CHANGES])
def test_whenever_a_save_is_killed_the_folder_holds_the_old_one_or_the_new_one(
    folder: Path, way: str, old: str | None, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(way, monkeypatch)
    make, layout = saver(new)
    seen = set()
    for at in range(0, count(folder, old, new), 1 if (old, new) == CHANGES[1] else 5):
        start(folder, old)
        vfs = Kill(at)
        with contextlib.suppress(Killed):
            make(folder, 2, layout, vfs=vfs)
        vfs.end_process()
        found = state(folder)
        assert found in ("absent" if old is None else 1, 2), (at, vfs.operations[-1:], found)
        assert found == "absent" or found == our_state(folder), (at, vfs.operations[-1:])
        seen.add(found)
        save(folder, 4, "2 shards")
        assert (4, []) == (state(folder), leftovers(folder)), (at, vfs.operations[-1:])
        assert_foreign_kept(folder, old)
    assert 2 == len(seen), "the commit was never passed"


def test_without_links_only_the_config_may_be_ahead_of_the_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be had there, held to what is documented: two renames between which config.json is the new one already."""
    choose("one by one", monkeypatch)
    for old, new in CHANGES[:5]:
        make, layout = saver(new)
        torn = []
        for at in range(count(folder, old, new)):
            start(folder, old)
            vfs = Kill(at)
            with contextlib.suppress(Killed):
                make(folder, 2, layout, vfs=vfs)
            vfs.end_process()
            if (found := state(folder)) not in (1, 2):
                torn.append(found)
            save(folder, 4, "2 shards")
            assert (4, []) == (state(folder), leftovers(folder)), (at, vfs.operations[-1:])
            assert_foreign_kept(folder, old)
        assert [
            "mixed: config 2, generation_config None, tensors [1.0]",
            "mixed: config 2, generation_config 2, tensors [1.0]",
        ] == torn


@pytest.mark.parametrize("way", WAYS)
def test_what_the_disk_refuses_leaves_the_old_checkpoint_or_says_that_the_new_one_is_there(
    folder: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(way, monkeypatch)
    old, new = CHANGES[1]
    total = count(folder, old, new)
    for at in range(total):  # `make kill-test` tries every errno at every operation, once and persistent
        assert_refused_well(folder, way, old, new, Faulty(at, ERRNOS[at % len(ERRNOS)], persistent=at // len(ERRNOS) % 2 == 0))


@pytest.mark.parametrize("way", ["exchange", "links"])
def test_an_operation_that_happened_and_was_reported_as_failed_costs_no_checkpoint(
    folder: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(way, monkeypatch)
    for old, new in CHANGES[1:2]:
        for at in range(count(folder, old, new)):
            assert_refused_well(folder, way, old, new, Faulty(at, 5, done=True))


def assert_refused_well(folder: Path, way: str, old: str | None, new: str, vfs: Faulty) -> None:
    start(folder, old)
    make, layout = saver(new)
    committed = "yes"
    try:
        make(folder, 2, layout, vfs=vfs)
    except SaveError as error:
        committed = error.committed
        assert error.operation in vfs.failed
        assert error.code in ("SV-IO", "SV-SPACE", "SV-TARGET")
    where = (way, vfs.at, vfs.code, vfs.persistent, vfs.operations[vfs.at : vfs.at + 1], committed)
    assert set() == vfs.open_descriptors, where
    found = state(folder)
    if way == "one by one" and isinstance(found, str):  # where even taking back is refused; the error does not say "no"
        assert ("uncertain", True, True) == (committed, found.startswith("mixed: config 2"), vfs.persistent), where
    else:
        assert found == {"no": "absent" if old is None else 1, "yes": 2}.get(committed, found), where
        assert found in (1, 2), where
    if not vfs.persistent and not vfs.done and committed == "no" and not {"rmdir", "unlink", "lock"} & set(vfs.failed):
        assert [] == leftovers(folder), where
    assert_foreign_kept(folder, old)
    save(folder, 4, "2 shards")
    assert (4, []) == (state(folder), leftovers(folder)), where
    assert_foreign_kept(folder, old)
