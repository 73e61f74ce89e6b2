"""SmolLM3: some layers know no positions."""

from __future__ import annotations

from functools import partial

from attrs import evolve

from modelrig.checkpoint.config import ConfigReader
from modelrig.checkpoint.rope import read_rope
from modelrig.components import Catalog
from modelrig_plugins.architectures.decoder import (
    DecoderConfig,
    DecoderPlanner,
    Family,
    Windows,
    read_layer_types,
    read_window,
    require_each,
)
from modelrig_plugins.architectures.reading import LAYER_LIMIT


def turning(reader: ConfigReader, layers: int) -> tuple[bool, ...]:
    """Whether each layer turns by positions: `no_rope_layers` has a 1 for those that do."""
    interval = reader.integer("no_rope_layer_interval", 1, LAYER_LIMIT, default=4)
    turns = reader.integers("no_rope_layers", 0, 1, default=None)
    if turns is None:
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    require_each(reader, "no_rope_layers", len(turns), layers)
    return tuple(turn == 1 for turn in turns)


def windows(reader: ConfigReader, layers: int) -> Windows:
    window = read_window(reader, usual=None)
    usual = window if reader.boolean("use_sliding_window", default=False) else None
    return read_layer_types(reader, layers, window, tuple(None if turns else usual for turns in turning(reader, layers)))


def finish(reader: ConfigReader, config: DecoderConfig, catalog: Catalog) -> DecoderConfig:  # noqa: ARG001 - one of several
    turns = turning(reader, len(config.layers))
    return evolve(config, ropes=tuple(rope if turn else None for rope, turn in zip(config.ropes, turns, strict=False)))


PLANNER = DecoderPlanner(
    Family(
        name="smollm3",
        max_positions=32_768,
        key_value_heads=4,
        tied=True,
        windows=windows,
        rope=partial(read_rope, theta=2e6),
        finish=finish,
    )
)
