"""GPT-2's modules, on the meta device. Shapes: b batch, t tokens of this step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from modelrig.components import AttentionSpec, LayerCache, ModelFacts
from modelrig.modules.activations import FUNCTIONS
from modelrig.modules.decoder import CausalLM, heads_first
from modelrig.modules.embedding import Embedding
from modelrig.modules.linear import Linear
from modelrig.modules.network import Blocks, BuildContext, Masks
from modelrig.modules.norms import LayerNorm
from modelrig.modules.slots import Slots
from modelrig_plugins.architectures.gpt2 import GPT2Config


class GPT2Attention(nn.Module):
    def __init__(self, hidden: int, spec: AttentionSpec, context: BuildContext) -> None:
        super().__init__()
        self.spec, self.attend = spec, context.attention.attend
        self.c_attn = Linear(hidden, 3 * hidden, True, context.dtype)
        self.c_proj = Linear(hidden, hidden, True, context.dtype)

    def forward(self, x: Tensor, mask: Any, slots: Slots, layer: LayerCache) -> Tensor:
        b, t = slots.positions.shape
        heads, dim = self.spec.num_heads, self.spec.head_dim
        q, k, v = (heads_first(part, b, t, heads, dim) for part in self.c_attn(x).chunk(3, dim=-1))
        y = self.attend(q, *layer.update(k, v, slots), mask, self.spec)  # [b, t, h * d]
        return self.c_proj(y.view(x.shape[:-1] + y.shape[-1:]))


class GPT2MLP(nn.Module):
    def __init__(self, config: GPT2Config, context: BuildContext) -> None:
        super().__init__()
        self.c_fc = Linear(config.hidden_size, config.inner_size, True, context.dtype)
        self.c_proj = Linear(config.inner_size, config.hidden_size, True, context.dtype)
        self.act = FUNCTIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class GPT2Block(nn.Module):
    def __init__(self, config: GPT2Config, spec: AttentionSpec, context: BuildContext) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.epsilon, context.dtype)
        self.attn = GPT2Attention(config.hidden_size, spec, context)
        self.ln_2 = LayerNorm(config.hidden_size, config.epsilon, context.dtype)
        self.mlp = GPT2MLP(config, context)

    def forward(self, x: Tensor, mask: Any, slots: Slots, layer: LayerCache) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, slots, layer)
        return x + self.mlp(self.ln_2(x))


class GPT2Decoder(nn.Module):
    stable_length = None

    def __init__(self, config: GPT2Config, context: BuildContext) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.hidden_size, context.dtype)
        self.wpe = Embedding(config.positions, config.hidden_size, context.dtype)
        self.h = Blocks(GPT2Block(config, spec, context) for spec in config.layers)
        self.ln_f = LayerNorm(config.hidden_size, config.epsilon, context.dtype)
        self.vector, self.masks = context.linear.vector, Masks(config.layers, context)

    def forward(self, ids: Tensor, slots: Slots) -> Tensor:  # ids: [b, t] -> [b * t, hidden] or [hidden]
        shape = () if self.vector and ids.numel() == 1 else (-1,)
        x = self.wte(ids.reshape(shape)) + self.wpe(slots.positions.reshape(shape))
        for block, mask, layer in zip(self.h.calls, self.masks(slots), slots.layers, strict=True):
            x = block(x, mask, slots, layer)
        return self.ln_f(x)


class GPT2Builder:
    @staticmethod
    def build(facts: ModelFacts, context: BuildContext) -> CausalLM:
        config: GPT2Config = facts.config
        decoder = GPT2Decoder(config, context)
        return CausalLM(decoder, config.vocab_size, config.hidden_size, config.tied, context, name="transformer", embedding="wte")
