"""Logits and greedy tokens equal transformers' at the same weights, for every config a llama may have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import modelrig
from checkpoints import write_llama

CONFIGS: dict[str, dict[str, Any]] = {
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
TOLERANCE = 1e-5  # of the logits' scale


def assert_close(expected: torch.Tensor, actual: torch.Tensor) -> None:
    scale = expected.abs().max().item()
    assert expected.shape == actual.shape
    assert (expected - actual).abs().max().item() <= TOLERANCE * scale


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "_"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """The reference, and the folder it was saved to."""
    folder = tmp_path_factory.mktemp("pair")
    reference = write_llama(folder, seed=7, **CONFIGS[request.param])
    yield reference, folder


def tokens(batch: int, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 97, (batch, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_without_a_cache(pair: tuple[Any, Path], attention: str) -> None:
    reference, folder = pair
    ids = tokens(2, 41)
    with torch.no_grad():
        expected = reference(ids).logits
    assert_close(expected, modelrig.load(folder, attention=attention)(ids))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prompts_that_arrive_in_chunks(pair: tuple[Any, Path], cache: str, attention: str) -> None:
    reference, folder = pair
    ids = tokens(3, 53)
    with torch.no_grad():
        expected = reference(ids).logits
    model = modelrig.load(folder, cache=cache, attention=attention)
    held = model.new_cache(batch=3, max_len=53)
    parts = [model(ids[:, start:stop], cache=held) for start, stop in ((0, 17), (17, 18), (18, 40), (40, 41), (41, 53))]
    assert_close(expected, torch.cat(parts, dim=1))


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


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens_over_64_steps_alone_and_in_a_batch(pair: tuple[Any, Path], cache: str) -> None:
    reference, folder = pair
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (23, 7, 14)]
    model = modelrig.load(folder, cache=cache)
    batch = model.generate(prompts, max_new_tokens=64)
    for prompt, row in zip(prompts, batch, strict=True):
        ids = torch.tensor([prompt])
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0)[
            0, len(prompt) :
        ].tolist()
        assert expected == list(row.tokens)
        assert expected == list(model.generate(prompt, max_new_tokens=64).tokens)


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


def test_v4_spellings_mean_the_same(pair: tuple[Any, Path], tmp_path: Path) -> None:
    import json

    reference, folder = pair
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = tokens(1, 31)
    with torch.no_grad():
        assert_close(reference(ids).logits, modelrig.load(tmp_path)(ids))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_within_the_references_own_error(tmp_path: Path, dtype: str) -> None:
    reference = write_llama(tmp_path).float()
    ids = tokens(2, 33)
    with torch.no_grad():
        exact = reference.double()(ids).logits
        theirs = reference.to(getattr(torch, dtype))(ids).logits.double()
    ours = modelrig.load(tmp_path, dtype=dtype)(ids).double()
    error = lambda logits: ((logits - exact) ** 2).mean().sqrt().item()  # noqa: E731
    assert error(ours) <= 1.2 * error(theirs)


def test_float64_agrees_to_its_own_precision(tmp_path: Path) -> None:
    reference = write_llama(tmp_path).double()
    ids = tokens(1, 29)
    with torch.no_grad():
        expected = reference(ids).logits
    actual = modelrig.load(tmp_path, dtype="float64")(ids)
    # rotary angles are float32 in both, so that is what can be compared
    assert (expected - actual).abs().max().item() <= 1e-6 * expected.abs().max().item()
