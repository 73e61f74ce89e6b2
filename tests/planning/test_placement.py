"""Weights over imagined devices: what holds for every module, machine and strategy, and that no better placement was missed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelrig.errors import PlanError, RequestError, ResourceLimitError
from modelrig.planning.placement import Device, Placed, Weight, placement_of_module, runs, spread
from modelrig.planning.placement_maps import resolve
from modelrig.planning.units import Unit, is_gpu, units_of
from modelrig.planning.values import STRATEGIES

GB = 10**9


def transformer(layers: int = 12, *, block: int = 10, embedding: int = 100, tied: bool = False) -> tuple[list[Weight], list[str]]:
    """A decoder's weights, of two tensors in each block, and the names of its blocks."""
    tie = "embedding" if tied else None
    weights = [Weight("model.embed_tokens.weight", embedding, tie)]
    weights += [Weight(f"model.layers.{i}.{name}", block // 2) for i in range(layers) for name in ("up.weight", "down.weight")]
    weights += [Weight("model.norm.weight", 1), Weight("lm_head.weight", embedding, tie)]
    return weights, [f"model.layers.{i}" for i in range(layers)]


def machine(*gpus: int, cpu: int | None = None, disk: int | None = None, reserve: int = 0) -> list[Device]:
    running = [Device(name=f"cuda:{i}", limit=limit, reserve=reserve) for i, limit in enumerate(gpus)]
    return [*running, Device(name="cpu", limit=cpu, reserve=0 if gpus else reserve), Device(name="disk", limit=disk)]


def device_of_each_block(placed: Placed, blocks: Sequence[str]) -> list[str]:
    return list(resolve(placed.device_map, blocks).values())


# ------------------------------------------------------------------------------------------------ strategies


def test_what_fits_one_gpu_is_on_one_gpu_and_balanced_divides_it_all_the_same() -> None:
    weights, blocks = transformer()
    assert {"": "cuda:0"} == spread(weights, machine(400, 400), blocks=blocks).device_map
    assert {"": "cuda:1"} == spread(weights, machine(200, 400), blocks=blocks).device_map
    balanced = spread(weights, machine(400, 400), strategy="balanced", blocks=blocks)
    assert {"cuda:0": 160, "cuda:1": 161} == balanced.totals
    assert ["cuda:0"] * 6 + ["cuda:1"] * 6 == device_of_each_block(balanced, blocks)


def test_balanced_low_0_leaves_the_first_gpu_as_free_as_it_can() -> None:
    weights, blocks = transformer()
    free = spread(weights, machine(400, 400, 400), strategy="balanced_low_0", blocks=blocks)
    assert {"cuda:1": 160, "cuda:2": 161} == free.totals
    tight = spread(weights, machine(400, 150, 150), strategy="balanced_low_0", blocks=blocks)
    assert {"cuda:0": 100, "cuda:1": 110, "cuda:2": 111} == tight.totals


def test_sequential_fills_each_device_before_the_next() -> None:
    weights, blocks = transformer()
    filled = spread(weights, machine(155, 100, 400), strategy="sequential", blocks=blocks)
    assert {"cuda:0": 150, "cuda:1": 71, "cuda:2": 100} == filled.totals


def test_a_head_that_would_need_large_slots_stays_where_it_runs() -> None:
    weights, blocks = transformer()
    for strategy in STRATEGIES:
        placed = spread(weights, machine(241, 40, cpu=30), strategy=strategy, blocks=blocks)
        assert {"cuda:0": 221, "cuda:1": 40, "cpu": 30, "disk": 30} == placed.totals
        assert ("cuda:0", 20) == (placed.where["lm_head.weight"], placed.slots)


def test_gpus_come_first_then_the_cpu_then_the_disk() -> None:
    weights, blocks = transformer(embedding=10)
    placed = spread(weights, machine(70, cpu=40), strategy="sequential", blocks=blocks)
    assert {"cuda:0": 50, "cpu": 40, "disk": 51} == placed.totals
    assert ["cuda:0"] * 4 + ["cpu"] * 4 + ["disk"] * 4 == device_of_each_block(placed, blocks)
    assert (10, 20, ("cpu", "disk"), "cuda:0") == (placed.slot, placed.slots, placed.streamed, placed.main)


def test_blocks_that_overflow_one_device_are_spread_evenly_and_other_units_stay() -> None:
    weights, blocks = transformer()
    placed = spread(weights, machine(cpu=281), blocks=blocks)
    assert {"cpu": 261, "disk": 60} == placed.totals
    assert [1, 3, 5, 7, 9, 11] == [i for i, device in enumerate(device_of_each_block(placed, blocks)) if device == "disk"]
    both = spread(weights, machine(281, cpu=30), blocks=blocks)
    assert {"cuda:0": 261, "cpu": 30, "disk": 30} == both.totals


def test_ties_are_counted_once_and_move_together() -> None:
    weights, blocks = transformer(tied=True)
    placed = spread(weights, machine(110, 200, cpu=0), strategy="balanced", blocks=blocks)
    assert {"cuda:0": 110, "cuda:1": 111} == placed.totals
    assert placed.where["model.embed_tokens.weight"] == placed.where["lm_head.weight"] == "cuda:0"


def test_bare_parameters_stand_in_the_map_by_their_own_name() -> None:
    weights = [
        Weight("scale", 4),
        Weight("enc.shift", 4),
        Weight("enc.a.weight", 10),
        Weight("enc.b.weight", 10),
        Weight("out.weight", 9),
    ]
    placed = spread(weights, machine(28, 28), strategy="sequential")
    assert {"scale": "cuda:0", "enc": "cuda:0", "out": "cuda:1"} == placed.device_map
    divided = spread(weights, machine(20, 28), strategy="sequential")
    assert {"scale": "cuda:0", "enc.shift": "cuda:0", "enc.a": "cuda:0", "enc.b": "cuda:1", "out": "cuda:1"} == divided.device_map


def test_what_stands_beside_a_block_counts_where_it_runs() -> None:
    weights, blocks = transformer(4, embedding=1)
    beside = dict.fromkeys(blocks, 10)
    placed = spread(weights, machine(61, 61), strategy="balanced", blocks=blocks, beside=beside)
    assert {"cuda:0": 21, "cuda:1": 22} == placed.totals
    with pytest.raises(ResourceLimitError):  # the caches of streamed blocks stay on the device that runs
        spread(weights, machine(50), blocks=blocks, beside=beside)


def test_a_table_that_is_only_looked_up_goes_first_and_needs_no_slot() -> None:
    weights, blocks = transformer()
    weights[0] = Weight(weights[0].name, 100, lookup=True)
    placed = spread(weights, machine(cpu=221), blocks=blocks)
    assert {"disk": 100, "cpu": 221} == placed.totals
    assert ("disk", 100, 0) == (placed.device_map["model.embed_tokens"], placed.looked_up, placed.slots)
    more = spread(weights, machine(cpu=220), blocks=blocks)
    assert ({"disk": 130, "cpu": 191}, 20) == (more.totals, more.slots)
    # a few blocks that go anyhow make room for a small table
    weights[0] = Weight(weights[0].name, 5, lookup=True)
    assert "cpu" == spread(weights, machine(cpu=206), blocks=blocks).device_map["model.embed_tokens"]


# ------------------------------------------------------------------------------------------------ what is in the way


@pytest.mark.parametrize(
    ("devices", "part"),
    [
        (machine(50, reserve=60), "nothing can run: cuda:0 has 50 B and needs 60 B for running"),
        (machine(15, cpu=400), "cuda:0 has no room for two slots"),
        (machine(70, cpu=10, disk=10), "there is not enough room outside of cuda:0"),
        (
            [Device(name="cuda:0", limit=50, why="free memory")],
            "there is nowhere else to put weights. cuda:0 has 50 B (free memory)",
        ),
        ([Device(name="disk")], "there is no device that runs"),
    ],
)
def test_an_error_says_which_limit_is_in_the_way(devices: list[Device], part: str) -> None:
    weights, blocks = transformer(embedding=11)
    with pytest.raises(ResourceLimitError) as caught:
        spread(weights, devices, blocks=blocks)
    assert ("RL-MEM", True) == (caught.value.code, part in caught.value.reason), caught.value.reason


# ------------------------------------------------------------------------------------------------ what people write


def test_one_function_takes_what_a_request_takes() -> None:
    weights, blocks = transformer()
    for written, expected in (
        ("cuda", {"": "cuda:0"}),
        (1, {"": "cuda:1"}),
        ("disk", {"": "disk"}),
        ({"model": 0, "lm_head": "cpu"}, {"model": "cuda:0", "lm_head": "cpu"}),
    ):
        placed = placement_of_module(weights, devices=machine(GB, GB), device_map=written, no_split=blocks)
        assert expected == placed.device_map
    with pytest.raises(RequestError, match="RQ-VALUE"):
        placement_of_module(weights, devices=machine(GB), device_map="tpu")
    with pytest.raises(PlanError, match=r"PN-DEVICE.*cuda:1.*there is cpu, cuda:0, disk"):
        placement_of_module(weights, devices=machine(GB), device_map={"": "cuda:1"})


def test_groups_of_ties_can_be_given_beside_the_weights() -> None:
    weights, blocks = transformer()
    ties = [{"model.embed_tokens.weight", "lm_head.weight"}]
    placed = placement_of_module(weights, devices=machine(GB), no_split=blocks, ties=ties)
    assert {"cuda:0": 221} == placed.totals


def test_a_module_without_weights_is_placed_too() -> None:
    placed = placement_of_module([], devices=machine(10))
    assert ({"": "cuda:0"}, {}, {"cuda:0": 0}) == (placed.device_map, placed.where, placed.totals)


# ------------------------------------------------------------------------------------------------ what always holds


@st.composite
def modules(draw: st.DrawFn) -> tuple[list[Weight], list[str]]:
    """Weights of a random tree of modules, some in blocks, some bare, some tied."""
    names, blocks = [], []
    for top in range(draw(st.integers(1, 3))):
        prefix = f"part{top}"
        if draw(st.booleans()):
            names.append(f"{prefix}.bare")
        for number in range(draw(st.integers(0, 5))):
            block = f"{prefix}.{number}"
            if draw(st.booleans()):
                blocks.append(block)
            names += [f"{block}.{leaf}" for leaf in ("a.weight", "a.bias", "gain")[: draw(st.integers(1, 3))]]
    if draw(st.booleans()):
        names.append("scale")
    ties = {name: draw(st.sampled_from(["x", "y"])) for name in draw(st.lists(st.sampled_from(names), max_size=4))} if names else {}
    sizes = {tie: draw(st.integers(0, 30)) for tie in ("x", "y")}
    lookups = set(draw(st.lists(st.sampled_from(names), max_size=2))) - set(ties) if names else set()
    weights = [
        Weight(name, sizes[tie] if (tie := ties.get(name)) else draw(st.integers(0, 30)), ties.get(name), name in lookups)
        for name in names
    ]
    return weights, blocks


@st.composite
def machines(draw: st.DrawFn) -> list[Device]:
    gpus = draw(st.lists(st.integers(0, 150), max_size=3))
    limit = st.none() | st.integers(0, 150)
    return machine(*gpus, cpu=draw(limit), disk=draw(limit), reserve=draw(st.integers(0, 20)))


def running(devices: Sequence[Device]) -> list[Device]:
    gpus = [device for device in devices if is_gpu(device.name)]
    return gpus or [device for device in devices if device.name == "cpu"]


def keeps_limits(placed_on: Sequence[str], units: Sequence[Unit], devices: Sequence[Device], main: str) -> bool:
    """Weights, reserve where it runs, and two slots for what is streamed stay below every limit."""
    used = {device.name: 0 for device in devices}
    for unit, device in zip(units, placed_on, strict=True):
        used[device] += unit.bytes
        used[device if runs(device, main) else main] += unit.beside
    slots = [unit.slot for unit, device in zip(units, placed_on, strict=True) if not runs(device, main)]
    used[main] += 2 * max(slots, default=0)
    return all(
        device.limit is None
        or (used[device.name] == 0 and device.name != main)
        or used[device.name] + device.reserve <= device.limit
        for device in devices
    )


def in_order(units: Sequence[Unit], devices: Sequence[Device]) -> Iterator[list[str]]:
    """Every placement in which devices follow each other as the units do."""
    for ends in combinations_with_replacement(range(len(units) + 1), len(devices) - 1):
        yield [device.name for device, (a, b) in zip(devices, pairwise((0, *ends, len(units))), strict=True) for _ in range(a, b)]


@settings(max_examples=300, deadline=None)
@given(modules(), machines(), st.sampled_from(STRATEGIES))
def test_every_placement_covers_all_splits_nothing_and_keeps_limits_or_there_is_none(
    module: tuple[list[Weight], list[str]], devices: list[Device], strategy: str
) -> None:
    weights, blocks = module
    units = units_of(weights, blocks, {})
    try:
        placed = spread(weights, devices, strategy=strategy, blocks=blocks)
    except ResourceLimitError as error:
        assert "RL-MEM" == error.code
        usable = [device for device in running(devices) if device.limit is None or device.reserve <= device.limit]
        if usable:
            left = [device for device in devices if device in usable or device not in running(devices)]
            assert not any(keeps_limits(one, units, left, usable[0].name) for one in in_order(units, left))
        return
    assert [weight.name for weight in weights] == list(placed.where)
    assert placed.where == resolve(placed.device_map, placed.where)
    assert all(len({placed.where[name] for name in unit.weights}) == 1 for unit in units)
    assert all(len({placed.where[one.name] for one in weights if one.name.startswith(f"{block}.")}) < 2 for block in blocks)
    assert all(len({placed.where[one.name] for one in weights if one.tie == tie}) < 2 for tie in ("x", "y"))
    assert keeps_limits([placed.where[unit.weights[0]] for unit in units], units, devices, placed.main)
    assert sum(unit.bytes for unit in units) == sum(placed.totals.values())
    assert placed == spread(weights, devices, strategy=strategy, blocks=blocks)
    # what was found is a map that people could have written
    again = placement_of_module(weights, devices=devices, device_map=dict(placed.device_map), no_split=blocks)
    assert (placed.where, placed.totals) == (again.where, again.totals)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.lists(st.integers(5, 60), min_size=2, max_size=4))
def test_balanced_is_as_good_as_the_best_division_into_runs(sizes: list[int], limits: list[int]) -> None:
    weights = [Weight(f"layers.{i}.weight", size) for i, size in enumerate(sizes)]
    devices = [Device(name=f"cuda:{i}", limit=limit) for i, limit in enumerate(limits)]
    best = None
    for ends in combinations_with_replacement(range(len(sizes) + 1), len(limits) - 1):
        loads = [sum(sizes[a:b]) for a, b in pairwise((0, *ends, len(sizes)))]
        if all(load <= limit for load, limit in zip(loads, limits, strict=True)):
            best = max(loads) if best is None else min(best, max(loads))
    if best is None:
        with pytest.raises(ResourceLimitError):
            spread(weights, devices, strategy="balanced")
    else:
        placed = spread(weights, devices, strategy="balanced")
        assert best == max(placed.totals.values())
        order = [int(placed.where[weight.name][-1]) for weight in weights]
        assert sorted(order) == order


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 16), st.integers(1, 20), st.integers(0, 40), st.integers(0, 400), st.integers(0, 10))
def test_no_placement_on_one_device_streams_fewer_bytes_than_were_streamed(
    layers: int, block: int, embedding: int, limit: int, reserve: int
) -> None:
    """With equal blocks: how many must go follows from the limit, whichever they are."""
    weights, blocks = transformer(layers, block=2 * block, embedding=embedding)
    devices = machine(cpu=limit, reserve=reserve)
    try:
        placed = spread(weights, devices, blocks=blocks)
    except ResourceLimitError:
        return
    if placed.streamed and placed.slot == 2 * block:
        total = sum(weight.bytes for weight in weights)
        needed = total + 4 * block + reserve - limit
        others = sum(weight.bytes for weight in weights if "layers" not in weight.name and placed.where[weight.name] == "disk")
        assert placed.totals["disk"] - others == min(-(-needed // (2 * block)), layers) * 2 * block


# ------------------------------------------------------------------------------------------------ beside accelerate


@pytest.mark.parametrize("limits", [(10_000,), (2600, 10_000), (2000, 2000), (1200, 1200, 1200), (1500, 700, 10_000)])
def test_no_more_devices_are_used_than_accelerate_uses(limits: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    accelerate = pytest.importorskip("accelerate")

    class Block(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(5, 10, bias=False), torch.nn.Linear(10, 5, bias=False)

    module = torch.nn.Sequential(*(Block() for _ in range(6)))  # 400 bytes each
    memory = {**dict(enumerate(limits)), "cpu": 100_000}
    theirs = accelerate.infer_auto_device_map(module, max_memory=memory, no_split_module_classes=["Block"])
    weights = [Weight(name, tensor.nbytes) for name, tensor in module.named_parameters()]
    blocks = [str(i) for i in range(6)]
    for strategy in ("auto", "sequential"):
        ours = spread(weights, machine(*limits, cpu=100_000), strategy=strategy, blocks=blocks)
        assert len(ours.totals) <= len(set(theirs.values()))
        assert len(ours.streamed) <= len({"cpu", "disk"} & set(theirs.values()))
        # theirs is a map that we take, with every parameter where accelerate puts it
        written = {name: where if isinstance(where, str) else int(where) for name, where in theirs.items()}
        taken = placement_of_module(weights, devices=machine(*limits), device_map=written, no_split=blocks)
        named = {f"cuda:{where}" if isinstance(where, int) else where for where in written.values()}
        assert named == set(taken.totals)
