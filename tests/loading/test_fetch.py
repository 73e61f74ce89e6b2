"""Tensor files that were not there when the plan was made must hold what their headers promised."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file

import modelrig
from modelrig.components import Catalog, Snapshot
from modelrig.errors import FileError, FormatError
from modelrig.loading.fetch import fetch
from modelrig_plugins.formats.safetensors import SafetensorsPlanner

FILE = "model.safetensors"


class Fetcher:
    """Copies the tensor file from where a hub would have it."""

    def __init__(self, origin: Path) -> None:
        self.origin, self.calls = origin, 0

    def fetch(self, snapshot: Snapshot, progress: Any) -> Snapshot:
        self.calls += 1
        shutil.copy(self.origin, snapshot.root / FILE)
        if progress is not None:
            progress(5, 5)
        return attrs.evolve(snapshot, complete=True, headers={})


@pytest.fixture
def origin(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(llama_folder / FILE, tmp_path / "origin.safetensors"))


@pytest.fixture
def planned(llama_folder: Path, tmp_path: Path) -> tuple[Snapshot, Catalog]:
    """A snapshot of which only the header is here, and its catalog."""
    root, headers = tmp_path / "root", tmp_path / "headers"
    root.mkdir()
    headers.mkdir()
    shutil.copy(llama_folder / "config.json", root)
    raw = (llama_folder / FILE).read_bytes()
    (headers / FILE).write_bytes(raw[: 8 + int.from_bytes(raw[:8], "little")])
    snapshot = Snapshot(reference="x/y", root=root, source="hub", complete=False, headers={FILE: (len(raw), headers)})
    return snapshot, SafetensorsPlanner.catalog(snapshot)


def test_a_complete_snapshot_is_left_alone(llama_folder: Path) -> None:
    plan = modelrig.plan(llama_folder)
    fetcher = Fetcher(llama_folder / FILE)
    found = fetch(plan.snapshot, plan.catalog, fetcher, SafetensorsPlanner)
    assert (plan.snapshot, plan.catalog, 0) == (*found, fetcher.calls)


def test_what_is_fetched_gets_a_catalog_with_identities(planned: tuple[Snapshot, Catalog], origin: Path) -> None:
    seen: list[tuple[int, int]] = []
    snapshot, catalog = fetch(*planned, Fetcher(origin), SafetensorsPlanner, lambda done, total: seen.append((done, total)))
    assert snapshot.complete
    assert dict(planned[1].entries) == dict(catalog.entries)
    assert (None, origin.stat().st_size) == (planned[1].files[0].identity, catalog.files[0].identity[0])
    assert [(5, 5)] == seen


def test_other_tensors_than_promised_are_refused(planned: tuple[Snapshot, Catalog], origin: Path) -> None:
    tensors = load_file(origin)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float16)
    save_file(tensors, origin)
    with pytest.raises(FileError, match="IO-CHANGED") as caught:
        fetch(*planned, Fetcher(origin), SafetensorsPlanner)
    assert str(planned[0].root) == caught.value.path


def test_a_half_file_is_what_its_format_says(planned: tuple[Snapshot, Catalog], origin: Path) -> None:
    origin.write_bytes(origin.read_bytes()[:-10])
    with pytest.raises(FormatError, match="ST-TRUNC"):
        fetch(*planned, Fetcher(origin), SafetensorsPlanner)


def test_an_error_of_the_source_passes(planned: tuple[Snapshot, Catalog], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fetch(*planned, Fetcher(tmp_path / "nothing"), SafetensorsPlanner)
