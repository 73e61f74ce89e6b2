"""What attention is, by loops over rows, heads and queries in float64, and inputs to compare kernels on."""

from __future__ import annotations

import torch
from torch import Tensor

from modelrig.components import AttentionSpec
from modelrig.modules.slots import Visibility

NOWHERE = 1 << 62  # what a cache says an empty slot holds


def reference(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, spec: AttentionSpec) -> Tensor:
    """float64 [batch, count, heads * value_dim] of the same inputs as a kernel's `attend`."""
    q, k, v = q.cpu(), k.cpu(), v.cpu()
    b, h, t, _ = q.shape
    out = torch.zeros(b, t, h, spec.value_dim, dtype=torch.float64)
    group = spec.num_heads // spec.num_key_value_heads
    for row in range(b):
        for i, index in enumerate(visible.query_index.tolist()):
            seen = [j for j, key in enumerate(visible.key_index.tolist()) if sees(visible, row, index, j, key)]
            for head in range(h):
                scores = k[row, head // group, seen].double() @ q[row, head, i].double() * spec.scale
                if spec.softcap is not None:
                    scores = spec.softcap * torch.tanh(scores / spec.softcap)
                out[row, i, head] = torch.softmax(scores, 0) @ v[row, head // group, seen].double()
    return out.flatten(2)


def sees(visible: Visibility, row: int, index: int, slot: int, key: int) -> bool:
    """Whether the query `index` of `row` looks at `slot`, which holds `key`: its definition, case by case."""
    if visible.seen_from is not None and index < int(visible.seen_from[slot]):
        return False
    if visible.seen_until is not None and index >= int(visible.seen_until[slot]):
        return False
    if key == index:
        return True  # padding too, so that it stays finite
    start = 0 if visible.starts is None else int(visible.starts[row])
    after = key > index and (visible.causal or key == NOWHERE)
    return key >= start and not after and (visible.window is None or index - key < visible.window)


def visibility(
    past: int, count: int, starts: list[int] | None = None, window: int | None = None, causal: bool = True
) -> Visibility:
    """`count` queries after `past` keys, in a contiguous cache."""
    start = None if starts is None else torch.tensor(starts)
    return Visibility(torch.arange(past, past + count), torch.arange(past + count), start, window, causal, past)


def ring(past: int, count: int, size: int, window: int, starts: list[int] | None = None) -> Visibility:
    """The same in a ring of `size` slots, each token at its index modulo the size; slots never written to are empty."""
    held = torch.full((size,), NOWHERE)
    for index in range(past + count):
        held[index % size] = index
    start = None if starts is None else torch.tensor(starts)
    return Visibility(torch.arange(past, past + count), held, start, window, True, None)


def inputs(spec: AttentionSpec, visible: Visibility, batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Random q, k and v for it; what no query may see is far from everything else."""
    generator = torch.Generator().manual_seed(len(visible.key_index))
    count, slots = len(visible.query_index), len(visible.key_index)
    q = torch.randn(batch, spec.num_heads, count, spec.head_dim, generator=generator)
    k = torch.randn(batch, spec.num_key_value_heads, slots, spec.head_dim, generator=generator)
    v = torch.randn(batch, spec.num_key_value_heads, slots, spec.value_dim, generator=generator)
    hidden = visible.key_index > visible.query_index[-1]
    k[:, :, hidden], v[:, :, hidden] = 50.0, 1000.0
    return q.to(dtype), k.to(dtype), v.to(dtype)
