"""Every decoder family in every shape its files come in: sharded, `.bin`, a base model alone, saved here and read there."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import modelrig
from checkpoints import assert_close, tokens, write_decoder
from modelrig.errors import CodeRefused, ConfigError, LoadError

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4, "num_local_experts": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {}, "Mistral": {}, "Mixtral": {"num_local_experts": 4}, "Qwen2": {}, "Qwen3": {"head_dim": 8}, "Qwen3Moe": EXPERTS,
    "Gemma": {"head_dim": 8}, "Gemma2": {"head_dim": 8, "sliding_window": 9}, "Gemma3Text": {"head_dim": 8, "sliding_window": 9},
    "Phi3": {}, "Olmo2": {}, "Granite": {}, "SmolLM3": {}, "GPT2": {}, "GPTNeoX": {"num_attention_heads": 3},
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def test_shards_are_read_and_what_is_saved_here_is_read_there(family: str, tmp_path: Path) -> None:
    reference = write_decoder(tmp_path / "theirs", family, max_shard_size="30KB", **FAMILIES[family])
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    model, ids = modelrig.load(tmp_path / "theirs"), tokens(2, 19)
    expected = reference(ids).logits
    assert_close(expected, model(ids))
    for form in ("safetensors", "pytorch_bin"):
        model.save(tmp_path / form, format=form, max_shard_size=30_000)
        again = type(reference).from_pretrained(
            tmp_path / form, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        assert_close(expected, again(ids).logits)
        assert torch.equal(model(ids), modelrig.load(tmp_path / form)(ids))


@pytest.mark.parametrize("names", ["of the checkpoint", "of the module"])
@torch.no_grad()
def test_bin_files_are_read(family: str, tmp_path: Path, names: str) -> None:
    """Names of transformers' modules differ from those it saves: experts are stacked, heads called otherwise."""
    reference = write_decoder(tmp_path, family, **FAMILIES[family])
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file) if names == "of the checkpoint" else reference.state_dict()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    file.unlink()
    ids = tokens(2, 19)
    assert_close(reference(ids).logits, modelrig.load(tmp_path)(ids))


@torch.no_grad()
def test_a_base_model_saved_without_its_head_is_read_where_the_head_is_tied(family: str, tmp_path: Path) -> None:
    reference = write_decoder(tmp_path / "whole", family, tie_word_embeddings=True, **FAMILIES[family])
    reference.base_model.save_pretrained(tmp_path / "base")
    ids = tokens(2, 19)
    assert_close(reference(ids).logits, modelrig.load(tmp_path / "base")(ids))


@torch.no_grad()
def test_a_head_that_is_stored_is_used_and_stays_used_when_saved(family: str, tmp_path: Path) -> None:
    """Where the config says nothing, and the family usually ties its head."""
    reference = write_decoder(tmp_path / "theirs", family, tie_word_embeddings=False, **FAMILIES[family])
    file = tmp_path / "theirs/config.json"
    config = json.loads(file.read_text())
    config.pop("tie_word_embeddings", None)
    file.write_text(json.dumps(config))
    ids, model = tokens(2, 19), modelrig.load(tmp_path / "theirs")
    expected = reference(ids).logits
    assert_close(expected, model(ids))
    model.save(tmp_path / "ours")
    again = type(reference).from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    assert_close(expected, again(ids).logits)


@pytest.mark.parametrize("cache", ["static", {"name": "sliding", "headroom": 4}], ids=["static", "sliding"])
@torch.no_grad()
def test_a_step_is_one_graph(family: str, tmp_path: Path, cache: Any) -> None:
    write_decoder(tmp_path, family, **FAMILIES[family])
    model, ids = modelrig.load(tmp_path, cache=cache), tokens(2, 19)
    torch._dynamo.reset()
    step = torch.compile(model.step, fullgraph=True, backend="eager", dynamic=False)
    held, traced = model.new_cache(batch=2, max_len=25), []
    for part in (ids[:, :17], ids[:, 17:18], ids[:, 18:]):
        traced.append(step(part, held.begin(part.shape[1])))
        held.commit(part.shape[1])
    assert_close(model(ids), torch.cat(traced, dim=1))


@pytest.mark.parametrize("cache", ["static", {"name": "sliding", "headroom": 4}], ids=["static", "sliding"])
def test_planned_bytes_are_measured_ones(family: str, tmp_path: Path, cache: Any) -> None:
    write_decoder(tmp_path, family, **FAMILIES[family])
    plan = modelrig.plan(tmp_path, dtype="bfloat16", context=37, batch=3, cache=cache)
    model = plan.load()
    planned = sum(line.bytes for line in plan.ledger if line.moment == "steady" and "weights" in line.what)
    assert model.memory()["weights"] == planned
    assert model.new_cache(batch=3).nbytes == sum(line.bytes for line in plan.ledger if "cache" in line.what)


def test_a_plan_of_what_transformers_wrote_notes_nothing_odd(family: str, tmp_path: Path) -> None:
    write_decoder(tmp_path, family, **FAMILIES[family])
    assert () == modelrig.plan(tmp_path).notes


def test_the_plan_tells_layers_that_see_a_window_from_those_that_see_all(tmp_path: Path) -> None:
    write_decoder(tmp_path, "Gemma3Text", head_dim=8, num_hidden_layers=7, sliding_window=9)
    plan = modelrig.plan(tmp_path, context=37, batch=3, dtype="bfloat16", cache="static")
    each = 2 * 2 * 8 * 37 * 3 * 2  # keys and values of 2 heads, 8 wide
    expected = [
        {"kind": "sliding", "window": 9, "layers": 6, "cache_bytes": 6 * each},
        {"kind": "full", "window": None, "layers": 1, "cache_bytes": each},
    ]
    assert expected == plan.to_json()["facts"]["layer_kinds"]
    assert plan.load().new_cache(batch=3).nbytes == 7 * each
    assert "6 sliding, 1 full" in plan.explain() and "a window of 9 tokens" in plan.explain()


def test_a_config_that_contradicts_the_tensors_is_refused(family: str, tmp_path: Path) -> None:
    write_decoder(tmp_path, family, **FAMILIES[family])
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    layers = "n_layer" if family == "GPT2" else "num_hidden_layers"
    file.write_text(json.dumps(config | {layers: 4}))
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        modelrig.plan(tmp_path)
    file.write_text(json.dumps(config | {"vocab_size": 96}))
    with pytest.raises(LoadError, match="96"):
        modelrig.plan(tmp_path)
    file.write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}, "model_type": "evil"}))
    with pytest.raises(CodeRefused):
        modelrig.plan(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "locus"),
    [
        ("Mixtral", {"num_local_experts": 5}, "num_local_experts"),
        ("Mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ("Mixtral", {"num_local_experts": 60_000}, "num_local_experts"),
        ("Qwen3Moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("Qwen3Moe", {"mlp_only_layers": "all"}, "mlp_only_layers"),
        ("Gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("Gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
        ("Gemma3Text", {"layer_types": ["full_attention"]}, "layer_types"),
        ("Gemma3Text", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters"),
        ("Phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}},
         "rope_parameters.short_factor"),
        ("Phi3", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "rope_parameters.partial_rotary_factor"),
        ("Granite", {"logits_scaling": 0}, "logits_scaling"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("SmolLM3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ("GPT2", {"n_head": 5}, "n_embd"),
        ("GPT2", {"add_cross_attention": True}, "add_cross_attention"),
        ("Phi3", {"rope_parameters": None, "partial_rotary_factor": 0.1}, "partial_rotary_factor"),
        ("GPTNeoX", {"hidden_act": "os.system"}, "hidden_act"),
        ("GPTNeoX", {"rope_parameters": None, "rotary_pct": 0.2}, "rotary_pct"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused(tmp_path: Path, family: str, changes: dict[str, Any], locus: str) -> None:
    write_decoder(tmp_path, family, **FAMILIES[family])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError) as caught:
        modelrig.plan(tmp_path)
    assert locus == caught.value.locus


@pytest.mark.parametrize(
    ("family", "name"), [("Mixtral", "block_sparse_moe.experts.{}.w1"), ("Qwen3Moe", "mlp.experts.{}.up_proj")]
)
def test_a_number_in_one_name_makes_no_plan_long(tmp_path: Path, family: str, name: str) -> None:
    write_decoder(tmp_path, family, **FAMILIES[family])
    safetensors.torch.save_file(
        {f"model.layers.1023.{name.format(4095)}.weight": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"num_hidden_layers": 1024, "num_local_experts": 4096, "num_experts": 4096}
    file.write_text(json.dumps(config | {"mlp_only_layers": [16384] * 200_000}))
    started = time.process_time()
    with pytest.raises(ConfigError, match="4096 in each of 1024 layers are 12582912 tensors, the tensor files hold 1"):
        modelrig.plan(tmp_path)
    assert time.process_time() - started < 20  # it took minutes


def test_experts_are_mapped_from_their_files_as_planned(tmp_path: Path) -> None:
    """Those that are large enough: here 1.1 MB each. The rest of their tensors is less than a page on either side of each."""
    write_decoder(tmp_path, "Mixtral", num_local_experts=3, hidden_size=384, intermediate_size=768, num_hidden_layers=1)
    plan = modelrig.plan(tmp_path)
    model = plan.load()
    mapped = sum(line.bytes for line in plan.ledger if line.moment == "steady" and "mapped" in line.what)
    assert model.load_report.mapped_bytes == mapped
    assert mapped > 0.9 * model.memory()["weights"]
