"""Load any module and spread it over devices: GPUs first, then main memory, then the disk.

    with modelrig.empty_weights():
        module = MyModule(...)
    modelrig.load_and_dispatch(module, "folder", device_map="auto", no_split_module_classes=("Block",))
    module(x)

Each part computes where it is; parts on the disk, or in main memory beside a GPU, are brought when they are called.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from modelrig.checkpoint.mapping import Rule
from modelrig.errors import RequestError, nearest, quoted
from modelrig.loading.filling import Filler, Wanted
from modelrig.loading.frames import forgets_frames
from modelrig.loading.into_module import (
    CPU,
    Matched,
    Opened,
    assign,
    extra_states,
    floating,
    match_module,
    open_checkpoint,
    require_data,
    wanted_tensors,
)
from modelrig.loading.offload import Streamer, Unit
from modelrig.loading.paging import MainMemory
from modelrig.loading.progress import ProgressChoice, progress_bar
from modelrig.planning.memory import asked_limit
from modelrig.planning.placement import Placed, Weight, placement_of_module
from modelrig.planning.places import devices_of_machine, request_of_limits
from modelrig.planning.units import DISK

#: modules of torch that use the weights of their children without calling them
WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@forgets_frames
def load_and_dispatch(
    module: nn.Module,
    folder: str | os.PathLike[str],
    device_map: Any = "auto",
    no_split_module_classes: Iterable[str | type[nn.Module]] = (),
    max_memory: Any = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    *,
    strict: bool = True,
    prefer_safe: bool = True,
    mapping: Sequence[Rule] = (),
    variant: str | None = None,
    progress: ProgressChoice = False,
) -> nn.Module:
    """Fill `module` from a checkpoint, each part on its device; returns it, in eval mode, with `hf_device_map`.

    Args:
        device_map: auto, balanced, balanced_low_0, sequential, a device, or a map from module names to devices and "disk".
        no_split_module_classes: classes, or their names, whose modules stay whole on one device: the blocks of the model.
            By default what the module says of itself (`_no_split_modules`).
        max_memory: bytes for each device, as a request's `max_memory`.
        offload_folder: where weights for the disk tier that cannot be used as they are stored (another dtype, rearranged) are
            written once; without it they are converted each time they are needed.
        strict, prefer_safe, mapping, dtype, variant, progress: as for `load_checkpoint`.

    Raises:
        LoadError, CheckpointError, RequestError; PlanError for a device map that does not fit, ResourceLimitError if nothing would.
    """
    opened = open_checkpoint(folder, prefer_safe, variant)
    matched = match_module(module, opened, mapping, strict)
    into = floating(dtype)
    blocks = block_names(module, no_split_module_classes)
    placed = place_module(module, into, blocks, device_map, max_memory)
    main = torch.device(placed.main)
    gpus = {device for device in placed.totals if device not in ("cpu", DISK)}
    streamed = {name for name, device in placed.where.items() if device == DISK or (device == "cpu" and gpus)}
    runs_on = {name: main if name in streamed else torch.device(device) for name, device in placed.where.items()}
    wanted = {one.name: one for one in wanted_tensors(matched, into, runs_on)}
    # a tensor with memory that goes to the disk is not filled in place: its memory is what the disk is to save
    wanted = {name: evolve(one, buffer=None) if name in streamed else one for name, one in wanted.items()}
    on_disk = {name for name in wanted if placed.where[name] == DISK}
    memory = MainMemory(is_limited=asked_limit("cpu", request_of_limits(max_memory)) is not None)
    has_room = not on_disk or memory.can_cache(wanted.values())
    with ExitStack() as stack:
        filler = stack.enter_context(Filler(opened.catalog, opened.reader))
        resident = [(name, evolve(one, may_view=has_room)) for name, one in wanted.items() if name not in on_disk]
        now = [evolve(one, device=CPU) if name in streamed else one for name, one in resident]
        with progress_bar("loading", progress) as report:
            tensors = filler.fill(now, report)
        states = extra_states(matched, opened, filler)
        filler.check_unchanged()
        streamer = None
        if streamed & wanted.keys():
            source, entries = _disk_source(opened, [wanted[name] for name in on_disk], offload_folder)
            paging = stack.enter_context(Filler(source.catalog, source.reader, keep_open=True))
            wanted.update(entries)
            held = {name: tensors.pop(name) for name in streamed & wanted.keys() - on_disk}
            units = streaming_units(module, matched, {name: wanted[name] for name in streamed & wanted.keys()}, blocks, held)
            streamer = Streamer(memory.paged(units, has_room=has_room), paging, main)
            stack.callback(streamer.close)
            tensors.update(streamer.tensors)
        assign(matched, tensors, states)
        _move_rest(module, runs_on)
        if strict:
            require_data(module)
        if streamer is not None:
            streamer.attach(_holders(module, matched, streamer.slotted))
            stack.pop_all()
            filler.close()
    if gpus:
        _move_inputs(module, placed)
    module.hf_device_map = dict(placed.device_map)  # type: ignore[assignment]
    return module.eval()


# ------------------------------------------------------------------------------------------------ plan


def block_names(module: nn.Module, classes: Iterable[str | type[nn.Module]]) -> list[str]:
    """Names of the modules that stay whole, outermost ones only. Raises `RequestError` for a class that is nowhere."""
    given = [classes] if isinstance(classes, str | type) else list(classes)
    wanted = [one if isinstance(one, str) else one.__name__ for one in given]
    named = {type(part).__name__ for part in module.modules()}
    for one in wanted:
        if one not in named:
            reason = f"the module has no part of class {quoted(one)}{nearest(one, named)}"
            raise RequestError("RQ-VALUE", reason, locus="no_split_module_classes")
    if not given:
        wanted = list(getattr(module, "_no_split_modules", None) or ())
    found: dict[str, None] = {}
    for name, part in module.named_modules():
        if name and (type(part).__name__ in wanted or isinstance(part, WHOLE)) and _block_of(name, found) is None:
            found[name] = None
    return list(found)


def _block_of(name: str, blocks: Container[str]) -> str | None:
    """The block that the module or tensor `name` is in."""
    ends = [place for place, letter in enumerate(name) if letter == "."]
    return next((name[:end] for end in ends if name[:end] in blocks), None)


def place_module(module: nn.Module, dtype: torch.dtype | None, blocks: Sequence[str], device_map: Any, max_memory: Any) -> Placed:
    """Where each parameter and buffer goes."""
    tensors = dict(named_tensors(module))
    if isinstance(device_map, Mapping):  # people who write a map know of no buffers that are computed
        stored = module.state_dict(keep_vars=True)
        tensors = {name: tensor for name, tensor in tensors.items() if name in stored}
    groups: dict[int, str] = {}
    weights = []
    for name, tensor in tensors.items():
        itemsize = dtype.itemsize if dtype is not None and tensor.is_floating_point() else tensor.element_size()
        tie = groups.setdefault(id(tensor), name)
        weights.append(Weight(name, tensor.numel() * itemsize, tie))
    return placement_of_module(
        weights,
        devices=devices_of_machine(max_memory),
        device_map=device_map,
        no_split=blocks,
        modules=[name for name, _ in module.named_modules()],
    )


def named_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Parameters and buffers with every name they have, in the order of the modules."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        for leaf, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{leaf}" if prefix else leaf, tensor


# ------------------------------------------------------------------------------------------------ stream


def streaming_units(
    module: nn.Module, matched: Matched, wanted: Mapping[str, Wanted], blocks: Sequence[str], held: Mapping[str, Tensor]
) -> list[Unit]:
    """Blocks, and modules outside of blocks that hold tensors themselves, in the order of the modules."""
    groups: dict[str, list[Wanted]] = {}
    sites: dict[str, dict[str, None]] = {}
    known = set(blocks)
    for name, chosen in matched.names.items():
        if chosen not in wanted:
            continue
        owner = _block_of(name, known) or name.rpartition(".")[0]
        if name == chosen:
            groups.setdefault(owner, []).append(wanted[chosen])
        sites.setdefault(chosen, {})[owner] = None
    units = []
    for owner, members in groups.items():
        users = dict.fromkeys([owner, *(site for one in members for site in sites[one.name])])
        is_lookup = isinstance(module.get_submodule(owner), nn.Embedding) and len(users) == 1
        units.append(
            Unit(
                name=owner,
                wanted=tuple(members),
                sites=tuple(module.get_submodule(site) for site in users),
                gathered=frozenset(one.name for one in members) if is_lookup else frozenset(),
                held={one.name: held[one.name] for one in members if one.name in held},
            )
        )
    return units


def _holders(module: nn.Module, matched: Matched, names: Iterable[str]) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """Where the module holds each of these tensors: what is in a slot is taken away while nobody calls for it."""
    wanted = set(names)
    found: dict[str, list[tuple[dict[str, Any], str]]] = {name: [] for name in wanted}
    for name, chosen in matched.names.items():
        if chosen in wanted:
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            found[chosen].append((owner._parameters if leaf in owner._parameters else owner._buffers, leaf))
    return found


def _disk_source(opened: Opened, wanted: Sequence[Wanted], offload_folder: Any) -> tuple[Opened, dict[str, Wanted]]:
    """Where the disk tier reads from: the checkpoint, or what was converted into `offload_folder`."""
    if offload_folder is None or not wanted:
        return opened, {}
    from modelrig.loading.converted import convert_once

    return convert_once(opened, wanted, offload_folder)


# ------------------------------------------------------------------------------------------------ devices


def _move_rest(module: nn.Module, runs_on: Mapping[str, torch.device]) -> None:
    """Buffers that were not loaded go where their module computes."""
    for prefix, part in module.named_modules():
        for leaf, buffer in part._buffers.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if buffer is not None and not buffer.is_meta and name in runs_on:
                part._buffers[leaf] = buffer.to(runs_on[name])


def _move_inputs(module: nn.Module, placed: Placed) -> None:
    """Each part gets its inputs on its device, and the whole gives its result where the inputs were."""
    parts = dict(module.named_modules(remove_duplicate=False))
    for name, device in placed.device_map.items():
        part = parts.get(name)
        if part is None:  # a bare parameter: its module's inputs decide
            continue
        target = torch.device(placed.main if device in ("cpu", DISK) else device)

        def before(_: nn.Module, args: Any, kwargs: Any, target: torch.device = target) -> Any:
            return moved(args, target), moved(kwargs, target)

        part.register_forward_pre_hook(before, with_kwargs=True)


def moved(value: Any, device: torch.device) -> Any:
    """`value` with the tensors in its lists, tuples and dicts on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        items = [moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is dict:
        return {key: moved(item, device) for key, item in value.items()}
    return value
