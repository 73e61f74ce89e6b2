"""Phi-3 and Phi-4: fused projections, parts of heads that turn, and frequencies that change beyond the trained length."""

from __future__ import annotations

from functools import partial

from attrs import evolve

from modelrig.checkpoint.config import ConfigReader
from modelrig.checkpoint.rope import read_rope
from modelrig.components import Catalog
from modelrig_plugins.architectures.decoder import DecoderConfig, DecoderPlanner, Family, rare_windows


def finish(reader: ConfigReader, config: DecoderConfig, catalog: Catalog) -> DecoderConfig:  # noqa: ARG001 - one of several
    rope = config.ropes[0]
    assert rope is not None
    return evolve(config, restarts_at=rope.original_positions)


PLANNER = DecoderPlanner(
    Family(
        name="phi3",
        max_positions=4096,
        epsilon=1e-5,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        is_fused=True,
        windows=rare_windows,
        rope=partial(read_rope, partial=1.0, renamed={"su": "longrope", "yarn": "longrope"}, original=4096),
        finish=finish,
    )
)
