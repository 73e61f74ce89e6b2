"""Gemma 2: capped scores and logits, norms on both sides, and windows in every other layer."""

from __future__ import annotations

from attrs import evolve

from modelrig.checkpoint.config import ConfigReader
from modelrig.components import Catalog
from modelrig_plugins.architectures.decoder import (
    DecoderConfig,
    DecoderPlanner,
    Family,
    Windows,
    read_layer_types,
    read_window,
    refuse_bidirectional,
)
from modelrig_plugins.architectures.gemma import scale_embeddings
from modelrig_plugins.architectures.reading import LIMIT


def windows(reader: ConfigReader, layers: int) -> Windows:
    window = read_window(reader)
    return read_layer_types(reader, layers, window, tuple(None if layer % 2 else window for layer in range(layers)))


def finish(reader: ConfigReader, config: DecoderConfig, catalog: Catalog) -> DecoderConfig:  # noqa: ARG001 - one of several
    refuse_bidirectional(reader)
    layers = scale_scores(reader, config).layers
    softcap = read_cap(reader, "attn_logit_softcapping", 50.0)
    return scale_embeddings(
        evolve(
            config,
            layers=tuple(evolve(spec, softcap=softcap) for spec in layers),
            logit_cap=read_cap(reader, "final_logit_softcapping", 30.0),
        )
    )


def scale_scores(reader: ConfigReader, config: DecoderConfig) -> DecoderConfig:
    """Scores are scaled by a number of its own, not by the size of a head."""
    scale = reader.number("query_pre_attn_scalar", 0.0, LIMIT, default=256.0, exclusive=True) ** -0.5
    return evolve(config, layers=tuple(evolve(spec, scale=scale) for spec in config.layers))


def read_cap(reader: ConfigReader, key: str, usual: float | None) -> float | None:
    """What scores or logits stay below; null for none."""
    return reader.number(key, 0.0, 1e9, default=None if key in reader.values else usual, exclusive=True)


PLANNER = DecoderPlanner(
    Family(
        name="gemma2",
        max_positions=8192,
        key_value_heads=4,
        head_dim=256,
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        tied=True,
        mlp_bias=False,
        norm="offset",
        block="both",
        windows=windows,
        finish=finish,
    )
)
