"""Which weights live on which device: the one planner, for a rig and for any module.

    placed = placement_of_module(weights, no_split=["layers.0", "layers.1"], devices=[Device(name="cuda:0", limit=8 << 30), ...])
    placed.device_map, placed.where["layers.0.up.weight"], placed.totals, placed.slots

Everything here is a function over data, so that machines nobody has can be planned for. What moves is a *unit*: a block that must
stay whole, or the weights that a module outside of blocks holds itself; units that share weights move together. GPUs run the
model, or the CPU where there is none; units that are elsewhere ("cpu" of a rig with a GPU, "disk") are streamed: each visits the
first device that runs (`Placed.main`), in one of two slots as large as the largest of them.

GPUs come first, then the CPU, then the disk:

* `auto`: one device if one holds everything, else `balanced`;
* `balanced`: contiguous runs of units on all GPUs, such that the fullest is as empty as can be;
* `balanced_low_0`: the same without the first GPU, which takes what the others cannot;
* `sequential`: each GPU is filled before the next.

What exceeds the GPUs overflows from the end of the model; with one device that runs and unless it is `sequential`, the blocks that
overflow are spread evenly instead, so that the next one is read while resident ones compute (docs/decisions/0010).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from attrs import evolve, field, frozen

from modelrig.errors import PlanError, RequestError, quoted
from modelrig.planning import values
from modelrig.planning.placement_maps import coarse, find, read_map
from modelrig.planning.spreading import Spread, spread_units
from modelrig.planning.units import CPU, DISK, SLOTS, Device, Weight, is_gpu, join, owners_of, streamed_bytes, units_of

__all__ = ["Device", "Placed", "Weight", "placement_of_module", "spread"]


@frozen(kw_only=True)
class Placed:
    """Every weight's device.

    Attributes:
        where: name of each weight → device.
        device_map: the same as Hugging Face writes it: names of modules, as few as will do, in execution order.
        main: the device that runs what is streamed, and everything if there is only one that runs.
        totals: device → bytes of the weights on it, ties once.
        looked_up: bytes of what is on disk and only looked up.
        slot: bytes of the largest block or module that is streamed; 0 if none is.
        slots: bytes that streaming takes on `main`: two such slots, one where only one is streamed.
    """

    where: Mapping[str, str] = field(repr=False)
    device_map: Mapping[str, str]
    main: str
    totals: Mapping[str, int]
    looked_up: int
    slot: int
    slots: int

    def device_of(self, module: str) -> str:
        """Where `module` is, if it is in one place."""
        key = find(self.device_map, module)
        if key is None:  # divided, or without weights
            inside = (device for name, device in self.where.items() if name.startswith(f"{module}."))
            return next(inside, self.main)
        return self.device_map[key]

    @property
    def streamed(self) -> tuple[str, ...]:
        """The devices whose weights are streamed."""
        return tuple(name for name in self.totals if not runs(name, self.main))


def runs(device: str, main: str) -> bool:
    """Whether what is on `device` is computed there."""
    return device == main or (is_gpu(device) and is_gpu(main))


def placement_of_module(
    weights: Sequence[Weight],
    *,
    devices: Sequence[Device],
    device_map: Any = values.AUTO,
    no_split: Collection[str] = (),
    ties: Iterable[Collection[str]] = (),
    beside: Mapping[str, int] | None = None,
    modules: Collection[str] = (),
) -> Placed:
    """Place the weights of a module.

    Args:
        weights: every parameter and buffer, in execution order, with the bytes it takes in memory.
        devices: where they may be, GPUs first, then "cpu", then "disk".
        device_map: a strategy, one device, or a map, as a request has it.
        no_split: names of modules that stay whole.
        ties: groups of weights that share one storage, beside those that their `tie` says.
        beside: name of a block → bytes it needs beside its weights on the device that runs it (its cache).
        modules: names of modules that hold no weights and may stand in a map all the same.

    Raises:
        RequestError: RQ-VALUE for a device map that is none.
        PlanError: PN-DEVICE for a device that is not among `devices`, PN-MAP-* for names that do not fit the module.
        ResourceLimitError: RL-MEM when no placement keeps the limits.
    """
    try:
        wanted = values.device_map(device_map)
    except ValueError as error:
        raise RequestError("RQ-VALUE", str(error), locus="device_map") from error
    weights = _tied(weights, ties)
    if isinstance(wanted, str) and wanted in values.STRATEGIES:
        return spread(weights, devices, strategy=wanted, blocks=no_split, beside=beside)
    given = {"": values.numbered(wanted)} if isinstance(wanted, str) else wanted
    there = {device.name for device in devices} | {CPU, DISK}
    absent = sorted({device for device in given.values() if device not in there})
    if absent:
        shown = ", ".join(quoted(device) for device in absent)
        raise PlanError("PN-DEVICE", f"not there: {shown}; there is {', '.join(sorted(there))}", locus="device_map")
    where = read_map(given, weights, no_split, modules)
    return placed_by(where, weights, no_split, main_of((where or given).values()))


def spread(
    weights: Sequence[Weight],
    devices: Sequence[Device],
    *,
    strategy: str = values.AUTO,
    blocks: Collection[str] = (),
    beside: Mapping[str, int] | None = None,
) -> Placed:
    """Place weights by a strategy. Raises `ResourceLimitError` (RL-MEM) saying which limit is in the way."""
    units = units_of(weights, blocks, beside or {})
    found: Spread = spread_units(units, devices, strategy)
    chosen = {name: device for unit, device in zip(units, found.devices, strict=True) for name in unit.weights}
    where = {weight.name: chosen[weight.name] for weight in weights}
    return placed_by(where, weights, blocks, found.main)


def main_of(devices: Iterable[str]) -> str:
    """The device that runs a map over `devices`: the first GPU among them, else the CPU."""
    return next((device for device in devices if is_gpu(device)), CPU)


def placed_by(where: Mapping[str, str], weights: Sequence[Weight], blocks: Collection[str], main: str) -> Placed:
    """What follows from each weight's device."""
    totals: dict[str, int] = {}
    seen: set[str] = set()
    for weight in weights:
        size = 0 if weight.tie in seen else weight.bytes
        if weight.tie is not None:
            seen.add(weight.tie)
        totals[where[weight.name]] = totals.get(where[weight.name], 0) + size
    looked_up = sum(weight.bytes for weight in weights if weight.lookup and not runs(where[weight.name], main))
    away = [weight for weight in weights if not weight.lookup and not runs(where[weight.name], main)]
    sizes = streamed_bytes(away, owners_of(away, blocks)).values()
    slot = max(sizes, default=0)
    return Placed(
        where=where,
        device_map=coarse(where) or {"": main},
        main=main,
        totals=totals or {main: 0},
        looked_up=looked_up,
        slot=slot,
        slots=slot * min(SLOTS, len(sizes)),
    )


def _tied(weights: Sequence[Weight], ties: Iterable[Collection[str]]) -> Sequence[Weight]:
    """The weights with `ties` noted, groups that overlap being one."""
    groups = [*ties]
    if not groups:
        return weights
    by_tie: dict[str, list[str]] = {}
    for weight in weights:
        if weight.tie is not None:
            by_tie.setdefault(weight.tie, []).append(weight.name)
    root = join([*groups, *by_tie.values()])
    return [evolve(weight, tie=root.get(weight.name)) for weight in weights]
