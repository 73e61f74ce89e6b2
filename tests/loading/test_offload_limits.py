"""What a disk tier takes, what its errors are, and what is left when it is gone."""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import modelrig
from modelrig.errors import FileError
from modelrig.loading import transport
from modelrig.loading.offload import Streamer
from residue import held, mappings, open_files, resident_bytes
from streamed import NET_IDS, WIDE, Boom, Net, Wide, nothing, raising, streamed, streamer_of

# ------------------------------------------------------------------------------------------------ errors, and what is left


@torch.no_grad()
def test_a_file_that_is_cut_while_it_is_in_use_is_an_error(tmp_path: Path, net: Net, on_network: None) -> None:
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    module = streamed(tmp_path)
    module(NET_IDS)
    with file.open("r+b") as stream:
        stream.truncate(len(content) // 3)
    for _ in range(3):
        with pytest.raises(FileError, match="IO-CHANGED") as caught:
            module(NET_IDS)
        assert str(file) == caught.value.path
    streamer_of(module)._fetcher.submit(int).result()  # what was asked for ahead has failed too
    with file.open("r+b") as stream:
        stream.write(content)
    assert torch.equal(net(NET_IDS), module(NET_IDS))  # the descriptor is still that of the same file


@torch.no_grad()
def test_an_error_of_one_reader_leaves_no_other_writing(
    tmp_path: Path, net: Net, on_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = streamed(tmp_path)
    real, count = transport.os.preadv, 0

    def preadv(*arguments: Any) -> int:
        nonlocal count
        count += 1
        if count % 7 == 3:
            raise OSError(5, "Input/output error")
        time.sleep(0.002)  # others are still reading when one has failed
        return real(*arguments)

    monkeypatch.setattr(transport.os, "preadv", preadv)
    expected, passed, failed = net(NET_IDS), 0, 0
    for _ in range(60):
        try:
            assert torch.equal(expected, module(NET_IDS))
            passed += 1
        except FileError as error:
            assert "IO-READ" == error.code
            failed += 1
    assert failed
    monkeypatch.undo()
    assert torch.equal(expected, module(NET_IDS))


@pytest.fixture
def threads() -> Callable[[], list[threading.Thread]]:
    """What is left of the threads that a test started; they end by themselves, soon after they are told."""
    gc.collect()
    before = set(threading.enumerate())

    def left() -> list[threading.Thread]:
        for _ in range(100):
            gc.collect()
            found = [thread for thread in threading.enumerate() if "modelrig" in thread.name and thread not in before]
            if not found:
                return []
            time.sleep(0.05)
        return found

    return left


@torch.no_grad()
def test_whoever_waits_when_a_model_is_closed_gets_an_error(tmp_path: Path, net: Net, on_network: None) -> None:
    module = streamed(tmp_path)
    module(NET_IDS)
    streamer = streamer_of(module)
    inside, closed, errors = threading.Event(), threading.Event(), []

    def compute() -> None:
        try:
            module(NET_IDS)
        except Exception as error:
            errors.append(error)

    def stay() -> None:
        inside.set()
        assert closed.wait(60)

    module.stack.blocks[1].inside = stay
    first = threading.Thread(target=compute, daemon=True)
    first.start()
    assert inside.wait(60)
    module.stack.blocks[1].inside = nothing
    # Of the blocks that take turns in the slot of the one that is in use, this one waits.
    second = threading.Thread(target=lambda: [compute() for _ in range(2)], daemon=True)
    second.start()
    second.join(1)
    assert second.is_alive()
    streamer.close()
    closed.set()
    for thread in (first, second):
        thread.join(60)
        assert not thread.is_alive()
    assert {"LD-STREAM"} == {getattr(error, "code", error) for error in errors[:1]}


@torch.no_grad()
def test_closing_leaves_nothing(tmp_path: Path, net: Net, way: str, threads: Any) -> None:
    module = streamed(tmp_path)
    module(NET_IDS)
    streamer = streamer_of(module)
    streamer.close()
    streamer.close()
    assert [] == threads()
    assert [] == open_files(tmp_path)
    assert not any("_call_impl" in part.__dict__ for part in module.modules())
    del module, streamer
    assert ([], []) == held(tmp_path)


@torch.no_grad()
def test_a_module_that_is_forgotten_leaves_nothing(tmp_path: Path, net: Net, way: str, threads: Any) -> None:
    module = streamed(tmp_path)
    module(NET_IDS)
    del module
    assert [] == threads()
    assert ([], []) == held(tmp_path)


def test_a_rig_that_is_closed_leaves_nothing(llama_folder: Path, threads: Any) -> None:
    for dtype in ("float32", "bfloat16"):
        model = modelrig.load(llama_folder, dtype=dtype, device_map="disk")
        model([[1, 2, 3]])
        model.close()
        assert [] == threads()
        assert ([], []) == held(llama_folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Boom])
def test_a_load_that_is_interrupted_leaves_nothing(
    tmp_path: Path, net: Net, way: str, error: type[BaseException], threads: Any
) -> None:
    with pytest.raises(error) as caught:
        streamed(tmp_path, device_map={"": "disk", "embed": "cpu", "head": "cpu"}, progress=raising(error))
    assert ([], []) == held(tmp_path)  # although `caught` still holds the traceback
    assert [] == threads()
    assert caught.value is not None


def test_a_mistake_after_the_disk_tier_was_set_up_leaves_nothing(
    tmp_path: Path, net: Net, way: str, monkeypatch: pytest.MonkeyPatch, threads: Any
) -> None:
    monkeypatch.setattr(Streamer, "attach", raising(Boom))
    with pytest.raises(Boom):
        streamed(tmp_path)
    assert [] == threads()
    assert ([], []) == held(tmp_path)


# ------------------------------------------------------------------------------------------------ what it takes

MIB = 1 << 20


@pytest.fixture
def waits_for_the_background(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A unit's pages go in the background; a test that counts them waits until that is done."""
    real = Streamer.leave

    def leave(self: Streamer, site: int, call: object) -> None:
        real(self, site, call)
        self._fetcher.submit(int).result()

    monkeypatch.setattr(Streamer, "leave", leave)
    yield


@pytest.mark.parametrize(("how", "dtype"), [("dropped", "float32"), ("around", "float32"), ("cast", "bfloat16")])
@torch.no_grad()
def test_the_disk_tier_takes_two_blocks(
    wide_folder: Path, waits_for_the_background: None, request: pytest.FixtureRequest, how: str, dtype: str
) -> None:
    if how == "around":
        request.getfixturevalue("around")
    block = 4 * MIB if how == "cast" else 8 * MIB
    module = streamed(wide_folder, Wide, dtype=dtype, max_memory={"cpu": "1GB"})
    x = torch.randn(1, WIDE).to(getattr(torch, dtype))
    module.blocks[0](x)  # threads and kernels have what they keep
    gc.collect()
    before = resident_bytes("RssAnon") + resident_bytes("RssFile")
    peaks: list[int] = []
    for part in module.blocks:
        part.inside = lambda: peaks.append(resident_bytes("RssAnon") + resident_bytes("RssFile"))
    for _ in range(2):
        module(x)
    assert max(peaks) - before < 2 * block + 10 * MIB
    assert 32 == len(peaks)


LIMITED = """
import resource, sys, torch
sys.path.insert(0, sys.argv[2])
import modelrig
from pathlib import Path
from streamed import WIDE, Wide
x = torch.ones(1, WIDE)
with modelrig.empty_weights():
    module = Wide()
torch.ones(300, 300) @ torch.ones(300, 300)
used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
room = 64 << 20
resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))
module = modelrig.load_and_dispatch(module, sys.argv[1], device_map="disk", no_split_module_classes=("Block",))
with torch.no_grad():
    module(x)
    print(module(x).double().sum().item())
"""


@torch.no_grad()
def test_the_disk_tier_works_where_the_file_is_larger_than_the_memory_allowed(wide_folder: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(wide_folder), str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert 0 == done.returncode, done.stderr
    module = Wide()
    modelrig.load_checkpoint(module, wide_folder)
    assert module.eval()(torch.ones(1, WIDE)).double().sum().item() == float(done.stdout)


@torch.no_grad()
def test_a_thousand_shards_on_the_disk_need_few_descriptors(tmp_path: Path) -> None:
    count = 400
    index = {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        save_file({f"{number}.weight": torch.full((3, 3), float(number))}, tmp_path / name)
        index[f"{number}.weight"] = name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, len(open_files()) + 120), hard))
    try:
        module = streamed(
            tmp_path, lambda: nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(count)]), no_split_module_classes=()
        )
        assert count == len(mappings(tmp_path))
        assert torch.equal(torch.full((1, 3), 7.0 * 3), module[7](torch.ones(1, 3)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ------------------------------------------------------------------------------------------------ GPUs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "device_map", [{"": 0, "stack.blocks.1": "cpu", "stack.blocks.3": "disk"}, {"": 0, "stack": "cpu"}, {"": 0, "stack": "disk"}]
)
@torch.no_grad()
def test_a_gpu_computes_with_weights_from_memory_and_disk(tmp_path: Path, net: Net, device_map: Any) -> None:
    expected = net.cuda()(NET_IDS.cuda())
    module = streamed(tmp_path, device_map=device_map)
    for _ in range(3):
        assert torch.equal(expected, module(NET_IDS.cuda()))
        assert torch.equal(expected.cpu(), module(NET_IDS).cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_a_gpu_holds_two_blocks(wide_folder: Path) -> None:
    module = streamed(wide_folder, Wide, device_map={"": "disk", "blocks.0": 0})
    x = torch.randn(1, WIDE, device="cuda")
    module(x)
    torch.cuda.reset_peak_memory_stats()
    module(x)
    assert torch.cuda.max_memory_allocated() < 3 * 8 * MIB + 16 * MIB
