"""Granite: llama's shape with a factor of its own for embeddings, scores, residuals and logits."""

from __future__ import annotations

from attrs import evolve

from modelrig.checkpoint.config import ConfigReader
from modelrig.components import Catalog
from modelrig_plugins.architectures.decoder import DecoderConfig, DecoderPlanner, Family


def finish(reader: ConfigReader, config: DecoderConfig, catalog: Catalog) -> DecoderConfig:  # noqa: ARG001 - one of several
    def factor(key: str) -> float:
        return reader.number(key, 0.0, 1e9, default=1.0, exclusive=True)

    scale = factor("attention_multiplier")
    return evolve(
        config,
        layers=tuple(evolve(spec, scale=scale) for spec in config.layers),
        embedding_scale=factor("embedding_multiplier"),
        residual_scale=factor("residual_multiplier"),
        logit_scale=1 / factor("logits_scaling"),
    )


PLANNER = DecoderPlanner(Family(name="granite", max_positions=2048, finish=finish))
