"""GPT-NeoX and Pythia: attention and feed-forward beside each other, and a part of each head that turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from modelrig.checkpoint.activations import ACTIVATIONS
from modelrig.checkpoint.config import ConfigReader
from modelrig.checkpoint.rope import RopeSpec, read_rope
from modelrig.components import AttentionSpec, Catalog, ModelFacts, Parameter
from modelrig_plugins.architectures.reading import LIMIT, POSITION_LIMIT, parse, read_layers, read_tie, require_head_dim

HEADS = ("embed_out.weight", "lm_head.weight")  # what checkpoints call the head
#: masks and frequencies that old versions of transformers stored with the weights
STORED_BUFFERS = (".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq")


@frozen(kw_only=True)
class NeoXConfig:
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    epsilon: float
    hidden_act: str
    attention_bias: bool
    is_parallel: bool
    tied: bool
    layers: tuple[AttentionSpec, ...]
    rope: RopeSpec


class NeoXPlanner:
    @staticmethod
    def describe(config: Mapping[str, Any], catalog: Catalog, path: Path) -> ModelFacts:
        parsed, dtype = parse(config, path, lambda reader: read_config(reader, catalog))
        prefix = "" if "embed_in.weight" in catalog.entries else "gpt_neox."  # saved as a base model
        head = None if parsed.tied else next((name for name in HEADS if name in catalog.entries), HEADS[0])
        return ModelFacts(
            architecture="gpt_neox",
            config=parsed,
            parameters=tuple(list_parameters(parsed, prefix, head)),
            blocks=tuple(f"gpt_neox.layers.{i}" for i in range(len(parsed.layers))),
            layers=parsed.layers,
            ties={"lm_head.weight": "gpt_neox.embed_in.weight"} if parsed.tied else {},
            hidden_size=parsed.hidden_size,
            intermediate_size=parsed.intermediate_size,
            vocab_size=parsed.vocab_size,
            context_length=parsed.rope.context_length,
            dtype=dtype,
            ignored=tuple(name for name in catalog.entries if name.endswith(STORED_BUFFERS)),
            empty=("gpt_neox.rotary_emb", "gpt_neox.emb_dropout"),
        )


PLANNER = NeoXPlanner


def read_config(reader: ConfigReader, catalog: Catalog) -> NeoXConfig:
    hidden = reader.integer("hidden_size", 1, LIMIT)
    heads = reader.integer("num_attention_heads", 1, LIMIT)
    layers = read_layers(reader, "num_hidden_layers", catalog, "layers.", ("", "gpt_neox."))
    require_head_dim(reader, hidden, heads, "hidden_size", "num_attention_heads")
    positions = reader.integer("max_position_embeddings", 1, POSITION_LIMIT, default=2048)
    dim = max(1, hidden // heads)
    is_tied = all(read_tie(reader, catalog, default=False, head=head) for head in HEADS)
    return NeoXConfig(
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size", 1, LIMIT),
        vocab_size=reader.integer("vocab_size", 1, LIMIT),
        epsilon=reader.number("layer_norm_eps", 0.0, 1.0, default=1e-5, exclusive=True),
        hidden_act=reader.choice("hidden_act", ACTIVATIONS, default="gelu"),
        attention_bias=reader.boolean("attention_bias", default=True),
        is_parallel=reader.boolean("use_parallel_residual", default=True),
        tied=is_tied,
        layers=(AttentionSpec(num_heads=heads, num_key_value_heads=heads, head_dim=dim, value_dim=dim, scale=dim**-0.5),) * layers,
        rope=read_rope(reader, dim, positions, theta_key="rotary_emb_base", partial=0.25, partial_key="rotary_pct"),
    )


def list_parameters(config: NeoXConfig, prefix: str, head: str | None) -> Iterator[Parameter]:
    """Every parameter in execution order. `prefix` is what the checkpoint puts before the decoder's names, `head` its head's."""
    hidden, inner, embedding = config.hidden_size, config.intermediate_size, (config.vocab_size, config.hidden_size)
    yield Parameter("gpt_neox.embed_in.weight", embedding, "embedding", f"{prefix}embed_in.weight")
    for i in range(len(config.layers)):
        for name, rows, columns, has_bias in (
            ("input_layernorm", hidden, 0, True),
            ("attention.query_key_value", 3 * hidden, hidden, config.attention_bias),
            ("attention.dense", hidden, hidden, config.attention_bias),
            ("post_attention_layernorm", hidden, 0, True),
            ("mlp.dense_h_to_4h", inner, hidden, True),
            ("mlp.dense_4h_to_h", hidden, inner, True),
        ):
            module, stored = f"gpt_neox.layers.{i}.{name}", f"{prefix}layers.{i}.{name}"
            shape = (rows, columns) if columns else (rows,)
            yield Parameter(f"{module}.weight", shape, "linear" if columns else "norm", f"{stored}.weight", i)
            if has_bias:
                yield Parameter(f"{module}.bias", (rows,), "bias" if columns else "norm", f"{stored}.bias", i)
    yield Parameter("gpt_neox.final_layer_norm.weight", (hidden,), "norm", f"{prefix}final_layer_norm.weight")
    yield Parameter("gpt_neox.final_layer_norm.bias", (hidden,), "norm", f"{prefix}final_layer_norm.bias")
    yield Parameter("lm_head.weight", embedding, "head", head)
