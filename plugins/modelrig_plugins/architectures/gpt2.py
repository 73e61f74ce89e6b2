"""GPT-2: learned positions, and weights that are stored as [in, out]."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from modelrig.checkpoint.activations import ACTIVATIONS
from modelrig.checkpoint.config import ConfigReader
from modelrig.components import AttentionSpec, Catalog, ModelFacts, Parameter, Part
from modelrig_plugins.architectures.reading import LIMIT, POSITION_LIMIT, parse, read_layers, read_tie, require_head_dim


@frozen(kw_only=True)
class GPT2Config:
    hidden_size: int
    inner_size: int
    vocab_size: int
    positions: int
    epsilon: float
    activation: str
    tied: bool
    layers: tuple[AttentionSpec, ...]


class GPT2Planner:
    @staticmethod
    def describe(config: Mapping[str, Any], catalog: Catalog, path: Path) -> ModelFacts:
        parsed, dtype = parse(config, path, lambda reader: read_config(reader, catalog))
        prefix = "" if "wte.weight" in catalog.entries else "transformer."  # saved as a base model
        return ModelFacts(
            architecture="gpt2",
            config=parsed,
            parameters=tuple(list_parameters(parsed, prefix)),
            blocks=tuple(f"transformer.h.{i}" for i in range(len(parsed.layers))),
            layers=parsed.layers,
            ties={"lm_head.weight": "transformer.wte.weight"} if parsed.tied else {},
            hidden_size=parsed.hidden_size,
            intermediate_size=parsed.inner_size,
            vocab_size=parsed.vocab_size,
            context_length=parsed.positions,
            position_limit=parsed.positions,
            dtype=dtype,
            # masks that old versions of transformers stored with the weights
            ignored=tuple(name for name in catalog.entries if name.endswith((".attn.bias", ".attn.masked_bias"))),
        )


PLANNER = GPT2Planner


def read_config(reader: ConfigReader, catalog: Catalog) -> GPT2Config:
    hidden = reader.integer("n_embd", 1, LIMIT, aliases=("hidden_size",))
    heads = reader.integer("n_head", 1, LIMIT, aliases=("num_attention_heads",))
    layers = read_layers(reader, "n_layer", catalog, "h.", ("", "transformer."))
    require_head_dim(reader, hidden, heads, "n_embd", "n_head")
    crosses = reader.boolean("add_cross_attention", default=False)
    reader.require(not crosses, "CF-ENUM", "add_cross_attention", "true; a decoder beside an encoder is not served")
    head_dim = max(1, hidden // heads)
    scale = head_dim**-0.5 if reader.boolean("scale_attn_weights", default=True) else 1.0
    by_layer = reader.boolean("scale_attn_by_inverse_layer_idx", default=False)
    return GPT2Config(
        hidden_size=hidden,
        inner_size=reader.integer("n_inner", 1, LIMIT, default=4 * hidden),
        vocab_size=reader.integer("vocab_size", 1, LIMIT, default=50_257),
        positions=reader.integer("n_positions", 1, POSITION_LIMIT, default=1024, aliases=("max_position_embeddings",)),
        epsilon=reader.number("layer_norm_epsilon", 0.0, 1.0, default=1e-5, exclusive=True),
        activation=reader.choice("activation_function", ACTIVATIONS, default="gelu_new"),
        tied=read_tie(reader, catalog, default=True),
        layers=tuple(
            AttentionSpec(
                num_heads=heads,
                num_key_value_heads=heads,
                head_dim=head_dim,
                value_dim=head_dim,
                scale=scale / (layer + 1) if by_layer else scale,
            )
            for layer in range(layers)
        ),
    )


def list_parameters(config: GPT2Config, prefix: str) -> Iterator[Parameter]:
    """Every parameter in execution order. `prefix` is what the checkpoint puts before the decoder's names."""
    hidden, inner, embedding = config.hidden_size, config.inner_size, (config.vocab_size, config.hidden_size)
    yield Parameter("transformer.wte.weight", embedding, "embedding", f"{prefix}wte.weight")
    yield Parameter("transformer.wpe.weight", (config.positions, hidden), "embedding", f"{prefix}wpe.weight")
    for i in range(len(config.layers)):
        for name, rows, columns in (
            ("ln_1", hidden, 0),
            ("attn.c_attn", 3 * hidden, hidden),
            ("attn.c_proj", hidden, hidden),
            ("ln_2", hidden, 0),
            ("mlp.c_fc", inner, hidden),
            ("mlp.c_proj", hidden, inner),
        ):
            module, stored = f"transformer.h.{i}.{name}", f"{prefix}h.{i}.{name}"
            if columns:
                part = Part(f"{stored}.weight", (columns, rows), axes=(columns, rows), order=(1, 0))
                yield Parameter(f"{module}.weight", (rows, columns), "linear", None, i, (part,))
            else:
                yield Parameter(f"{module}.weight", (rows,), "norm", f"{stored}.weight", i)
            yield Parameter(f"{module}.bias", (rows,), "bias" if columns else "norm", f"{stored}.bias", i)
    yield Parameter("transformer.ln_f.weight", (hidden,), "norm", f"{prefix}ln_f.weight")
    yield Parameter("transformer.ln_f.bias", (hidden,), "norm", f"{prefix}ln_f.bias")
    yield Parameter("lm_head.weight", embedding, "head", None if config.tied else "lm_head.weight")
