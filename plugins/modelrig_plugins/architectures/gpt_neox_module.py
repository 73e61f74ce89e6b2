"""GPT-NeoX's modules, on the meta device. Shapes: b batch, t tokens of this step, h heads, d head_dim."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from modelrig.components import AttentionSpec, LayerCache, ModelFacts
from modelrig.modules.activations import FUNCTIONS
from modelrig.modules.decoder import CausalLM
from modelrig.modules.embedding import Embedding
from modelrig.modules.linear import Linear
from modelrig.modules.network import Blocks, BuildContext, Masks
from modelrig.modules.norms import LayerNorm
from modelrig.modules.rotary import Rotary, Rotation, apply_rotary
from modelrig.modules.slots import Slots
from modelrig_plugins.architectures.gpt_neox import NeoXConfig


class NeoXAttention(nn.Module):
    """One weight holds query, key and value of a head one after the other, head by head."""

    def __init__(self, config: NeoXConfig, spec: AttentionSpec, context: BuildContext) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        self.spec, self.attend = spec, context.attention.attend
        self.query_key_value = Linear(hidden, 3 * hidden, bias, context.dtype)
        self.dense = Linear(hidden, hidden, bias, context.dtype)

    def forward(self, x: Tensor, rotation: Rotation, mask: Any, slots: Slots, layer: LayerCache) -> Tensor:
        b, t = slots.positions.shape
        joined = self.query_key_value(x).view(b, t, self.spec.num_heads, -1).transpose(1, 2)  # [b, h, t, 3 * d]
        q, k, v = joined.chunk(3, dim=-1)
        keys, values = layer.update(apply_rotary(k, rotation), v, slots)
        y = self.attend(apply_rotary(q, rotation), keys, values, mask, self.spec)  # [b, t, h * d]
        return self.dense(y.view(x.shape[:-1] + y.shape[-1:]))


class NeoXMLP(nn.Module):
    def __init__(self, config: NeoXConfig, context: BuildContext) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.intermediate_size, True, context.dtype)
        self.dense_4h_to_h = Linear(config.intermediate_size, config.hidden_size, True, context.dtype)
        self.act = FUNCTIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)))


class NeoXBlock(nn.Module):
    def __init__(self, config: NeoXConfig, spec: AttentionSpec, context: BuildContext) -> None:
        super().__init__()
        self.is_parallel = config.is_parallel
        self.input_layernorm = LayerNorm(config.hidden_size, config.epsilon, context.dtype)
        self.attention = NeoXAttention(config, spec, context)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.epsilon, context.dtype)
        self.mlp = NeoXMLP(config, context)

    def forward(self, x: Tensor, rotation: Rotation, mask: Any, slots: Slots, layer: LayerCache) -> Tensor:
        attended = self.attention(self.input_layernorm(x), rotation, mask, slots, layer)
        if self.is_parallel:
            return x + attended + self.mlp(self.post_attention_layernorm(x))
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class NeoXDecoder(nn.Module):
    def __init__(self, config: NeoXConfig, context: BuildContext) -> None:
        super().__init__()
        self.embed_in = Embedding(config.vocab_size, config.hidden_size, context.dtype)
        self.layers = Blocks(NeoXBlock(config, spec, context) for spec in config.layers)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.epsilon, context.dtype)
        self.rotary = Rotary(config.rope, context.dtype)
        self.vector, self.masks = context.linear.vector, Masks(config.layers, context)
        self.stable_length = config.rope.stable_length

    def forward(self, ids: Tensor, slots: Slots) -> Tensor:  # ids: [b, t] -> [b * t, hidden] or [hidden]
        x = self.embed_in(ids.view(()) if self.vector and ids.numel() == 1 else ids.reshape(-1))
        rotation = self.rotary(slots.positions)
        for block, mask, layer in zip(self.layers.calls, self.masks(slots), slots.layers, strict=True):
            x = block(x, rotation, mask, slots, layer)
        return self.final_layer_norm(x)


class NeoXBuilder:
    @staticmethod
    def build(facts: ModelFacts, context: BuildContext) -> CausalLM:
        config: NeoXConfig = facts.config
        decoder = NeoXDecoder(config, context)
        return CausalLM(decoder, config.vocab_size, config.hidden_size, config.tied, context, name="gpt_neox", embedding="embed_in")
