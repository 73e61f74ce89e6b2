"""What is kept on disk: whole or not at all, ours alone, and made again if it is damaged."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modelrig.errors import LoadError
from modelrig_plugins.compilers import artefacts
from modelrig_plugins.compilers.artefacts import ABOUT, CODE, Store, default_folder
from modelrig_plugins.compilers.fingerprint import sources
from modelrig_plugins.compilers.graphs import Graphs, Input


def builder(text: bytes = b"code") -> Callable[[Path], tuple[Path, tuple[int, ...]]]:
    def build(place: Path) -> tuple[Path, tuple[int, ...]]:
        (place / "made.so").write_bytes(text)
        return place / "made.so", (0, 2)

    return build


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "modelrig" / "compiled")


def test_what_is_made_is_found_again_and_nobody_else_can_read_it(store: Store) -> None:
    assert store.find("key") is None
    made = store.make("key", builder(), {"what": "a test"})
    found = Store(store.folder).find("key")
    assert made == found
    assert found is not None and (b"code", (0, 2)) == (found.code.read_bytes(), found.inputs)
    assert ["key"] == [file.name for file in store.folder.iterdir()]
    assert {0o700, 0o600} == {path.stat().st_mode & 0o777 for path in [store.folder, *store.folder.rglob("*")]}
    assert "a test" == json.loads((store.folder / "key" / ABOUT).read_text())["what"]


def test_it_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tmp_path / "modelrig" / "compiled" == default_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path / ".cache" / "modelrig" / "compiled" == default_folder()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (CODE, b"codf"),
        (CODE, b"cod"),
        (CODE, None),
        (ABOUT, b"{"),
        (ABOUT, b"[]"),
        (ABOUT, b'{"inputs": ["x"], "bytes": 4, "sha256": ""}'),
        (ABOUT, b"\xff"),
        (ABOUT, None),
    ],
)
def test_what_is_damaged_is_made_again(store: Store, name: str, content: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    store.make("key", builder(), {})
    file = store.folder / "key" / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    assert store.find("key") is None
    assert "damaged" in caplog.text
    store.make("key", builder(b"new"), {})
    found = store.find("key")
    assert found is not None and b"new" == found.code.read_bytes()
    assert ["key"] == [one.name for one in store.folder.iterdir()]


@pytest.mark.parametrize("place", ["", "key", f"key/{CODE}", f"key/{ABOUT}"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_may_write_is_not_loaded(store: Store, place: str, mode: int) -> None:
    store.make("key", builder(), {})
    path = store.folder / place
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(LoadError, match="LD-STORE"):
        Store(store.folder).find("key")


def test_what_others_own_is_not_loaded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.make("key", builder(), {})
    monkeypatch.setattr(artefacts.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(LoadError, match=r"LD-STORE.*belongs to user"):
        store.find("key")


def test_a_link_is_not_followed(store: Store, tmp_path: Path) -> None:
    store.make("key", builder(), {})
    (tmp_path / "else.so").write_bytes(b"code")
    (store.folder / "key" / CODE).unlink()
    (store.folder / "key" / CODE).symlink_to(tmp_path / "else.so")
    with pytest.raises(LoadError, match=r"LD-STORE.*link"):
        store.find("key")


def test_where_nothing_can_be_kept_it_lives_as_long_as_the_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "compiled")
    assert "cannot be kept" in caplog.text
    made = store.make("key", builder(), {})
    found, folder = store.find("key"), made.code.parent
    assert made == found
    del store
    assert not folder.exists()


def test_an_error_while_building_leaves_nothing(store: Store) -> None:
    def fail(place: Path) -> tuple[Path, tuple[int, ...]]:
        (place / "half.so").write_bytes(b"")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.make("key", fail, {})
    assert [] == list(store.folder.iterdir())


def test_many_who_make_the_same_all_have_it(store: Store) -> None:
    barrier, found = threading.Barrier(8), []

    def build(place: Path) -> tuple[Path, tuple[int, ...]]:
        barrier.wait()
        return builder()(place)

    def make() -> None:
        found.append(Store(store.folder).make("key", build, {}).code.read_bytes())

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [b"code"] * 8 == found
    assert ["key"] == [file.name for file in store.folder.iterdir()]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_code_that_does_not_load_is_compiled_anew(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    x, spare = torch.arange(4.0), torch.zeros(3)

    def graphs(held: Graphs) -> torch.Tensor:
        graph = held.get("x + 1", lambda given: given[1] + 1, [Input(spare), Input(x, {0: 510})], ["a test"], [__name__])
        assert (1,) == graph.inputs
        return graph.run([x])[0]

    first = Graphs(store=store)
    assert torch.equal(x + 1, graphs(first))
    other = store.folder.with_name("other")  # a library that is loaded already would be found by its path
    shutil.copytree(store.folder, other)
    (folder,) = other.iterdir()
    (folder / CODE).write_bytes(b"\x7fELF" + bytes(100))
    about = json.loads((folder / ABOUT).read_text())
    about["sha256"], about["bytes"] = artefacts._digest(folder / CODE)
    (folder / ABOUT).write_text(json.dumps(about))
    second = Graphs(store=Store(other))
    assert torch.equal(x + 1, graphs(second))
    assert ((1, 0), (1, 0)) == ((first.compiled, first.loaded), (second.compiled, second.loaded))
    assert "cannot be loaded" in caplog.text
    third = Graphs(store=Store(other))
    assert torch.equal(x + 1, graphs(third))
    assert (0, 1) == (third.compiled, third.loaded)


def test_a_changed_source_file_is_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    helper, user = tmp_path / "some_helper.py", tmp_path / "some_user.py"
    helper.write_text("def act(x):\n    return x\n")
    user.write_text("from some_helper import act\n\ndef run(x):\n    return act(x)\n")
    import some_user  # type: ignore[import-not-found]

    assert some_user.run(1) == 1
    before = sources(["some_user"])
    assert before == sources(["some_user", "some_user", "torch.nn", "os"])
    helper.write_text("def act(x):\n    return 2 * x  # read anew\n")
    assert before != sources(["some_user"])
