"""Load a checkpoint into any `nn.Module`, by the names of its state dict.

    with modelrig.empty_weights():
        module = MyModule(...)
    modelrig.load_checkpoint(module, "folder")

No config.json is needed and no architecture has to know the module: names and shapes decide. Parameters on the meta device get
tensors of their own (views of the mapped files where the dtype stays); those with memory are filled in place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attrs import evolve, frozen
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from modelrig.checkpoint.collector import collector_paused
from modelrig.checkpoint.folder import again_if_exchanged, consistently
from modelrig.checkpoint.mapping import Rule, Target, apply_rules, check_cover
from modelrig.components import Catalog, FormatReader
from modelrig.errors import LoadError, RequestError, quoted
from modelrig.loading.filling import Filler, Wanted, stored_dtype
from modelrig.loading.frames import forgets_frames
from modelrig.loading.progress import ProgressChoice, progress_bar
from modelrig.planning.identify import catalog, check_reference, possible_folder, resolve
from modelrig.registry import current

LISTED = 20  # names of each sort that a message spells out
CPU = torch.device("cpu")
EXTRA = "_extra_state"  # what torch calls that of a module with `set_extra_state`


class IncompatibleKeys(NamedTuple):
    """As torch's `load_state_dict` returns: names the checkpoint lacks, and names the module lacks."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@frozen(eq=False)
class Opened:
    """A checkpoint that was catalogued, and the code that reads it."""

    root: Path
    catalog: Catalog
    reader: FormatReader


@frozen(eq=False)
class Matched:
    """A module's tensors beside those of a checkpoint.

    `fills` has one name of each tensor that is loaded → what it is put together of; `names` all names of a tensor → the one it is
    loaded by; `extra` the names of modules' extra states; `owners` the module's parts by all their names.
    """

    fills: Mapping[str, Target]
    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]
    extra: Sequence[str]
    keys: IncompatibleKeys
    owners: Mapping[str, nn.Module]


@forgets_frames
def load_checkpoint(
    module: nn.Module,
    folder: str | os.PathLike[str],
    strict: bool = True,
    prefer_safe: bool = True,
    *,
    mapping: Sequence[Rule] = (),
    dtype: Any = None,
    variant: str | None = None,
    progress: ProgressChoice = False,
) -> IncompatibleKeys:
    """Fill `module` from a checkpoint: one file or shards with an index, safetensors or .bin, like `load_state_dict`.

    Args:
        module: any module; its state dict's names are the checkpoint's.
        folder: a folder, or whatever else a source knows.
        strict: missing or unexpected names are an error; otherwise they are only returned. Shapes must always fit.
        prefer_safe: of a folder that holds both, safetensors is read; otherwise the format that usually steps back.
        mapping: rules of `modelrig.checkpoint.mapping` from stored names to the module's.
        dtype: what floating parameters and buffers become; by default they keep the module's dtype.
        variant: which set of files, such as "fp16".
        progress: True for a bar, or a function called with (bytes done, bytes in all).

    Raises:
        LoadError: LD-TENSORS with the names, LD-MAPPING, LD-DTYPE, LD-META (strict, something would stay without data).
        CheckpointError: the files are not what they should be; the module is then as it was.
    """
    return again_if_exchanged(
        possible_folder(check_reference(folder)),
        lambda: _load(module, open_checkpoint(folder, prefer_safe, variant), strict, mapping, floating(dtype), progress),
    )


def _load(
    module: nn.Module,
    opened: Opened,
    strict: bool,
    mapping: Sequence[Rule],
    dtype: torch.dtype | None,
    progress: ProgressChoice,
) -> IncompatibleKeys:
    with collector_paused(), Filler(opened.catalog, opened.reader) as filler:
        matched = match_module(module, opened, mapping, strict)
        wanted = wanted_tensors(matched, dtype)
        with progress_bar("loading", progress) as report:
            tensors = filler.fill(wanted, report)
        states = extra_states(matched, opened, filler)
        filler.check_unchanged()
        assign(matched, tensors, states)
    if strict:
        require_data(module)
    return matched.keys


# ------------------------------------------------------------------------------------------------ the checkpoint


def open_checkpoint(folder: str | os.PathLike[str], prefer_safe: bool = True, variant: str | None = None) -> Opened:
    """Catalogue the tensor files of a folder. Raises `CheckpointError`."""
    registry = current()
    _, snapshot = resolve(check_reference(folder), registry, variant)
    if not snapshot.complete:
        raise RequestError("RQ-VALUE", f"{quoted(os.fspath(folder))} is not on this machine; fetch it first", locus="folder")
    identified, found = consistently(snapshot.root, lambda: catalog(snapshot, registry, prefer_yielding=not prefer_safe))
    return Opened(snapshot.root, found, identified.registered.implementation())


def floating(dtype: Any) -> torch.dtype | None:
    """`dtype` as torch's; a name is one too. Raises `RequestError` (RQ-VALUE) for what is no floating dtype."""
    from modelrig.planning import values

    if dtype is None:
        return None
    try:
        name = values.dtype(dtype)
    except ValueError as error:
        raise RequestError("RQ-VALUE", str(error), locus="dtype") from error
    return None if name == values.AUTO else getattr(torch, name)


# ------------------------------------------------------------------------------------------------ names


def match_module(module: nn.Module, opened: Opened, mapping: Sequence[Rule], strict: bool) -> Matched:
    """Which stored tensors fill which of the module's. Raises `LoadError` before anything is read."""
    state = module.state_dict(keep_vars=True)
    extra = [name for name in state if name.rpartition(".")[2] == EXTRA]
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and name not in extra}
    shapes = {name: entry.shape for name, entry in opened.catalog.entries.items()}
    stored = apply_rules(mapping, shapes, opened.root)
    for name, target in stored.items():
        if mapping and name in tensors:
            check_cover(name, target.shape, target.parts, opened.root)
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, value in tensors.items():  # a shared tensor is loaded by the first of its names that is stored
        known = first.get(id(value))
        if known is None or (known not in stored and name in stored):
            first[id(value)] = name
    for name, value in tensors.items():
        names[name] = first[id(value)]
    owners = dict(module.named_modules(remove_duplicate=False))
    counters = set(_counters(owners))
    missing = [name for name in state if names.get(name, name) not in stored and name not in counters]
    unexpected = [name for name in stored if name not in state]
    fills = {name: stored[name] for name in (*dict.fromkeys(names.values()), *extra) if name in stored}
    misshapen = [
        f"{name}: stored as {list(stored[name].shape)}, the module has {_shape(value)}"
        for name, value in tensors.items()
        if name in stored and (is_lazy(value) or stored[name].shape != tuple(value.shape))
    ]
    if misshapen or (strict and (missing or unexpected)):
        parts = [
            f"{len(found)} {what}: {', '.join(map(quoted, found[:LISTED]))}" + ("" if len(found) <= LISTED else " …")
            for found, what in ((missing, "missing"), (unexpected, "unexpected"), (misshapen, "of another shape"))
            if found and (strict or found is misshapen)
        ]
        raise LoadError(
            "LD-TENSORS",
            f"the stored tensors do not fill the module {type(module).__name__}: " + "; ".join(parts),
            path=opened.root,
            locus=(misshapen or missing or unexpected)[0].split(":")[0],
            missing=missing,
            unexpected=unexpected,
            misshapen=misshapen,
            hint="strict=False loads what fits; mapping= renames and rearranges" if not misshapen else None,
        )
    _require_equal_ties(stored, names, opened)
    return Matched(fills, tensors, names, extra, IncompatibleKeys(missing, unexpected), owners)


def _shape(value: Tensor) -> str:
    return "yet to see its first input" if is_lazy(value) else str(list(value.shape))


def _counters(owners: Mapping[str, nn.Module]) -> Iterator[str]:
    """Counters of batches, which files from before torch had them lack, as `load_state_dict` knows too."""
    for prefix, part in owners.items():
        if isinstance(part, _NormBase) and part._buffers.get("num_batches_tracked") is not None:
            yield f"{prefix}.num_batches_tracked" if prefix else "num_batches_tracked"


def _require_equal_ties(stored: Mapping[str, Target], names: Mapping[str, str], opened: Opened) -> None:
    """Raise `LoadError` (LD-TIE) where one tensor of the module is stored twice, with different values."""
    for name, chosen in names.items():
        if name == chosen or name not in stored or chosen not in stored or stored[name] == stored[chosen]:
            continue
        if not _are_equal(stored[name], stored[chosen], opened):
            reason = f"is the same tensor as {quoted(chosen)} in the module, and another one in the checkpoint"
            raise LoadError("LD-TIE", reason, path=opened.root, locus=name, hint="untie them before loading")


def _are_equal(one: Target, other: Target, opened: Opened) -> bool:
    sources = [[opened.catalog.entries[part.name] for part in target.parts] for target in (one, other)]
    places = [
        [(entry.file, entry.offset, evolve(part, name="")) for entry, part in zip(entries, target.parts, strict=True)]
        for entries, target in zip(sources, (one, other), strict=True)
    ]
    if places[0] == places[1]:
        return True
    dtypes = {entry.dtype for entries in sources for entry in entries}
    if len(dtypes) != 1:
        return False
    dtype = getattr(torch, dtypes.pop())
    with Filler(opened.catalog, opened.reader) as filler:
        pair = [Wanted(str(number), target.shape, dtype, CPU, target.parts) for number, target in enumerate((one, other))]
        tensors = filler.fill(pair)
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values()))


# ------------------------------------------------------------------------------------------------ tensors


def wanted_tensors(matched: Matched, dtype: torch.dtype | None, places: Mapping[str, torch.device] | None = None) -> list[Wanted]:
    """What to read for each tensor of the module that is stored. `places` says where one without memory goes, "cpu" by default."""
    found = []
    for name, target in matched.fills.items():
        if name in matched.extra:
            continue
        value = matched.tensors[name]
        into = dtype if dtype is not None and value.is_floating_point() else value.dtype
        device = (places or {}).get(name, CPU if value.is_meta else value.device)
        in_place = not value.is_meta and into == value.dtype and device == value.device
        found.append(Wanted(name, target.shape, into, device, target.parts, value.data if in_place else None))
    return found


def extra_states(matched: Matched, opened: Opened, filler: Filler) -> dict[str, Tensor]:
    """What `set_extra_state` of modules gets: tensors as they are stored, whatever their shape."""
    wanted = []
    for name in matched.extra:
        if name in matched.fills:
            target = matched.fills[name]
            entry = opened.catalog.entries[target.parts[0].name]
            dtype = stored_dtype(entry, opened.catalog.files[entry.file])
            wanted.append(Wanted(name, target.shape, dtype, CPU, target.parts))
    return filler.fill(wanted)


def assign(matched: Matched, tensors: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
    """Put what was read where the module has it; what two modules share stays shared."""
    for name, state in states.items():
        matched.owners[name.rpartition(".")[0]].set_extra_state(state)
    made: dict[str, Tensor] = {}
    for name, chosen in matched.names.items():
        value, tensor = matched.tensors[name], tensors.get(chosen)
        if tensor is None and value.is_meta and chosen.endswith("num_batches_tracked") and chosen not in matched.keys.missing_keys:
            tensor = torch.zeros((), dtype=value.dtype, device=CPU)  # one of `_counters`
        if tensor is None or (tensor.dtype == value.dtype and not value.is_meta and tensor.data_ptr() == value.data_ptr()):
            continue  # not stored, or filled in place
        if chosen not in made:
            made[chosen] = like(value, tensor)
        path, _, leaf = name.rpartition(".")
        owner = matched.owners[path]
        (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = made[chosen]  # type: ignore[assignment]


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` as the parameter or buffer that `value` is."""
    if not isinstance(value, nn.Parameter):
        return tensor
    parameter = Tensor._make_subclass(type(value), tensor, value.requires_grad)
    if value.__dict__:
        parameter.__dict__.update(value.__dict__)
    return parameter


def require_data(module: nn.Module) -> None:
    """Raise `LoadError` (LD-META) if a parameter or buffer is still without data."""
    held = (one for part in module.modules() for one in (*part._parameters.values(), *part._buffers.values()))
    if any(one is not None and one.is_meta for one in held):
        empty = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
        raise LoadError(
            "LD-META",
            f"{len(empty)} got no data: {', '.join(empty[:LISTED])}",
            missing=empty,
            locus=empty[0],
            hint="buffers that are computed and not stored need empty_weights(include_buffers=False), or to be computed anew",
        )
