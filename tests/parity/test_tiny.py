"""The bundled model is what its card says: judged by the training script's own model, and as small as promised."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import modelrig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "plugins/modelrig_plugins/sources/bundled_models/tiny"
BAR = 1.35  # bits per byte
SHORT_MODULES = ("bisect.py", "queue.py", "shlex.py", "heapq.py", "asyncio/queues.py")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """`examples/train_tiny.py`, whose model shares no code with ours."""
    spec = importlib.util.spec_from_file_location("train_tiny", ROOT / "examples/train_tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def card() -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|$", (FOLDER / "README.md").read_text(), re.MULTILINE))


def test_it_is_small_and_every_quantizer_applies() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4_000_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert 0 == config["hidden_size"] % 128
    assert 0 == config["intermediate_size"] % 128
    assert 512 <= config["max_position_embeddings"]


def test_the_card_meets_the_bar() -> None:
    facts = card()
    assert float(facts["bits per byte"]) <= BAR
    assert int(facts["training seconds"]) <= 40 * 60
    assert math.isclose(math.exp(float(facts["loss"])), float(facts["perplexity"]), rel_tol=1e-3)


def test_held_out_modules_are_judged_alike_by_both_implementations(script: ModuleType) -> None:
    _, held_out = script.read_library()
    texts = {name: held_out[name] for name in SHORT_MODULES}
    reference, tokenizer = script.read_folder(FOLDER)
    expected = script.evaluate(reference, tokenizer, texts)
    model = modelrig.load("tiny", dtype="float32")
    nats, size = 0.0, 0
    for text in texts.values():
        ids = torch.tensor([[tokenizer.token_to_id(script.END_OF_TEXT), *model.tokenizer.encode(text)]])
        size += len(text.encode())
        for start in range(0, ids.shape[1] - 1, script.CONTEXT):
            window = ids[:, start : start + script.CONTEXT + 1]
            nats += F.cross_entropy(model(window[:, :-1])[0], window[0, 1:], reduction="sum").item()
    actual = nats / math.log(2) / size
    assert math.isclose(expected["bits_per_byte"], actual, rel_tol=1e-4)
    assert actual <= BAR


def test_the_tokenizer_round_trips_any_text() -> None:
    tokenizer = modelrig.load("tiny").tokenizer
    for text in ("def f(x):\n\treturn x  # ünïcode 🙂\r\n", " leading", "", "\x00\x7f", "日本語"):
        assert text == tokenizer.decode(tokenizer.encode(text))
