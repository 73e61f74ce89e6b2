"""Weights for the disk tier that cannot be used as they are stored, written once as they are needed: `offload_folder`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve

from modelrig.checkpoint.saving.names import MANIFEST
from modelrig.checkpoint.saving.protocol import save_checkpoint
from modelrig.components import Part, StoredTensor
from modelrig.errors import RequestError
from modelrig.loading.filling import Filler, Wanted
from modelrig.loading.into_module import CPU, Opened
from modelrig.planning.identify import catalog, resolve
from modelrig.registry import Registry, current


def convert_once(opened: Opened, wanted: Sequence[Wanted], folder: str | os.PathLike[str]) -> tuple[Opened, dict[str, Wanted]]:
    """Where `wanted` is read from, and how: the checkpoint as it is where that serves, else a copy in a folder of its own.

    The copy is made tensor by tensor and is used again by later loads of the same files with the same dtypes.
    """
    with Filler(opened.catalog, opened.reader, keep_open=True) as filler:
        if all(filler.view(one) is not None for one in wanted):
            return opened, {}
    registry = current()
    place = Path(folder) / _key(opened, wanted)
    stored = [StoredTensor(one.name, str(one.dtype).removeprefix("torch."), one.shape) for one in wanted]
    if not (place / MANIFEST).exists():  # a save is all or nothing: what is there is complete
        by_name = {one.name: one for one in wanted}
        with Filler(opened.catalog, opened.reader, keep_open=True) as filler:

            def read(tensor: StoredTensor) -> Iterator[memoryview]:
                one = evolve(by_name[tensor.name], device=CPU, buffer=None)
                values = filler.fill([one])[one.name].contiguous().view(-1)
                filler.check_unchanged()  # before anything is committed
                if values.numel():
                    yield values.view(torch.uint8).numpy().data

            save_checkpoint(place, stored, read, _writer(registry), durable=False)
    _, snapshot = resolve(str(place.absolute()), registry)
    identified, found = catalog(snapshot, registry)
    copy = Opened(place, found, identified.registered.implementation())
    return copy, {one.name: evolve(one, sources=(Part(one.name, one.shape),)) for one in wanted}


def _writer(registry: Registry) -> Any:
    """The first format that can be written."""
    for one in registry.components("formats"):
        if one.state == "active" and hasattr(one.planner(), "write"):
            return one.planner()
    raise RequestError("RQ-VALUE", "no installed format can be written", locus="offload_folder")


def _key(opened: Opened, wanted: Sequence[Wanted]) -> str:
    """Names the copy by all that decides what is in it."""
    known = [(str(file.path), file.identity) for file in opened.catalog.files]
    parts = [(one.name, one.shape, str(one.dtype), one.sources) for one in wanted]
    return "offload-" + hashlib.sha256(repr((known, parts)).encode()).hexdigest()[:24]
