"""Every registered attention backend against a float64 computation, over the masks and head layouts it declares."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modelrig.components import AttentionSpec
from modelrig.modules.slots import Visibility
from modelrig.registry import current

BACKENDS = ["sdpa", "eager"]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def reference(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, spec: AttentionSpec) -> Tensor:
    """Loops over rows, heads and queries in float64."""
    b, h, t, _ = q.shape
    out = torch.zeros(b, t, h, spec.value_dim, dtype=torch.float64)
    group = spec.num_heads // spec.num_key_value_heads
    for row in range(b):
        start = 0 if visible.starts is None else int(visible.starts[row])
        for head in range(h):
            for i, index in enumerate(visible.query_index.tolist()):
                seen = [
                    j
                    for j, key in enumerate(visible.key_index.tolist())
                    if key == index
                    or (key >= start and (key <= index or not spec.causal) and (spec.window is None or index - key < spec.window))
                ]
                scores = k[row, head // group, seen].double() @ q[row, head, i].double() * spec.scale
                if spec.softcap is not None:
                    scores = spec.softcap * torch.tanh(scores / spec.softcap)
                out[row, i, head] = torch.softmax(scores, 0) @ v[row, head // group, seen].double()
    return out.flatten(2)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"), [(6, 2, 10, 10), (3, 3, 17, 17), (4, 1, 64, 64), (4, 2, 12, 20)]
)
@pytest.mark.parametrize(("past", "count"), [(0, 9), (9, 1), (9, 5)])
@pytest.mark.parametrize("starts", [None, [0, 6, 2]])
def test_causal_attention(
    name: str,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    past: int,
    count: int,
    starts: list[int] | None,
    dtype: torch.dtype,
) -> None:
    spec = AttentionSpec(heads, kv_heads, dim, value_dim, 1 / math.sqrt(dim))
    check(name, spec, past, count, starts, dtype)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize(("past", "count"), [(0, 9), (9, 1), (9, 5)])
@pytest.mark.parametrize("starts", [None, [0, 6, 2]])
def test_sliding_windows(name: str, window: int, past: int, count: int, starts: list[int] | None) -> None:
    check(name, AttentionSpec(4, 2, 16, 16, 0.3, window=window), past, count, starts, torch.float32)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("starts", [None, [0, 6, 2]])
def test_bidirectional_attention(name: str, starts: list[int] | None) -> None:
    check(name, AttentionSpec(4, 2, 16, 16, 0.3, causal=False), 0, 9, starts, torch.float32)


@pytest.mark.parametrize("name", BACKENDS)
def test_soft_caps_where_declared(name: str) -> None:
    declared = current().find("attention", name).descriptor.capabilities.softcap
    if not declared:
        assert "sdpa" == name  # negotiation refuses it; see tests/planning
        return
    check(name, AttentionSpec(4, 2, 16, 16, 2.0, softcap=3.0), 3, 6, [0, 1, 2], torch.float32)


def check(name: str, spec: AttentionSpec, past: int, count: int, starts: list[int] | None, dtype: torch.dtype) -> None:
    torch.manual_seed(past + count)
    q = torch.randn(3, spec.num_heads, count, spec.head_dim).to(dtype)
    k = torch.randn(3, spec.num_key_value_heads, past + count, spec.head_dim).to(dtype)
    v = torch.randn(3, spec.num_key_value_heads, past + count, spec.value_dim).to(dtype)
    visible = Visibility(
        torch.arange(past, past + count),
        torch.arange(past + count),
        None if starts is None else torch.tensor(starts),
        spec.window,
        spec.causal,
        past,
    )
    kernel = current().find("attention", name).implementation()(None)
    for seen in (visible, visible._replace(past=None)):  # eager, and as a compiled step would lower it
        actual = kernel.attend(q, k, v, kernel.prepare(spec, seen), spec)
        expected = reference(q, k, v, visible, spec)
        assert expected.shape == actual.shape
        assert (expected - actual.double()).abs().max().item() <= BOUNDS[dtype] * v.abs().max().item()
