"""The decoder-only transformer that most families share: rotary attention and a gated feed-forward, in three arrangements.

Module and parameter names are Hugging Face's, so a checkpoint's names need no mapping. A family composes or subclasses these;
it does not copy them.

Hidden states are flat: x is [b * t, hidden], or [hidden] for a step of a single token where the linear kernels want a vector, so
that the hot path of decoding has no reshaping around its products.

Shapes: b batch, t tokens of this step, h heads, d head_dim, s slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelrig.checkpoint.rope import RopeSpec
from modelrig.components import AttentionSpec, LayerCache
from modelrig.modules.embedding import Embedding
from modelrig.modules.linear import Linear
from modelrig.modules.network import Blocks, BuildContext, Masks, Network
from modelrig.modules.rotary import Rotary, Rotation, apply_rotary
from modelrig.modules.slots import Slots

MakeNorm = Callable[[int], nn.Module]  # of a size


class Attention(nn.Module):
    """Projections around the attention slot. With `head_norm`, queries and keys of each head are normalised; with `wide_norm`, all
    heads' together."""

    def __init__(
        self,
        hidden: int,
        spec: AttentionSpec,
        bias: bool,
        output_bias: bool,
        context: BuildContext,
        head_norm: MakeNorm | None = None,
        wide_norm: MakeNorm | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.attend = spec, context.attention.attend
        self.has_head_norm, self.has_wide_norm = head_norm is not None, wide_norm is not None
        queries, keys = spec.num_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        self.make_projections(hidden, (queries, keys, spec.num_key_value_heads * spec.value_dim), bias, context)
        self.o_proj = Linear(spec.num_heads * spec.value_dim, hidden, output_bias, context.dtype)
        if head_norm is not None:
            self.q_norm, self.k_norm = head_norm(spec.head_dim), head_norm(spec.head_dim)
        elif wide_norm is not None:
            self.q_norm, self.k_norm = wide_norm(queries), wide_norm(keys)

    def make_projections(self, hidden: int, sizes: tuple[int, int, int], bias: bool, context: BuildContext) -> None:
        self.q_proj, self.k_proj, self.v_proj = (Linear(hidden, size, bias, context.dtype) for size in sizes)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, the heads of each side by side."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Any, slots: Slots, layer: LayerCache) -> Tensor:
        b, t = slots.positions.shape
        spec = self.spec
        q, k, v = self.project(x)
        if self.has_wide_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = heads_first(q, b, t, spec.num_heads, spec.head_dim)
        k = heads_first(k, b, t, spec.num_key_value_heads, spec.head_dim)
        v = heads_first(v, b, t, spec.num_key_value_heads, spec.value_dim)
        if self.has_head_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = apply_rotary(q, rotation), apply_rotary(k, rotation)
        keys, values = layer.update(k, v, slots)
        y = self.attend(q, keys, values, mask, spec)  # [b, t, h * d]
        return self.o_proj(y.view(x.shape[:-1] + y.shape[-1:]))


class FusedAttention(Attention):
    """An `Attention` whose queries, keys and values come from one weight, one after the other."""

    def make_projections(self, hidden: int, sizes: tuple[int, int, int], bias: bool, context: BuildContext) -> None:
        self.sizes = sizes
        self.qkv_proj = Linear(hidden, sum(sizes), bias, context.dtype)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv_proj(x).split(self.sizes, dim=-1)
        return q, k, v


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


class FusedMLP(nn.Module):
    """A `GatedMLP` whose gate and up come from one weight, one after the other."""

    def __init__(self, hidden: int, intermediate: int, bias: bool, act: Callable[[Tensor], Tensor], context: BuildContext) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden, 2 * intermediate, bias, context.dtype)
        self.down_proj = Linear(intermediate, hidden, bias, context.dtype)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)


class PreNormBlock(nn.Module):
    """What goes into attention and feed-forward is normalised; what comes out is weighed with `residual`."""

    def __init__(self, hidden: int, norm: MakeNorm, attention: nn.Module, mlp: nn.Module, residual: float = 1.0) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.residual = attention, mlp, residual
        self.input_layernorm, self.post_attention_layernorm = norm(hidden), norm(hidden)

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Any, slots: Slots, layer: LayerCache) -> Tensor:
        x = torch.add(x, self.self_attn(self.input_layernorm(x), rotation, mask, slots, layer), alpha=self.residual)
        return torch.add(x, self.mlp(self.post_attention_layernorm(x)), alpha=self.residual)


class PostNormBlock(nn.Module):
    """What comes out of attention and feed-forward is normalised."""

    def __init__(self, hidden: int, norm: MakeNorm, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.post_attention_layernorm, self.post_feedforward_layernorm = norm(hidden), norm(hidden)

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Any, slots: Slots, layer: LayerCache) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(x, rotation, mask, slots, layer))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class SandwichBlock(nn.Module):
    """What goes into attention and feed-forward is normalised, and what comes out too."""

    def __init__(self, hidden: int, norm: MakeNorm, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm, self.post_attention_layernorm = norm(hidden), norm(hidden)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(hidden), norm(hidden)

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Any, slots: Slots, layer: LayerCache) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), rotation, mask, slots, layer)
        x = x + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, blocks, final norm.

    Args:
        ropes: of each layer; None where it knows no positions.
        scale: what embeddings are multiplied by; with `rounds_scale` rounded to the model's dtype.
    """

    def __init__(
        self,
        vocab: int,
        hidden: int,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        specs: tuple[AttentionSpec, ...],
        ropes: tuple[RopeSpec | None, ...],
        context: BuildContext,
        scale: float = 1.0,
        *,
        rounds_scale: bool = False,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(vocab, hidden, context.dtype)
        self.layers = Blocks(blocks)
        self.norm = norm
        self.scale = float(torch.tensor(scale, dtype=context.dtype)) if rounds_scale else scale
        distinct = tuple(dict.fromkeys(rope for rope in ropes if rope is not None))
        self.rotaries = nn.ModuleList(Rotary(rope, context.dtype) for rope in distinct)
        self.rotary_of_layer = tuple(len(distinct) if rope is None else distinct.index(rope) for rope in ropes)
        self.stable_length = min((rope.stable_length for rope in distinct if rope.stable_length is not None), default=None)
        self.vector, self.masks = context.linear.vector, Masks(specs, context)

    def forward(self, ids: Tensor, slots: Slots) -> Tensor:  # ids: [b, t] -> [b * t, hidden] or [hidden]
        x = self.embed_tokens(ids.view(()) if self.vector and ids.numel() == 1 else ids.reshape(-1))
        if self.scale != 1.0:
            x = x * self.scale
        rotations = [*(rotary(slots.positions) for rotary in self.rotaries), None]
        for block, rotary, mask, layer in zip(
            self.layers.calls, self.rotary_of_layer, self.masks(slots), slots.layers, strict=True
        ):
            x = block(x, rotations[rotary], mask, slots, layer)
        return self.norm(x)


class CausalLM(Network):
    """A decoder with a language-model head; `step` is what generation calls and compilers compile.

    Args:
        decoder: a module (ids, slots) → hidden states, with the embedding that a tied head shares, and `stable_length`.
        name: what checkpoints call it.
        embedding: what checkpoints call its embedding.
        logit_scale: what logits are multiplied by.
        logit_cap: what they then stay below: cap * tanh(logits / cap).
        restarts_at: a longer sequence is computed anew from its beginning, because all its keys change.
    """

    def __init__(
        self,
        decoder: nn.Module,
        vocab: int,
        hidden: int,
        tied: bool,
        context: BuildContext,
        *,
        name: str = "model",
        embedding: str = "embed_tokens",
        logit_scale: float = 1.0,
        logit_cap: float | None = None,
        restarts_at: int | None = None,
    ) -> None:
        super().__init__()
        self.add_module(name, decoder)
        self.name, self.logit_scale, self.logit_cap, self.restarts_at = name, logit_scale, logit_cap, restarts_at
        self.lm_head = Linear(hidden, vocab, False, context.dtype)
        if tied:
            self.lm_head.weight = decoder.get_submodule(embedding).weight  # type: ignore[assignment]

    @property
    def decoder(self) -> nn.Module:
        return self._modules[self.name]  # type: ignore[return-value]

    @property
    def stable_length(self) -> int | None:
        """A longer prompt must not be prefilled in parts, since that changes its result; None where any may."""
        return self.decoder.stable_length  # type: ignore[return-value]

    def step(self, ids: Tensor, slots: Slots, last_only: bool = False) -> Tensor:
        """ids int64 [b, t] → logits [b, t, vocab], or [b, 1, vocab] with `last_only`."""
        b, t = ids.shape
        x = self.decoder(ids, slots)
        if last_only and t > 1:
            x, t = x.view(b, t, -1)[:, -1], 1
        logits = self.lm_head(x).view(b, t, -1)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.logit_cap is None else torch.tanh(logits / self.logit_cap) * self.logit_cap

    forward = step
