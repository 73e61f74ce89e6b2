"""What a save does to its surroundings: whose files stay, where it may write, who may save and read at the same time."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelrig.checkpoint.saving import in_place, protocol, tree, writing
from modelrig.checkpoint.saving.lock import locked
from modelrig.checkpoint.saving.protocol import save_checkpoint
from modelrig.checkpoint.saving.verify import verify
from modelrig.checkpoint.saving.vfs import OperationError, Vfs
from modelrig.components import StoredTensor
from modelrig.errors import FormatError, SaveError, SaveInProgress
from modelrig_plugins.formats.safetensors import SafetensorsPlanner
from saves import Faulty, Recording, filled, leftovers, our_state, save, save_bin, state, tensors
from saves import tree as files_of

ROOT = Path(__file__).parents[3]
DTYPES = ("float32", "uint8", "bool", "int64")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.fixture(params=["exchange", "links", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "exchange":
        monkeypatch.setattr(protocol, "why_in_place", lambda folder, vfs: "a test asks for it")
    if request.param == "one by one":
        monkeypatch.setattr(in_place, "_has_links", lambda vfs, stage: False)
    return str(request.param)


class Meanwhile(Recording):
    """Does something before an operation, once."""

    def __init__(self, before: str, action: Callable[[], object]) -> None:
        super().__init__()
        self.before, self.action, self.is_done = before, action, False

    def call(self, operation: str, path: Path, action: Callable[..., Any], *arguments: Any) -> Any:
        if not self.is_done and f"{operation} {path.name}".startswith(self.before):
            self.is_done = True
            self.action()
        return super().call(operation, path, action, *arguments)


# ------------------------------------------------------------------------------------------------ the result


def test_a_save_says_what_it_wrote_and_how_safely(folder: Path) -> None:
    report = save(folder, 1)
    assert ("atomic+durable", folder, ()) == (report.durability, report.path, report.notes)
    assert {file.name: file.bytes for file in report.files} == {name: (folder / name).stat().st_size for name in os.listdir(folder)}
    assert report.bytes == sum(file.bytes for file in report.files)
    assert "atomic" == save(folder, 2, durable=False).durability
    assert "verified" == verify(folder).state


@pytest.mark.parametrize("durable", [True, False])
def test_the_disk_is_told_to_write_early_where_the_end_waits_for_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    monkeypatch.setattr(writing, "_SYNCED", 1)
    begun: dict[int, list[tuple[int, int]]] = {}

    class Watching(Vfs):
        def begin_sync(self, descriptor: int, start: int, size: int) -> None:
            super().begin_sync(descriptor, start, size)
            begun.setdefault(os.fstat(descriptor).st_ino, []).append((start, start + size))

    save(folder, 1, durable=durable, vfs=Watching())
    assert 1 == state(folder)
    assert durable == bool(begun)
    files = {path.stat().st_ino: path.stat().st_size for path in folder.iterdir() if path.suffix == ".safetensors"}
    for inode in files.keys() & begun.keys():
        spans = begun[inode]
        assert [0, *(end for _, end in spans)] == [*(start for start, _ in spans), files[inode]]


def test_every_layout_follows_every_other(folder: Path, way: str) -> None:
    generation = 0
    makers = [(save, layout) for layout in ("single", "2 shards", "3 shards")] + [(save_bin, "single"), (save_bin, "3 shards")]
    for first in makers:
        for second in makers:
            for make, layout in (first, second):
                generation += 1
                make(folder, generation, layout)
                assert (generation, generation, []) == (state(folder), our_state(folder), leftovers(folder)), (first, second)
                assert "verified" == verify(folder).state


def test_a_folder_of_transformers_is_replaced_whole(folder: Path, way: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder, max_shard_size=4000)
    (folder / "generation_config.json").unlink()
    save(folder, 1, "2 shards")
    assert (1, []) == (state(folder), leftovers(folder))
    assert 2 == len([name for name in os.listdir(folder) if name.endswith(".safetensors")])


def test_progress_is_in_bytes_of_tensors(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    save(folder, 1, progress=lambda done, total: seen.append((done, total)))
    total = sum(one.nbytes for one in tensors())
    assert (total, total) == seen[-1]
    assert sorted(seen) == seen


def test_large_tensors_are_hashed_beside_writing(folder: Path) -> None:
    values = np.arange(1 << 19, dtype="float32")
    save_checkpoint(folder, [StoredTensor("large", "float32", (1 << 19,))], lambda _: [values], SafetensorsPlanner)
    assert "verified" == verify(folder).state


def test_a_save_over_the_files_it_reads_from_is_exact(folder: Path, way: str) -> None:
    save(folder, 1, "single")
    with open(folder / "model.safetensors", "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    before = bytes(mapping)
    sizes = 6 * 256

    def read(tensor: StoredTensor) -> Iterator[memoryview]:
        number = [one.name for one in tensors()].index(tensor.name)
        begin = len(mapping) - sizes + 256 * number
        yield memoryview(mapping)[begin : begin + 256]

    config = folder / "config.json"
    save_checkpoint(folder, tensors(), read, SafetensorsPlanner, max_shard_size=600, files={"config.json": config})
    assert (1, before) == (state(folder), bytes(mapping))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=8), st.integers(1, 300))
def test_what_is_saved_is_what_the_library_reads(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], limit: int) -> None:
    from safetensors.numpy import load_file

    folder = tmp_path_factory.mktemp("saved") / "model"
    rng = np.random.default_rng(0)
    values = {f"t{n}": rng.integers(0, 2, tuple(shape)).astype(dtype) for n, (dtype, shape) in enumerate(rows)}
    stored = [StoredTensor(name, str(one.dtype), one.shape) for name, one in values.items()]
    save_checkpoint(
        folder, stored, lambda one: [values[one.name].tobytes()], SafetensorsPlanner, max_shard_size=limit, durable=False
    )
    found = {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}
    assert set(values) == set(found)
    assert all(np.array_equal(values[name], found[name]) and values[name].dtype == found[name].dtype for name in values)


# ------------------------------------------------------------------------------------------------ whose files stay


def plant(folder: Path) -> dict[str, bytes | None]:
    """What somebody keeps beside a checkpoint."""
    (folder / ".git/objects").mkdir(parents=True)
    (folder / ".git/HEAD").write_text("ref")
    (folder / ".git/objects/aa").write_text("object")
    (folder / "README.md").write_text("about")
    (folder / "adapter_model.safetensors").write_text("other weights")
    (folder / "training_args.bin").write_text("arguments")
    (folder / "link").symlink_to("README.md")
    (folder / "empty").mkdir()
    return {name: data for name, data in files_of(folder).items() if not name.startswith(("model", "config", "generation"))}


def test_what_others_keep_in_the_folder_stays(folder: Path, way: str) -> None:
    save(folder, 1)
    planted = plant(folder)
    os.chmod(folder / ".git", 0o711)
    held = open(folder / "README.md", "a")  # noqa: SIM115
    save(folder, 2, "single")
    with held:
        held.write(", and more")  # by a process that had it open: under both names it is one file
    expected = {**planted, "README.md": b"about, and more", "link": b"about, and more"}
    assert expected == {name: data for name, data in files_of(folder).items() if name in expected}
    assert ("README.md", 0o711) == (os.readlink(folder / "link"), stat.S_IMODE((folder / ".git").stat().st_mode))
    save(folder, 3)
    assert expected == {name: data for name, data in files_of(folder).items() if name in expected}


def test_they_are_copied_where_there_are_no_hard_links(folder: Path) -> None:
    class NoLinks(Vfs):
        def link(self, source: Path, path: Path) -> None:
            raise OperationError("link", path, OSError(1, "Operation not permitted"))

    save(folder, 1)
    planted = plant(folder)
    save(folder, 2, vfs=NoLinks())
    assert (2, []) == (state(folder), [name for name in leftovers(folder) if name != "link"])
    assert planted == {name: data for name, data in files_of(folder).items() if name in planted}


@pytest.mark.parametrize("moment", ["create model-00002", "exchange model", "fsync", "rmdir tree", "list tree"])
def test_what_others_write_meanwhile_is_not_lost(folder: Path, moment: str) -> None:
    save(folder, 1)
    (folder / "grows.txt").write_text("old")
    (folder / "goes.tmp").write_text("x")
    (folder / "sub").mkdir()

    def write() -> None:
        (folder / "new.txt").write_text("new")
        (folder / "sub/new.txt").write_text("new")
        (folder / "next").write_text("replaced")
        os.replace(folder / "next", folder / "grows.txt")
        os.unlink(folder / "goes.tmp")

    # After the exchange, a process that had the folder open still writes into the old one.
    descriptor = os.open(folder, os.O_RDONLY)
    before = os.getcwd()
    try:

        def write_from_inside() -> None:
            os.chdir(f"/proc/self/fd/{descriptor}")
            for name in ("new.txt", "next"):
                Path(name).write_text("new" if name == "new.txt" else "replaced")
            os.replace("next", "grows.txt")
            Path("sub").mkdir(exist_ok=True)
            Path("sub/new.txt").write_text("new")
            Path("goes.tmp").unlink(missing_ok=True)
            os.chdir(before)

        late = moment in ("rmdir tree", "list tree")
        save(folder, 2, vfs=Meanwhile(moment, write_from_inside if late else write))
    finally:
        os.chdir(before)
        os.close(descriptor)
    assert ("new", "new", "replaced") == tuple((folder / name).read_text() for name in ("new.txt", "sub/new.txt", "grows.txt"))
    assert (2, []) == (state(folder), leftovers(folder))
    if moment not in ("rmdir tree",):
        assert not (folder / "goes.tmp").exists()


def test_what_somebody_wrote_before_a_save_was_killed_is_found_by_the_next(folder: Path) -> None:
    class Crash(BaseException):
        pass

    def crash() -> None:
        (next(folder.parent.glob(".model.stage-*/tree")) / "late.txt").write_text("late")
        raise Crash

    class AfterExchange(Meanwhile):
        def call(self, operation: str, path: Path, action: Callable[..., Any], *arguments: Any) -> Any:
            if self.is_done and operation != "close":
                raise Crash
            return super().call(operation, path, action, *arguments)

    save(folder, 1)
    vfs = AfterExchange("rmdir tree", crash)
    with pytest.raises(Crash):
        save(folder, 2, vfs=vfs)
    vfs.end_process()
    assert 2 == state(folder)
    save(folder, 3, "single")
    assert (3, [], "late") == (state(folder), leftovers(folder), (folder / "late.txt").read_text())


def test_files_of_another_variant_stay_and_stay_listed(folder: Path, way: str) -> None:
    save(folder, 1, "3 shards")
    save(folder, 1, "2 shards", variant="fp16")
    assert {"model.safetensors.index.json", "model.safetensors.index.fp16.json"} <= set(os.listdir(folder))
    assert ("verified", 1) == (verify(folder).state, state(folder))
    assert any(name.startswith("model-00003") for name in verify(folder).checked)
    save(folder, 3, "single", variant="fp16")
    assert "model.fp16.safetensors" in os.listdir(folder)
    assert not [name for name in os.listdir(folder) if name.startswith("model.fp16-")]


def test_what_an_earlier_save_listed_goes_unless_it_was_edited(folder: Path, way: str) -> None:
    files = {"config.json": b'{"generation": 1}', "tokenizer.json": b"{}", "edited.json": b"{}"}
    save(folder, 1, files=files)
    (folder / "edited.json").write_text("mine now")
    save(folder, 3)
    assert ("mine now", False) == ((folder / "edited.json").read_text(), (folder / "tokenizer.json").exists())


def test_a_stage_that_is_none_of_ours_is_left_alone(folder: Path) -> None:
    other = folder.parent / f".model.stage-{'a' * 32}"
    other.mkdir()
    (other / "precious").write_text("x")
    named = folder.parent / ".model.stage-mine"
    named.mkdir()
    report = save(folder, 1)
    assert [f"left alone, it is none of ours: {other}"] == list(report.notes)
    assert ("x", True) == ((other / "precious").read_text(), named.is_dir())


def test_files_have_the_mode_the_umask_leaves_or_that_of_the_file_they_replace(folder: Path, way: str) -> None:
    before = os.umask(0o027)
    try:
        save(folder, 1)
        modes = {name: stat.S_IMODE((folder / name).stat().st_mode) for name in os.listdir(folder)}
        assert {0o640} == set(modes.values())
        assert 0o750 == stat.S_IMODE(folder.stat().st_mode)
        os.chmod(folder / "config.json", 0o604)
        os.chmod(folder / "model-00001-of-00003.safetensors", 0o444)
        os.chmod(folder, 0o2775)
        save(folder, 3)
    finally:
        os.umask(before)
    assert 0o604 == stat.S_IMODE((folder / "config.json").stat().st_mode)
    if way != "one by one":  # there, shards have other names
        assert 0o444 == stat.S_IMODE((folder / "model-00001-of-00003.safetensors").stat().st_mode)
    assert 0o2775 == stat.S_IMODE(folder.stat().st_mode)


# ------------------------------------------------------------------------------------------------ where it writes


def test_missing_parents_are_made_and_go_again_when_the_save_fails(tmp_path: Path) -> None:
    target = tmp_path / "a/b/model"
    with pytest.raises(SaveError):
        save(target, 1, vfs=Faulty(30, 5))
    assert [] == os.listdir(tmp_path)
    save(target, 1)
    assert 1 == state(target)


def test_a_link_stays_a_link_and_its_folder_is_saved(tmp_path: Path) -> None:
    save(tmp_path / "real", 1)
    (tmp_path / "link").symlink_to("real")
    report = save(tmp_path / "link", 2)
    assert (True, 2, tmp_path / "real") == ((tmp_path / "link").is_symlink(), state(tmp_path / "real"), report.path)
    (tmp_path / "to come").symlink_to("new")
    save(tmp_path / "to come", 3)
    assert (True, 3) == ((tmp_path / "to come").is_symlink(), state(tmp_path / "new"))


def test_a_file_of_the_folder_that_is_a_link_is_replaced_and_not_followed(folder: Path, way: str) -> None:
    save(folder, 1, "single")
    blob = folder.parent / "blob"
    os.rename(folder / "model.safetensors", blob)
    (folder / "model.safetensors").symlink_to("../blob")
    content = blob.read_bytes()
    save(folder, 2, "single")
    assert (2, content, False) == (state(folder), blob.read_bytes(), (folder / "model.safetensors").is_symlink())


def test_a_failed_save_in_place_gives_links_back_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "why_in_place", lambda folder, vfs: "a test asks for it")
    save(folder, 1, "single")
    os.rename(folder / "model.safetensors", folder.parent / "blob")
    (folder / "model.safetensors").symlink_to("../blob")

    class Stop(Exception):
        pass

    def stop() -> None:
        assert os.readlink(folder / "model.safetensors").startswith(".modelrig.current/")
        raise Stop

    with pytest.raises(SaveError, match="Stop"):
        save(folder, 2, "single", vfs=Meanwhile("rename modelrig.json", stop))
    assert (1, "../blob") == (state(folder), os.readlink(folder / "model.safetensors"))
    assert ["model.safetensors"] == leftovers(folder)  # it is a link, as it was


@pytest.mark.parametrize("beside", ["blobs", "refs"])
@pytest.mark.parametrize("inside", ["snapshots/abc", "snapshots/abc/sub", "snapshots/new", "blobs", ""])
def test_the_cache_of_the_hub_is_refused(tmp_path: Path, beside: str, inside: str) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "snapshots/abc").mkdir(parents=True)
    (cache / beside).mkdir()
    (tmp_path / "link").symlink_to(cache / inside)
    before = files_of(tmp_path)
    for target in (cache / inside, tmp_path / "link"):
        with pytest.raises(SaveError, match=r"SV-TARGET.*cache") as caught:
            save(target, 1)
        assert "no" == caught.value.committed
    assert before == files_of(tmp_path)


@pytest.mark.parametrize("kind", ["file", "loop", "long", "root", "a folder of a file's name"])
def test_what_cannot_be_a_target_is_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    target = tmp_path / ("x" * 256 if kind == "long" else "model")
    if kind == "file":
        target.write_text("x")
    elif kind == "loop":
        target.symlink_to("model")
    elif kind == "a folder of a file's name":
        (target / "config.json").mkdir(parents=True)
    before = files_of(tmp_path)
    with pytest.raises(SaveError) as caught:
        save(Path("/") if kind == "root" else target, 1)
    assert "no" == caught.value.committed
    assert before == files_of(tmp_path)


def test_a_long_name_can_be_saved(tmp_path: Path) -> None:
    folder = tmp_path / ("é" * 127)
    save(folder, 1)
    save(folder, 2)
    assert (2, [folder.name]) == (state(folder), os.listdir(tmp_path))


def test_a_folder_that_holds_something_is_replaced_only_if_that_may_be(folder: Path) -> None:
    save(folder, 1, overwrite=False)
    with pytest.raises(SaveError, match=r"SV-TARGET.*not empty"):
        save(folder, 2, overwrite=False)
    assert 1 == state(folder)


def test_the_working_directory_stays_where_it_is(folder: Path) -> None:
    save(folder, 1)
    (folder / "sub").mkdir()
    for inside in (folder, folder / "sub"):
        shell = subprocess.Popen(["sleep", "60"], cwd=inside)
        try:
            report = save(folder, 2, "single")
            there = Path(f"/proc/{shell.pid}/cwd")
            assert "in place" == report.durability
            assert f"working directory of process {shell.pid}" in report.notes[-1]
            assert 2 == state(there if inside == folder else Path(os.readlink(there)).parent)
            assert not os.readlink(there).endswith("(deleted)")
        finally:
            shell.kill()
            shell.wait()
    assert [] == leftovers(folder)


def test_our_own_working_directory_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 1)
    monkeypatch.chdir(folder)
    assert "in place" == save(Path("."), 2).durability
    assert 2 == state(Path(".")) == state(folder)


MOUNTED = """
import os, subprocess, sys
from pathlib import Path
sys.path.insert(0, "tests")
from saves import leftovers, save, state
from modelrig.errors import SaveError
root = Path(sys.argv[1])
target = root / "model"
target.mkdir()
def mount(size, where):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(where)], check=True)
mount("1m", target)
(target / "mine").write_text("mine")
for generation, layout in enumerate(["single", "3 shards", "2 shards", "single"], 1):
    report = save(target, generation, layout)
    assert report.durability == "in place" and "mount point" in report.notes[-1], report
    assert state(target) == generation and leftovers(target) == [], (state(target), leftovers(target))
assert (target / "mine").read_text() == "mine"
holder = root / "holder"
save(holder, 1)
(holder / "data").mkdir()
mount("1m", holder / "data")
(holder / "data/precious").write_text("x")
assert save(holder, 2, "single").durability == "in place"
assert (holder / "data/precious").read_text() == "x" and state(holder) == 2
small = root / "small"
small.mkdir()
mount("40k", small)
save(small / "model", 1, "single")
(small / "fill").write_bytes(b"x" * 4096)
try:
    for generation in range(2, 40):
        (small / f"fill{generation}").write_bytes(b"x" * 4096)
except OSError:
    pass
for layout in ("single", "6 shards"):
    try:
        save(small / "model", 2, layout)
        raise SystemExit("a full disk was not noticed")
    except SaveError as error:
        assert (error.code, error.committed) == ("SV-SPACE", "no"), error
    assert state(small / "model") == 1 and leftovers(small / "model") == [], (state(small / "model"), leftovers(small / "model"))
subprocess.run(["mount", "-o", "remount,ro", str(target)], check=True)
try:
    save(target, 9)
    raise SystemExit("a read-only file system was not noticed")
except SaveError as error:
    assert error.committed == "no", error
assert state(target) == 4
print("done")
"""


def test_mount_points_full_disks_and_read_only_file_systems(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("only root may mount, in a namespace of its own")
    command = [unshare, "-m", sys.executable, "-c", MOUNTED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (0, "done\n") == (done.returncode, done.stdout), done.stderr


def test_a_file_system_that_cannot_exchange_is_found_out_before_anything_is_written(folder: Path) -> None:
    class NoExchange(Recording):
        def exchange(self, source: Path, path: Path) -> None:
            raise OperationError("exchange", path, OSError(22, "Invalid argument"))

    save(folder, 1)
    vfs = NoExchange()
    report = save(folder, 2, vfs=vfs)
    assert ("in place", 2, []) == (report.durability, state(folder), leftovers(folder))
    assert 3 == len([one for one in vfs.operations if one.startswith("create model-")])


def test_a_folder_the_system_does_not_exchange_is_saved_in_place(folder: Path) -> None:
    class Busy(Vfs):
        def exchange(self, source: Path, path: Path) -> None:
            if path == folder:
                raise OperationError("exchange", path, OSError(16, "Device or resource busy"))
            super().exchange(source, path)

    save(folder, 1)
    (folder / "mine").write_text("x")
    report = save(folder, 2, vfs=Busy())
    assert ("in place", 2, []) == (report.durability, state(folder), leftovers(folder))
    assert (folder / "mine").exists()


@pytest.mark.parametrize("moment", ["create model-00002", "create modelrig.json", "open .model.stage-"])
def test_nothing_is_exchanged_under_the_hands_of_a_process_that_writes(folder: Path, moment: str) -> None:
    save(folder, 1)
    (folder / "log.txt").write_text("old")
    before = folder.stat().st_ino
    vfs = Meanwhile(moment, lambda: (folder / "log.txt").write_text("older"))
    report = save(folder, 2, vfs=vfs)
    assert (True, 2, [], "older") == (vfs.is_done, state(folder), leftovers(folder), (folder / "log.txt").read_text())
    if moment.startswith("create"):
        assert "in place" == report.durability
        assert "another process writes into it" in report.notes[-1]
        assert before == folder.stat().st_ino
        assert 3 == len([one for one in vfs.operations if one.startswith("create model-")]), "written twice"


# ------------------------------------------------------------------------------------------------ at the same time


def test_a_second_saver_is_told_who_is_first(folder: Path) -> None:
    save(folder, 1)

    def second() -> None:
        with pytest.raises(SaveInProgress) as caught:
            save(folder, 3)
        assert (os.getpid(), "no") == (caught.value.pid, caught.value.committed)
        assert caught.value.host is not None and caught.value.since is not None

    vfs = Meanwhile("create config.json", second)
    save(folder, 2, vfs=vfs)
    assert (True, 2, []) == (vfs.is_done, state(folder), leftovers(folder))


def test_the_lock_is_taken_over_from_the_dead_and_removed(folder: Path) -> None:
    lock = folder.parent / ".model.modelrig.lock"
    lock.write_text("torn {")
    save(folder, 1)
    assert [] == leftovers(folder)


def test_one_lock_has_one_holder_however_often_it_is_removed(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "lock", [], []
    deciding = threading.Lock()

    def run() -> None:
        for _ in range(100):
            try:
                with locked(Vfs(), path, tmp_path):
                    with deciding:
                        inside.append(1)
                        most.append(len(inside))
                    with deciding:
                        inside.pop()
            except SaveInProgress:
                pass

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ({1}, False) == (set(most), path.exists())


# ------------------------------------------------------------------------------------------------ what cannot be saved


@pytest.mark.parametrize(
    ("options", "locus"),
    [
        ({"max_shard_size": 0}, "max_shard_size"),
        ({"max_shard_size": "10XB"}, "max_shard_size"),
        ({"variant": "../x"}, "variant"),
        ({"variant": ""}, "variant"),
        ({"files": {"../x": b""}}, "files"),
        ({"files": {"sub/x": b""}}, "files"),
        ({"files": {"model.safetensors": b""}}, "files"),
        ({"files": {"modelrig.json": b""}}, "files"),
        ({"files": {".modelrig.current": b""}}, "files"),
        ({"files": {"x": Path("/does/not/exist")}}, "files"),
        ({"format": object()}, "format"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_anything_is_written(folder: Path, options: Any, locus: str) -> None:
    with pytest.raises(SaveError, match="SV-ARGS") as caught:
        save(folder, 1, **options)
    assert (locus, [], "no") == (caught.value.locus, os.listdir(folder.parent), caught.value.committed)


def test_a_name_given_twice_is_refused(folder: Path) -> None:
    twice = [StoredTensor("a", "uint8", (1,)), StoredTensor("b", "uint8", (1,), aliases=("a",))]
    with pytest.raises(SaveError, match=r"SV-ARGS.*a: is given twice"):
        save_checkpoint(folder, twice, filled(1), SafetensorsPlanner)


def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(folder: Path) -> None:
    with pytest.raises(FormatError):
        save_checkpoint(folder, [StoredTensor("a", "complex128", (1,))], filled(1), SafetensorsPlanner)
    assert [] == os.listdir(folder.parent)


def test_tensors_that_cannot_be_read_are_named_before_anything_is_written(folder: Path) -> None:
    save(folder, 1)
    vfs = Recording()

    def problem(tensor: StoredTensor) -> str | None:
        return "is on the meta device" if tensor.name.startswith(("layer.1", "layer.4")) else None

    with pytest.raises(SaveError, match=r"SV-TENSOR.*layer.1.weight: is on the meta device, and 1 more: layer.4.weight"):
        save(folder, 2, problem=problem, vfs=vfs)
    assert (1, []) == (state(folder), vfs.operations)


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("odd"), MemoryError()])
def test_a_tensor_that_fails_while_it_is_read_costs_nothing(folder: Path, way: str, error: Exception) -> None:
    save(folder, 1)

    def read(tensor: StoredTensor) -> Iterator[bytes]:
        if tensor.name == "layer.4.weight":
            raise error
        yield bytes(tensor.nbytes)

    with pytest.raises(SaveError, match="SV-READ") as caught:
        save_checkpoint(folder, tensors(), read, SafetensorsPlanner)
    assert (1, [], "no", error) == (state(folder), leftovers(folder), caught.value.committed, caught.value.__cause__)


def test_a_reader_that_brings_too_few_bytes_costs_nothing(folder: Path) -> None:
    save(folder, 1)
    with pytest.raises(SaveError, match="SV-READ"):
        save_checkpoint(folder, tensors(), lambda tensor: [b"short"], SafetensorsPlanner)
    assert (1, []) == (state(folder), leftovers(folder))


@pytest.mark.parametrize("moment", ["create model-00002", "fsync", "exchange tree", "rename modelrig.json", "rmdir tree"])
def test_ctrl_c_leaves_one_checkpoint_and_nothing_else(folder: Path, way: str, moment: str) -> None:
    save(folder, 1)

    def interrupt() -> None:
        raise KeyboardInterrupt

    vfs = Meanwhile(moment, interrupt)
    try:
        save(folder, 2, vfs=vfs)
    except KeyboardInterrupt:
        assert state(folder) in (1, 2)
        assert [] == [name for name in leftovers(folder) if "lock" in name]
    save(folder, 3)
    assert (3, []) == (state(folder), leftovers(folder))


def test_too_little_space_is_noticed_before_anything_is_written(folder: Path) -> None:
    class Full(Recording):
        def free_bytes(self, path: Path) -> int:
            return 1000

    vfs = Full()
    with pytest.raises(SaveError, match=r"SV-SPACE.*are needed and 1,000 are free"):
        save(folder, 1, vfs=vfs)
    assert [] == [one for one in vfs.operations if one.startswith("create")]
    assert [] == os.listdir(folder.parent)


def test_no_descriptor_is_left_open(folder: Path, way: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for generation in range(1, 4):
        save(folder, generation)
    assert before == len(os.listdir("/proc/self/fd"))


def test_the_errors_of_a_save_can_be_read_by_machines(folder: Path) -> None:
    with pytest.raises(SaveError) as caught:
        save(folder, 1, vfs=Faulty(40, 28))
    error = caught.value
    assert ("SV-SPACE", "no", True) == (error.code, error.committed, error.operation is not None)
    assert "the folder is as it was" in str(error)
    assert json.dumps(error.to_json())


def test_walking_a_tree_survives_what_goes_meanwhile(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    seen = []
    for inside, _ in tree.walk(Vfs(), tmp_path, lambda name, status: False):
        seen.append(str(inside))
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
    assert {"b", "c", "b/x", "c/x"} <= set(seen)
