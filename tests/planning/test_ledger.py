from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

import rigs
from modelrig.components import Catalog, ModelFacts, Parameter, TensorEntry, TensorFile, TensorSpec
from modelrig.planning import ledger as ledger_module
from modelrig.planning.ledger import (
    ACTIVATIONS,
    CACHE,
    GPU_CONTEXT,
    MAPPED,
    MOMENTS,
    PIECE_BYTES,
    PREFILL_TOKENS,
    STAGING,
    WEIGHTS,
    Account,
    Ledger,
    Weights,
    activation_bytes,
    weigh,
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
    assert 2 * 4 * 16 * 10 * 4 == account(facts=facts(spec())).cache_bytes(context=10, batch=1)
    assert 0 == account(facts=facts(layers=())).cache_bytes(context=10, batch=1)


def test_prompts_run_in_the_parts_that_the_estimate_assumes() -> None:
    from modelrig.generation.loop import PREFILL_CHUNK

    assert PREFILL_CHUNK == PREFILL_TOKENS


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
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
        assert predicted[CACHE] == held.nbytes
