"""Compiled steps equal eager ones, for every family; what was compiled serves other lengths, calls and processes."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelrig
from checkpoints import assert_close, tokens, write_bert, write_decoder, write_llama
from modelrig.errors import LoadError, PlanError, PluginError
from modelrig_plugins.compilers.inductor import InductorOptions
from modelrig_plugins.compilers.inductor_module import InductorCompiler

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

#: family → (config, attention, cache)
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "Llama": ({}, "sdpa", "static"),
    "Mistral": ({"sliding_window": 7}, "sdpa", "sliding"),
    "Gemma3Text": (
        {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "head_dim": 10},
        "sdpa",
        "sliding",
    ),
    "Mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, "sdpa", "static"),
    "GPT2": ({}, "eager", "static"),
    "GPTNeoX": ({}, "sdpa", "static"),
    "Gemma2": ({"sliding_window": 7, "head_dim": 10}, "eager", "static"),
    "Phi3": ({}, "sdpa", "sliding"),
}
#: the others are compiled by `make test-long`
SHORT = ("Llama", "Mixtral")
KINDS = {"Gemma3Text": 2, "Gemma2": 2}  # of blocks, where there are several
COMPILED = {"compiler": "inductor"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in made.items():
        write_decoder(folder, family, **FAMILIES[family][0])
    return made


def feed(step: Any, cache: Any, ids: torch.Tensor, width: int) -> torch.Tensor:
    """Logits of `ids` [batch, n], `width` tokens a step."""
    logits = []
    with torch.no_grad():
        for part in ids.split(width, dim=1):
            logits.append(step(part, cache.begin(part.shape[1])))
            cache.commit(part.shape[1])
    return torch.cat(logits, dim=1)


def both(folder: Path, **request: Any) -> tuple[modelrig.Model, modelrig.Model]:
    """The same model, eager and compiled."""
    compiler = request.pop("compiler", "inductor")
    return modelrig.load(folder, **request), modelrig.load(folder, compiler=compiler, **request)


def assert_equal_steps(
    eager: modelrig.Model, compiled: modelrig.Model, width: int, steps: int, padding: list[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt, steps, and the steps again after a rewind; returns the logits of the steps."""
    batch = 1 if padding is None else len(padding)
    ids = tokens(batch, 6 + width * steps)
    caches = [model.new_cache(batch=batch, padding=padding) for model in (eager, compiled)]
    with torch.no_grad():
        for cache in caches:
            eager.step(ids[:, :6], cache.begin(6), True)
            cache.commit(6)
    expected, actual = (feed(model.step, cache, ids[:, 6:], width) for model, cache in zip((eager, compiled), caches, strict=True))
    held = caches[1]
    held.rewind(held.length - 2 * width)
    again = feed(compiled.step, held, ids[:, -2 * width :], width)
    assert torch.equal(actual[:, -2 * width :], again)
    held.reset(padding)
    with torch.no_grad():
        compiled.step(ids[:, :6], held.begin(6), True)
        held.commit(6)
    assert torch.equal(actual, feed(compiled.step, held, ids[:, 6:], width))
    return expected, actual


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family in SHORT else [pytest.mark.long]) for family in FAMILIES]
)
def test_every_family_computes_what_it_computes_eagerly(folders: dict[str, Path], family: str) -> None:
    _, attention, cache = FAMILIES[family]
    eager, compiled = both(folders[family], attention=attention, cache=cache, context=120)
    assert_close(*assert_equal_steps(eager, compiled, 1, 30))
    graphs = compiled.step.compiled + compiled.step.loaded
    assert KINDS.get(family, 1) == graphs
    prompt = tokens(1, 9)[0].tolist()
    expected, actual = (model.generate(prompt, max_new_tokens=40, ignore_eos=True) for model in (eager, compiled))
    assert expected.tokens == actual.tokens
    assert graphs == compiled.step.compiled + compiled.step.loaded


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_rows_of_a_padded_batch_too(folders: dict[str, Path], family: str) -> None:
    _, attention, cache = FAMILIES[family]
    eager, compiled = both(folders[family], attention=attention, cache=cache, context=120)
    assert_close(*assert_equal_steps(eager, compiled, 1, 30, padding=[0, 3]))


def test_steps_that_verify_drafts_too(folders: dict[str, Path]) -> None:
    eager, compiled = both(folders["Mistral"], attention="sdpa", cache="sliding", context=120)
    assert_close(*assert_equal_steps(eager, compiled, 4, 12))
    assert {4} <= set(compiled.step.widths)


def test_bfloat16_within_its_rounding(tmp_path: Path) -> None:
    write_llama(tmp_path, dtype="bfloat16")
    eager, compiled = both(tmp_path, context=120, cache="static")
    rounded = assert_equal_steps(eager, compiled, 1, 30)
    exact = modelrig.load(tmp_path, context=120, cache="static", dtype="float32")
    expected, _ = assert_equal_steps(exact, exact, 1, 30)
    eagerly, actual = ((expected - one.float()).abs().max() for one in rounded)
    assert actual <= 1.5 * eagerly


@pytest.mark.long
def test_the_whole_step_as_one_graph(folders: dict[str, Path]) -> None:
    request = {"attention": "sdpa", "cache": "sliding", "context": 120, "compiler": {"name": "inductor", "scope": "step"}}
    eager, compiled = both(folders["Gemma3Text"], **request)
    assert_close(*assert_equal_steps(eager, compiled, 1, 30))
    assert 1 == compiled.step.compiled + compiled.step.loaded


# ------------------------------------------------------------------------------------------------ what is compiled, and when


def test_prompts_of_any_length_and_further_calls_compile_nothing(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="modelrig.compiler")
    model = modelrig.load(folders["Llama"], **COMPILED, context=150)
    model.generate([1, 2, 3], max_new_tokens=5)
    first = model.step.compiled + model.step.loaded
    assert 1 == first == len(caplog.records)
    for length in (1, 2, 4, 8, 16, 17, 33, 100):
        model.generate(tokens(1, length)[0].tolist(), max_new_tokens=20, ignore_eos=True)
        model(tokens(1, length))
    session = model.session()
    for turn in ([5, 6, 7], [8]):
        session.generate(turn, max_new_tokens=4)
    assert first == model.step.compiled + model.step.loaded == len(caplog.records)
    assert "1 x 1 tokens" in caplog.text


def test_lengths_that_are_rounded_up_to_one_bucket_share_a_graph(folders: dict[str, Path]) -> None:
    """The longest of the bucket too, which has no padding."""
    eager, compiled = both(folders["Llama"], cache="static")
    made = None
    for count in (5, 1, 15, 16, 9):
        prompt = tokens(1, count, seed=count)[0].tolist()
        found = compiled.generate(prompt, max_new_tokens=6, pad_to_multiple_of=16)
        assert eager.generate(prompt, max_new_tokens=6).tokens == found.tokens
        assert made in (None, (compiled.step.compiled, compiled.step.loaded))
        made = (compiled.step.compiled, compiled.step.loaded)
    assert made is not None and sum(made) == 1


def test_a_text_that_outgrows_a_window_needs_no_graph_of_its_own(folders: dict[str, Path]) -> None:
    """Prompts below, at and above the window of 7, each decoded far beyond it."""
    eager, compiled = both(folders["Mistral"], cache="sliding")
    made = None
    for count in (3, 7, 20):
        prompt = tokens(1, count, seed=count)[0].tolist()
        assert eager.generate(prompt, max_new_tokens=90).tokens == compiled.generate(prompt, max_new_tokens=90).tokens
        assert made in (None, compiled.step.compiled + compiled.step.loaded)
        made = compiled.step.compiled + compiled.step.loaded


def test_a_larger_cache_compiles_nothing(folders: dict[str, Path]) -> None:
    model = modelrig.load(folders["Llama"], **COMPILED)
    feed(model.step, model.new_cache(max_len=20), tokens(1, 20), 1)
    first = model.step.compiled + model.step.loaded
    feed(model.step, model.new_cache(max_len=160), tokens(1, 160), 1)
    assert first == model.step.compiled + model.step.loaded == 1


SECOND = """
import json, sys, time
import modelrig
model = modelrig.load(sys.argv[1], compiler="inductor", attention="sdpa", cache="static", context=120)
made = model.generate([1, 2, 3], max_new_tokens=8, ignore_eos=True)
heavy = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
print(json.dumps([model.step.compiled, model.step.loaded, heavy, made.tokens]))
"""


def test_a_second_process_loads_what_the_first_compiled_and_imports_no_dynamo(folders: dict[str, Path]) -> None:
    folder = folders["Llama"]
    expected = modelrig.load(folder, cache="static").generate([1, 2, 3], max_new_tokens=8, ignore_eos=True).tokens
    for _ in range(2):  # two like each other: tests before this one may have changed how many threads there are
        done = subprocess.run(
            [sys.executable, "-c", SECOND, str(folder)], capture_output=True, text=True, check=True, env={**os.environ}
        )
    assert [0, 1, [], list(expected)] == json.loads(done.stdout)


def test_a_copy_of_the_module_runs_its_own_blocks(folders: dict[str, Path]) -> None:
    model = modelrig.load(folders["Llama"], **COMPILED)
    copied = copy.deepcopy(model.module)
    ids = tokens(1, 5)
    with torch.no_grad():
        expected = model.step(ids, model.new_cache().begin(5))
        assert torch.equal(expected, copied.step(ids, model.new_cache().begin(5)))


def test_a_cache_of_someone_else_says_where_things_go(folders: dict[str, Path]) -> None:
    class Odd:
        def update(self, k: Any, v: Any, slots: Any) -> Any:
            return k, v

    model = modelrig.load(folders["Llama"], **COMPILED)
    cache = model.new_cache()
    cache.begin(3)
    cache.commit(3)
    slots = cache.begin(1)
    slots.layers = [Odd()] * 3
    with pytest.raises(PluginError, match=r"PL-CONTRACT.*place"):
        model.step(tokens(1, 1), slots)


def test_a_module_without_blocks_is_refused_for_the_scope_block() -> None:
    module = nn.Linear(2, 2)
    module.step = module.forward  # type: ignore[assignment]
    with pytest.raises(LoadError, match=r"LD-COMPILE.*Blocks"):
        InductorCompiler.compile(module, InductorOptions("block"))
    InductorCompiler.compile(module, InductorOptions("step"))


# ------------------------------------------------------------------------------------------------ planning


def refusals(folder: Path, **request: Any) -> Iterator[str]:
    with pytest.raises(PlanError) as caught:
        modelrig.plan(folder, compiler=request.pop("compiler", "inductor"), **request)
    for rows in caught.value.refused.values():
        for reasons in rows.values():
            yield from (reason.code for reason in reasons)


def test_a_plan_takes_a_cache_whose_buffers_stay_where_they_are(llama_folder: Path) -> None:
    plan = modelrig.plan(llama_folder, **COMPILED)
    assert ("static", InductorOptions("block")) == (plan.choices["caches"].name, plan.choices["compilers"].options)
    assert "compiler.link.cache" in refusals(llama_folder, cache="dynamic")
    assert "compiler.link.attention" in refusals(llama_folder, attention="flex")


def test_without_a_compiler_the_plan_says_so(llama_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "compiler.cxx" in refusals(llama_folder)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert "compiler.cxx" in refusals(llama_folder)


def test_other_reasons_of_a_refusal(llama_folder: Path, tmp_path: Path) -> None:
    assert "compiler.scope" in refusals(llama_folder, compiler={"name": "inductor", "scope": "all"})
    assert "compiler.streams" in refusals(llama_folder, device_map="disk")
    write_bert(tmp_path)
    assert "compiler.generates" in refusals(tmp_path)
