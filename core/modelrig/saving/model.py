"""Saving a loaded model in the layout it was loaded from: the same names, tensors and companions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modelrig.checkpoint.mapping import stored_tensors
from modelrig.checkpoint.saving.protocol import SaveReport, save_checkpoint
from modelrig.components import FormatReader, StoredTensor
from modelrig.errors import SaveError
from modelrig.loading.into_module import floating
from modelrig.loading.materialise import DISK
from modelrig.loading.progress import ProgressChoice, progress_bar
from modelrig.loading.transport import TensorFileReader
from modelrig.planning.identify import read_config
from modelrig.planning.placement_maps import resolve
from modelrig.registry import current
from modelrig.saving.companions import companions, dtype_changes
from modelrig.saving.convert import EntryReader, writing_format
from modelrig.saving.streams import bytes_of_stored

if TYPE_CHECKING:
    from modelrig.planning.plan import RigPlan


def save_model(
    module: nn.Module,
    plan: RigPlan,
    reader: FormatReader,
    target: str | os.PathLike[str],
    *,
    format: str = "safetensors",  # noqa: A002
    max_shard_size: int | str = "5GB",
    dtype: Any = None,
    variant: str | None = None,
    progress: ProgressChoice = False,
    open_file: Callable[[int], TensorFileReader] | None = None,
) -> SaveReport:
    """Write `module`, which `plan` loaded, to the folder `target`.

    Weights that stay on disk are read from there, out of the files that `open_file` holds open. Raises as
    `modelrig.saving.convert.convert` does.
    """
    writer = writing_format(format, current())
    into = floating(dtype)
    parameters = {one.name: one for one in plan.facts.parameters}
    held = dict(module.named_parameters())
    order = {name: number for number, name in enumerate(held)}
    layout = stored_tensors({name: one for name, one in parameters.items() if one.sources})
    names = sorted(layout, key=lambda name: min(order.get(origin.name, len(order)) for origin in layout[name][1]))
    aliases: dict[str, list[str]] = {}
    for alias, original in plan.facts.ties.items():
        aliases.setdefault(original, []).append(alias)
    places = resolve(plan.device_map, parameters)
    on_disk = {name for name, place in places.items() if place == DISK}
    tensors: dict[str, Tensor] = {}
    for name, one in parameters.items():
        if one.sources and name not in on_disk:
            if name not in held or held[name].shape != one.shape or held[name].is_meta:
                reason = f"{name} is not in the module as the plan has it, so it cannot be written"
                raise SaveError("SV-TENSOR", reason, path=target, locus=name)
            tensors[name] = held[name].detach()
    kept = EntryReader(plan.catalog, reader, into or getattr(torch, plan.dtype), open_file)
    stored = []
    for name in names:
        shape, origins = layout[name]
        first = origins[0].name
        kind = str(into or (tensors[first].dtype if first in tensors else plan.dtype)).removeprefix("torch.")
        further = aliases.get(first, []) if len(origins) == 1 and origins[0].part.shape == parameters[first].shape else []
        stored.append(StoredTensor(name, kind, shape, tuple(further)))

    def read(tensor: StoredTensor) -> Iterator[memoryview]:
        shape, origins = layout[tensor.name]
        if all(origin.name in tensors for origin in origins):
            yield from bytes_of_stored(shape, origins, tensors, getattr(torch, tensor.dtype))
        else:  # all of it is in the checkpoint still: nobody can have changed it
            yield from kept(tensor)

    config = read_config(plan.snapshot)
    changes = dtype_changes(config, next((one.dtype for one in stored if one.dtype != "int64"), None))
    vocabulary = (plan.facts.vocab_size, plan.facts.hidden_size)
    has_head = any(one.role == "head" and one.shape == vocabulary for one in parameters.values())
    # A stored head was used; others would tie it, if the config says so, or says nothing and that is usual for its family.
    if config.get("tie_word_embeddings", True) and has_head and not plan.facts.ties:
        changes["tie_word_embeddings"] = False
    try:
        with progress_bar("saving", progress) as report:
            return save_checkpoint(
                target,
                stored,
                read,
                writer,
                max_shard_size=max_shard_size,
                variant=variant,
                files=companions(plan.snapshot, plan.catalog, changes),
                progress=report,
            )
    finally:
        kept.close()
