"""How a disk tier is brought: pages of mapped files, or slots, for files on a network or around the page cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modelrig.loading import dispatch, materialise, transport
from streamed import Net, saved


@pytest.fixture
def on_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is mapped, so everything goes through slots."""
    monkeypatch.setattr(transport, "is_on_network", lambda path: True)


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where main memory has no room to cache the files."""
    for module in (dispatch, materialise):
        monkeypatch.setattr(module, "has_room_to_cache", lambda wanted: False)


@pytest.fixture
def net(tmp_path: Path) -> Net:
    torch.manual_seed(0)
    made = Net().eval()
    saved(tmp_path, made)
    return made


@pytest.fixture(params=["on_network", "around"])
def in_slots(request: pytest.FixtureRequest) -> None:
    """Both ways by which tensors take turns in slots."""
    request.getfixturevalue(request.param)


@pytest.fixture(params=["paged", "on_network", "around"])
def way(request: pytest.FixtureRequest) -> str:
    """All ways to bring a tensor that is stored as it is used."""
    if request.param != "paged":
        request.getfixturevalue(request.param)
    return request.param
