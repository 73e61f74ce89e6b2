"""Qwen2 and 2.5: biases on queries, keys and values, and windows in the layers that `layer_types` names."""

from __future__ import annotations

from modelrig.checkpoint.config import ConfigReader
from modelrig_plugins.architectures.decoder import (
    DecoderPlanner,
    Family,
    Windows,
    read_layer_types,
    read_window,
)
from modelrig_plugins.architectures.reading import LAYER_LIMIT


def windows(reader: ConfigReader, layers: int) -> Windows:
    """Of older configs, the layers from `max_window_layers` on, where `use_sliding_window` allows any."""
    window = read_window(reader) if reader.boolean("use_sliding_window", default=False) else None
    first = reader.integer("max_window_layers", 0, LAYER_LIMIT, default=28) if window is not None else layers
    usual = tuple(None if layer < first else window for layer in range(layers))
    return read_layer_types(reader, layers, window, usual)


PLANNER = DecoderPlanner(
    Family(
        name="qwen2",
        max_positions=32_768,
        key_value_heads=32,
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        windows=windows,
    )
)
