"""torch's kernels: only those that are permitted run, which one is in the plan, and none is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve

import modelrig
from modelrig.components import AttentionSpec
from modelrig.errors import PlanError, PluginError, RequestError
from modelrig.modules.slots import Visibility
from modelrig.planning.needs import attention_need
from modelrig.planning.pipeline import make_plan
from modelrig.planning.probes import Finding, run
from modelrig_plugins.attention import sdpa_module
from modelrig_plugins.attention.eager import EagerAttention
from modelrig_plugins.attention.probing import attention_probe
from modelrig_plugins.attention.sdpa import SdpaOptions, SdpaPlanner
from modelrig_plugins.attention.sdpa_module import Lowered, SdpaAttention
from rigs import gpu, machine, situation

MATH, FLASH = "_scaled_dot_product_attention_math", "_scaled_dot_product_flash_attention_for_cpu"


def calls(kernel: SdpaAttention, spec: AttentionSpec, visible: Visibility, dtype: torch.dtype = torch.float32) -> set[str]:
    """Names of torch's attention kernels that one call runs."""
    torch.manual_seed(0)
    count, slots = visible.query_index.shape[0], visible.key_index.shape[0]
    q = torch.randn(2, spec.num_heads, count, spec.head_dim).to(dtype)
    k = torch.randn(2, spec.num_key_value_heads, slots, spec.head_dim).to(dtype)
    v = torch.randn(2, spec.num_key_value_heads, slots, spec.value_dim).to(dtype)
    eager = EagerAttention()
    expected = eager.attend(q, k, v, eager.prepare(spec, visible), spec)
    with torch.no_grad(), torch.profiler.profile() as profile:
        actual = kernel.attend(q, k, v, kernel.prepare(spec, visible), spec)
    torch.testing.assert_close(expected, actual, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-5)
    return {event.name.removeprefix("aten::") for event in profile.events()} & {MATH, FLASH}


def visible(past: int, count: int, starts: list[int] | None = None, window: int | None = None) -> Visibility:
    start = None if starts is None else torch.tensor(starts)
    return Visibility(torch.arange(past, past + count), torch.arange(past + count), start, window, True, past)


@pytest.mark.filterwarnings("ignore")  # of the profiler
@pytest.mark.parametrize(
    ("kernels", "expected"),
    [(("flash", "efficient", "cudnn"), FLASH), (("flash",), FLASH), (("math",), MATH), (("math", "flash"), FLASH)],
)
@pytest.mark.parametrize("dims", [(16, 16), (12, 20), (20, 12), (1, 1)])
@pytest.mark.parametrize("seen", [visible(0, 7), visible(9, 1), visible(9, 3, [0, 4]), visible(9, 4, None, 5)])
def test_only_what_is_permitted_runs(kernels: tuple[str, ...], expected: str, dims: tuple[int, int], seen: Visibility) -> None:
    kernel = SdpaAttention(SdpaOptions(kernels))
    spec = AttentionSpec(4, 2, *dims, 0.3, window=seen.window)
    for _ in range(2):  # found out, and known
        assert {expected} == calls(kernel, spec, seen)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_on_cpu_flash_takes_every_dtype(dtype: torch.dtype) -> None:
    assert {FLASH} == calls(SdpaAttention(), AttentionSpec(4, 2, 17, 17, 0.3), visible(9, 3, [0, 4]), dtype)


@pytest.mark.filterwarnings("ignore")
def test_where_no_permitted_kernel_is_left_that_is_an_error_and_no_silent_fallback() -> None:
    spec = AttentionSpec(4, 2, 16, 16, 0.3)
    q, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16)
    k = torch.randn(2, 2, 16, 3).transpose(2, 3)  # not dense along the last axis
    for kernels, repeats in (("flash", True), ("flash,math", False)):  # flash with a dense copy
        permitted = SdpaAttention(SdpaOptions(kernels))
        permitted.attend(q, k, v, permitted.prepare(spec, visible(0, 3)), spec)
        assert repeats == permitted.prepare(spec, visible(0, 3)).way.repeats
    kernel = SdpaAttention(SdpaOptions("efficient,cudnn"))  # as on a machine that is not the one planned for
    with pytest.raises(PluginError, match=r"none of torch's kernels efficient, cudnn computes q \[2, 4, 3, 16\]") as caught:
        kernel.attend(q, k, v, kernel.prepare(spec, visible(0, 3)), spec)
    assert "PL-KERNEL" == caught.value.code
    assert "attention.kernels=efficient,cudnn,flash,math" in (caught.value.hint or "")


def test_the_choice_is_looked_at_once_for_each_form_of_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Lowered] = []
    original = SdpaAttention._look
    monkeypatch.setattr(SdpaAttention, "_look", lambda self, *args: (looks.append(args[3]), original(self, *args))[1])
    monkeypatch.setattr(sdpa_module, "sdpa_kernel", None)  # no call enters a block that forbids kernels
    kernel, spec = SdpaAttention(), AttentionSpec(4, 2, 16, 16, 0.3)
    for step in range(5):
        for seen in (visible(0, 4), visible(9 + step, 1), visible(9 + step, 1, [0, 3])):
            q = torch.randn(2, 4, seen.query_index.shape[0], 16)
            k = torch.randn(2, 2, seen.key_index.shape[0], 16)
            kernel.attend(q, k, k, kernel.prepare(spec, seen), spec)
    assert 3 == len(looks)


def test_kernels_without_grouped_heads_get_keys_for_each_query_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where `efficient` takes masks but no grouped heads, and `flash` the reverse."""

    def choice(self: Any, q: Any, k: Any, v: Any, mask: Lowered, spec: Any, is_restricted: bool, grouped: bool) -> str:
        return ("math" if grouped else "efficient") if mask.mask is not None else "flash"

    monkeypatch.setattr(SdpaAttention, "_choice", choice)
    kernel, eager, spec = SdpaAttention(), EagerAttention(), AttentionSpec(4, 2, 16, 16, 0.3)
    for seen, repeats in ((visible(0, 4), False), (visible(0, 4, [0, 3]), True)):
        q, k = torch.randn(2, 4, 4, 16), torch.randn(2, 2, 4, 16)
        actual = kernel.attend(q, k, k, kernel.prepare(spec, seen), spec)
        assert repeats == kernel.prepare(spec, seen).way.repeats
        torch.testing.assert_close(eager.attend(q, k, k, eager.prepare(spec, seen), spec), actual)


# ------------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize(
    ("written", "runs"),
    [("flash,efficient", ["flash"]), (["math"], ["math"]), ("math", ["math"]), (["efficient", "math", "flash"], ["flash"])],
)
def test_the_plan_names_the_kernel_that_runs_on_cpu(llama_folder: Path, written: object, runs: list[str]) -> None:
    plan = make_plan(llama_folder, attention={"name": "sdpa", "kernels": written})
    assert {"kernels": runs} == json.loads(json.dumps(plan.to_json()))["choices"]["attention"]["options"]
    assert f"sdpa (kernels={runs[0]})" in plan.explain()
    assert not any("attention" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("efficient,cudnn", "none of the kernels efficient, cudnn runs on cpu; flash and math do"),
        ("flsh", "there is no kernel 'flsh'; did you mean 'flash'?"),
        ([], "a list of flash, efficient, math, cudnn is accepted"),
        (3, "kernels 3: a list"),
        ([1], r"kernels \[1\]: a list"),
    ],
)
def test_kernels_that_cannot_be_are_refused_when_planning(llama_folder: Path, written: object, says: str) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        make_plan(llama_folder, attention={"name": "sdpa", "kernels": written})
    assert "[attention.kernels]" in str(caught.value)


def test_an_unknown_option_is_an_error_with_the_nearest(llama_folder: Path) -> None:
    with pytest.raises(RequestError, match="did you mean 'kernels'"):
        make_plan(llama_folder, attention={"name": "sdpa", "kernel": "math"})


def test_on_a_gpu_the_kernel_is_unverified_unless_it_was_tried(llama_folder: Path) -> None:
    plan = make_plan(llama_folder, environment=machine(8 << 30, gpu()))
    (note,) = [note for note in plan.notes if note.startswith("attention sdpa: ")]
    assert "which of the kernels flash, efficient, cudnn runs is unverified" in note
    need = attention_need(situation(device="cuda:0", gpus=(gpu(),)))
    tried = {"error": None, "kernels": {"a prompt": "flash", "a padded prompt": "cudnn"}}
    need = evolve(need, probe=lambda probe: Finding(tried))
    (said,) = SdpaPlanner.notes(need, SdpaOptions())
    assert "a trial on H200 computed a prompt by flash; a padded prompt by cudnn" == said
    assert [] == list(SdpaPlanner.check(need, SdpaOptions()))
    failing = evolve(need, probe=lambda probe: Finding({"error": "PluginError: none"}))
    assert ["attention.probe"] == [reason.code for reason in SdpaPlanner.check(failing, SdpaOptions())]
    crashed = evolve(need, probe=lambda probe: Finding(None, "a probe ended with signal 9"))
    assert "unverified (a probe ended with signal 9)" in next(iter(SdpaPlanner.notes(crashed, SdpaOptions())))


def test_math_alone_generates_what_flash_does(llama_folder: Path) -> None:
    tokens = []
    for kernels in ("flash", "math"):
        model = modelrig.load(llama_folder, attention={"name": "sdpa", "kernels": kernels})
        found = model.generate([[5, 6, 7], [8, 9]], max_new_tokens=8, ignore_eos=True)
        tokens.append([one.tokens for one in found])
    assert tokens[0] == tokens[1]


def test_the_trial_itself_runs_in_a_child_process() -> None:
    layers = (AttentionSpec(4, 2, 16, 16, 0.3, window=8), AttentionSpec(4, 2, 12, 20, 0.3))
    need = attention_need(situation(*layers))
    tried = run(attention_probe("sdpa", need, {"kernels": ["flash"]}, packages=("torch",)))
    assert tried.found is not None
    assert (None, {"flash"}) == (tried.found["error"], set(tried.found["kernels"].values()))
    assert torch.__version__ == tried.found["versions"]["torch"]
    failed = run(attention_probe("sdpa", need, {"kernels": ["efficient"]}, packages=("torch",)))
    assert "PL-KERNEL" in (failed.found or {})["error"]


@pytest.mark.parametrize("kernels", ["flash", "math"])
def test_a_compiled_block_takes_masks_that_were_made_outside_of_it(kernels: str) -> None:
    kernel, eager, spec = SdpaAttention(SdpaOptions(kernels)), EagerAttention(), AttentionSpec(4, 2, 16, 16, 0.3)
    attend = torch.compile(lambda q, k, v, mask: kernel.attend(q, k, v, mask, spec) * 1.0, fullgraph=True, backend="eager")
    with torch.no_grad():
        for seen in (visible(0, 4), visible(0, 4, [0, 3])):
            q, k = torch.randn(2, 4, 4, 16), torch.randn(2, 2, 4, 16)
            expected = eager.attend(q, k, k, eager.prepare(spec, seen), spec)
            torch.testing.assert_close(expected, attend(q, k, k, kernel.prepare(spec, seen)))
    torch._dynamo.reset()
