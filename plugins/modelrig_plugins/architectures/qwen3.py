"""Qwen3: queries and keys of each head are normalised before they are rotated."""

from __future__ import annotations

from modelrig_plugins.architectures.decoder import DecoderPlanner, Family
from modelrig_plugins.architectures.qwen2 import windows

PLANNER = DecoderPlanner(
    Family(
        name="qwen3",
        max_positions=32_768,
        key_value_heads=32,
        head_dim=128,
        mlp_bias=False,
        qk_norm="heads",
        windows=windows,
    )
)
