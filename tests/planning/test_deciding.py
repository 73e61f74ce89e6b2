"""Plans whose weights do not stay in one place: what is placed, what it takes, what is negotiated for it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

import rigs
from modelrig.components import dtype_bytes
from modelrig.errors import PlanError, ResourceLimitError
from modelrig.hookspecs import hookimpl
from modelrig.planning.environment import read_environment
from modelrig.planning.ledger import ACTIVATIONS, CACHE, GPU_CONTEXT_BYTES, MAPPED, ON_DISK, SLOTS, WEIGHTS
from modelrig.planning.pipeline import make_plan
from modelrig.planning.placement_maps import resolve
from modelrig.planning.plan import RigPlan
from modelrig.registry import temporary
from modelrig_plugins.quantizers.none import NonePlanner
from rigs import gpu, machine

GB = 10**9
CONTEXT = 64  # so that activations are small beside the weights


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in float32 with ten blocks of equal size; nothing else is as large as a block."""
    from checkpoints import write_llama

    folder = tmp_path_factory.mktemp("deep")
    write_llama(folder, num_hidden_layers=10, vocab_size=32)
    return folder


def plan_of(folder: Path, **request: Any) -> RigPlan:
    return make_plan(folder, **({"context": CONTEXT, "environment": machine(8 * GB)} | request))


def block_bytes(plan: RigPlan, block: str = "model.layers.0") -> int:
    return sum(dtype_bytes(plan.dtype, _count(one.shape)) for one in plan.facts.parameters if one.name.startswith(f"{block}."))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def lines(plan: RigPlan, device: str, moment: str = "run") -> dict[str, int]:
    return {line.what: line.bytes for line in plan.ledger if (line.device, line.moment) == (device, moment)}


def streamed_blocks(plan: RigPlan, device: str = "disk") -> list[int]:
    return [i for i, found in enumerate(resolve(plan.device_map, plan.facts.blocks).values()) if found == device]


def tight(folder: Path, blocks: int, **request: Any) -> int:
    """A limit with which `blocks` blocks must go."""
    plan = plan_of(folder, device_map="cpu", **request)
    beside = lines(plan, "cpu")[CACHE] + lines(plan, "cpu")[ACTIVATIONS]
    return plan.catalog.total_bytes + beside - (blocks - 2) * block_bytes(plan)


# ------------------------------------------------------------------------------------------------ the disk


def test_what_main_memory_does_not_take_stays_on_disk_and_the_ledger_says_what_that_needs(deep: Path) -> None:
    limit = tight(deep, 5)
    plan = plan_of(deep, max_memory={"cpu": limit})
    assert ("cpu", [1, 3, 5, 7, 9]) == (plan.device, streamed_blocks(plan))
    one = block_bytes(plan)
    assert {ON_DISK: 5 * one} == lines(plan, "disk") == lines(plan, "disk", "steady")
    assert (2 * one, plan.catalog.total_bytes - 5 * one) == (lines(plan, "cpu")[SLOTS], lines(plan, "cpu")[MAPPED])
    assert SLOTS not in lines(plan, "cpu", "load_peak")
    assert limit == plan.ledger.total("run", "cpu")
    assert any("are brought to cpu in each step" in note for note in plan.notes)
    assert any("max_memory by argument" in note for note in plan.notes)


def test_embeddings_are_looked_up_on_disk_before_another_block_is_streamed(deep: Path) -> None:
    limit = tight(deep, 5) - 1
    plan = plan_of(deep, max_memory={"cpu": limit})
    assert ([1, 3, 5, 7, 9], "disk") == (streamed_blocks(plan), plan.device_map["model.embed_tokens"])
    assert 2 * block_bytes(plan) == lines(plan, "cpu")[SLOTS]
    assert any(note.startswith("embeddings of 6.14 kB") for note in plan.notes)
    # where they are cast they cannot be looked up in the file
    cast = plan_of(deep, dtype="bfloat16", max_memory={"cpu": limit // 2})
    assert "cpu" == cast.device_map["model.embed_tokens"]
    assert 5 < len(streamed_blocks(cast))


def test_sequential_keeps_the_first_blocks(deep: Path) -> None:
    plan = plan_of(deep, max_memory={"cpu": tight(deep, 5)}, device_map="sequential")
    assert {"model.embed_tokens": "cpu", **{f"model.layers.{i}": "cpu" if i < 5 else "disk" for i in range(10)}} == {
        name: device for name, device in plan.device_map.items() if name not in ("model.norm", "lm_head")
    }


def test_without_a_limit_auto_reads_ahead_rather_than_let_pages_thrash_and_a_device_that_is_asked_for_maps_all(deep: Path) -> None:
    small = machine(tight(deep, 5))
    plan = plan_of(deep, environment=small)
    assert 5 == len(streamed_blocks(plan))
    assert any("with everything on cpu, cpu would need" in note and "free memory" in note for note in plan.notes)
    whole = plan_of(deep, environment=small, device_map="cpu")
    assert {"": "cpu"} == whole.device_map
    assert any("read again" in note for note in whole.notes)


def test_a_device_that_is_asked_for_and_too_small_is_refused_with_auto_as_a_way_out(deep: Path) -> None:
    with pytest.raises(ResourceLimitError) as caught:
        plan_of(deep, max_memory={"cpu": tight(deep, 5)}, device_map="cpu")
    assert ("RL-MEM", True) == (caught.value.code, "device_map='auto'" in str(caught.value.hint))


def test_where_no_placement_fits_the_error_has_both_reasons(deep: Path) -> None:
    with pytest.raises(ResourceLimitError) as caught:
        plan_of(deep, max_memory={"cpu": tight(deep, 5), "disk": 100})
    assert caught.value.reason.startswith("cpu needs ")
    assert "not enough room outside of cpu" in caught.value.reason
    assert "disk has 100 B (max_memory by argument)" in caught.value.reason


def test_cast_weights_are_streamed_at_their_size_in_memory(deep: Path) -> None:
    plan = plan_of(deep, dtype="bfloat16", device_map={"": "cpu", "model.layers.3": "disk", "model.layers.4": "disk"})
    one = block_bytes(plan)
    assert ({ON_DISK: 2 * one}, 2 * one) == (lines(plan, "disk"), lines(plan, "cpu")[SLOTS])
    assert plan.catalog.total_bytes // 2 - 2 * one == lines(plan, "cpu")[WEIGHTS]


# ------------------------------------------------------------------------------------------------ GPUs, imagined


def test_a_gpu_that_is_too_small_gets_the_rest_from_main_memory_then_from_disk(deep: Path) -> None:
    room = tight(deep, 6) + GPU_CONTEXT_BYTES
    plan = plan_of(deep, environment=machine(8 * GB, gpu(free_bytes=room)))
    assert ("cuda:0", 6, room) == (plan.device, len(streamed_blocks(plan, "cpu")), plan.ledger.total("run", "cuda:0"))
    assert 6 * block_bytes(plan) == lines(plan, "cpu")[MAPPED]
    both = plan_of(deep, environment=machine(8 * GB, gpu(free_bytes=room)), max_memory={"cpu": 3 * block_bytes(plan)})
    assert (2, 4) == (len(streamed_blocks(both, "cpu")), len(streamed_blocks(both)))  # a block's worth is for converting
    assert ("cuda:0", "cpu", "disk") == both.ledger.devices


def test_two_gpus_share_what_one_does_not_hold_each_with_the_cache_of_its_layers(deep: Path) -> None:
    whole = plan_of(deep, environment=machine(8 * GB, gpu(0), gpu(1)))
    assert {"": "cuda:0"} == whole.device_map
    room = tight(deep, 6) + GPU_CONTEXT_BYTES
    plan = plan_of(deep, environment=machine(8 * GB, gpu(0, room), gpu(1, room)))
    assert {"cuda:0", "cuda:1"} == set(plan.device_map.values())
    assert list(range(5)) == streamed_blocks(plan, "cuda:0")
    assert lines(whole, "cuda:0")[CACHE] == 2 * lines(plan, "cuda:0")[CACHE] == 2 * lines(plan, "cuda:1")[CACHE]
    assert plan.catalog.total_bytes == sum(lines(plan, device)[WEIGHTS] for device in ("cuda:0", "cuda:1"))
    assert SLOTS not in lines(plan, "cuda:0")


def test_balanced_divides_what_one_gpu_would_hold_and_low_0_leaves_it_free(deep: Path) -> None:
    environment = machine(8 * GB, gpu(0), gpu(1), gpu(2))
    assert {"cuda:0", "cuda:1", "cuda:2"} == set(plan_of(deep, environment=environment, device_map="balanced").device_map.values())
    low = plan_of(deep, environment=environment, device_map="balanced_low_0")
    assert ("cuda:1", {"cuda:1", "cuda:2"}) == (low.device, set(low.device_map.values()))


def test_of_the_gpus_only_those_that_max_memory_names_are_used(deep: Path) -> None:
    environment = machine(8 * GB, gpu(0), gpu(1))
    assert "cuda:1" == plan_of(deep, environment=environment, max_memory={1: "4GB"}).device
    assert "cuda:1" == plan_of(deep, environment=environment, max_memory={0: 0, "1": "4GB"}).device
    assert "cuda:0" == plan_of(deep, environment=environment, max_memory={"cpu": "4GB"}).device
    assert "cpu" == plan_of(deep, environment=environment, max_memory={0: 0}).device
    assert "cuda:0" == plan_of(deep, environment=environment, max_memory={"cpu": 0}).device
    absent = plan_of(deep, max_memory={3: "4GB"})
    assert ("cpu", True) == (absent.device, any("names cuda:3, which is not there" in note for note in absent.notes))


# ------------------------------------------------------------------------------------------------ maps


def test_a_map_of_the_callers_is_followed_and_a_gpu_in_it_runs_the_model(deep: Path) -> None:
    written = {"model": "cpu", "model.layers.1": "disk", "lm_head": 0, "model.embed_tokens": 0}
    plan = plan_of(deep, environment=machine(8 * GB, gpu()), device_map=written)
    assert ("cuda:0", [1]) == (plan.device, streamed_blocks(plan))
    assert [0, 2, 3, 4, 5, 6, 7, 8, 9] == streamed_blocks(plan, "cpu")
    assert "disk" == plan.device_map["model.layers.1"]
    assert list(plan.device_map) == ["model.embed_tokens", *plan.facts.blocks, "model.norm", "lm_head"]
    only_disk = plan_of(deep, device_map="disk")
    assert ("cpu", {"": "disk"}, 2 * block_bytes(plan)) == (only_disk.device, only_disk.device_map, lines(only_disk, "cpu")[SLOTS])


def test_the_map_that_was_made_can_be_asked_for(deep: Path) -> None:
    made = plan_of(deep, max_memory={"cpu": tight(deep, 5)})
    asked = plan_of(deep, device_map=dict(made.device_map))
    assert (made.device_map, made.hash) == (asked.device_map, asked.hash)


def test_a_map_from_another_tool_may_name_the_rotary_module(deep: Path) -> None:
    written = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    assert {"": "cpu"} == plan_of(deep, device_map=written).device_map


@pytest.mark.parametrize(
    ("written", "code", "part"),
    [
        ({"model": "cpu"}, "PN-MAP-COVER", "'lm_head.weight'"),
        ({"": "cpu", "model.layer.1": "disk"}, "PN-MAP-NAME", "did you mean 'model.layers.1'?"),
        ({"": "cpu", "model.layers.1.mlp": "disk"}, "PN-MAP-SPLIT", "model.layers.1 ("),
        ({"": "cpu", "model": "disk", "lm_head": "cpu"}, "PN-MAP-UNUSED", "'' decides nothing"),
        ({"": "cpu", "model.layers.1": 7}, "PN-DEVICE", "'cuda:7' (asked for by argument) is not there"),
        ({"": 2, "model.layers.1": 7}, "PN-DEVICE", "'cuda:2', 'cuda:7' (asked for by argument) are not there"),
    ],
)
def test_a_map_that_does_not_fit_is_one_typed_error(deep: Path, written: dict[str, Any], code: str, part: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(deep, device_map=written)
    assert (code, True) == (caught.value.code, part in caught.value.reason), caught.value.reason


def test_a_map_that_is_more_than_a_limit_takes_is_refused_with_what_would_fit(deep: Path) -> None:
    with pytest.raises(ResourceLimitError) as caught:
        plan_of(deep, device_map={"": "cpu", "model.layers.1": "disk"}, max_memory={"cpu": tight(deep, 5)})
    assert "device_map='auto'" in str(caught.value.hint)


def test_the_layer_1_of_a_map_is_not_the_layer_10(tmp_path: Path) -> None:
    from checkpoints import write_llama

    write_llama(tmp_path, num_hidden_layers=12)
    assert [1] == streamed_blocks(plan_of(tmp_path, device_map={"": "cpu", "model.layers.1": "disk"}))


# ------------------------------------------------------------------------------------------------ parts


def test_kernels_use_weights_that_are_streamed_where_they_lie(deep: Path) -> None:
    flags = frozenset({"avx512f", "avx512_bf16"})
    environment = evolve(read_environment(), cpu_flags=flags, memory=machine(8 * GB).memory)
    common: dict[str, Any] = {"dtype": "bfloat16", "environment": environment}
    packed: dict[str, Any] = {"quantizer": {"name": "none", "kernel": "packed"}, **common}
    assert "packed" == plan_of(deep, **packed).choices["quantizers"].options.kernel
    streamed = plan_of(deep, device_map={"": "cpu", "model.layers.1": "disk"}, **common)
    assert "linear" == streamed.choices["quantizers"].options.kernel
    assert not any("own layout" in line.what for line in streamed.ledger)
    with pytest.raises(PlanError, match="packed keeps copies"):
        plan_of(deep, device_map={"": "cpu", "model.layers.1": "disk"}, **packed)


def test_copies_that_a_limit_does_not_take_are_given_up_before_weights_are_streamed(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a quantizer that settles on them by itself; those that were asked for are an error instead."""
    environment = evolve(read_environment(), cpu_flags=frozenset({"avx512f", "avx512_bf16"}), memory=machine(8 * GB).memory)
    common: dict[str, Any] = {"dtype": "bfloat16", "environment": environment}
    packed: dict[str, Any] = {"quantizer": {"name": "none", "kernel": "packed"}, **common}
    needed = plan_of(deep, **packed).ledger.peak("cpu", with_mapped=True, with_copies=False)
    with pytest.raises(PlanError, match=r"(?s)cpu needs .*packed keeps copies"):
        plan_of(deep, max_memory=needed, **packed)
    monkeypatch.setattr(NonePlanner, "settle", lambda need, options: evolve(options, kernel="mv" if need.streamed else "packed"))
    plan = plan_of(deep, max_memory=needed, **common)
    assert ({"": "cpu"}, "mv") == (plan.device_map, plan.choices["quantizers"].options.kernel)


@pytest.mark.parametrize("streams", [True, False])
def test_a_quantizer_must_say_that_its_weights_can_be_streamed(deep: Path, streams: bool) -> None:
    class Plugin:
        MODELRIG_API = "1.0"

        @hookimpl
        def modelrig_quantizers(self) -> list[Any]:
            return [rigs.quantizer("other", streams=streams, offers={"fullgraph"})]

    with temporary(Plugin(), "local"):
        assert "other" == plan_of(deep, quantizer="other").choices["quantizers"].name
        if streams:
            assert plan_of(deep, quantizer="other", device_map="disk").device_map == {"": "disk"}
        else:
            with pytest.raises(PlanError, match=r"quantizer\.streams"):
                plan_of(deep, quantizer="other", device_map="disk")
            with pytest.raises(ResourceLimitError, match="with weights on several devices: cannot serve"):
                plan_of(deep, quantizer="other", max_memory={"cpu": tight(deep, 5)})


# ------------------------------------------------------------------------------------------------ what is said


def test_the_plan_shows_where_weights_are_in_few_words_and_as_data(deep: Path) -> None:
    plan = plan_of(deep, device_map={"": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "model.layers.5": "disk"})
    text = plan.explain()
    assert "  cpu   model.embed_tokens, model.layers.0, 3-4, 6-9, model.norm, lm_head\n" in text
    assert "  disk  model.layers.1-2, 5\n" in text
    assert "disk: read in each step" in text
    assert " on cpu and disk " in plan.summary()
    document = json.loads(json.dumps(plan.to_json()))
    assert dict(plan.device_map) == document["device_map"]
    assert {"model.layers.1": "disk"}.items() <= document["request"]["device_map"]["value"].items()
    assert "places" not in plan_of(deep).explain()


def test_the_hash_depends_on_the_map(deep: Path) -> None:
    maps = ("cpu", "disk", {"": "cpu", "model.layers.1": "disk"}, {"": "cpu", "model.layers.2": "disk"})
    assert len(maps) == len({plan_of(deep, device_map=one).hash for one in maps})


def test_what_was_planned_is_what_runs(deep: Path) -> None:
    import torch

    import modelrig

    ids = torch.arange(6)[None]
    with modelrig.load(deep, device_map="cpu", context=CONTEXT) as model:
        expected = model(ids)
    for request in (
        {"max_memory": {"cpu": tight(deep, 5)}},
        {"device_map": "disk"},
        {"device_map": {"": "cpu", "model.layers.1": "disk"}},
    ):
        with modelrig.load(deep, context=CONTEXT, **request) as model:
            assert "disk" in model.device_map.values()
            assert torch.equal(expected, model(ids))
