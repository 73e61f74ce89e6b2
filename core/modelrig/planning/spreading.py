"""Units over devices with limits: the algorithms behind the strategies of `modelrig.planning.placement`.

Runs of units are found on prefix sums. Filling each device as far as it goes is exact for runs in a fixed order: whatever else the
first devices hold, the rest begins no later.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NoReturn

from attrs import evolve, frozen

from modelrig.errors import ResourceLimitError
from modelrig.planning.memory import human
from modelrig.planning.units import DISK, SLOTS, Device, Unit, is_gpu

UNLIMITED = 1 << 62


@frozen
class Spread:
    """One device for each unit, and the one that runs what is streamed."""

    devices: tuple[str, ...]
    main: str


@frozen(kw_only=True)
class Task:
    """Units, and room for them: bytes of weights and what stands beside them that each device takes.

    `running` are the devices that compute and have room for their reserve; `slower` hold what is streamed to the first of them.
    """

    units: Sequence[Unit]
    running: Sequence[Device]
    slower: Sequence[Device]

    @property
    def costs(self) -> list[int]:
        """Sums of what units take where they run: costs[i] is before unit i."""
        return _sums(unit.bytes + unit.beside for unit in self.units)

    @property
    def sizes(self) -> list[int]:
        """Sums of the weights alone, for where they only lie."""
        return _sums(unit.bytes for unit in self.units)


def spread_units(units: Sequence[Unit], devices: Sequence[Device], strategy: str) -> Spread:
    """Devices by `strategy`. Raises `ResourceLimitError` (RL-MEM) when no placement keeps the limits."""
    gpus = [device for device in devices if is_gpu(device.name)]
    running = gpus or [device for device in devices if device.name != DISK][:1]
    slower = sorted((device for device in devices if device not in running), key=lambda device: device.name == DISK)
    task = Task(units=units, running=[device for device in running if room(device) >= 0], slower=slower)
    if not task.running:
        _raise_no_room(running)
    if strategy == "auto":
        for device in task.running:
            if task.costs[-1] <= room(device):
                return Spread((device.name,) * len(units), device.name)
    ends = RUNS.get(strategy, balanced)(task.costs, [room(device) for device in task.running])
    if ends is not None:
        return Spread(_by_ends(task.running, ends), _first_used(task.running, ends))
    found = _ways(task, strategy)
    if not found:
        _raise_nothing_fits(task)
    return Spread(found[0], task.running[0].name)


def room(device: Device) -> int:
    """What `device` takes beside its reserve; negative if that alone is too much."""
    return UNLIMITED if device.limit is None else device.limit - device.reserve


def _first_used(devices: Sequence[Device], ends: Sequence[int]) -> str:
    used = (device.name for device, (start, end) in zip(devices, pairwise((0, *ends)), strict=True) if end > start)
    return next(used, devices[0].name)


def _by_ends(devices: Sequence[Device], ends: Sequence[int]) -> tuple[str, ...]:
    runs = zip(devices, pairwise((0, *ends)), strict=True)
    return tuple(device.name for device, (start, end) in runs for _ in range(start, end))


def _sums(values: Iterator[int]) -> list[int]:
    return list(accumulate(values, initial=0))


# ------------------------------------------------------------------------------------------------ runs of units
# `sums[i]` is the size of all units before i, `rooms` what each device takes. The results are where each device's run ends.


def fill(sums: Sequence[int], start: int, rooms: Sequence[int]) -> list[int]:
    """Each device as full as it gets, in order; the last end is short of all units if they do not fit."""
    ends = []
    for available in rooms:
        start = max(start, bisect_right(sums, sums[start] + available) - 1)
        ends.append(start)
    return ends


def latest(sums: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """For each device the first unit from which on it and those after it can hold everything."""
    start, starts = len(sums) - 1, []
    for available in reversed(rooms):
        start = min(start, bisect_left(sums, sums[start] - available))
        starts.append(start)
    return starts[::-1]


def sequential(sums: Sequence[int], rooms: Sequence[int]) -> list[int] | None:
    """First fit."""
    ends = fill(sums, 0, rooms)
    return ends if ends[-1] == len(sums) - 1 else None


def balanced(sums: Sequence[int], rooms: Sequence[int]) -> list[int] | None:
    """The fullest device as empty as can be; among such, each near an equal share of what is left."""
    if sequential(sums, rooms) is None:
        return None
    low, high = -1, sums[-1] - sums[0]  # the fullest cannot, can hold no more than this
    while high - low > 1:
        middle = (low + high) // 2
        fits = sequential(sums, [min(middle, available) for available in rooms]) is not None
        low, high = (low, middle) if fits else (middle, high)
    rooms = [min(high, available) for available in rooms]
    needed = [*latest(sums, rooms)[1:], len(sums) - 1]
    start, ends = 0, []
    for number, available in enumerate(rooms):
        share = sums[start] + (sums[-1] - sums[start]) // (len(rooms) - number)
        after = min(bisect_left(sums, share), len(sums) - 1)
        nearest = after - 1 if after > start and share - sums[after - 1] < sums[after] - share else after
        start = min(max(nearest, needed[number]), fill(sums, start, [available])[0])
        ends.append(start)
    return ends


def balanced_low_0(sums: Sequence[int], rooms: Sequence[int]) -> list[int] | None:
    """`balanced` over all but the first device, which holds what they cannot."""
    if len(rooms) == 1:
        return balanced(sums, rooms)
    first = latest(sums, rooms[1:])[0]
    if first and sums[first] - sums[0] > rooms[0]:
        return None
    others = balanced(sums[first:], rooms[1:])
    return None if others is None else [first, *(first + end for end in others)]


#: strategy → how everything is put on devices that run
RUNS = {"sequential": sequential, "balanced": balanced, "balanced_low_0": balanced_low_0}


# ------------------------------------------------------------------------------------------------ streaming


def _ways(task: Task, strategy: str) -> list[tuple[str, ...]]:
    """Placements that stream something, the best first."""
    if len(task.running) == 1 and strategy != "sequential":
        spaced = evenly(task)
        if spaced is not None:
            return [spaced]
    ways = [way for way in (overflow(task), others_first(task)) if way is not None]
    return sorted(ways, key=lambda way: _streamed(task, way))


def _streamed(task: Task, devices: Sequence[str]) -> tuple[int, int]:
    """Bytes on disk, and bytes streamed."""
    resident = {device.name for device in task.running}
    rows = [(unit.bytes, device) for unit, device in zip(task.units, devices, strict=True) if not unit.is_lookup]
    return sum(size for size, device in rows if device == DISK), sum(size for size, device in rows if device not in resident)


def overflow(task: Task) -> tuple[str, ...] | None:
    """As many units as possible from the first on are kept where they run, the rest overflows in order."""
    units, costs, sizes = task.units, task.costs, task.sizes
    rooms, slower = [room(device) for device in task.running], [room(device) for device in task.slower]
    slot = beside = 0
    for kept in range(len(units) - 1, -1, -1):
        slot, beside = max(slot, units[kept].slot), beside + units[kept].beside
        first = rooms[0] - SLOTS * slot - beside
        if first < 0:
            continue
        ends = [min(end, kept) for end in fill(costs, 0, [first, *rooms[1:]])]
        away = fill(sizes, kept, slower)
        if ends[-1] == kept and away and away[-1] == len(units):
            slow = _by_ends(task.slower, [end - kept for end in away])
            return (*_by_ends(task.running, ends), *slow)
    return None


def others_first(task: Task) -> tuple[str, ...] | None:
    """`overflow`, units that are no blocks before blocks: a head at the end is often larger, and so would its slots be."""
    order = sorted(range(len(task.units)), key=lambda place: task.units[place].is_block)
    found = overflow(evolve(task, units=[task.units[place] for place in order]))
    return None if found is None else tuple(device for _, device in sorted(zip(order, found, strict=True)))


def evenly(task: Task) -> tuple[str, ...] | None:
    """With one device that runs: the fewest bytes are streamed, blocks before other units, and blocks at even distances."""
    (main,) = task.running
    best: tuple[str, ...] | None = None
    lookups = [place for place, unit in enumerate(task.units) if unit.is_lookup]
    streamable = [place for place, unit in enumerate(task.units) if not unit.is_lookup]
    for slot in sorted({unit.slot for unit in task.units}):
        needed = task.costs[-1] + SLOTS * slot - room(main)
        blocks, others = (
            [place for place in streamable if task.units[place].is_block == is_block and task.units[place].slot <= slot]
            for is_block in (True, False)
        )
        # What stands beside a unit stays on the device that runs it, the only one, so only weights are won.
        away = _choose(task.units, blocks, others, needed - sum(task.units[place].bytes for place in lookups))
        away = None if away is None else _with_lookups(task.units, away, lookups, needed)
        devices = None if away is None else _lower(task, away, main.name)
        if devices is None:
            continue
        if best is None or _streamed(task, devices) < _streamed(task, best):
            best = devices
    return best


def _with_lookups(units: Sequence[Unit], away: Sequence[int], lookups: Sequence[int], needed: int) -> list[int]:
    """Places `away` and as many of `lookups`, largest first, as `needed` bytes take: they cost hardly any reading."""
    chosen = list(away)
    total = sum(units[place].bytes for place in chosen)
    for place in sorted(lookups, key=lambda place: -units[place].bytes):
        if total < needed:
            chosen.append(place)
            total += units[place].bytes
    return sorted(chosen)


def _lower(task: Task, away: Sequence[int], main: str) -> tuple[str, ...] | None:
    """Units `away` on the slower devices, as little as possible on the later ones; None if there is no room."""
    devices = [main] * len(task.units)
    left = list(away)
    for number, device in enumerate(task.slower):
        rest: list[int] | None = []
        if number < len(task.slower) - 1:
            excess = sum(task.units[place].bytes for place in left) - room(device)
            rest = left if room(device) < 0 else _choose(task.units, left, [], excess)
        elif sum(task.units[place].bytes for place in left) > room(device):
            return None
        moved = set(rest or ())
        for place in left:
            if place not in moved:
                devices[place] = device.name
        left = [place for place in left if place in moved]
    return None if left else tuple(devices)


def _choose(units: Sequence[Unit], blocks: Sequence[int], others: Sequence[int], needed: int) -> list[int] | None:
    """Places of units of at least `needed` bytes in all: evenly spaced ones of `blocks`; all these and of `others`, largest first,
    if they are not enough."""
    if needed <= 0:
        return []
    total = sum(units[place].bytes for place in blocks)
    if total >= needed:
        low, high = 0, len(blocks)  # so many are too few, are enough
        while high - low > 1:
            middle = (low + high) // 2
            enough = sum(units[place].bytes for place in _evenly_spaced(blocks, middle)) >= needed
            low, high = (low, middle) if enough else (middle, high)
        return _evenly_spaced(blocks, high)
    chosen = list(blocks)
    for place in sorted(others, key=lambda place: -units[place].bytes):
        if total >= needed:
            break
        chosen.append(place)
        total += units[place].bytes
    return sorted(chosen) if total >= needed else None


def _evenly_spaced(places: Sequence[int], count: int) -> list[int]:
    return [places[(2 * number + 1) * len(places) // (2 * count)] for number in range(count)]


# ------------------------------------------------------------------------------------------------ what is in the way


def _raise_no_room(running: Sequence[Device]) -> NoReturn:
    found = "; ".join(f"{_limit(device)} and needs {human(device.reserve)} for running" for device in running)
    raise ResourceLimitError("RL-MEM", f"nothing can run: {found or 'there is no device that runs'}", locus="device_map")


def _raise_nothing_fits(task: Task) -> NoReturn:
    main, units = task.running[0], task.units
    smallest = min([unit.slot for unit in units if unit.is_block] or [unit.slot for unit in units])
    total = task.sizes[-1]
    largest = max(units, key=lambda unit: unit.slot)
    places = "; ".join(
        f"{_limit(device)}" + (f", {human(device.reserve)} of it kept for running" if device.reserve else "")
        for device in (*task.running, *task.slower)
    )
    if room(main) < SLOTS * smallest:
        why = f"{main.name} has no room for two slots of even the smallest block ({human(smallest)})"
    elif not task.slower:
        why = "there is nowhere else to put weights"
    elif all(room(device) >= total for device in task.slower[-1:]):
        why = (
            f"what is streamed needs two slots on {main.name} as large as the largest of it (at most {human(largest.slot)}, "
            f"{largest.name or 'the model'}), and what is not needs room beside them"
        )
    else:
        why = f"there is not enough room outside of {main.name}"
    raise ResourceLimitError(
        "RL-MEM", f"no placement of {human(total)} of weights keeps every limit: {why}. {places}", locus="device_map"
    )


def _limit(device: Device) -> str:
    if device.limit is None:
        return f"{device.name} has no limit"
    return f"{device.name} has {human(device.limit)}" + (f" ({device.why})" if device.why else "")
