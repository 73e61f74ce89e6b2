"""The plain linear kernels: equal to `F.linear`, packed only when it pays, never stale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attrs import evolve

import modelrig
from checkpoints import write_llama
from modelrig.components import Parameter
from modelrig.errors import PlanError
from modelrig.planning.environment import read_environment
from modelrig.planning.pipeline import make_plan
from modelrig_plugins.quantizers.none import NoneOptions, NonePlanner
from modelrig_plugins.quantizers.none_module import PATIENCE, SPREAD, DenseLinear

packs = pytest.mark.skipif("avx512_bf16" not in read_environment().cpu_flags, reason="packing is for CPUs with avx512_bf16")


def weights(rows: int, columns: int, bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(rows)
    return torch.randn(rows, columns).bfloat16(), torch.randn(rows).bfloat16() if bias else None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(64, 48), (7, 35), (129, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_single_token_as_a_vector_is_the_product(rows: int, columns: int, bias: bool, dtype: torch.dtype) -> None:
    weight, offset = weights(rows, columns, bias)
    weight, offset = weight.to(dtype), None if offset is None else offset.to(dtype)
    linear = DenseLinear(NoneOptions("mv")).make_linear(weight, offset)
    x = torch.randn(columns).to(dtype)
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (exact - linear(x).double()).abs().max().item() <= bound * exact.abs().max().item()
    many = torch.randn(5, columns).to(dtype)
    torch.testing.assert_close(F.linear(many, weight, offset), linear(many))


@packs
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(64, 48), (7, 35), (129, 1), (256, 576)])
def test_packing_happens_after_some_tokens_and_stays_within_rounding(rows: int, columns: int, bias: bool) -> None:
    weight, offset = weights(rows, columns, bias)
    linear = DenseLinear(NoneOptions("packed")).make_linear(weight, offset)
    for step in range(PATIENCE + SPREAD + 2):
        x = torch.randn(1, columns).bfloat16()
        exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
        assert (exact - linear(x).double()).abs().max().item() <= 1e-2 * exact.abs().max().item()
        assert ("packed" if step >= PATIENCE + SPREAD else "linear") == linear.name_at(1)
    many = torch.randn(9, columns).bfloat16()
    torch.testing.assert_close(F.linear(many, weight, offset), linear(many), rtol=1e-2, atol=1e-2)


@packs
def test_prompts_alone_never_pack() -> None:
    weight, _ = weights(64, 48, False)
    linear = DenseLinear(NoneOptions("packed")).make_linear(weight, None)
    for _ in range(100):
        linear(torch.randn(40, 48).bfloat16())
    assert "linear" == linear.name_at(1)


@packs
def test_a_weight_that_was_written_to_is_used_as_it_is_now() -> None:
    weight, _ = weights(64, 48, False)
    linear = DenseLinear(NoneOptions("packed")).make_linear(weight, None)
    x = torch.randn(1, 48).bfloat16()
    for _ in range(PATIENCE + SPREAD + 2):
        linear(x)
    weight.mul_(3)
    torch.testing.assert_close(F.linear(x, weight), linear(x))


@packs
def test_without_room_nothing_is_packed() -> None:
    weight, _ = weights(64, 48, False)
    maker = DenseLinear(NoneOptions("packed"))
    linear = maker.make_linear(weight, None)
    maker.bytes = 1 << 60
    for _ in range(PATIENCE + SPREAD + 2):
        torch.testing.assert_close(F.linear(torch.ones(1, 48).bfloat16(), weight), linear(torch.ones(1, 48).bfloat16()))
    assert "linear" == linear.name_at(1)


@packs
def test_packed_weights_compute_what_the_mapped_ones_do_and_leave_the_parameters_alone(tmp_path: Path) -> None:
    write_llama(tmp_path, dtype="bfloat16")
    ids = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(0))
    with modelrig.load(tmp_path, set={"quantizer.kernel": "linear"}) as plain:
        expected = plain(ids)
        stored = {name: parameter.clone() for name, parameter in plain.module.state_dict().items()}
    with modelrig.load(tmp_path, set={"quantizer.kernel": "packed"}) as model:
        model.generate([3, 1, 4, 1, 5], max_new_tokens=90)
        assert {"packed"} == model.kernels().keys() == model.kernels(rows=7).keys()
        torch.testing.assert_close(expected, model(ids), rtol=0.05, atol=0.02 * expected.abs().max().item())
        for name, parameter in model.module.state_dict().items():
            assert torch.equal(stored[name], parameter)


def test_the_kernel_is_settled_by_the_cpu_when_planning(tmp_path: Path) -> None:
    write_llama(tmp_path, dtype="bfloat16")
    machine = read_environment()
    expected = {
        frozenset(): "mv",
        frozenset({"avx512f", "avx512_bf16"}): "linear",
        frozenset({"avx512_bf16", "amx_tile", "amx_bf16"}): "mv",
    }
    for flags, kernel in expected.items():
        plan = make_plan(tmp_path, environment=evolve(machine, cpu_flags=flags))
        assert kernel == plan.choices["quantizers"].options.kernel
        assert not [line for line in plan.ledger if "own layout" in line.what]
    packing = evolve(machine, cpu_flags=frozenset({"avx512f", "avx512_bf16"}))
    plan = make_plan(tmp_path, environment=packing, quantizer={"name": "none", "kernel": "packed"})
    assert [line for line in plan.ledger if "own layout" in line.what]
    in_float32 = make_plan(tmp_path, environment=evolve(machine, cpu_flags=frozenset({"avx512_bf16"})), dtype="float32")
    assert "mv" == in_float32.choices["quantizers"].options.kernel


@pytest.mark.parametrize(("kernel", "dtype"), [("fast", "bfloat16"), ("packed", "float32")])
def test_a_kernel_that_cannot_serve_is_refused_with_the_reason(tmp_path: Path, kernel: str, dtype: str) -> None:
    write_llama(tmp_path)
    with pytest.raises(PlanError, match=r"quantizer\.kernel"):
        make_plan(tmp_path, dtype=dtype, quantizer={"name": "none", "kernel": kernel})


def test_outputs_are_the_weight_itself() -> None:
    parameter = Parameter("a.weight", (3, 5), "linear", "a.weight")
    (spec,) = NonePlanner.outputs(parameter, "bfloat16", NoneOptions())
    assert ("", "bfloat16", (3, 5), 30) == (spec.suffix, spec.dtype, spec.shape, spec.nbytes)
