"""Every cache under a real model, whatever its history: logits are those of one forward without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import modelrig
from checkpoints import TOLERANCE, write_decoder
from dequantised import Form, reference
from modelrig.errors import CacheError

CAPACITY, FORM = 48, Form(bits=4, group=4, residual=5)
HALF = ["sliding_attention", "full_attention"]
SMALL = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("Llama", {}),
    "sliding": ("Mistral", {"sliding_window": 6}),
    "hybrid": ("Gemma3Text", {"sliding_window": 6, "layer_types": HALF, "head_dim": 6, "query_pre_attn_scalar": 6}),
    "MoE": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
CACHES: dict[str, Any] = {
    "dynamic": "dynamic",
    "static": "static",
    "sliding": {"name": "sliding", "headroom": 3},
    "offloaded": "offloaded",
    "quantized": {"name": "quantized", "headroom": 3, **FORM._asdict()},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, (family, config) in KINDS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        write_decoder(made[kind], family, **{**SMALL, **config})
    return made


@pytest.fixture(scope="module", params=[(kind, cache) for kind in KINDS for cache in CACHES], ids="-".join)
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    """In float64: what is packed then differs by no code between ways to compute it."""
    kind, cache = request.param
    with modelrig.load(folders[kind], cache=CACHES[cache], dtype="float64", context=CAPACITY) as loaded:
        yield loaded


def without_cache(model: Any, row: list[int]) -> torch.Tensor:
    """Logits [tokens, vocab] of a row alone."""
    if model.plan.choices["caches"].name == "quantized":
        return reference(model, torch.tensor([row]), FORM)[0]
    return model([row])[0]


class History:
    """A cache, and what each row of it was fed."""

    def __init__(self, model: Any, padding: list[int]) -> None:
        self.model, self.padding = model, padding
        self.cache, self.rows = model.new_cache(len(padding), CAPACITY, padding), [[] for _ in padding]

    def step(self, new: list[list[int]], kept: int | None) -> None:
        """Feed tokens [batch][count] and keep some of them; None abandons the step, as an error would."""
        count = len(new[0])
        slots = self.cache.begin(count)
        with torch.no_grad():
            logits = self.model.step(torch.tensor(new), slots)
        for row, (old, tokens, pad) in enumerate(zip(self.rows, new, self.padding, strict=True)):
            own = [*old, *tokens][pad:]
            if not own:
                continue
            expected = without_cache(self.model, own)[-count:]
            torch.testing.assert_close(
                logits[row, -len(expected) :], expected, rtol=0, atol=TOLERANCE * expected.abs().max().item()
            )
        if kept is not None:
            self.cache.commit(kept)
            self.rows = [old + tokens[:kept] for old, tokens in zip(self.rows, new, strict=True)]

    def select(self, rows: list[int]) -> None:
        self.rows, self.padding = [list(self.rows[row]) for row in rows], [self.padding[row] for row in rows]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_logits_are_those_without_a_cache_whatever_the_history(model: Any, data: st.DataObject) -> None:
    draw = data.draw
    tokens = st.integers(0, SMALL["vocab_size"] - 1)
    paddings = st.sampled_from([[0, 0], [0, 3], [2, 1], [1]])
    history = History(model, draw(paddings))
    for _ in range(draw(st.integers(2, 8))):
        cache = history.cache
        match draw(st.sampled_from(["step", "step", "step", "step", "fail", "rewind", "reset", "fork", "reorder", "move"])):
            case "step" | "fail" as action if cache.length < CAPACITY:
                count = min(draw(st.sampled_from([1, 1, 2, 4, 9, 16])), CAPACITY - cache.length)
                new = [[draw(tokens) for _ in range(count)] for _ in history.rows]
                history.step(new, None if action == "fail" else draw(st.sampled_from([count, count, count // 2])))
            case "step":
                with pytest.raises(CacheError, match="CA-FULL"):
                    cache.begin(1)
            case "rewind":
                to = draw(st.integers(max(0, cache.length - 5), cache.length))
                try:
                    cache.rewind(to)
                    history.rows = [row[:to] for row in history.rows]
                except CacheError as error:  # then it is as it was
                    assert "CA-REWIND" == error.code
            case "reset":
                history.padding = [draw(st.integers(0, 3)) for _ in history.rows]
                cache.reset(history.padding)
                history.rows = [[] for _ in history.rows]
            case "fork" if cache.batch < 4:
                history.cache = cache.fork(2)
                history.select([row for row in range(cache.batch) for _ in range(2)])
            case "reorder":
                cache.rewind(cache.length)
                order = [draw(st.integers(0, cache.batch - 1)) for _ in history.rows]
                cache.reorder(order)
                history.select(order)
            case "move":
                history.cache = model.new_cache(cache.batch, CAPACITY)
                history.cache.adopt(cache.export())
