"""Fill a module that was built on the meta device: schedule → execute → finalise.

On CPU a tensor whose dtype stays is a view of the mapped file: nothing is copied, processes share the pages. Any other tensor is
cast in pieces straight into its final storage, so the peak is the model plus a few pieces. What the device map leaves on disk, or
in main memory for a GPU, is brought by a `Streamer` when it is needed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack

import torch
from attrs import evolve, frozen
from torch import nn

from modelrig.components import Catalog, FormatReader, LinearMaker, ModelFacts, Parameter
from modelrig.errors import LoadError, PluginError
from modelrig.loading.filling import Filler, Wanted
from modelrig.loading.offload import Streamer, Unit
from modelrig.loading.paging import UNLIMITED, MainMemory
from modelrig.loading.progress import Progress

DISK = "disk"
EMBEDDING = "embedding"  # the role of parameters that are looked up by rows


@frozen
class LoadReport:
    """What a load did, in bytes of the files: viewed in place, and copied into memory of their own; seconds."""

    mapped_bytes: int
    copied_bytes: int
    seconds: float


@frozen(eq=False)
class Filled:
    """A filled module's report, and what brings the weights that are not in the device's memory; None when all are."""

    report: LoadReport
    streamer: Streamer | None


def materialise(
    module: nn.Module,
    facts: ModelFacts,
    catalog: Catalog,
    reader: FormatReader,
    linear: LinearMaker,
    *,
    dtype: torch.dtype,
    device: torch.device,
    places: Mapping[str, str] | None = None,
    memory: MainMemory = UNLIMITED,
    progress: Progress | None = None,
) -> Filled:
    """Give every parameter its data.

    Args:
        device: where the model computes.
        places: parameter → device, or `"disk"`; everything on `device` by default.
        memory: what the disk tier may use of main memory.

    Raises:
        LoadError: LD-DTYPE for a stored dtype that is no weight, LD-META if a parameter got no data.
        FileError: IO-CHANGED if a file is not what was planned, before or after reading.
        PluginError: PL-CONTRACT if the module has not the parameters that the plan's facts say.
    """
    started = time.perf_counter()
    places = places or {}
    wanted = {one.name: Wanted(one.name, one.shape, dtype, device, one.sources) for one in facts.parameters if one.sources}
    for one in wanted.values():
        _require_shape(module, one, facts.architecture)
    on_disk = {name for name in wanted if places.get(name) == DISK}
    elsewhere = {name for name in wanted if name not in on_disk and _is_held(places.get(name), device)}
    has_room = not on_disk or memory.can_cache(wanted.values())
    with ExitStack() as stack:
        filler = stack.enter_context(Filler(catalog, reader))
        now = [
            # pages of a mapped file would make room for what streams past them
            evolve(one, device=torch.device("cpu") if name in elsewhere else device, may_view=has_room)
            for name, one in wanted.items()
            if name not in on_disk
        ]
        tensors = filler.fill(now, progress)
        filler.check_unchanged()
        streamer = None
        if on_disk or elsewhere:
            paging = stack.enter_context(Filler(catalog, reader, keep_open=True))
            units = _units(module, facts, wanted, on_disk, {name: tensors[name] for name in elsewhere})
            streamer = Streamer(memory.paged(units, has_room=has_room), paging, device)
            stack.callback(streamer.close)
            tensors.update(streamer.tensors)
        for name, tensor in tensors.items():
            owner, leaf = _slot(module, name, facts.architecture)
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        finalise(module, facts, linear, device)
        if streamer is not None:
            streamer.attach()
            stack.pop_all()
            filler.close()
    report = LoadReport(filler.tally.mapped_bytes, filler.tally.copied_bytes, time.perf_counter() - started)
    return Filled(report, streamer)


def _is_held(place: str | None, device: torch.device) -> bool:
    """Whether what lies at `place` waits in main memory for a device that computes elsewhere."""
    return place == "cpu" and device.type != "cpu"


def _units(
    module: nn.Module,
    facts: ModelFacts,
    wanted: Mapping[str, Wanted],
    on_disk: set[str],
    held: Mapping[str, torch.Tensor],
) -> list[Unit]:
    """Blocks, and modules outside of blocks that have parameters of their own, in execution order."""
    groups: dict[str, list[Parameter]] = {}
    for parameter in facts.parameters:
        if parameter.name in on_disk or parameter.name in held:
            name = facts.blocks[parameter.block] if parameter.block is not None else parameter.name.rpartition(".")[0]
            groups.setdefault(name, []).append(parameter)
    users: dict[str, list[str]] = {}
    for alias, original in facts.ties.items():
        users.setdefault(original, []).append(alias.rpartition(".")[0])
    units = []
    for name, parameters in groups.items():
        sites = dict.fromkeys([name, *(user for one in parameters for user in users.get(one.name, ()))])
        units.append(
            Unit(
                name=name,
                wanted=tuple(wanted[one.name] for one in parameters),
                sites=tuple(module.get_submodule(site) for site in sites),
                gathered=frozenset(one.name for one in parameters if one.role == EMBEDDING and one.name not in users),
                held={one.name: held[one.name] for one in parameters if one.name in held},
            )
        )
    return units


def _require_shape(module: nn.Module, one: Wanted, architecture: str) -> None:
    owner, leaf = _slot(module, one.name, architecture)
    shape = owner._parameters[leaf].shape  # type: ignore[union-attr]
    if shape != one.shape:
        text = f"{architecture} builds {one.name} as {list(shape)}, its plan says {list(one.shape)}"
        raise PluginError("PL-CONTRACT", text, plugin=architecture, locus=one.name)


def _slot(module: nn.Module, name: str, architecture: str) -> tuple[nn.Module, str]:
    """The submodule that holds parameter `name`, and what it calls it."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        owner = None
    if owner is None or owner._parameters.get(leaf) is None:
        text = f"{architecture} builds a module without the parameter {name} of its plan"
        raise PluginError("PL-CONTRACT", text, plugin=architecture, locus=name)
    return owner, leaf


def finalise(module: nn.Module, facts: ModelFacts, linear: LinearMaker, device: torch.device) -> None:
    """Ties, buffers, kernels; then check that nothing was forgotten."""
    for alias, original in facts.ties.items():
        source, source_leaf = _slot(module, original, facts.architecture)
        owner, leaf = _slot(module, alias, facts.architecture)
        owner._parameters[leaf] = source._parameters[source_leaf]
    module.init_buffers(device)  # type: ignore[operator]
    empty = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if empty:
        raise LoadError("LD-META", f"{len(empty)} got no data: {', '.join(empty[:20])}", missing=empty, locus=empty[0])
    module.bind(linear)  # type: ignore[operator]
    module.eval()
