"""Rotary settings are read from both spellings; what they contradict each other in, or no float can hold, is told with its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelrig.checkpoint.config import ConfigReader
from modelrig.checkpoint.rope import RopeSpec, read_rope
from modelrig.errors import ConfigError

LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(max_positions: int = 64, **config: Any) -> RopeSpec:
    with ConfigReader(config, Path("config.json")) as reader:
        return read_rope(reader, 8, max_positions)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": LINEAR, "rope_theta": 5e5},
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 5e5},
        {"rope_parameters": {**LINEAR, "rope_theta": 5e5}},
        {"rope_parameters": LINEAR, "rope_theta": 5e5},
        {"rope_parameters": {**LINEAR, "rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 5e5},
        {"rope_parameters": {}, "rope_scaling": LINEAR, "rope_theta": 5e5},
        {"rope_parameters": None, "rope_scaling": {**LINEAR, "type": "linear"}, "rope_theta": 5e5},
    ],
)
def test_every_spelling_gives_the_same_settings(config: dict[str, Any]) -> None:
    assert RopeSpec(kind="linear", theta=5e5, dim=8, max_positions=64, factor=2.0, high_frequency_factor=1.0) == read(**config)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"rope_parameters": {**LINEAR, "factor": 4.0}, "rope_scaling": LINEAR}, "rope_scaling.factor"),
        ({"rope_parameters": {**LINEAR, "rope_type": "dynamic"}, "rope_scaling": LINEAR}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type"),
        ({"rope_parameters": {**LINEAR, "rope_theta": 1e4}, "rope_theta": 5e5}, "rope_theta"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "rope_scaling.high_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 5.0}}, "rope_scaling.high_freq_factor"),
    ],
)
def test_values_that_contradict_each_other_are_told(config: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**config)
    assert ("CF-REL", key) == (caught.value.code, caught.value.locus)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"factor": 0}, "factor"),
        ({"factor": -2.0}, "factor"),
        ({"factor": 1e300}, "factor"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({"original_max_position_embeddings": 1 << 41}, "original_max_position_embeddings"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": 1e-300}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"beta_fast": 1e-310}, "beta_fast"),
        ({"beta_slow": 1e-7}, "beta_slow"),
        ({"beta_slow": -1}, "beta_slow"),
        ({"attention_factor": -1}, "attention_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_a_value_no_frequency_can_come_of_is_told(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(rope_scaling={**YARN, **changes})
    assert ("CF-RANGE", f"rope_scaling.{key}") == (caught.value.code, caught.value.locus)


def test_zero_stands_for_the_usual_bounds_of_yarn() -> None:
    assert read(rope_scaling=YARN) == read(rope_scaling={**YARN, "beta_fast": 0, "beta_slow": 0.0})


@pytest.mark.parametrize(("factor", "context"), [(2.0, 128), (1.0, 64), (0.01, 1), (1e9, 64 * 10**9)])
def test_a_factor_stretches_the_context_to_one_token_at_least(factor: float, context: int) -> None:
    assert context == read(rope_scaling={**LINEAR, "factor": factor}).context_length
