"""Attention by `torch.nn.attention.flex_attention`: the symbolic mask as a function that is compiled into the kernel.

One compiled function serves all layers of all models: window, scale and cap are tensors, and lengths are dynamic. What is compiled
anew is another form of step: another dtype, head layout, a single token, a single row, padding, a cap. Tensors that the mask looks
into have fixed sizes, in steps of doubling: torch 2.13 generates wrong C++ for dynamic ones.

Within a step that is compiled as a whole it is part of that graph.

Shapes: b batch, h query heads, g key/value heads, t queries, s slots, d head_dim.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from modelrig.components import AttentionSpec
from modelrig.errors import PluginError
from modelrig.modules.compiling import is_compiling
from modelrig.modules.slots import Visibility
from modelrig.registry.ledger import cause

FAR = 1 << 61  # further than any two tokens are apart, and nearer than an empty slot
WHOLE = 1 << 30  # one block of keys for all: what torch takes where nothing is known to be masked
FIRST_SLOTS, FIRST_ROWS = 4096, 64  # sizes of what the mask looks into
NARROWEST = 16  # head_dim of its kernel for GPUs; less is padded
GRAPHS = 200  # forms of steps that one process may compile


class Numbers(NamedTuple):
    """What does not change from step to step. `blocks` say that there is one block of keys, to be masked."""

    nearest: Tensor | int  # int64 [], how far behind a query a key must be at least: 0 if causal
    reach: Tensor | int  # int64 [], from how far behind it is not seen any more
    scale: Tensor | float  # float32 []
    cap: Tensor | float | None  # float32 []
    blocks: tuple[Tensor, Tensor]  # int32 [1, 1, 1], [1, 1, 1, 1]


class Lowered(NamedTuple):
    """One step's mask for one spec."""

    first: Tensor  # int64 [], index of the first query
    keys: Tensor  # int64 [s or more], index of the token in each slot
    starts: Tensor | None  # int64 [b or more]
    seen: tuple[Tensor, Tensor] | None  # int64 [1 or b, s or more], the first query that sees a slot, and the first that does not
    numbers: Numbers


class FlexAttention:
    def __init__(self, options: Any = None) -> None:  # noqa: ARG002 - protocol
        self._numbers: dict[tuple[AttentionSpec, torch.device], Numbers] = {}

    def prepare(self, spec: AttentionSpec, visible: Visibility) -> Lowered:
        index, keys, starts, device = visible.query_index, visible.key_index, visible.starts, visible.query_index.device
        seen = None
        if visible.seen_from is not None or visible.seen_until is not None:
            since = torch.zeros_like(keys) if visible.seen_from is None else visible.seen_from
            until = torch.full_like(keys, FAR) if visible.seen_until is None else visible.seen_until
            since, until = (one if one.dim() == 2 else one[None] for one in (since, until))
            rows = max(since.shape[0], until.shape[0])
            seen = since.expand(rows, -1), until.expand(rows, -1)
        if is_compiling():
            return Lowered(index[0], keys, starts, seen, constants(spec, device))
        numbers = self._numbers.get((spec, device))
        if numbers is None:
            numbers = self._numbers[spec, device] = make_numbers(spec, device)
            for block in numbers.blocks:
                torch._dynamo.mark_static(block)
        return Lowered(
            first=index[0],
            keys=fixed(keys, FIRST_SLOTS),
            starts=None if starts is None else fixed(starts, FIRST_ROWS),
            seen=None if seen is None else (fixed(seen[0], FIRST_SLOTS), fixed(seen[1], FIRST_SLOTS)),
            numbers=numbers,
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Lowered, spec: AttentionSpec) -> Tensor:
        if is_compiling():
            y = attention(q, k, v, mask)  # [b, h, t, d]
        else:
            try:
                y = compiled()(q, k, v, mask)
            except torch._dynamo.exc.TorchDynamoException as error:
                text = f"torch could not compile flex_attention for this step: {cause(error)}"
                raise PluginError("PL-KERNEL", text, plugin="flex", hint="take another attention, such as 'eager'") from error
        b, _, t, _ = q.shape
        return y.transpose(1, 2).reshape(b, t, spec.num_heads * spec.value_dim)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Lowered) -> Tensor:
    """q [b, h, t, d], k and v [b, g, s, d] → [b, h, t, d]; to be compiled."""
    first, keys, starts, seen, (nearest, reach, scale, cap, blocks) = mask

    def is_seen(row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:  # noqa: ARG001 - the signature it has
        index, key = first + query, keys[slot]
        behind = index - key
        found, own = (behind >= nearest) & (behind < reach), behind == 0
        if seen is not None:
            place = row if seen[0].shape[0] > 1 else 0
            shown = (index >= seen[0][place, slot]) & (index < seen[1][place, slot])
            found, own = found & shown, own & shown
        return found if starts is None else (found & (key >= starts[row])) | own

    def score(raw: Tensor, row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:  # noqa: ARG001 - likewise
        scaled = raw * scale
        return scaled if cap is None else cap * torch.tanh(scaled / cap)

    block_mask = BlockMask.from_kv_blocks(
        *blocks, BLOCK_SIZE=WHOLE, mask_mod=is_seen, seq_lengths=(q.shape[2], k.shape[2]), compute_q_blocks=False
    )
    grouped = q.shape[1] != k.shape[1]
    width = v.shape[3]
    if q.is_cuda and min(q.shape[3], width) < NARROWEST:
        q, k, v = (F.pad(x, (0, max(0, NARROWEST - x.shape[3]))) for x in (q, k, v))
    found: Tensor = flex_attention(q, k, v, score_mod=score, block_mask=block_mask, scale=1.0, enable_gqa=grouped)
    return found[..., :width]


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """`attention`, compiled when it is first called with each form of arguments."""
    known = inspect.signature(torch.compile).parameters
    limit: dict[str, Any] = {"recompile_limit": GRAPHS} if "recompile_limit" in known else {}
    made: Callable[..., Tensor] = torch.compile(attention, dynamic=True, fullgraph=True, **limit)
    return made


def make_numbers(spec: AttentionSpec, device: torch.device) -> Numbers:
    """As tensors, so that one graph serves any."""
    nearest, reach, scale, cap, blocks = constants(spec, device)
    return Numbers(
        nearest=torch.as_tensor(nearest, device=device),
        reach=torch.as_tensor(reach, device=device),
        scale=torch.as_tensor(scale, dtype=torch.float32, device=device),
        cap=None if cap is None else torch.as_tensor(cap, dtype=torch.float32, device=device),
        blocks=blocks,
    )


def constants(spec: AttentionSpec, device: torch.device) -> Numbers:
    """As numbers, for the graph of a whole step: a constant tensor of a graph would find no kernel."""
    return Numbers(
        nearest=0 if spec.causal else -FAR,
        reach=FAR if spec.window is None else spec.window,
        scale=spec.scale,
        cap=spec.softcap,
        blocks=(
            torch.ones(1, 1, 1, dtype=torch.int32, device=device),
            torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device),
        ),
    )


def fixed(numbers: Tensor, least: int) -> Tensor:
    """A copy of `numbers` [..., n] that a graph may take to be of one size: `least`, or twice that, or twice again."""
    count = numbers.shape[-1]
    padded = F.pad(numbers, (0, max(least, 1 << (count - 1).bit_length()) - count))
    torch._dynamo.mark_static(padded)
    return padded
