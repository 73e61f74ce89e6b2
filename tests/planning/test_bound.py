"""What a step reads: every weight once but tables that are looked up, of experts those that are chosen, and keys and values."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from checkpoints import write_llama
from modelrig.planning.bound import step_bytes
from modelrig.planning.pipeline import make_plan


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dense_model_reads_all_but_its_embeddings(tmp_path: Path, tied: bool, dtype: str) -> None:
    write_llama(tmp_path, tie_word_embeddings=tied)
    plan = make_plan(tmp_path, dtype=dtype, batch=3)
    size = {"float32": 4, "bfloat16": 2}[dtype]
    expected = size * sum(math.prod(one.shape) for one in plan.facts.parameters if one.role != "embedding")
    read = step_bytes(plan, 17)
    assert expected == read.weights
    kept = sum(spec.num_key_value_heads * (spec.head_dim + spec.value_dim) for spec in plan.facts.cached_layers)
    assert read.cache >= 3 * 17 * size * kept
    assert read.total == read.weights + read.cache


def test_of_experts_those_count_that_tokens_choose(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    stacked = 4 * sum(math.prod(one.shape) for one in make_plan(tmp_path).facts.parameters if one.role == "experts")
    others = 4 * sum(math.prod(o.shape) for o in make_plan(tmp_path).facts.parameters if o.role not in ("experts", "embedding"))
    assert stacked == 4 * 2 * 4 * 3 * 16 * 24
    assert others + stacked / 4 == step_bytes(make_plan(tmp_path), 1).weights
    assert others + stacked * (1 - 0.75**2) == step_bytes(make_plan(tmp_path, batch=2), 1).weights
