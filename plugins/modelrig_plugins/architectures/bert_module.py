"""BERT on the meta device: embeddings of tokens, positions and types; blocks that see the whole text; a pooler; heads.

Names are Hugging Face's. Hidden states are flat: x is [b * t, hidden]. Shapes: b batch, t tokens, h heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modelrig.components import AttentionSpec, ModelFacts
from modelrig.modules.activations import FUNCTIONS
from modelrig.modules.decoder import heads_first
from modelrig.modules.embedding import Embedding
from modelrig.modules.linear import Linear
from modelrig.modules.network import BuildContext, Masks, Network
from modelrig.modules.norms import LayerNorm
from modelrig.modules.slots import Slots
from modelrig_plugins.architectures.bert import BASE, MASKED, SEQUENCE, BertConfig

Activation = Callable[[Tensor], Tensor]


class BertBuilder:
    @staticmethod
    def build(facts: ModelFacts, context: BuildContext) -> Bert:
        return Bert(facts.config, context)


class Embeddings(nn.Module):
    def __init__(self, config: BertConfig, context: BuildContext) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, hidden, context.dtype)
        self.position_embeddings = Embedding(config.max_positions, hidden, context.dtype)
        self.token_type_embeddings = Embedding(config.type_vocab_size, hidden, context.dtype)
        self.LayerNorm = LayerNorm(hidden, config.layer_norm_eps, context.dtype)

    def forward(self, ids: Tensor, positions: Tensor, types: Tensor) -> Tensor:  # [b, t] each → [b * t, hidden]
        x = self.word_embeddings(ids) + self.token_type_embeddings(types)
        y: Tensor = self.LayerNorm((x + self.position_embeddings(positions)).flatten(0, 1))
        return y


class SelfAttention(nn.Module):
    def __init__(self, hidden: int, spec: AttentionSpec, context: BuildContext) -> None:
        super().__init__()
        self.spec, self.attend = spec, context.attention.attend
        self.query, self.key, self.value = (Linear(hidden, hidden, True, context.dtype) for _ in range(3))

    def forward(self, x: Tensor, mask: Any, slots: Slots) -> Tensor:
        (b, t), h, d = slots.positions.shape, self.spec.num_heads, self.spec.head_dim
        q, k, v = (heads_first(part(x), b, t, h, d) for part in (self.query, self.key, self.value))
        y = self.attend(q, k, v, mask, self.spec)  # [b, t, h * d]
        return y.reshape(x.shape)


class Output(nn.Module):
    """What comes out of attention or feed-forward, added to what went in and normalised."""

    def __init__(self, width: int, config: BertConfig, context: BuildContext) -> None:
        super().__init__()
        self.dense = Linear(width, config.hidden_size, True, context.dtype)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, context.dtype)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        normed: Tensor = self.LayerNorm(self.dense(y) + x)
        return normed


class Attention(nn.Module):
    def __init__(self, config: BertConfig, context: BuildContext) -> None:
        super().__init__()
        self.self = SelfAttention(config.hidden_size, config.layer, context)
        self.output = Output(config.hidden_size, config, context)


class Dense(nn.Module):
    """act(dense(x)), with a norm after it for the head of masked tokens."""

    def __init__(self, width: int, act: Activation, config: BertConfig, context: BuildContext, has_norm: bool = False) -> None:
        super().__init__()
        self.dense, self.act = Linear(config.hidden_size, width, True, context.dtype), act
        self.LayerNorm = LayerNorm(width, config.layer_norm_eps, context.dtype) if has_norm else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.dense(x))
        return y if self.LayerNorm is None else self.LayerNorm(y)


class Block(nn.Module):
    def __init__(self, config: BertConfig, context: BuildContext) -> None:
        super().__init__()
        self.attention = Attention(config, context)
        self.intermediate = Dense(config.intermediate_size, FUNCTIONS[config.hidden_act], config, context)
        self.output = Output(config.intermediate_size, config, context)

    def forward(self, x: Tensor, mask: Any, slots: Slots) -> Tensor:
        x = self.attention.output(self.attention.self(x, mask, slots), x)
        y: Tensor = self.output(self.intermediate(x), x)
        return y


class MaskedHead(nn.Module):
    """A token for each place. It holds the bias under both names that checkpoints have for it."""

    def __init__(self, config: BertConfig, context: BuildContext) -> None:
        super().__init__()
        self.transform = Dense(config.hidden_size, FUNCTIONS[config.hidden_act], config, context, has_norm=True)
        self.decoder = Linear(config.hidden_size, config.vocab_size, True, context.dtype)
        self.bias = nn.Parameter(torch.empty(config.vocab_size, dtype=context.dtype, device="meta"), requires_grad=False)


class Bert(Network):
    """A base model, and its head if it has one. Without one it has the base model's names itself."""

    bert: Any
    cls: Any

    def __init__(self, config: BertConfig, context: BuildContext) -> None:
        super().__init__()
        self.head, self.masks = config.head, Masks((config.layer,) * config.num_hidden_layers, context)
        base: Any = self
        if config.head != BASE:
            base = self.bert = nn.Module()
        base.embeddings = Embeddings(config, context)
        base.encoder = nn.Module()
        base.encoder.layer = nn.ModuleList(Block(config, context) for _ in range(config.num_hidden_layers))
        if config.has_pooler:
            base.pooler = Dense(config.hidden_size, torch.tanh, config, context)
        self.has_pooler = config.has_pooler
        if config.head == MASKED:
            self.cls = nn.Module()
            self.cls.predictions = MaskedHead(config, context)
        elif config.head != BASE:
            self.classifier = Linear(config.hidden_size, config.labels, True, context.dtype)

    @property
    def base(self) -> Any:
        return self if self.head == BASE else self.bert

    def step(self, ids: Tensor, slots: Slots, last_only: bool = False, token_types: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """ids int64 [b, t] → what the head gives: [b, t, hidden or vocab or labels], or [b, labels] for a class of the text."""
        x = self.run(ids, slots, token_types)
        y: Tensor = self.classifier(self.pool(x, slots)) if self.head == SEQUENCE else self.give(x).view(*ids.shape, -1)
        return y

    forward = step

    def give(self, x: Tensor) -> Tensor:
        """What the head makes of each token."""
        if self.head == MASKED:
            x = self.cls.predictions.decoder(self.cls.predictions.transform(x))
        elif self.head != BASE:
            x = self.classifier(x)
        return x

    def encode(self, ids: Tensor, slots: Slots, token_types: Tensor | None, all_layers: bool) -> tuple[list[Tensor], Tensor | None]:
        """See `modelrig.components.ModuleBuilder`."""
        states: list[Tensor] = []
        x = self.run(ids, slots, token_types, states if all_layers else None)
        pooled = self.pool(x, slots) if self.has_pooler else None
        return [x.view(*ids.shape, -1) for x in states or [x]], pooled

    def run(self, ids: Tensor, slots: Slots, token_types: Tensor | None, states: list[Tensor] | None = None) -> Tensor:
        """The last block's output [b * t, hidden]. `states` takes what went into each block, and what came out of the last."""
        types = torch.zeros_like(ids) if token_types is None else token_types
        x: Tensor = self.base.embeddings(ids, slots.positions, types)
        for block, mask in zip(self.base.encoder.layer, self.masks(slots), strict=True):
            if states is not None:
                states.append(x)
            x = block(x, mask, slots)
        if states is not None:
            states.append(x)
        return x

    def pool(self, x: Tensor, slots: Slots) -> Tensor:
        """Of each row's first token: [b, hidden]."""
        b, t = slots.positions.shape
        x = x.view(b, t, -1)
        first = x[:, 0] if slots.starts is None else x[torch.arange(b, device=x.device), slots.starts]
        pooled: Tensor = self.base.pooler(first)
        return pooled
