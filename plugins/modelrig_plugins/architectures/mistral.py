"""Mistral: every layer sees a window of the last tokens, or all of them where `sliding_window` is null."""

from __future__ import annotations

from modelrig_plugins.architectures.decoder import DecoderPlanner, Family, same_windows

PLANNER = DecoderPlanner(
    Family(
        name="mistral",
        max_positions=131_072,
        key_value_heads=8,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        windows=same_windows,
    )
)
