"""Qwen3 with experts: in most layers a few of many small feed-forwards, chosen for each token."""

from __future__ import annotations

from attrs import evolve

from modelrig.checkpoint.config import ConfigReader
from modelrig.components import Catalog
from modelrig_plugins.architectures.decoder import (
    DecoderConfig,
    DecoderPlanner,
    Family,
    Windows,
    read_window,
)
from modelrig_plugins.architectures.experts import read_experts
from modelrig_plugins.architectures.reading import LAYER_LIMIT, LIMIT


def windows(reader: ConfigReader, layers: int) -> Windows:
    return (read_window(reader) if reader.boolean("use_sliding_window", default=False) else None,) * layers


def finish(reader: ConfigReader, config: DecoderConfig, catalog: Catalog) -> DecoderConfig:
    step = reader.integer("decoder_sparse_step", 1, LAYER_LIMIT, default=1)
    dense = frozenset(reader.integers("mlp_only_layers", 0, LAYER_LIMIT, default=()))
    experts = read_experts(
        reader,
        catalog,
        count_keys=("num_experts", "num_local_experts"),
        usual=(128, 8),
        size=reader.integer("moe_intermediate_size", 1, LIMIT, default=768),
        renormalises=reader.boolean("norm_topk_prob", default=False),
        layers=tuple((layer + 1) % step == 0 and layer not in dense for layer in range(len(config.layers))),
        folder="mlp",
        names=("gate_proj", "up_proj", "down_proj"),
    )
    return evolve(config, experts=experts)


PLANNER = DecoderPlanner(
    Family(
        name="qwen3_moe",
        max_positions=32_768,
        key_value_heads=4,
        mlp_bias=False,
        qk_norm="heads",
        windows=windows,
        finish=finish,
    )
)
