"""Gemma 3, the language model: layers with a window turn by frequencies of their own, and most have one."""

from __future__ import annotations

from attrs import evolve

from modelrig.checkpoint.config import ConfigReader
from modelrig.checkpoint.rope import THETA, RopeSpec, rope_from
from modelrig.components import Catalog
from modelrig_plugins.architectures.decoder import (
    FULL,
    SLIDING,
    DecoderConfig,
    DecoderPlanner,
    Family,
    Windows,
    read_layer_types,
    read_window,
    refuse_bidirectional,
)
from modelrig_plugins.architectures.gemma import scale_embeddings
from modelrig_plugins.architectures.gemma2 import read_cap, scale_scores
from modelrig_plugins.architectures.reading import LAYER_LIMIT


def windows(reader: ConfigReader, layers: int) -> Windows:
    window = read_window(reader)
    pattern = reader.integer("sliding_window_pattern", 1, LAYER_LIMIT, default=6, aliases=("_sliding_window_pattern",))
    usual = tuple(window if (layer + 1) % pattern else None for layer in range(layers))
    return read_layer_types(reader, layers, window, usual)


def read_full_rope(reader: ConfigReader, head_dim: int, max_positions: int) -> RopeSpec:
    """Of layers that see everything: `rope_parameters.full_attention`, or `rope_theta` and `rope_scaling`."""
    theta = reader.number("rope_theta", *THETA, default=1e6)
    settings = reader.child("rope_parameters")
    if settings is not None:
        flat = sorted(set(settings.values) - {FULL, SLIDING})
        text = f"{', '.join(flat[:5])}; {FULL} and {SLIDING} are needed, each with settings of its own"
        reader.require(not flat, "CF-REL", "rope_parameters", text)
    settings = reader.child("rope_scaling") if settings is None else settings.child(FULL)
    return evolve(rope_from(settings, head_dim, max_positions, theta=theta), max_positions=max_positions)


def read_sliding_rope(reader: ConfigReader, head_dim: int, max_positions: int) -> RopeSpec:
    theta = reader.number("rope_local_base_freq", *THETA, default=1e4)
    settings = reader.child("rope_parameters")
    return rope_from(None if settings is None else settings.child(SLIDING), head_dim, max_positions, theta=theta)


def finish(reader: ConfigReader, config: DecoderConfig, catalog: Catalog) -> DecoderConfig:  # noqa: ARG001 - one of several
    refuse_bidirectional(reader)
    config = scale_embeddings(scale_scores(reader, config))
    full = config.ropes[0]
    assert full is not None
    sliding = read_sliding_rope(reader, full.dim, full.max_positions)
    return evolve(
        config,
        context_length=full.max_positions,  # the scaling is in it
        ropes=tuple(full if spec.window is None else sliding for spec in config.layers),
        logit_cap=read_cap(reader, "final_logit_softcapping", None),
    )


PLANNER = DecoderPlanner(
    Family(
        name="gemma3_text",
        max_positions=131_072,
        key_value_heads=4,
        head_dim=256,
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        tied=True,
        mlp_bias=False,
        norm="offset",
        qk_norm="heads",
        block="both",
        windows=windows,
        rope=read_full_rope,
        finish=finish,
    )
)
