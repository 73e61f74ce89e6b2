"""Logits and greedy tokens of families of llama's shape equal transformers' at the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import modelrig
from checkpoints import write_decoder
from modelrig.errors import ConfigError

SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "rope_theta": 1e4}
WINDOWS = {"use_sliding_window": True, "sliding_window": 7}
#: name → family, what its config says besides checkpoints.TINY_LLAMA
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
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
}
TOLERANCE = 1e-5  # of the logits' scale


def assert_close(expected: torch.Tensor, actual: torch.Tensor) -> None:
    assert expected.shape == actual.shape
    assert (expected - actual).abs().max().item() <= TOLERANCE * expected.abs().max().item()


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "_"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """The reference, and the folder it was saved to."""
    folder = tmp_path_factory.mktemp("pair")
    family, config = CONFIGS[request.param]
    yield write_decoder(folder, family, seed=3, **config), folder


def tokens(batch: int, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 97, (batch, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_without_a_cache(pair: tuple[Any, Path], attention: str) -> None:
    reference, folder = pair
    ids = tokens(2, 41)
    assert_close(reference(ids).logits, modelrig.load(folder, attention=attention)(ids))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_prompts_that_arrive_in_chunks(pair: tuple[Any, Path], cache: str, attention: str) -> None:
    reference, folder = pair
    ids = tokens(3, 53)
    model = modelrig.load(folder, cache=cache, attention=attention)
    held = model.new_cache(batch=3, max_len=53)
    parts = [model(ids[:, start:stop], cache=held) for start, stop in ((0, 17), (17, 18), (18, 40), (40, 41), (41, 53))]
    assert_close(reference(ids).logits, torch.cat(parts, dim=1))


@torch.no_grad()
def test_rows_padded_on_the_left(pair: tuple[Any, Path]) -> None:
    reference, folder = pair
    rows = [tokens(1, length, seed=length)[0] for length in (19, 5, 12)]
    ids, mask = torch.zeros(3, 19, dtype=torch.int64), torch.zeros(3, 19, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, 19 - len(row) :], mask[number, 19 - len(row) :] = row, 1
    model = modelrig.load(folder)
    cache = model.new_cache(batch=3, max_len=24)
    made, following = model(ids, cache=cache, attention_mask=mask), model(tokens(3, 2), cache=cache)
    for number, row in enumerate(rows):
        expected = reference(torch.cat((row, tokens(3, 2)[number]))[None]).logits[0]
        assert_close(expected[:-2], made[number, 19 - len(row) :])
        assert_close(expected[-2:], following[number])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens_over_64_steps_alone_and_in_a_batch(pair: tuple[Any, Path], cache: str) -> None:
    reference, folder = pair
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (23, 7, 14)]
    model = modelrig.load(folder, cache=cache)
    batch = model.generate(prompts, max_new_tokens=64)
    options: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    if reference.config.sliding_window == 1:  # its cache then keeps all keys rather than none, and its masks do not hide them
        options["use_cache"] = False
    for prompt, row in zip(prompts, batch, strict=True):
        ids = torch.tensor([prompt])
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert expected[0, len(prompt) :].tolist() == list(row.tokens)
        assert expected[0, len(prompt) :].tolist() == list(model.generate(prompt, max_new_tokens=64).tokens)


def test_in_bfloat16_it_is_as_near_as_the_reference(pair: tuple[Any, Path]) -> None:
    reference, folder = pair
    ids = tokens(2, 41)
    with torch.no_grad():
        exact = reference(ids).logits
        theirs = (reference.bfloat16()(ids).logits.float() - exact).abs().max()
        reference.float()
        # its weights are rounded now; ours are read from the file, which was written before
        ours = (modelrig.load(folder, dtype="bfloat16")(ids).float() - exact).abs().max()
    assert ours <= 2 * theirs


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


@pytest.mark.parametrize(("family", "head_dim", "window"), [("Mistral", 2, 4096), ("Qwen2", 2, None), ("Qwen3", 128, None)])
def test_a_config_without_optional_keys_means_what_it_means_to_transformers(
    tmp_path: Path, family: str, head_dim: int, window: int | None
) -> None:
    import transformers

    usual = getattr(transformers, f"{family}Config")()
    needed = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 32}
    write_decoder(tmp_path, family, **needed, num_key_value_heads=usual.num_key_value_heads, head_dim=head_dim)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({key: stored[key] for key in (*needed, "model_type")}))
    facts = modelrig.plan(tmp_path, context=8).facts
    [spec] = {*facts.layers}
    assert (usual.num_key_value_heads, head_dim, window) == (spec.num_key_value_heads, spec.head_dim, spec.window)
    assert (usual.max_position_embeddings, usual.rms_norm_eps) == (facts.context_length, facts.config.rms_norm_eps)
