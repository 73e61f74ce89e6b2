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


@pytest.mark.parametrize("kind", ["full", "hybrid"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_numbers_that_are_not_finite_are_gone_after_a_reset(
    folders: dict[str, Path], kind: str, cache: str, attention: str
) -> None:
    """A compiled step attends to the whole buffer, and a mask turns NaN into NaN times zero."""
    with modelrig.load(folders[kind], cache=CACHES[cache], attention=attention, dtype="float64", context=CAPACITY) as model:
        offers = model.plan.choices["caches"].registered.descriptor.offers
        torch.compiler.reset()  # it counts what other tests compiled
        compiled = torch.compile(model.module.step, backend="eager", fullgraph=True) if "fullgraph" in offers else None
        for step in filter(None, (model.module.step, compiled)):
            held, fresh = model.new_cache(), model.new_cache()
            for count in (9, 9, 1, 1):
                slots = held.begin(count)
                for layer, spec in zip(held.layers, model.plan.facts.cached_layers, strict=True):
                    shape = (1, spec.num_key_value_heads, count)
                    bad = torch.full((*shape, spec.head_dim), float("nan"), dtype=torch.float64)
                    layer.update(bad, bad[..., : spec.value_dim], slots)
                held.commit(count)
            held.reset()
            with torch.no_grad():
                for ids in ([[1, 2, 3]], [[4]], [[5]], [[6]]):
                    logits = [step(torch.tensor(ids), one.begin(len(ids[0]))) for one in (held, fresh)]
                    assert logits[1].isfinite().all() and torch.equal(*logits)
                    held.commit(len(ids[0]))
                    fresh.commit(len(ids[0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", CACHES)
def test_a_second_turn_over_an_edited_history_is_that_of_a_new_session(folders: dict[str, Path], kind: str, cache: str) -> None:
    """The common beginning is kept where the cache can rewind to it, and prefilled again where it cannot."""
    with modelrig.load(folders[kind], cache=CACHES[cache], dtype="float64", context=CAPACITY) as model:
        asked = list(range(3, 25))
        for same in (21, 12, 1, 0):
            session, other = model.session(), model.session()
            first = session.generate([asked], max_new_tokens=5).tokens
            edited = [*asked[:same], *range(40, 46)]
            session._encode = lambda *_, ids=edited: list(ids)  # as a template would render an edited conversation
            answer = session.generate(messages=[{"role": "user", "content": "edited"}], max_new_tokens=5)
            assert other.generate([edited], max_new_tokens=5).tokens == answer.tokens
            assert [*edited, *answer.tokens] == session.tokens and 5 == len(first)
            assert answer.stats.prompt_tokens in (len(edited) - same, len(edited))
