"""What is placed: weights, the units they move in, and the devices they move to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from attrs import frozen

CPU, DISK = "cpu", "disk"
SLOTS = 2  # blocks that are streamed have a place on the device that runs: one computes, the next arrives


@frozen
class Weight:
    """A parameter or buffer and the bytes it takes in memory. Those with the same `tie` share one storage, counted once.

    Of a `lookup` (an embedding, mapped from its file) only some rows are needed at a time: on disk it needs no slot and hardly any
    reading.
    """

    name: str
    bytes: int
    tie: str | None = None
    lookup: bool = False


@frozen(kw_only=True)
class Device:
    """A place for weights: `"cuda:1"`, `"cpu"`, `"disk"`.

    `limit` is for the weights and for `reserve`, which the device needs for anything else while it runs; None is no limit. `why`
    says who sets the limit.
    """

    name: str
    limit: int | None = None
    reserve: int = 0
    why: str = ""


@frozen(kw_only=True)
class Unit:
    """What moves as a whole.

    Attributes:
        name: of the block or module, or of the first of several that are tied.
        weights: names, in execution order.
        bytes: of all of them, ties once.
        slot: what a streamed unit needs of a slot: the largest of its blocks and modules.
        beside: bytes it needs beside them on the device that runs it.
        is_block: a block, and nothing tied to it.
        is_lookup: rows of it are looked up, and nothing else is done with it.
    """

    name: str
    weights: tuple[str, ...]
    bytes: int
    slot: int
    beside: int
    is_block: bool
    is_lookup: bool


def is_gpu(device: str) -> bool:
    return device not in (CPU, DISK)


def owners_of(weights: Iterable[Weight], blocks: Collection[str]) -> dict[str, str]:
    """Name of a weight → the outermost of `blocks` that holds it, else the module that does."""
    whole, owners = frozenset(blocks), {}
    for weight in weights:
        parent = weight.name.rpartition(".")[0]
        owners[weight.name] = parent
        if not whole:
            continue
        if "" in whole:
            owners[weight.name] = ""
            continue
        end = parent.find(".")
        while end != -1 and parent[:end] not in whole:
            end = parent.find(".", end + 1)
        if end != -1:
            owners[weight.name] = parent[:end]
    return owners


def streamed_bytes(weights: Iterable[Weight], owners: Mapping[str, str]) -> dict[str, int]:
    """Bytes of each owner's weights, ties within it once."""
    sizes: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    for weight in weights:
        owner = owners[weight.name]
        counted = weight.tie is not None and (owner, weight.tie) in seen
        sizes[owner] = sizes.get(owner, 0) + (0 if counted else weight.bytes)
        if weight.tie is not None:
            seen.add((owner, weight.tie))
    return sizes


def join(groups: Iterable[Collection[str]]) -> dict[str, str]:
    """Member → the name of its group, groups with a common member being one."""
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while above.setdefault(name, name) != name:
            above[name] = name = above[above[name]]
        return name

    for group in groups:
        first = next(iter(group), None)
        for other in group:
            above[top(other)] = top(first or other)
    return {name: top(name) for name in list(above)}


def units_of(weights: Sequence[Weight], blocks: Collection[str], beside: Mapping[str, int]) -> list[Unit]:
    """The units in execution order: each stands where the first of its weights does."""
    owners = owners_of(weights, blocks)
    slots = streamed_bytes((weight for weight in weights if not weight.lookup), owners)
    by_tie: dict[str, dict[str, None]] = {}
    for weight in weights:
        if weight.tie is not None:
            by_tie.setdefault(weight.tie, {})[owners[weight.name]] = None
    joined = join(by_tie.values())
    members: dict[str, dict[str, None]] = {}  # root → owners, in order
    held: dict[str, list[Weight]] = {}
    for weight in weights:
        owner = owners[weight.name]
        root = joined.get(owner, owner)
        members.setdefault(root, {})[owner] = None
        held.setdefault(root, []).append(weight)
    whole = frozenset(blocks)
    units = []
    for root, inside in held.items():
        names = members[root]
        units.append(
            Unit(
                name=next(iter(names)),
                weights=tuple(weight.name for weight in inside),
                bytes=sum(streamed_bytes(inside, dict.fromkeys((weight.name for weight in inside), "")).values()),
                slot=max(slots.get(name, 0) for name in names),
                beside=sum(beside.get(name, 0) for name in names),
                is_block=len(names) == 1 and next(iter(names)) in whole,
                is_lookup=all(weight.lookup for weight in inside),
            )
        )
    return units
