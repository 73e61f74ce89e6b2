"""What families of llama's shape share: config keys in v4 and v5 spelling, parameters, ties, layer kinds. No torch.

A family is a `Family` with what it fixes, or takes by default, where others ask the config:

    PLANNER = DecoderPlanner(Family(name="mistral", max_positions=131_072, key_value_heads=8, windows=windows))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from modelrig.checkpoint.activations import ACTIVATIONS
from modelrig.checkpoint.config import ConfigReader
from modelrig.checkpoint.rope import RopeSpec, read_rope
from modelrig.components import AttentionSpec, Catalog, ModelFacts, Parameter
from modelrig_plugins.architectures.experts import ExpertsConfig, list_experts
from modelrig_plugins.architectures.reading import (
    LIMIT,
    POSITION_LIMIT,
    parse,
    read_layers,
    read_tie,
    require_head_dim,
)

FULL, SLIDING = "full_attention", "sliding_attention"

Windows = tuple[int | None, ...]  # tokens that each layer sees, its own among them; None for all


@frozen(kw_only=True)
class DecoderConfig:
    """What a config says, with what its family fixes.

    Attributes:
        layers, ropes: of each layer; the rope is None where it knows no positions.
        embedding_scale, residual_scale, logit_scale: what embeddings, outputs of attention and feed-forward, and logits are
            multiplied by; `rounds_scale` is whether the first is rounded to the model's dtype before.
        logit_cap: what logits stay below.
        restarts_at: a longer sequence is computed anew from its beginning, because all its keys change.
    """

    family: Family
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    hidden_act: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool
    layers: tuple[AttentionSpec, ...]
    ropes: tuple[RopeSpec | None, ...]
    embedding_scale: float = 1.0
    rounds_scale: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    experts: ExpertsConfig | None = None
    restarts_at: int | None = None


def no_windows(reader: ConfigReader, layers: int) -> Windows:  # noqa: ARG001 - one of several
    return (None,) * layers


def no_more(reader: ConfigReader, config: DecoderConfig, catalog: Catalog) -> DecoderConfig:  # noqa: ARG001 - one of several
    return config


@frozen(kw_only=True)
class Family:
    """What a family fixes. For biases None stands for what `attention_bias` and `mlp_bias` of the config say.

    Attributes:
        max_positions, key_value_heads, head_dim, epsilon, activation, tied: for configs that lack the key; None for as many as
            query heads, and for `hidden_size / num_attention_heads`.
        norm: "plain", "late" (rounded after the product with the weight) or "offset" (the weight is what is added to 1).
        qk_norm: "heads" where queries and keys of each head are normalised, "all" for all heads' together.
        block: what is normalised of attention and feed-forward: "before", "after" or "both".
        is_fused: queries, keys and values are one weight, and gate and up another.
        windows: reads what each layer sees.
        rope: reads how far each position turns.
        finish: reads what else the family knows.
    """

    name: str
    max_positions: int
    key_value_heads: int | None = None
    head_dim: int | None = None
    epsilon: float = 1e-6
    activation: str = "silu"
    activation_key: str = "hidden_act"
    tied: bool = False
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    norm: str = "plain"
    qk_norm: str | None = None
    block: str = "before"
    is_fused: bool = False
    windows: Callable[[ConfigReader, int], Windows] = no_windows
    rope: Callable[[ConfigReader, int, int], RopeSpec] = read_rope
    finish: Callable[[ConfigReader, DecoderConfig, Catalog], DecoderConfig] = no_more


@frozen
class DecoderPlanner:
    """Plans one family."""

    family: Family

    def describe(self, config: Mapping[str, Any], catalog: Catalog, path: Path) -> ModelFacts:
        parsed, dtype = parse(config, path, lambda reader: read_config(self.family, reader, catalog))
        prefix = "" if "embed_tokens.weight" in catalog.entries else "model."  # saved as a base model, without its head
        sizes = [parsed.intermediate_size, *([parsed.experts.busy_size] if parsed.experts else [])]
        return ModelFacts(
            architecture=self.family.name,
            config=parsed,
            parameters=tuple(list_parameters(parsed, prefix)),
            blocks=tuple(f"model.layers.{i}" for i in range(len(parsed.layers))),
            layers=parsed.layers,
            ties={"lm_head.weight": "model.embed_tokens.weight"} if parsed.tied else {},
            hidden_size=parsed.hidden_size,
            intermediate_size=max(sizes),
            vocab_size=parsed.vocab_size,
            context_length=parsed.context_length,
            dtype=dtype,
            experts_per_token=parsed.experts.chosen if parsed.experts else 0,
            ignored=tuple(name for name in catalog.entries if name.endswith(".rotary_emb.inv_freq")),
            empty=("model.rotary_emb",),
        )


def read_config(family: Family, reader: ConfigReader, catalog: Catalog) -> DecoderConfig:
    hidden = reader.integer("hidden_size", 1, LIMIT)
    layers = read_layers(reader, "num_hidden_layers", catalog, "layers.", ("", "model."))
    spec = read_attention(reader, family, hidden)
    max_positions = reader.integer("max_position_embeddings", 1, POSITION_LIMIT, default=family.max_positions)
    rope = family.rope(reader, spec.head_dim, max_positions)
    attention_bias = False if family.qkv_bias is not None else reader.boolean("attention_bias", default=False)
    config = DecoderConfig(
        family=family,
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size", 1, LIMIT),
        vocab_size=reader.integer("vocab_size", 1, LIMIT),
        context_length=rope.context_length,
        rms_norm_eps=reader.number("rms_norm_eps", 0.0, 1.0, default=family.epsilon, exclusive=True),
        hidden_act=reader.choice(family.activation_key, ACTIVATIONS, default=family.activation),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=reader.boolean("mlp_bias", default=False) if family.mlp_bias is None else family.mlp_bias,
        tied=read_tie(reader, catalog, default=family.tied),
        layers=tuple(evolve(spec, window=window) for window in family.windows(reader, layers)),
        ropes=(rope,) * layers,
    )
    return family.finish(reader, config, catalog)


def read_attention(reader: ConfigReader, family: Family, hidden: int) -> AttentionSpec:
    heads = reader.integer("num_attention_heads", 1, LIMIT)
    usual = family.key_value_heads if "num_key_value_heads" not in reader.values else None  # null says: as many as queries
    kv_heads = reader.integer("num_key_value_heads", 1, LIMIT, default=usual or heads)
    if "head_dim" not in reader and family.head_dim is None:
        require_head_dim(reader, hidden, heads, "hidden_size", "num_attention_heads")
    head_dim = reader.integer("head_dim", 1, LIMIT, default=family.head_dim or max(1, hidden // heads))
    reader.require(
        head_dim % 2 == 0,
        "CF-REL",
        "head_dim",
        f"{head_dim} is odd: rotary embeddings turn pairs",
        uses=("hidden_size", "num_attention_heads"),
    )
    reader.require(
        heads % kv_heads == 0,
        "CF-REL",
        "num_key_value_heads",
        f"{kv_heads} does not divide num_attention_heads ({heads})",
        uses=("num_attention_heads",),
    )
    return AttentionSpec(num_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5)


def refuse_bidirectional(reader: ConfigReader) -> None:
    """Note a problem where a config asks for attention to later tokens too."""
    asked = reader.boolean("use_bidirectional_attention", default=False)
    reader.require(not asked, "CF-ENUM", "use_bidirectional_attention", "true; only causal attention is served")


def read_window(reader: ConfigReader, usual: int | None = 4096) -> int | None:
    """`sliding_window`: null for none, `usual` where a config lacks it."""
    usual = None if "sliding_window" in reader.values else usual
    return reader.integer("sliding_window", 1, POSITION_LIMIT, default=usual)


def same_windows(reader: ConfigReader, layers: int, usual: int | None = 4096) -> Windows:
    """Every layer sees as much."""
    return (read_window(reader, usual),) * layers


#: `same_windows` of a family that has none unless its config says so
rare_windows = partial(same_windows, usual=None)


def read_layer_types(reader: ConfigReader, layers: int, window: int | None, usual: Windows) -> Windows:
    """`layer_types`, one for each layer; `usual` where the config lacks them."""
    kinds = reader.choices("layer_types", (FULL, SLIDING), default=None)
    if kinds is None:
        return usual
    require_each(reader, "layer_types", len(kinds), layers)
    reader.require(
        window is not None or SLIDING not in kinds,
        "CF-REL",
        "layer_types",
        f"{SLIDING}, and there is no window",
        uses=("sliding_window",),
    )
    return tuple(window if kind == SLIDING else None for kind in kinds)


def require_each(reader: ConfigReader, key: str, count: int, layers: int) -> None:
    """Note a problem unless `key` has one value for each layer."""
    reader.require(count == layers, "CF-REL", key, f"{count} of them for {layers} layers", uses=("num_hidden_layers",))


def list_parameters(config: DecoderConfig, prefix: str) -> Iterator[Parameter]:
    """Every parameter in execution order. `prefix` is what the checkpoint puts before the decoder's names."""
    hidden, embedding = config.hidden_size, (config.vocab_size, config.hidden_size)
    yield Parameter("model.embed_tokens.weight", embedding, "embedding", f"{prefix}embed_tokens.weight")
    before, between, after = _norms(config)
    attention, mlp = list(_attention(config)), list(_mlp(config))
    for i in range(len(config.layers)):
        module, stored = f"model.layers.{i}.", f"{prefix}layers.{i}."
        experts = config.experts if config.experts is not None and config.experts.layers[i] else None
        for name, shape, role in (*before, *attention, *between, *(() if experts else mlp), *after):
            yield Parameter(module + name, shape, role, stored + name, i)
        if experts is not None:
            yield from list_experts(experts, hidden, module, stored, i)
    yield Parameter("model.norm.weight", (hidden,), "norm", f"{prefix}norm.weight")
    yield Parameter("lm_head.weight", embedding, "head", None if config.tied else "lm_head.weight")


Shaped = tuple[str, tuple[int, ...], str]  # name, shape, role


def _norms(config: DecoderConfig) -> tuple[list[Shaped], list[Shaped], list[Shaped]]:
    """Those before attention, those between it and the feed-forward, and those after."""
    names: dict[str, tuple[tuple[str, ...], ...]] = {
        "before": (("input",), ("post_attention",), ()),
        "after": ((), ("post_attention",), ("post_feedforward",)),
        "both": (("input",), ("post_attention", "pre_feedforward"), ("post_feedforward",)),
    }
    size: tuple[int, ...] = (config.hidden_size,)
    before, between, after = (
        [(f"{name}_layernorm.weight", size, "norm") for name in group] for group in names[config.family.block]
    )
    return before, between, after


def _attention(config: DecoderConfig) -> Iterator[Shaped]:
    spec, hidden = config.layers[0], config.hidden_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    if config.family.is_fused:
        yield from _linear("self_attn.qkv_proj", queries + 2 * keys, hidden, config.qkv_bias)
    else:
        for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield from _linear(f"self_attn.{letter}_proj", rows, hidden, config.qkv_bias)
    yield from _linear("self_attn.o_proj", hidden, queries, config.output_bias)
    if config.family.qk_norm is not None:
        sizes = (spec.head_dim,) * 2 if config.family.qk_norm == "heads" else (queries, keys)
        for letter, size in zip("qk", sizes, strict=True):
            yield f"self_attn.{letter}_norm.weight", (size,), "norm"


def _mlp(config: DecoderConfig) -> Iterator[Shaped]:
    hidden, size = config.hidden_size, config.intermediate_size
    if config.family.is_fused:
        yield from _linear("mlp.gate_up_proj", 2 * size, hidden, config.mlp_bias)
    else:
        yield from _linear("mlp.gate_proj", size, hidden, config.mlp_bias)
        yield from _linear("mlp.up_proj", size, hidden, config.mlp_bias)
    yield from _linear("mlp.down_proj", hidden, size, config.mlp_bias)


def _linear(name: str, rows: int, columns: int, has_bias: bool) -> Iterator[Shaped]:
    yield f"{name}.weight", (rows, columns), "linear"
    if has_bias:
        yield f"{name}.bias", (rows,), "bias"
