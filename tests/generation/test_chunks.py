"""A prompt that is prefilled in parts gives what it gives whole, in every cache."""

from __future__ import annotations

from pathlib import Path

import pytest

import modelrig
from checkpoints import tokens, write_decoder
from modelrig.generation import feeding

CACHES = ["dynamic", "static", "sliding", "quantized", "offloaded"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hybrid")
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    write_decoder(made, "Gemma3Text", head_dim=8, sliding_window=6, layer_types=layers)
    return made


@pytest.mark.parametrize("cache", CACHES)
def test_parts_of_any_length_give_the_same_text(folder: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [tokens(1, count, seed=count)[0].tolist() for count in (90, 71)]
    options = {"name": "quantized", "bits": 4, "group": 4, "residual": 6} if cache == "quantized" else cache
    found = []
    with modelrig.load(folder, cache=options, dtype="float64", context=120) as model:
        for length in (1000, 64, 16, 7, 1):
            monkeypatch.setattr(feeding, "PREFILL_CHUNK", length)
            found.append([one.tokens for one in model.generate(prompts, max_new_tokens=16)])
    assert found[1:] == found[:1] * 4
