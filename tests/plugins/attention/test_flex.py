"""flex_attention: few graphs for many lengths, one function for all layers, the same tokens as eager, refusals with reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from torch._dynamo.utils import counters

import modelrig
from attention_reference import inputs, reference, visibility
from checkpoints import write_bert, write_decoder, write_llama
from modelrig.components import AttentionSpec
from modelrig.errors import PlanError, PluginError
from modelrig.planning.environment import find_lack_of_cpp, read_environment
from modelrig.planning.needs import attention_need
from modelrig.planning.pipeline import make_plan
from modelrig.planning.probes import Finding
from modelrig_plugins.attention import flex_module
from modelrig_plugins.attention.flex import FlexPlanner
from modelrig_plugins.attention.flex_module import FIRST_SLOTS, FlexAttention, fixed
from rigs import gpu, machine, situation

HERE = read_environment()
compiles = pytest.mark.skipif(
    HERE.lacks_cpp is not None or "avx2" not in HERE.cpu_flags, reason="needs a C++ compiler and a CPU with avx2"
)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@compiles
def test_hundreds_of_steps_and_prompts_of_any_length_share_few_graphs(tmp_path: Path) -> None:
    write_llama(tmp_path, num_hidden_layers=2, max_position_embeddings=700)
    with modelrig.load(tmp_path, attention="flex", context=700) as model:
        before = graphs()
        first = model.generate([list(range(5, 19))], max_new_tokens=420, ignore_eos=True)
        made = graphs() - before
        assert made <= 4  # a prompt, a token, and either where the buffer is exactly full
        for count in (14, 15, 90, 33):
            model.generate([list(range(5, 5 + count))], max_new_tokens=40, ignore_eos=True)
        assert first[0].tokens == model.generate([list(range(5, 19))], max_new_tokens=420, ignore_eos=True)[0].tokens
        assert graphs() - before == made


@compiles
def test_layers_with_and_without_windows_and_other_models_of_the_same_shape_share_graphs() -> None:
    kernel, calls = FlexAttention(), []
    for number, layer in enumerate((AttentionSpec(4, 2, 16, 16, 0.3), AttentionSpec(4, 2, 16, 16, 0.7, window=4))):
        for another in (kernel, FlexAttention()):
            for past, count in ((9, 5), (9, 1), (11, 3), (700, 1)):
                visible = visibility(past, count, None, layer.window)
                q, k, v = inputs(layer, visible)
                actual = another.attend(q, k, v, another.prepare(layer, visible), layer)
                torch.testing.assert_close(reference(q, k, v, visible, layer), actual.double(), rtol=1e-4, atol=1e-5)
        calls.append((number, graphs()))
    assert calls[0][1] == calls[1][1]


@compiles
@pytest.mark.long
@pytest.mark.parametrize(("family", "cache"), [("Mistral", "dynamic"), ("Gemma2", "static"), ("Mistral", "sliding")])
def test_models_generate_what_they_do_with_eager(tmp_path: Path, family: str, cache: str) -> None:
    heads = {"head_dim": 8} if family == "Gemma2" else {}
    write_decoder(tmp_path, family, num_hidden_layers=2, sliding_window=6, **heads)
    prompts = [list(range(5, 19)), [7, 8, 9], list(range(40, 49))]
    found = []
    for attention in ("eager", "flex"):
        options: dict[str, Any] = {"cache": {"name": cache, "headroom": 3}} if cache == "sliding" else {"cache": cache}
        with modelrig.load(tmp_path, attention=attention, dtype="float32", **options) as model:
            together = model.generate(prompts, max_new_tokens=12, ignore_eos=True)
            held = model.new_cache(batch=1, max_len=40)
            chunks = [model(torch.tensor([part]), cache=held) for part in (prompts[0][:6], prompts[0][6:7], prompts[0][7:])]
            found.append(([one.tokens for one in together], torch.cat(chunks, dim=1)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)


@compiles
@pytest.mark.long
def test_padded_encoders_give_what_they_do_with_eager(tmp_path: Path) -> None:
    write_bert(tmp_path, num_hidden_layers=1)
    ids, mask = torch.arange(2 * 7).view(2, 7), torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    found = []
    for attention in ("eager", "flex"):
        with modelrig.load(tmp_path, attention=attention, dtype="float32") as model:
            found.append(model(ids, attention_mask=mask)[mask.bool()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@compiles
def test_it_is_part_of_a_step_that_is_compiled_as_a_whole(tmp_path: Path) -> None:
    write_decoder(tmp_path, "Gemma2", num_hidden_layers=2, sliding_window=6, head_dim=8)  # with a window, and a cap
    torch._dynamo.reset()
    batch, padding = 2, [0, 3]
    with modelrig.load(tmp_path, cache="static", attention="flex") as model, torch.no_grad():
        step = torch.compile(model.step, fullgraph=True, dynamic=False)
        caches = [model.new_cache(batch=batch, max_len=40, padding=padding) for _ in range(2)]
        for cache in caches:
            model.step(torch.arange(batch * 9).view(batch, 9), cache.begin(9))
            cache.commit(9)
        before = graphs()
        for number in range(5):
            ids = torch.full((batch, 1), number)
            eager, traced = (run(ids, cache.begin(1)) for run, cache in zip((model.step, step), caches, strict=True))
            for cache in caches:
                cache.commit(1)
            torch.testing.assert_close(eager, traced, rtol=1e-4, atol=1e-4)
        assert graphs() - before <= 2  # the step, and the kernel of the one that is not compiled
    torch._dynamo.reset()


@compiles
def test_more_slots_than_the_tables_have_at_first() -> None:
    layer, visible = AttentionSpec(2, 1, 8, 8, 0.3), visibility(FIRST_SLOTS + 5, 1)
    q, k, v = inputs(layer, visible, batch=2)
    kernel = FlexAttention()
    actual = kernel.attend(q, k, v, kernel.prepare(layer, visible), layer)
    torch.testing.assert_close(reference(q, k, v, visible, layer), actual.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("count", "size"), [(1, 64), (64, 64), (65, 128), (129, 256)])
def test_tables_double(count: int, size: int) -> None:
    table = fixed(torch.arange(count), 64)
    assert (size, list(range(count))) == (len(table), table[:count].tolist())


def test_what_torch_cannot_compile_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    monkeypatch.setattr(flex_module, "compiled", lambda: fails)
    kernel, layer, visible = FlexAttention(), AttentionSpec(2, 1, 8, 8, 0.3), visibility(0, 3)
    with pytest.raises(PluginError, match=r"could not compile flex_attention for this step: .*no compiler") as caught:
        kernel.attend(*inputs(layer, visible), kernel.prepare(layer, visible), layer)
    assert "PL-KERNEL" == caught.value.code


# ------------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"lacks_cpp": "there is no C++ compiler 'g++'"}, "attention.compiler", "there is no C[+][+] compiler 'g[+][+]'"),
        ({"cpu_flags": frozenset({"sse2"})}, "attention.cpu_flags", "needs a CPU with the flag avx2"),
    ],
)
def test_a_machine_on_which_it_cannot_be_compiled_is_refused_when_planning(
    llama_folder: Path, changes: dict[str, Any], code: str, says: str
) -> None:
    environment = machine(**({"cpu_flags": frozenset({"avx2"})} | changes))
    with pytest.raises(PlanError, match=says) as caught:
        make_plan(llama_folder, attention="flex", environment=environment)
    assert f"[{code}]" in str(caught.value)


def test_a_plan_says_that_it_compiles_and_auto_takes_another(llama_folder: Path) -> None:
    able = machine(cpu_flags=frozenset({"avx2"}))
    assert any("is compiled at its first use" in note for note in make_plan(llama_folder, attention="flex", environment=able).notes)
    assert "sdpa" == make_plan(llama_folder, environment=able).choices["attention"].name


def test_on_a_gpu_a_trial_decides_and_without_one_it_is_unverified() -> None:
    need = attention_need(situation(device="cuda:0", gpus=(gpu(),)))
    assert [] == list(FlexPlanner.check(need, None))
    assert any("unverified" in note for note in FlexPlanner.notes(need, None))
    failing = evolve(need, probe=lambda probe: Finding({"error": "InductorError: out of resource"}))
    (reason,) = FlexPlanner.check(failing, None)
    assert ("attention.probe", True) == (reason.code, "a trial on H200 failed: InductorError" in reason.text)


def test_a_compiler_is_looked_for_as_torch_does(tmp_path: Path) -> None:
    assert find_lack_of_cpp({"PATH": str(tmp_path)}) == "there is no C++ compiler 'g++'"
    assert find_lack_of_cpp({"PATH": str(tmp_path), "CXX": "no-such-c++"}) == "there is no C++ compiler 'no-such-c++'"
    (tmp_path / "my-c++").touch(mode=0o755)
    found = find_lack_of_cpp({"PATH": str(tmp_path), "CXX": "my-c++"})
    assert found is None or "headers" in found
