"""What becomes of the pages of the disk tier's files, by what main memory has room for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import modelrig
from modelrig.loading import paging
from modelrig.loading.filling import Wanted
from modelrig.loading.offload import Unit
from modelrig.loading.paging import MainMemory, Paging
from modelrig.planning.environment import read_memory
from residue import resident_bytes
from streamed import WIDE, Wide, streamed, streamer_of

MIB = 1 << 20
CPU = torch.device("cpu")


def units(*sizes: int) -> list[Unit]:
    return [Unit(str(size), (Wanted(str(size), (size, 2), torch.bfloat16, CPU, ()),), (nn.Module(),)) for size in sizes]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    memory = evolve(read_memory(Path("/")), available_bytes=request.param)
    monkeypatch.setattr(paging, "read_memory", lambda root: memory)


def ways(memory: MainMemory, *sizes: int, has_room: bool = False) -> str:
    return "".join(unit.paging.value[0] for unit in memory.paged(units(*sizes), has_room=has_room))


@pytest.mark.parametrize("free", [4000], indirect=True)
def test_what_fits_is_cached_beside_what_is_reserved(free: None) -> None:
    [half, other] = [unit.wanted[0] for unit in units(500, 500)]  # 2,000 bytes each
    assert MainMemory().can_cache([half, other])
    assert not MainMemory(reserved_bytes=1).can_cache([half, other])
    assert MainMemory(reserved_bytes=2000).can_cache([half])


def test_with_room_pages_stay_unless_there_is_a_max_memory() -> None:
    assert "kkk" == ways(MainMemory(), 5, 5, 5, has_room=True)
    assert "ddd" == ways(MainMemory(is_limited=True), 5, 5, 5, has_room=True)
    assert "aaa" == ways(MainMemory(is_limited=True), 5, 5, 5)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (0, "aaaaaaaa"),
        (12_000, "aaaaaaaa"),  # two slots of 4,000 bytes, and 95 % of the rest is less than one unit
        (12_300, "aaaaaaak"),
        (16_500, "aaakaaak"),
        (24_900, "akakakak"),
        (33_300, "akkkakkk"),
        (200_000, "kkkkkkkk"),
    ],
    indirect=["free"],
)
def test_as_many_stay_as_there_is_room_for_in_equal_distances(free: None, expected: str) -> None:
    assert expected == ways(MainMemory(), *[1000] * 8)
    assert "a" * 8 == ways(MainMemory(is_limited=True), *[1000] * 8)
    assert "a" * 8 == ways(MainMemory(reserved_bytes=200_000), *[1000] * 8)


@given(sizes=st.lists(st.integers(0, 1000), max_size=40), free=st.integers(0, 40_000))
def test_what_stays_fits_and_little_more_would(sizes: list[int], free: int) -> None:
    kept = paging._spaced(sizes, free)
    room = (free - 2 * max(sizes, default=0)) * paging.CAUTION
    held = sum(sizes[number] for number in kept)
    assert held <= max(room, 0) + 1e-6
    fitting = sum(size for size in sizes if size <= room)
    assert held >= min(fitting, room) - max(sizes, default=0) - 1e-6


def test_one_large_unit_keeps_no_other_from_staying() -> None:
    assert {*range(1, 101)} == paging._spaced([1000] + [10] * 100, 3_100)  # 1,045 bytes beside two slots
    assert 46 <= len(paging._spaced([1000] + [10] * 100, 2_500)) <= 47
    assert set() == paging._spaced([10] * 100_000, 0)


@torch.no_grad()
def test_without_a_limit_what_was_used_stays(wide_folder: Path) -> None:
    module = streamed(wide_folder, Wide)
    before = resident_bytes("RssFile")
    x = torch.ones(1, WIDE)
    expected = module(x)
    assert resident_bytes("RssFile") - before > 15 * 8 * MIB
    assert torch.equal(expected, module(x))
    assert 0 == streamer_of(module).slot_bytes


@torch.no_grad()
def test_some_stay_and_the_rest_takes_turns(wide_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Wide()
    modelrig.load_checkpoint(whole, wide_folder)
    room = evolve(read_memory(Path("/")), available_bytes=60 * MIB)  # of 128
    monkeypatch.setattr(paging, "read_memory", lambda root: room)
    module = streamed(wide_folder, Wide)
    streamer = streamer_of(module)
    assert [unit.unit.paging for unit in streamer._states].count(Paging.KEPT) in range(3, 6)
    assert 16 * MIB <= streamer.slot_bytes < 17 * MIB
    x = torch.randn(3, WIDE)
    for _ in range(3):
        assert torch.equal(whole.eval()(x), module(x))
