"""The decoder-only transformer that most families share: pre-norm blocks with rotary attention and a gated feed-forward.

Module and parameter names are Hugging Face's, so a checkpoint's names need no mapping. A family composes or subclasses these;
it does not copy them.

Hidden states are flat: x is [b * t, hidden], or [hidden] for a step of a single token where the linear kernels want a vector, so
that the hot path of decoding has no reshaping around its products.

Shapes: b batch, t tokens of this step, h heads, d head_dim, s slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor, nn

from modelrig.checkpoint.rope import RopeSpec
from modelrig.components import AttentionKernel, AttentionSpec, LayerCache, LinearMaker
from modelrig.modules.linear import Linear
from modelrig.modules.norms import RMSNorm
from modelrig.modules.rotary import Rotary, apply_rotary
from modelrig.modules.slots import Slots


@frozen
class BuildContext:
    """What a builder needs besides the facts: the parts that were negotiated, and the dtype to compute in."""

    attention: AttentionKernel
    linear: LinearMaker
    dtype: torch.dtype


class Attention(nn.Module):
    """Projections around the attention slot; with `norm_epsilon`, queries and keys of each head are normalised."""

    def __init__(
        self,
        hidden: int,
        spec: AttentionSpec,
        bias: bool,
        output_bias: bool,
        context: BuildContext,
        norm_epsilon: float | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.attend = spec, context.attention.attend
        queries, keys = spec.num_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        self.q_proj = Linear(hidden, queries, bias, context.dtype)
        self.k_proj = Linear(hidden, keys, bias, context.dtype)
        self.v_proj = Linear(hidden, spec.num_key_value_heads * spec.value_dim, bias, context.dtype)
        self.o_proj = Linear(spec.num_heads * spec.value_dim, hidden, output_bias, context.dtype)
        self.has_norms = norm_epsilon is not None
        if norm_epsilon is not None:
            self.q_norm = RMSNorm(spec.head_dim, norm_epsilon, context.dtype)
            self.k_norm = RMSNorm(spec.head_dim, norm_epsilon, context.dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Any, slots: Slots, layer: LayerCache) -> Tensor:
        b, t = slots.positions.shape
        spec = self.spec
        q = heads_first(self.q_proj(x), b, t, spec.num_heads, spec.head_dim)
        k = heads_first(self.k_proj(x), b, t, spec.num_key_value_heads, spec.head_dim)
        v = heads_first(self.v_proj(x), b, t, spec.num_key_value_heads, spec.value_dim)
        if self.has_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        keys, values = layer.update(apply_rotary(k, cos, sin), v, slots)
        y = self.attend(apply_rotary(q, cos, sin), keys, values, mask, spec)  # [b, t, h * d]
        return self.o_proj(y.view(x.shape[:-1] + y.shape[-1:]))


def heads_first(x: Tensor, b: int, t: int, heads: int, dim: int) -> Tensor:
    """[b * t, heads * dim] → [b, heads, t, dim]; for one token a row that is a plain view."""
    if t == 1:
        return x.view(b, heads, 1, dim)
    return x.view(b, t, heads, dim).transpose(1, 2)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))"""

    def __init__(self, hidden: int, intermediate: int, bias: bool, act: Callable[[Tensor], Tensor], context: BuildContext) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias, context.dtype)
        self.up_proj = Linear(hidden, intermediate, bias, context.dtype)
        self.down_proj = Linear(intermediate, hidden, bias, context.dtype)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(nn.Module):
    def __init__(self, hidden: int, epsilon: float, attention: nn.Module, mlp: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm = RMSNorm(hidden, epsilon, dtype)
        self.post_attention_layernorm = RMSNorm(hidden, epsilon, dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Any, slots: Slots, layer: LayerCache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, slots, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Embedding(nn.Module):
    def __init__(self, rows: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size, dtype=dtype, device="meta"), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(
        self,
        vocab: int,
        hidden: int,
        epsilon: float,
        blocks: list[DecoderBlock],
        specs: tuple[AttentionSpec, ...],
        rope: RopeSpec,
        context: BuildContext,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(vocab, hidden, context.dtype)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(hidden, epsilon, context.dtype)
        self.rotary = Rotary(rope, context.dtype)
        self.vector = context.linear.vector
        self.prepare = context.attention.prepare
        self.specs = tuple(dict.fromkeys(specs))  # distinct ones, in order of appearance
        self.mask_of_layer = tuple(self.specs.index(spec) for spec in specs)

    def forward(self, ids: Tensor, slots: Slots) -> Tensor:  # ids: [b, t] -> [b * t, hidden] or [hidden]
        x = self.embed_tokens(ids.view(()) if self.vector and ids.numel() == 1 else ids.reshape(-1))
        cos, sin = self.rotary(slots.positions)
        masks = [self.prepare(spec, slots.visible(spec)) for spec in self.specs]
        for block, mask, layer in zip(self.layers, self.mask_of_layer, slots.layers, strict=True):
            x = block(x, cos, sin, masks[mask], slots, layer)
        return self.norm(x)


class CausalLM(nn.Module):
    """A decoder with a language-model head; `step` is what generation calls and compilers compile."""

    def __init__(self, model: Decoder, vocab: int, hidden: int, tied: bool, context: BuildContext) -> None:
        super().__init__()
        self.model = model
        self.lm_head = Linear(hidden, vocab, False, context.dtype)
        if tied:
            self.lm_head.weight = model.embed_tokens.weight

    @property
    def chunkable(self) -> bool:
        """A prompt may be prefilled in parts without changing its result."""
        return not self.model.rotary.spec.depends_on_length

    def step(self, ids: Tensor, slots: Slots, last_only: bool = False) -> Tensor:
        """ids int64 [b, t] → logits [b, t, vocab], or [b, 1, vocab] with `last_only`."""
        b, t = ids.shape
        x = self.model(ids, slots)
        if last_only and t > 1:
            x, t = x.view(b, t, -1)[:, -1], 1
        return self.lm_head(x).view(b, t, -1)

    forward = step

    def init_buffers(self, device: torch.device) -> None:
        for module in self.modules():
            if isinstance(module, RMSNorm | Rotary):
                module.init_buffers(device)

    def bind(self, linear: LinearMaker) -> None:
        for module in self.modules():
            if isinstance(module, Linear):
                module.bind(linear)
