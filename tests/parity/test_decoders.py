"""Logits and greedy tokens of families of llama's shape equal transformers' at the same weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import modelrig
from checkpoints import assert_close, random_decoder, tokens, write_decoder, write_llama
from modelrig.errors import CacheError, ConfigError

Record = Callable[[str, object], None]

SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "rope_theta": 1e4}
WINDOWS = {"use_sliding_window": True, "sliding_window": 7}
LLAMAS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "one key head, head_dim of its own, biases": {
        "num_key_value_heads": 1, "head_dim": 20, "attention_bias": True, "mlp_bias": True,
    },
    "a key head for each query head": {"num_key_value_heads": 6},
    "tied embeddings": {"tie_word_embeddings": True},
    "head_dim 2, odd width": {"hidden_size": 35, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 2},
    "head_dim 14 with odd head counts": {
        "hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 37,
    },
    "wide heads": {"head_dim": 130, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 50},
    "gelu": {"hidden_act": "gelu", "rms_norm_eps": 1e-3},
    "gelu_pytorch_tanh, large theta": {
        "hidden_act": "gelu_pytorch_tanh", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
    "dynamic rope within its length": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 20, "rope_theta": 5e5,
        }
    },
    "yarn rope": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "rope_theta": 1e4},
    },
    "yarn rope with its own attention factor, not truncated": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 20, "rope_theta": 1e4, "attention_factor": 1.3,
            "beta_fast": 16, "beta_slow": 2, "truncate": False,
        }
    },
    "yarn rope with mscale": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "rope_theta": 1e4, "mscale": 0.7,
            "mscale_all_dim": 1.2,
        },
        "tie_word_embeddings": True,
    },
}  # fmt: skip
#: name → family, what its config says besides checkpoints.TINY_LLAMA
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"llama, {name}": ("Llama", config) for name, config in LLAMAS.items()},
    "mistral, a window shorter than the prompt": ("Mistral", {"sliding_window": 6}),
    "mistral, a window of one": ("Mistral", {"sliding_window": 1, "tie_word_embeddings": True}),
    "mistral without a window": ("Mistral", {"sliding_window": None, "head_dim": 10}),
    "mistral, one key head": ("Mistral", {"sliding_window": 20, "num_key_value_heads": 1, "hidden_act": "gelu"}),
    "qwen2": ("Qwen2", {}),
    "qwen2, windows from the second layer on": ("Qwen2", WINDOWS | {"max_window_layers": 1}),
    "qwen2, layer types": (
        "Qwen2",
        WINDOWS | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "tie_word_embeddings": True},
    ),
    "qwen2, yarn": ("Qwen2", {"rope_parameters": SCALED}),
    "qwen3": ("Qwen3", {"head_dim": 22}),
    "qwen3, biases and windows": ("Qwen3", WINDOWS | {"attention_bias": True, "max_window_layers": 2, "head_dim": 6}),
    "qwen3, tied, wide heads": ("Qwen3", {"head_dim": 64, "tie_word_embeddings": True, "num_key_value_heads": 6}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral, a window, one expert at a time, tied": (
        "Mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 9, "tie_word_embeddings": True, "head_dim": 12},
    ),
    "mixtral, every expert": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 4, "hidden_act": "gelu"}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 10}),
    "qwen3_moe, some layers dense, weights renormalised, biases": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 11,
        },
    ),
    "qwen3_moe, a layer left out": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
    ),
    "gemma": ("Gemma", {"head_dim": 14}),
    "gemma, gelu that means its approximation, one key head, biases, not tied": (
        "Gemma",
        {
            "head_dim": 20,
            "hidden_act": "gelu",
            "num_key_value_heads": 1,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma2": ("Gemma2", {"head_dim": 14, "sliding_window": 7}),
    "gemma2, caps and scale of its own": (
        "Gemma2",
        {
            "head_dim": 10,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 37,
            "sliding_window": 12,
            "attention_bias": True,
            "hidden_activation": "gelu",
        },
    ),
    "gemma2, no caps, layer types": (
        "Gemma2",
        {
            "head_dim": 8,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "tie_word_embeddings": False,
        },
    ),
    "gemma3_text": ("Gemma3Text", {"head_dim": 14, "sliding_window": 6}),
    "gemma3_text, a pattern, scaled": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 9,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3_text, a cap, biases, not tied": (
        "Gemma3Text",
        {
            "head_dim": 6,
            "sliding_window": 15,
            "final_logit_softcapping": 4.0,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3", {}),
    "phi3, a window, a part of each head": (
        "Phi3",
        {"sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi3, longrope within its length": (
        "Phi3",
        {
            "max_position_embeddings": 320,
            "original_max_position_embeddings": 160,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.3, 1.7],
                "long_factor": [1.5, 2.0, 4.0, 9.0],
            },
        },
    ),
    "llama, longrope within its length": (
        "Llama",
        {
            "max_position_embeddings": 320,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.3, 1.7],
                "factor": 3.0,
                "long_factor": [1.5, 2.0, 4.0, 9.0],
                "original_max_position_embeddings": 120,
            },
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo2, one key head, biases, tied": (
        "Olmo2",
        {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True, "rope_parameters": SCALED},
    ),
    "granite": (
        "Granite",
        {"embedding_multiplier": 3.3, "residual_multiplier": 0.22, "attention_multiplier": 0.4, "logits_scaling": 6.5},
    ),
    "granite, biases, tied": (
        "Granite",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 6},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "smollm3, layers without positions have a window": (
        "SmolLM3",
        {
            "no_rope_layers": [1, 0, 0],
            "use_sliding_window": True,
            "sliding_window": 7,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "gpt2": ("GPT2", {}),
    "gpt2, scales by layer, not tied": (
        "GPT2",
        {
            "scale_attn_by_inverse_layer_idx": True,
            "scale_attn_weights": False,
            "tie_word_embeddings": False,
            "activation_function": "relu",
            "hidden_size": 35,
            "num_attention_heads": 5,
        },
    ),
    "gpt_neox": ("GPTNeoX", {"num_attention_heads": 3}),
    "gpt_neox, one after the other, no biases, tied": (
        "GPTNeoX",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_new",
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
    ),
}


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "_"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """The reference, and the folder it was saved to."""
    folder = tmp_path_factory.mktemp("pair")
    family, config = CONFIGS[request.param]
    yield write_decoder(folder, family, seed=3, **config), folder


def require_served(reference: Any, attention: str) -> None:
    if (
        attention == "sdpa"
        and getattr(reference.config, "attn_logit_softcapping", None)
        and reference.config.model_type == "gemma2"
    ):
        pytest.skip("torch's kernel caps no scores, so the plan refuses it")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_without_a_cache(pair: tuple[Any, Path], attention: str, record_property: Record) -> None:
    reference, folder = pair
    require_served(reference, attention)
    ids = tokens(2, 41)
    record_property("error", assert_close(reference(ids).logits, modelrig.load(folder, attention=attention)(ids)))


@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_prompts_that_arrive_in_chunks(pair: tuple[Any, Path], cache: str, attention: str) -> None:
    reference, folder = pair
    require_served(reference, attention)
    ids = tokens(3, 53)
    model = modelrig.load(folder, cache=cache, attention=attention)
    held = model.new_cache(batch=3, max_len=53)
    parts = [model(ids[:, start:stop], cache=held) for start, stop in ((0, 17), (17, 18), (18, 40), (40, 41), (41, 53))]
    assert_close(reference(ids).logits, torch.cat(parts, dim=1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(pair: tuple[Any, Path], side: str) -> None:
    reference, folder = pair
    lengths = (19, 5, 12)
    rows = [tokens(1, length, seed=length)[0] for length in lengths]
    ids = torch.zeros(3, 19, dtype=torch.int64)
    mask = torch.zeros(3, 19, dtype=torch.int64)
    places = [slice(19 - n, 19) if side == "left" else slice(0, n) for n in lengths]
    for row, (place, values) in enumerate(zip(places, rows, strict=True)):
        ids[row, place], mask[row, place] = values, 1
    model = modelrig.load(folder)
    cache = model.new_cache(batch=3, max_len=24)
    without_cache, with_cache = model(ids, attention_mask=mask), model(ids, cache=cache, attention_mask=mask)
    following = model(tokens(3, 2), cache=cache)
    for row, (place, values) in enumerate(zip(places, rows, strict=True)):
        with torch.no_grad():
            expected = reference(torch.cat((values, tokens(3, 2)[row]))[None]).logits[0]
        assert_close(expected[:-2], without_cache[row, place])
        assert_close(expected[:-2], with_cache[row, place])
        assert_close(expected[-2:], following[row])


@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding"])
def test_greedy_tokens_over_64_steps_alone_and_in_a_batch(pair: tuple[Any, Path], cache: str) -> None:
    reference, folder = pair
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (23, 7, 14)]
    model = modelrig.load(folder, cache=cache)
    batch = model.generate(prompts, max_new_tokens=64)
    options: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    # With a window of 1 its cache keeps all keys rather than none, and its masks do not hide them.
    if getattr(reference.config, "sliding_window", None) == 1:
        options["use_cache"] = False
    for prompt, row in zip(prompts, batch, strict=True):
        ids = torch.tensor([prompt])
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert expected[0, len(prompt) :].tolist() == list(row.tokens)
        assert expected[0, len(prompt) :].tolist() == list(model.generate(prompt, max_new_tokens=64).tokens)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_half_precision_is_within_the_references_own_error(pair: tuple[Any, Path], dtype: str, record_property: Record) -> None:
    reference, folder = pair
    ids = tokens(2, 33)
    exact = copy.deepcopy(reference).double()(ids).logits
    theirs = copy.deepcopy(reference).to(getattr(torch, dtype))(ids).logits.double()
    ours = modelrig.load(folder, dtype=dtype)(ids).double()

    def error(logits: torch.Tensor) -> float:
        squares = ((logits - exact) ** 2).mean(dim=-1)
        # Rounding lets a token choose another expert that is nearly as likely, here in one of the two, there in the other.
        has_experts = hasattr(reference.config, "num_experts_per_tok")
        return (squares.median() if has_experts else squares.mean()).sqrt().item()

    record_property("half", error(ours) / error(theirs))
    assert error(ours) <= 1.2 * error(theirs)


def test_v4_spellings_mean_the_same(pair: tuple[Any, Path], tmp_path: Path) -> None:
    reference, folder = pair
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        if "sliding_attention" in rope:
            config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        is_neox = config["model_type"] == "gpt_neox"
        config["rotary_emb_base" if is_neox else "rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config["rotary_pct" if is_neox else "partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = tokens(1, 31)
    with torch.no_grad():
        assert_close(reference(ids).logits, modelrig.load(tmp_path)(ids))


def test_dynamic_rope_beyond_its_length_is_the_references_for_whole_prompts_and_each_step(tmp_path: Path) -> None:
    """Frequencies then depend on the length of each forward; transformers and we agree forward by forward."""
    reference = write_llama(
        tmp_path, max_position_embeddings=24, rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}
    )
    model = modelrig.load(tmp_path, context=160)
    prompt = tokens(1, 40)
    with torch.no_grad():
        assert_close(reference(prompt).logits, model(prompt))
    expected = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, pad_token_id=0
    )
    assert expected[0, 40:].tolist() == list(model.generate(prompt[0].tolist(), max_new_tokens=64).tokens)


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.5, 2.0, 4.0, 9.0]}


@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding"])
def test_phi3_computes_all_keys_anew_when_a_text_outgrows_the_trained_length(tmp_path: Path, cache: str) -> None:
    """As the reference does; each row of a batch by its own length."""
    reference = write_decoder(tmp_path, "Phi3", original_max_position_embeddings=40, rope_parameters=LONG)
    model = modelrig.load(tmp_path, cache=cache)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (40, 12, 33, 47)]
    batch = model.generate(prompts, max_new_tokens=50)
    for prompt, row in zip(prompts, batch, strict=True):
        ids = torch.tensor([prompt])
        options: dict[str, Any] = {"max_new_tokens": 50, "do_sample": False, "pad_token_id": 0}
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        assert expected == list(model.generate(prompt, max_new_tokens=50).tokens)
        assert expected == list(row.tokens)
    session, said = model.session(), []
    for count in (15, 4, 9):
        turn = tokens(1, count, seed=count)[0].tolist()
        said += turn
        ids = torch.tensor([said])
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, pad_token_id=0)
        assert expected[0, len(said) :].tolist() == list(session.generate(turn, max_new_tokens=9).tokens)
        said = expected[0].tolist()


def test_phi3_says_so_where_the_tokens_of_a_cache_are_not_known(tmp_path: Path) -> None:
    write_decoder(tmp_path, "Phi3", original_max_position_embeddings=40, rope_parameters=LONG)
    model = modelrig.load(tmp_path)
    cache = model.new_cache(max_len=100)
    model(tokens(1, 30), cache=cache)
    with pytest.raises(CacheError, match="computed anew"):
        model.generate(tokens(1, 5)[0].tolist(), cache=cache, max_new_tokens=20)
    cache.reset()
    assert 20 == len(model.generate(tokens(1, 35)[0].tolist(), cache=cache, max_new_tokens=20).tokens)
    assert 55 == cache.length


def test_phi3_computes_all_keys_anew_within_a_turn_of_a_session(tmp_path: Path) -> None:
    write_decoder(tmp_path, "Phi3", original_max_position_embeddings=40, rope_parameters=LONG)
    model = modelrig.load(tmp_path)
    session, said = model.session(), []
    for count in (15, 9):
        said += tokens(1, count, seed=count)[0].tolist()
        answer = session.generate(said[-count:], max_new_tokens=14).tokens  # the second one begins at 38 tokens
        assert answer == model.generate(said, max_new_tokens=14).tokens
        said += answer


def test_phi3_knows_how_long_each_row_of_a_padded_cache_is(tmp_path: Path) -> None:
    write_decoder(tmp_path, "Phi3", original_max_position_embeddings=40, rope_parameters=LONG)
    model = modelrig.load(tmp_path)
    cache = model.new_cache(2, max_len=100)
    model.generate([[1, 2, 3], tokens(1, 45)[0].tolist()], cache=cache, max_new_tokens=2)  # one is beyond, one is not
    with pytest.raises(CacheError, match="computed anew"):
        model.generate([[7], [8]], cache=cache, max_new_tokens=50)


def test_longrope_beyond_its_length_is_the_references_forward_by_forward(tmp_path: Path) -> None:
    settings = {**LONG, "original_max_position_embeddings": 30}
    reference = write_llama(tmp_path, rope_parameters=settings)
    model = modelrig.load(tmp_path)
    with torch.no_grad():
        assert_close(reference(tokens(1, 41)).logits, model(tokens(1, 41)))
    ids = tokens(1, 20)
    expected = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert expected[0, 20:].tolist() == list(model.generate(ids[0].tolist(), max_new_tokens=64).tokens)


def test_float64_agrees_to_its_own_precision(tmp_path: Path) -> None:
    reference = write_llama(tmp_path).double()
    ids = tokens(1, 29)
    with torch.no_grad():
        expected = reference(ids).logits
    actual = modelrig.load(tmp_path, dtype="float64")(ids)
    # rotary angles are float32 in both, so that is what can be compared
    assert (expected - actual).abs().max().item() <= 1e-6 * expected.abs().max().item()


def test_it_is_saved_as_transformers_reads_it(pair: tuple[Any, Path], tmp_path: Path) -> None:
    reference, folder = pair
    modelrig.load(folder).save(tmp_path / "saved")
    with torch.no_grad():
        again = type(reference).from_pretrained(tmp_path / "saved", dtype=torch.float32)
        assert_close(modelrig.load(folder)(tokens(2, 30)), again(tokens(2, 30)).logits)


def test_the_planned_bytes_are_those_of_the_module(pair: tuple[Any, Path]) -> None:
    _, folder = pair
    plan = modelrig.plan(folder, dtype="bfloat16", context=50)
    model = plan.load()
    held = {id(one): one.nbytes for one in model.module.parameters()}
    assert sum(held.values()) == sum(line.bytes for line in plan.ledger if line.moment == "steady" and "weights" in line.what)


@pytest.mark.parametrize(
    ("family", "changes", "locus"),
    [
        ("Qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("Qwen3", {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False}, "layer_types"),
        ("Mistral", {"sliding_window": 0}, "sliding_window"),
        ("Qwen3", {"head_dim": 7}, "head_dim"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(tmp_path: Path, family: str, changes: dict[str, Any], locus: str) -> None:
    write_decoder(tmp_path, family)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError) as caught:
        modelrig.plan(tmp_path)
    assert locus == caught.value.locus


NEEDED = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 7, "num_attention_heads": 32}
NEEDED_GPT2 = {"vocab_size": 97, "n_embd": 64, "n_layer": 3, "n_head": 4}


@pytest.mark.parametrize("family", sorted({family for family, _ in CONFIGS.values()}))
@torch.no_grad()
def test_a_config_without_optional_keys_means_what_it_means_to_transformers(tmp_path: Path, family: str) -> None:
    needed: dict[str, Any] = NEEDED_GPT2 if family == "GPT2" else NEEDED
    if family == "GPTNeoX":
        needed = needed | {"num_attention_heads": 4}  # of whose heads a quarter turns
    usual = random_decoder(family, pad_token_id=None, **needed)
    usual.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**needed, "model_type": usual.config.model_type}))
    ids = tokens(2, 23)
    model = modelrig.load(tmp_path, context=30)
    assert_close(usual(ids).logits, model(ids))
    assert usual.config.max_position_embeddings == model.plan.facts.context_length
