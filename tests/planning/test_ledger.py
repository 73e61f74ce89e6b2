from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

import rigs
from modelrig.components import Catalog, ModelFacts, Parameter, Part, TensorEntry, TensorFile, TensorSpec
from modelrig.planning import ledger as ledger_module
from modelrig.planning.ledger import (
    ACTIVATIONS,
    CACHE,
    CACHE_ON_DISK,
    GPU_CONTEXT,
    MAPPED,
    MOMENTS,
    ON_DISK,
    PIECE_BYTES,
    PREFILL_TOKENS,
    SLOTS,
    STAGING,
    WEIGHTS,
    Account,
    Ledger,
    Weights,
    activation_bytes,
    add_up,
    weigh,
    weigh_each,
)
from rigs import facts, spec


def stored(model: ModelFacts, dtype: str = "float32", start: int = 128) -> Catalog:
    """The model's tensors, one after the other from byte `start`."""
    entries, bytes_each = {}, {"float32": 4, "bfloat16": 2}[dtype]
    for parameter in model.parameters:
        if parameter.stored_as is not None:
            count = bytes_each
            for size in parameter.shape:
                count *= size
            entries[parameter.stored_as] = TensorEntry(parameter.stored_as, dtype, parameter.shape, 0, start, count)
            start += count
    return Catalog(format="made_up", files=(), entries=entries)


EMBED, UP = 100 * 64 * 4, 128 * 64 * 4  # bytes in float32


def test_on_cpu_weights_whose_dtype_stays_are_mapped_and_ties_count_once() -> None:
    weights = weigh(facts(), stored(facts()), rigs.Plain, None, "float32", "cpu")
    assert Weights(mapped=EMBED + 2 * UP, allocated=0, staging=0) == weights


def test_another_dtype_or_a_gpu_needs_memory_and_a_place_to_convert() -> None:
    cast = weigh(facts(), stored(facts(), "bfloat16"), rigs.Plain, None, "float32", "cpu")
    moved = weigh(facts(), stored(facts()), rigs.Plain, None, "float32", "cuda:0")
    assert Weights(mapped=0, allocated=EMBED + 2 * UP, staging=UP // 2) == cast
    assert Weights(mapped=0, allocated=EMBED + 2 * UP, staging=UP) == moved


def test_plain_tensors_are_converted_in_parts() -> None:
    from modelrig.loading import filling, pieces

    wide = facts(parameters=(Parameter("embed", (50_000, 64), "embedding", "embed"),), ties={})
    cast = weigh(wide, stored(wide, "bfloat16"), rigs.Plain, None, "float32", "cpu")
    assert filling.READERS * pieces.PIECE_BYTES == PIECE_BYTES == cast.staging < 50_000 * 64 * 2


def test_files_on_a_network_are_read_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    files = (TensorFile("model.safetensors", Path("/mnt/model.safetensors"), 1, None),)
    catalog = evolve(stored(facts()), files=files)
    monkeypatch.setattr(ledger_module, "is_on_network", lambda path: path == files[0].path)
    weights = weigh(facts(), catalog, rigs.Plain, None, "float32", "cpu")
    assert (0, EMBED + 2 * UP) == (weights.mapped, weights.allocated)


def test_a_tensor_at_an_odd_address_is_copied() -> None:
    weights = weigh(facts(), stored(facts(), start=129), rigs.Plain, None, "float32", "cpu")
    assert (0, EMBED + 2 * UP) == (weights.mapped, weights.allocated)


def test_linear_weights_are_what_the_quantizer_makes_of_them() -> None:
    class Halves:
        @staticmethod
        def outputs(parameter: Parameter, dtype: str, options: object) -> tuple[TensorSpec, ...]:
            rows, columns = parameter.shape
            return (TensorSpec("", "int8", (rows, columns)), TensorSpec(".scale", dtype, (rows, 1)))

    weights = weigh(facts(), stored(facts()), Halves, None, "float32", "cpu")
    assert Weights(mapped=EMBED, allocated=2 * (128 * 64 + 128 * 4), staging=UP) == weights


def test_parameters_that_are_put_together_of_parts_are_copied_and_one_that_is_a_whole_tensor_is_not() -> None:
    halves = tuple(Part(f"half.{i}", (64, 64), into=((64 * i, 64 * i + 64), (0, 64))) for i in range(2))
    parameters = (
        Parameter("joined", (128, 64), "linear", None, parts=halves),
        Parameter("first", (32, 64), "linear", None, parts=(Part("wide", (64, 64), taken=((0, 32), (0, 64))),)),
        Parameter("turned", (64, 32), "linear", None, parts=(Part("tall", (32, 64), order=(1, 0)),)),
        Parameter("as_it_is", (16, 64), "linear", None, parts=(Part("plain", (16, 64)),)),
    )
    shapes = {"half.0": (64, 64), "half.1": (64, 64), "wide": (64, 64), "tall": (32, 64), "plain": (16, 64)}
    entries, start = {}, 0
    for name, (rows, columns) in shapes.items():
        entries[name] = TensorEntry(name, "float32", (rows, columns), 0, start, 4 * rows * columns)
        start += 4 * rows * columns
    catalog = Catalog(format="made_up", files=(), entries=entries)
    weights = weigh(facts(parameters=parameters, ties={}), catalog, rigs.Plain, None, "float32", "cpu")
    # what is cut along the first dimension is a run of its file; parts of less than a megabyte are read side by side
    assert Weights(mapped=4 * 64 * (16 + 32), allocated=4 * 64 * (128 + 32), staging=4 * 64 * 64) == weights


def test_a_tensor_that_is_stored_in_another_order_is_copied() -> None:
    catalog = stored(facts())
    entries = {name: evolve(entry, strides=(1, entry.shape[0])) for name, entry in catalog.entries.items()}
    weights = weigh(facts(), evolve(catalog, entries=entries), rigs.Plain, None, "float32", "cpu")
    assert (0, EMBED + 2 * UP) == (weights.mapped, weights.allocated)


def test_bytes_are_added_up_where_parameters_are() -> None:
    each = list(weigh_each(facts(), stored(facts()), rigs.Plain, None, "float32"))
    where = {"embed": "cuda:0", "head": "cuda:0", "layers.0.up": "cpu", "layers.1.up": "disk"}
    expected = {
        "cuda:0": Weights(mapped=0, allocated=EMBED, staging=EMBED),
        "cpu": Weights(mapped=UP, allocated=0, staging=0),
        "disk": Weights(mapped=0, allocated=UP, staging=UP),
    }
    assert expected == add_up(each, "cuda:0", where)


def test_what_is_streamed_stands_on_disk_and_in_slots_and_not_in_the_peak_of_loading() -> None:
    on_disk = Weights(mapped=0, allocated=700, staging=90)
    ledger = account(elsewhere={"disk": on_disk}, slots=400).draw(16, 1)
    assert {ON_DISK: 700} == {line.what: line.bytes for line in ledger if line.device == "disk" and line.moment == "run"}
    assert [1800, 1900] == [ledger.total(moment, "cpu") for moment in MOMENTS[:2]]
    assert 400 == lines(ledger, "run")[SLOTS]
    assert ("cpu", "disk") == ledger.devices


def test_pages_that_copies_replace_are_needed_where_no_copies_are_made() -> None:
    one = account(weights=Weights(mapped=1000, allocated=0, staging=0, copies=1100, replaced=900), facts=facts(layers=()))
    ledger, rest = one.draw(1, 1), activation_bytes(facts(layers=()), 1, 1, "float32")
    assert [100 + 1100 + rest, 1000 + rest, rest] == [
        ledger.peak("cpu", with_mapped=True),
        ledger.peak("cpu", with_mapped=True, with_copies=False),
        ledger.peak("cpu", with_mapped=False),
    ]


def test_what_a_device_needs_beside_weights_is_kept_for_it() -> None:
    one = account(device="cuda:0")
    (cache,), activations = (
        one.cache_places("cuda:0", 16, 1, facts().cached_layers).values(),
        activation_bytes(facts(), 1, 16, "float32"),
    )
    context = ledger_module.GPU_CONTEXT_BYTES
    assert [context + cache + activations, context + activations, 300, 0] == [
        one.reserve("cuda:0", 16, 1),
        one.reserve("cuda:1", 16, 1),
        one.reserve("cpu", 16, 1),
        one.reserve("disk", 16, 1),
    ]


def account(**changes: object) -> Account:
    usual = {
        "device": "cpu",
        "dtype": "float32",
        "facts": facts(),
        "weights": Weights(mapped=1000, allocated=500, staging=300),
        "cache": rigs.Plain,
        "cache_options": None,
    }
    return Account(**(usual | changes))  # type: ignore[arg-type]


def lines(ledger: Ledger, moment: str) -> dict[str, int]:
    return {line.what: line.bytes for line in ledger if line.moment == moment}


def test_the_lines_of_a_moment_add_up_to_what_is_needed_then() -> None:
    ledger = account().draw(context=256, batch=2)
    cache, activations = 2 * 2 * 4 * 16 * 2 * 256 * 4, activation_bytes(facts(), 2, 256, "float32")
    assert {MAPPED: 1000, WEIGHTS: 500, STAGING: 300} == lines(ledger, "load_peak")
    assert {MAPPED: 1000, WEIGHTS: 500} == lines(ledger, "steady")
    assert {MAPPED: 1000, WEIGHTS: 500, CACHE: cache, ACTIVATIONS: activations} == lines(ledger, "run")
    assert [1800, 1500, 1500 + cache + activations] == [ledger.total(moment, "cpu") for moment in MOMENTS]
    assert (1500 + cache + activations, 500 + cache + activations) == (
        ledger.peak("cpu", with_mapped=True),
        ledger.peak("cpu", with_mapped=False),
    )
    assert {STAGING, ACTIVATIONS} == {line.what for line in ledger if not line.exact}


def test_on_a_gpu_conversion_happens_in_main_memory_and_cuda_takes_its_share() -> None:
    ledger = account(device="cuda:0", weights=Weights(mapped=0, allocated=500, staging=300)).draw(16, 1)
    assert ("cuda:0", "cpu") == ledger.devices
    assert 300 == ledger.total("load_peak", "cpu")
    assert GPU_CONTEXT in lines(ledger, "steady")


def test_a_model_without_layers_that_keep_anything_needs_no_cache() -> None:
    assert 2 * 4 * 16 * 10 * 4 == account(facts=facts(spec())).cache_places("cpu", 10, 1, (spec(),))["cpu"]
    assert {} == account(facts=facts(layers=())).cache_places("cpu", 10, 1, ())


class Elsewhere(rigs.Plain):
    @staticmethod
    def places(layers: object, batch: int, context: int, dtype: str, options: object, device: str) -> dict[str, int]:
        return {"disk": 700} if device == "cpu" else {"cpu": 700, device: 30}


def test_a_cache_counts_where_its_planner_says_that_it_lies() -> None:
    on_cpu = account(cache=Elsewhere).draw(16, 1)
    assert ("cpu", "disk") == on_cpu.devices
    assert (700, 0) == (on_cpu.bytes_of(CACHE_ON_DISK, "disk", "run"), on_cpu.bytes_of(CACHE, "cpu", "run"))
    usual = account().draw(16, 1)
    assert usual.total("run", "cpu") - usual.bytes_of(CACHE, "cpu", "run") == on_cpu.total("run", "cpu")
    on_gpu = account(cache=Elsewhere, device="cuda:0", weights=Weights(mapped=0, allocated=500, staging=300))
    ledger = on_gpu.draw(16, 1)
    assert (700, 30) == (ledger.bytes_of(CACHE, "cpu", "run"), ledger.bytes_of(CACHE, "cuda:0", "run"))
    assert 700 == on_gpu.reserve("cpu", 16, 1)
    assert 700 == account(cache=Elsewhere).reserve("disk", 16, 1)


def test_prompts_run_in_the_parts_that_the_estimate_assumes() -> None:
    from modelrig.generation.feeding import PREFILL_CHUNK

    assert PREFILL_CHUNK == PREFILL_TOKENS


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding", "quantized", "offloaded"])
def test_the_predicted_bytes_are_those_the_loaded_model_measures(llama_folder: Path, dtype: str, cache: str) -> None:
    import torch

    import modelrig

    plan = modelrig.plan(llama_folder, dtype=dtype, cache=cache, batch=2, device_map="cpu")
    predicted = lines(plan.ledger, "run")
    with plan.load() as model:
        assert predicted.get(MAPPED, 0) + predicted.get(WEIGHTS, 0) == sum(
            p.nbytes for p in {id(p): p for p in model.module.parameters()}.values()
        )
        assert predicted.get(MAPPED, 0) == model.load_report.mapped_bytes
        held = model.new_cache(batch=2)
        model(torch.zeros(2, plan.context, dtype=torch.int64), cache=held)
        assert predicted[CACHE_ON_DISK if cache == "offloaded" else CACHE] == held.nbytes
