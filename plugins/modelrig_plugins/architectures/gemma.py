"""Gemma: embeddings scaled by the root of their size, and norms whose weight is added to 1."""

from __future__ import annotations

from attrs import evolve

from modelrig.checkpoint.config import ConfigReader
from modelrig.components import Catalog
from modelrig_plugins.architectures.decoder import DecoderConfig, DecoderPlanner, Family, refuse_bidirectional


def scale_embeddings(config: DecoderConfig) -> DecoderConfig:
    return evolve(config, embedding_scale=config.hidden_size**0.5, rounds_scale=True)


def finish(reader: ConfigReader, config: DecoderConfig, catalog: Catalog) -> DecoderConfig:  # noqa: ARG001 - one of several
    refuse_bidirectional(reader)
    # Early configs say "gelu" and mean its approximation, which these models were trained with.
    return scale_embeddings(evolve(config, hidden_act="gelu_pytorch_tanh") if config.hidden_act == "gelu" else config)


PLANNER = DecoderPlanner(
    Family(
        name="gemma",
        max_positions=8192,
        key_value_heads=16,
        head_dim=256,
        activation="gelu_pytorch_tanh",
        tied=True,
        mlp_bias=False,
        norm="offset",
        finish=finish,
    )
)
