"""The cache `offloaded`: what lies where, what is brought when, and that nothing is left behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modelrig
from modelrig.components import AttentionSpec
from modelrig.errors import CacheError
from modelrig.registry import current
from modelrig_plugins.caches.offloaded_module import DiskCache, HostCache, Turns
from modelrig_plugins.caches.static_module import StaticCache
from residue import held

SPECS = (
    AttentionSpec(num_heads=6, num_key_value_heads=3, head_dim=4, value_dim=7, scale=1.0),
    AttentionSpec(num_heads=6, num_key_value_heads=2, head_dim=10, value_dim=10, scale=1.0),
    AttentionSpec(num_heads=6, num_key_value_heads=1, head_dim=8, value_dim=2, scale=1.0),
)


def make(kind: Any, layers: int = 3, batch: int = 2, **given: Any) -> Any:
    usual = {"capacity": 30, "dtype": torch.float32, "device": torch.device("cpu")} | given
    return kind.create(SPECS[:layers], batch=batch, **usual)


def seen(cache: Any, numbers: list[tuple[torch.Tensor, torch.Tensor]], stops_after: int | None = None) -> list[torch.Tensor]:
    """What each layer offers in a step that writes `numbers`; as a copy, since layers share slots."""
    slots = cache.begin(numbers[0][0].shape[2])
    pairs = list(zip(cache.layers, numbers, strict=True))[:stops_after]
    return [tensor.clone() for layer, (k, v) in pairs for tensor in layer.update(k, v, slots)]


class Recorded(Turns):
    """Counts the times a layer had to wait, since its tokens were not brought before."""

    waited = 0

    def _fetch(self, slot: Any, number: int, tokens: int, *, waits: bool = True) -> None:
        Recorded.waited += waits and tokens > 0
        super()._fetch(slot, number, tokens, waits=waits)


class RecordedCache(HostCache):
    turns = Recorded


@pytest.mark.parametrize("layers", [1, 2, 3])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_layers_that_take_turns_show_what_a_static_cache_shows(layers: int, data: st.DataObject) -> None:
    cache, static = make(HostCache, layers), make(StaticCache, layers)
    for _ in range(data.draw(st.integers(1, 14))):
        match data.draw(st.sampled_from(["step", "step", "step", "fail", "rewind", "reset", "reorder", "fork", "adopt"])):
            case "step" | "fail" as action if cache.length < 30:
                count = data.draw(st.integers(1, min(6, 30 - cache.length)))
                new = [
                    tuple(torch.randn(2, spec.num_key_value_heads, count, size) for size in (spec.head_dim, spec.value_dim))
                    for spec in SPECS[:layers]
                ]
                stops_after = data.draw(st.integers(0, layers)) if action == "fail" else None
                shown, expected = (seen(one, new, stops_after) for one in (cache, static))
                assert all(torch.equal(a, b) for a, b in zip(expected, shown, strict=True))
                if action == "step":
                    kept = data.draw(st.integers(0, count))
                    cache.commit(kept)
                    static.commit(kept)
            case "rewind":
                to = data.draw(st.integers(0, cache.length))
                cache.rewind(to)
                static.rewind(to)
            case "reset":
                cache.reset()
                static.reset()
            case "reorder":
                for one in (cache, static):
                    one.rewind(one.length)
                    one.reorder([1, 0])
            case "fork":
                cache = cache.fork(1)
            case "adopt":
                cache.adopt(static.export())
                static.adopt(cache.export())
        assert static.length == cache.length


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_layer_waits_only_for_tokens_that_could_not_be_asked_for_before(layers: int) -> None:
    cache, Recorded.waited = make(RecordedCache, layers), 0
    for count in (5, 1, 1, 3):
        shapes = [
            tuple(torch.zeros(2, spec.num_key_value_heads, count, size) for size in (spec.head_dim, spec.value_dim))
            for spec in SPECS[:layers]
        ]
        seen(cache, shapes)
        cache.commit(count)
    assert 0 == Recorded.waited
    cache.reorder([1, 0])
    seen(cache, shapes)
    assert 1 == Recorded.waited


def test_the_planner_says_where_the_bytes_lie() -> None:
    planner = current().find("caches", "offloaded").planner()
    sizes = [planner.nbytes((spec,), 2, 30, "float32", None) for spec in SPECS]
    assert {"disk": sum(sizes)} == planner.places(SPECS, 2, 30, "float32", planner.Options(), "cpu")
    assert {"cpu": sum(sizes), "cuda:1": 2 * max(sizes)} == planner.places(SPECS, 2, 30, "float32", planner.Options(), "cuda:1")
    host = make(HostCache)
    assert sum(sizes) == host.nbytes == make(DiskCache).nbytes
    assert 2 * max(sizes) == sum(slot.room.nbytes for slot in host.layers[0].turns.slots)


def test_its_file_has_no_name_and_goes_with_it(tmp_path: Path) -> None:
    planner = current().find("caches", "offloaded").planner()
    cache = make(DiskCache, options=planner.Options(directory=str(tmp_path)))
    assert [] == list(tmp_path.iterdir())
    files, mapped = held(tmp_path)
    assert [] == files[1:] and 1 == len(mapped) and mapped[0][2].endswith("(deleted)")
    assert mapped[0][1] - mapped[0][0] >= cache.nbytes
    fork = cache.fork(2)
    del cache, fork
    assert ([], []) == held(tmp_path)


KILLED = """
import os, signal, sys, torch
from modelrig.registry import current
from modelrig.components import AttentionSpec
part = current().find("caches", "offloaded")
spec = AttentionSpec(num_heads=1, num_key_value_heads=1, head_dim=64, value_dim=64, scale=1.0)
given = {"batch": 1, "capacity": 5000, "dtype": torch.float32, "device": torch.device("cpu")}
cache = part.implementation().create([spec], options=part.planner().Options(directory=sys.argv[1]), **given)
cache.layers[0].update(torch.ones(1, 1, 9, 64), torch.ones(1, 1, 9, 64), cache.begin(9))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, capture_output=True, text=True)
    assert (-signal.SIGKILL, "") == (done.returncode, done.stderr)
    assert [] == list(tmp_path.iterdir())


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("reason", ["free", "full", "missing"])
def test_a_disk_without_room_is_an_error_with_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    directory = tmp_path / "missing" if reason == "missing" else tmp_path
    if reason == "free":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 93, 7))
    if reason == "full":  # someone else was faster
        monkeypatch.setattr(os, "posix_fallocate", full)
    planner = current().find("caches", "offloaded").planner()
    with pytest.raises(CacheError) as caught:
        make(DiskCache, options=planner.Options(directory=str(directory)))
    assert ("CA-SPACE", str(directory)) == (caught.value.code, caught.value.locus)
    assert f"{planner.nbytes(SPECS, 2, 30, 'float32', None):,} bytes" in str(caught.value)
    assert ([], []) == held(tmp_path)


def test_a_context_that_memory_cannot_hold_is_planned_with_it(llama_folder: Path) -> None:
    request: dict[str, Any] = {"context": 160, "batch": 500, "device_map": "cpu"}
    usual, offloaded = (modelrig.plan(llama_folder, cache=cache, **request).ledger for cache in ("static", "offloaded"))
    limit = offloaded.peak("cpu", with_mapped=True) + 1000
    assert limit < usual.peak("cpu", with_mapped=True)
    with pytest.raises(modelrig.errors.ResourceLimitError, match="key/value cache"):
        modelrig.plan(llama_folder, cache="static", max_memory={"cpu": limit}, **request)
    plan = modelrig.plan(llama_folder, cache="offloaded", max_memory={"cpu": limit}, **request)
    assert "key/value cache on disk, no memory" in plan.explain()
    with pytest.raises(modelrig.errors.ResourceLimitError, match="disk needs"):
        modelrig.plan(llama_folder, cache="offloaded", max_memory={"disk": 10_000}, **request)


@pytest.mark.parametrize("directory", [3, "a\0b", b"x"])
def test_a_directory_that_is_no_path_is_a_reason(llama_folder: Path, directory: Any) -> None:
    with pytest.raises(modelrig.errors.ModelrigError) as caught:
        modelrig.plan(llama_folder, cache={"name": "offloaded", "directory": directory})
    assert "directory" in str(caught.value)
