"""How a disk tier is brought: pages of mapped files, or slots, for files on a network or around the page cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import pytest
import torch
from attrs import evolve
from safetensors.torch import save_file

from modelrig.loading import transport
from modelrig.loading.offload import Unit
from modelrig.loading.paging import MainMemory, Paging
from streamed import Net, Wide, saved


@pytest.fixture
def on_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is mapped, so everything goes through slots."""
    monkeypatch.setattr(transport, "is_on_network", lambda path: True)


def memory_with(monkeypatch: pytest.MonkeyPatch, has_room: bool, *pagings: Paging) -> None:
    """Main memory such that units are paged in these ways in turn."""

    def paged(_: MainMemory, units: Sequence[Unit], has_room: bool) -> list[Unit]:
        return [evolve(unit, paging=paging) for unit, paging in zip(units, cycle(pagings))]

    monkeypatch.setattr(MainMemory, "can_cache", lambda _, wanted: has_room)
    monkeypatch.setattr(MainMemory, "paged", paged)


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where main memory has no room to cache the files."""
    memory_with(monkeypatch, False, Paging.AROUND)


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `max_memory`."""
    memory_with(monkeypatch, True, Paging.DROPPED)


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where main memory has room for some units."""
    memory_with(monkeypatch, False, Paging.KEPT, Paging.AROUND, Paging.AROUND)


@pytest.fixture
def net(tmp_path: Path) -> Net:
    torch.manual_seed(0)
    made = Net().eval()
    saved(tmp_path, made)
    return made


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 MiB in float32."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(1)
    save_file(Wide().state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(params=["on_network", "around"])
def in_slots(request: pytest.FixtureRequest) -> None:
    """Both ways by which tensors take turns in slots."""
    request.getfixturevalue(request.param)


@pytest.fixture(params=["kept", "dropped", "on_network", "around", "mixed"])
def way(request: pytest.FixtureRequest) -> str:
    """All ways to bring a tensor that is stored as it is used."""
    if request.param != "kept":
        request.getfixturevalue(request.param)
    return request.param
