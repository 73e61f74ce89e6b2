"""The cycle collector is as it was before, whatever happens meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import modelrig
from modelrig.checkpoint.collector import collector_paused
from modelrig.errors import CheckpointError


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    yield
    gc.enable()


def test_it_is_paused_and_goes_on() -> None:
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_who_runs_without_it_goes_on_without_it() -> None:
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()


def test_it_goes_on_after_a_load_that_failed(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(CheckpointError):
        modelrig.load_checkpoint(nn.Linear(3, 2), tmp_path)
    assert gc.isenabled()
    torch.save({"weight": torch.ones(2, 3)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(modelrig.errors.LoadError):
        modelrig.load_checkpoint(nn.Linear(3, 2), tmp_path)
    assert gc.isenabled()
