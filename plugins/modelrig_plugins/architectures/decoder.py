"""What families of llama's shape share: config keys in v4 and v5 spelling, parameters, ties, layer kinds. No torch.

A family is a `Family` with what it fixes, or takes by default, where others ask the config:

    PLANNER = DecoderPlanner(Family(name="mistral", max_positions=131_072, key_value_heads=8, windows=windows))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from modelrig.checkpoint.activations import ACTIVATIONS
from modelrig.checkpoint.config import ConfigReader
from modelrig.checkpoint.rope import RopeSpec, read_rope
from modelrig.components import FLOATING, AttentionSpec, Catalog, ModelFacts, Parameter

LIMIT = 1 << 24  # no width or vocabulary is larger
LAYER_LIMIT = 1 << 14
WINDOW_LIMIT = 1 << 31
FULL, SLIDING = "full_attention", "sliding_attention"

Windows = tuple[int | None, ...]  # tokens that each layer sees, its own among them; None for all


def no_windows(reader: ConfigReader, layers: int) -> Windows:  # noqa: ARG001 - one of several
    return (None,) * layers


@frozen(kw_only=True)
class Family:
    """What a family fixes. For biases None stands for what `attention_bias` and `mlp_bias` of the config say.

    Attributes:
        max_positions, key_value_heads, head_dim: for configs that lack the key; None for as many as query heads, and for
            `hidden_size / num_attention_heads`.
        qk_norm: queries and keys of each head are normalised.
        windows: reads what each layer sees.
    """

    name: str
    max_positions: int
    key_value_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    windows: Callable[[ConfigReader, int], Windows] = no_windows


@frozen(kw_only=True)
class DecoderConfig:
    """What a config says, with what its family fixes."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int
    rms_norm_eps: float
    hidden_act: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    layers: tuple[AttentionSpec, ...]
    rope: RopeSpec


@frozen
class DecoderPlanner:
    """Plans one family."""

    family: Family

    def describe(self, config: Mapping[str, Any], catalog: Catalog, path: Path) -> ModelFacts:
        reader = ConfigReader(config, path)
        with reader:
            parsed, context_length = read_config(self.family, reader, catalog)
            dtype = reader.choice("dtype", FLOATING, default=None, aliases=("torch_dtype",))
        prefix = "" if "embed_tokens.weight" in catalog.entries else "model."  # saved as a base model, without its head
        parameters = tuple(list_parameters(parsed, prefix))
        layers = parsed.num_hidden_layers
        return ModelFacts(
            architecture=self.family.name,
            config=parsed,
            parameters=parameters,
            blocks=tuple(f"model.layers.{i}" for i in range(layers)),
            layers=parsed.layers,
            ties={"lm_head.weight": "model.embed_tokens.weight"} if parsed.tied else {},
            hidden_size=parsed.hidden_size,
            intermediate_size=parsed.intermediate_size,
            vocab_size=parsed.vocab_size,
            context_length=context_length,
            dtype=dtype,
            ignored=tuple(name for name in catalog.entries if name.endswith(".rotary_emb.inv_freq")),
            empty=("model.rotary_emb",),
        )


def read_config(family: Family, reader: ConfigReader, catalog: Catalog) -> tuple[DecoderConfig, int]:
    hidden = reader.integer("hidden_size", 1, LIMIT)
    heads = reader.integer("num_attention_heads", 1, LIMIT)
    usual = family.key_value_heads if "num_key_value_heads" not in reader.values else None  # null says: as many as queries
    kv_heads = reader.integer("num_key_value_heads", 1, LIMIT, default=usual or heads)
    layers = reader.integer("num_hidden_layers", 1, LAYER_LIMIT)
    if "head_dim" not in reader and family.head_dim is None:
        reader.require(
            hidden % heads == 0,
            "CF-REL",
            "hidden_size",
            f"{hidden} is not a multiple of num_attention_heads ({heads}), and there is no head_dim",
            uses=("num_attention_heads",),
        )
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
    stored = stored_layers(catalog)
    if stored:
        reader.require(
            layers == stored, "CF-REL", "num_hidden_layers", f"{layers}, but the tensor files hold layers 0 to {stored - 1}"
        )
    max_positions = reader.integer("max_position_embeddings", 1, 1 << 31, default=family.max_positions)
    rope = read_rope(reader, head_dim, max_positions)
    tied = reader.boolean("tie_word_embeddings", default=False) and "lm_head.weight" not in catalog.entries
    spec = AttentionSpec(num_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5)
    attention_bias = False if family.qkv_bias is not None else reader.boolean("attention_bias", default=False)
    config = DecoderConfig(
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size", 1, LIMIT),
        num_hidden_layers=layers,
        vocab_size=reader.integer("vocab_size", 1, LIMIT),
        rms_norm_eps=reader.number("rms_norm_eps", 0.0, 1.0, default=1e-6, exclusive=True),
        hidden_act=reader.choice("hidden_act", ACTIVATIONS, default="silu"),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=reader.boolean("mlp_bias", default=False) if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        # A head that is stored is used as stored, whatever the flag says: equal tensors give equal results.
        tied=tied,
        layers=tuple(evolve(spec, window=window) for window in family.windows(reader, layers)),
        rope=rope,
    )
    return config, rope.context_length


def read_window(reader: ConfigReader) -> int | None:
    """`sliding_window`: null for none, and 4,096 where a config of a family that has windows lacks it."""
    usual = None if "sliding_window" in reader.values else 4096
    return reader.integer("sliding_window", 1, WINDOW_LIMIT, default=usual)


def read_layer_types(reader: ConfigReader, layers: int, window: int | None, usual: Windows) -> Windows:
    """`layer_types`, one for each layer; `usual` where the config lacks them."""
    kinds = reader.choices("layer_types", (FULL, SLIDING), default=None)
    if kinds is None:
        return usual
    uses = ("num_hidden_layers",)
    reader.require(len(kinds) == layers, "CF-REL", "layer_types", f"{len(kinds)} of them for {layers} layers", uses=uses)
    reader.require(
        window is not None or SLIDING not in kinds,
        "CF-REL",
        "layer_types",
        f"{SLIDING}, and there is no window",
        uses=("sliding_window",),
    )
    return tuple(window if kind == SLIDING else None for kind in kinds)


def stored_layers(catalog: Catalog) -> int:
    """How many layers the tensor files hold, by their highest number; 0 if there are none."""
    highest = -1
    for name in catalog.entries:
        head, found, rest = name.partition("layers.")
        if found and head in ("", "model."):
            number = rest.partition(".")[0]
            if number.isascii() and number.isdigit() and len(number) < 8:
                highest = max(highest, int(number))
    return highest + 1


def list_parameters(config: DecoderConfig, prefix: str) -> Iterator[Parameter]:
    """Every parameter in execution order. `prefix` is what the checkpoint puts before the decoder's names."""
    hidden, spec = config.hidden_size, config.layers[0]
    queries, keys = spec.num_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    embedding = (config.vocab_size, hidden)
    yield Parameter("model.embed_tokens.weight", embedding, "embedding", f"{prefix}embed_tokens.weight")
    block: list[tuple[str, tuple[int, ...], str]] = [("input_layernorm.weight", (hidden,), "norm")]
    for name, rows, columns, has_bias in (
        ("self_attn.q_proj", queries, hidden, config.qkv_bias),
        ("self_attn.k_proj", keys, hidden, config.qkv_bias),
        ("self_attn.v_proj", keys, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, queries, config.output_bias),
        ("mlp.gate_proj", config.intermediate_size, hidden, config.mlp_bias),
        ("mlp.up_proj", config.intermediate_size, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, config.intermediate_size, config.mlp_bias),
    ):
        block.append((f"{name}.weight", (rows, columns), "linear"))
        if has_bias:
            block.append((f"{name}.bias", (rows,), "bias"))
    if config.qk_norm:
        block += [(f"self_attn.{name}_norm.weight", (spec.head_dim,), "norm") for name in "qk"]
    block.append(("post_attention_layernorm.weight", (hidden,), "norm"))
    for i in range(config.num_hidden_layers):
        for name, shape, role in block:
            yield Parameter(f"model.layers.{i}.{name}", shape, role, f"{prefix}layers.{i}.{name}", i)
    yield Parameter("model.norm.weight", (hidden,), "norm", f"{prefix}norm.weight")
    yield Parameter("lm_head.weight", embedding, "head", None if config.tied else "lm_head.weight")
