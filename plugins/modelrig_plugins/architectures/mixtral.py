"""Mixtral: in every layer a few of several feed-forwards, chosen for each token."""

from __future__ import annotations

from functools import partial

from attrs import evolve

from modelrig.checkpoint.config import ConfigReader
from modelrig.checkpoint.rope import read_rope
from modelrig.components import Catalog
from modelrig_plugins.architectures.decoder import DecoderConfig, DecoderPlanner, Family, rare_windows
from modelrig_plugins.architectures.experts import read_experts


def finish(reader: ConfigReader, config: DecoderConfig, catalog: Catalog) -> DecoderConfig:
    experts = read_experts(
        reader,
        catalog,
        count_keys=("num_local_experts", "num_experts"),
        usual=(8, 2),
        size=config.intermediate_size,
        renormalises=True,
        layers=(True,) * len(config.layers),
        folder="block_sparse_moe",
        names=("w1", "w3", "w2"),
    )
    return evolve(config, experts=experts)


PLANNER = DecoderPlanner(
    Family(
        name="mixtral",
        max_positions=131_072,
        key_value_heads=8,
        epsilon=1e-5,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        windows=rare_windows,
        rope=partial(read_rope, theta=1e6),
        finish=finish,
    )
)
