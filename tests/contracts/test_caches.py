"""Every registered cache against the contract: positions, overflow, rewind, padding, exact bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelrig.components import AttentionSpec
from modelrig.errors import CacheError
from modelrig.registry import current

CPU = torch.device("cpu")
LAYERS = (
    AttentionSpec(num_heads=6, num_key_value_heads=2, head_dim=10, value_dim=10, scale=1.0),
    AttentionSpec(num_heads=6, num_key_value_heads=3, head_dim=4, value_dim=7, scale=1.0),
)
CACHES = ["dynamic", "static", "sliding", "quantized", "offloaded"]
LOSSY = {"quantized"}  # with tests of its own for what it shows of old tokens


def make(name: str, batch: int = 2, capacity: int = 600, padding: list[int] | None = None) -> Any:
    return (
        current()
        .find("caches", name)
        .implementation()
        .create(LAYERS, batch=batch, capacity=capacity, dtype=torch.float32, device=CPU, padding=padding)
    )


def feed(cache: Any, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Write recognisable keys and values for `tokens` [batch, count]; returns what each layer may attend to."""
    slots = cache.begin(tokens.shape[1])
    seen = []
    for number, (layer, spec) in enumerate(zip(cache.layers, LAYERS, strict=True)):
        k, v = (
            (tokens[:, None, :, None] + 1000 * number).expand(-1, spec.num_key_value_heads, -1, dim).float()
            for dim in (spec.head_dim, spec.value_dim)
        )
        keys, values = layer.update(k, -v, slots)
        seen.append((keys, values))
    return seen


@pytest.mark.parametrize("name", [name for name in CACHES if name not in LOSSY])
def test_what_was_written_is_seen_in_order(name: str) -> None:
    cache = make(name)
    tokens = torch.arange(2 * 500).view(2, 500)
    for start, stop in ((0, 3), (3, 4), (4, 300), (300, 301), (301, 500)):
        seen = feed(cache, tokens[:, start:stop])
        cache.commit(stop - start)
    assert 500 == cache.length
    for number, (keys, values) in enumerate(seen):
        assert torch.equal((tokens + 1000 * number).float(), keys[:, 0, :, 0])
        assert torch.equal(-(tokens + 1000 * number).float(), values[:, -1, :, -1])


@pytest.mark.parametrize("name", CACHES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_history_of_steps_and_rewinds_equals_a_list_of_tokens(name: str, data: st.DataObject) -> None:
    cache, oracle, fresh = make(name, batch=1, capacity=40), [], iter(range(1, 100_000))
    for _ in range(data.draw(st.integers(1, 15))):
        action = data.draw(st.sampled_from(["step", "step", "step", "rewind", "reset", "abandon"]))
        if action == "step":
            count = data.draw(st.integers(1, 45))
            tokens = [next(fresh) for _ in range(count)]
            if len(oracle) + count > 40:
                with pytest.raises(CacheError, match="CA-FULL"):
                    cache.begin(count)
                continue
            (keys, _), _ = feed(cache, torch.tensor([tokens]))
            assert [*oracle, *tokens] == keys[0, 0, : len(oracle) + count, 0].long().tolist()
            kept = data.draw(st.integers(0, count))
            cache.commit(kept)
            oracle += tokens[:kept]
        elif action == "rewind":
            to = data.draw(st.integers(0, 45))
            if to > len(oracle):
                with pytest.raises(CacheError, match="CA-REWIND"):
                    cache.rewind(to)
            else:
                cache.rewind(to)
                del oracle[to:]
        elif action == "abandon" and len(oracle) < 40:
            cache.begin(1)  # a step that failed: never committed
        elif action == "reset":
            cache.reset()
            oracle.clear()
        assert len(oracle) == cache.length


@pytest.mark.parametrize("name", CACHES)
def test_positions_count_a_rows_own_tokens(name: str) -> None:
    cache = make(name, padding=[0, 3])
    slots = cache.begin(5)
    assert [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]] == slots.positions.tolist()
    assert [0, 1, 2, 3, 4] == slots.index.tolist()
    cache.commit(5)
    assert [[5], [2]] == cache.begin(1).positions.tolist()


@pytest.mark.parametrize("name", CACHES)
def test_a_step_of_one_length_always_uses_the_same_tensors(name: str) -> None:
    cache = make(name)
    first = cache.begin(1)
    address = first.index.data_ptr()
    cache.commit(1)
    assert first is cache.begin(1)
    assert address == first.index.data_ptr()
    assert [1] == first.index.tolist()


@pytest.mark.parametrize("name", CACHES)
def test_predicted_bytes_are_the_measured_ones_at_full_length(name: str) -> None:
    component = current().find("caches", name)
    cache = make(name, batch=3, capacity=517)
    feed(cache, torch.zeros(3, 517))
    assert component.planner().nbytes(LAYERS, 3, 517, "float32", None) == cache.nbytes


@pytest.mark.parametrize("name", CACHES)
def test_a_full_cache_says_so_and_stays_usable(name: str) -> None:
    cache = make(name, batch=1, capacity=8)
    feed(cache, torch.arange(6)[None])
    cache.commit(6)
    with pytest.raises(CacheError, match="6 of 8 slots"):
        cache.begin(3)
    assert 6 == cache.length
    (keys, _), _ = feed(cache, torch.tensor([[6, 7]]))
    cache.commit(2)
    assert list(range(8)) == keys[0, 0, :, 0].long().tolist()


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda cache: cache.begin(0), "CA-ARGS"),
        (lambda cache: cache.begin(True), "CA-ARGS"),
        (lambda cache: cache.commit(1), "CA-STATE"),
        (lambda cache: (cache.begin(2), cache.commit(3)), "CA-ARGS"),
        (lambda cache: (cache.begin(2), cache.commit(-1)), "CA-ARGS"),
        (lambda cache: cache.rewind(-1), "CA-REWIND"),
        (lambda cache: cache.rewind(1), "CA-REWIND"),
        (lambda cache: cache.reset([1]), "CA-ARGS"),
        (lambda cache: cache.reset([0, 600]), "CA-ARGS"),
        (lambda cache: cache.reset([0, -1]), "CA-ARGS"),
    ],
)
def test_misuse_is_an_error_that_changes_nothing(name: str, call: Any, code: str) -> None:
    cache = make(name)
    with pytest.raises(CacheError) as caught:
        call(cache)
    assert code == caught.value.code
    assert 0 == cache.length
    cache.begin(1)
    cache.commit(1)
    assert 1 == cache.length


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize(("batch", "capacity"), [(0, 5), (-1, 5), (1, 0), (1, -5), (True, 5), (1, 2.5)])
def test_impossible_sizes_are_refused(name: str, batch: Any, capacity: Any) -> None:
    with pytest.raises(CacheError, match="CA-ARGS"):
        make(name, batch=batch, capacity=capacity)


def test_more_tokens_than_can_be_numbered_are_a_typed_error() -> None:
    with pytest.raises(CacheError, match="CA-ARGS"):
        make("offloaded", batch=1, capacity=10**15)


def test_the_static_caches_buffers_never_move() -> None:
    cache = make("static", batch=1, capacity=700)
    address = cache.layers[0].keys.data_ptr()
    for count in (300, 1, 399):
        feed(cache, torch.zeros(1, count))
        cache.commit(count)
    cache.reset()
    assert address == cache.layers[0].keys.data_ptr()


# ------------------------------------------------------------------------------------------------ windows


def windowed(window: int, headroom: int, batch: int = 1, padding: list[int] | None = None) -> Any:
    component = current().find("caches", "sliding")
    layers = (evolve(LAYERS[0], window=window), LAYERS[1])
    options = component.planner().Options(headroom=headroom)
    made = component.implementation().create(
        layers, batch=batch, capacity=40, dtype=torch.float32, device=CPU, padding=padding, options=options
    )
    assert component.planner().nbytes(layers, batch, 40, "float32", options) == made.nbytes
    return made


def seen_by(cache: Any, tokens: list[int], window: int) -> list[list[list[int]]]:
    """For each layer and query of a step that writes `tokens`: the tokens it sees, in order."""
    slots = cache.begin(len(tokens))
    found = []
    for layer, spec in zip(cache.layers, (evolve(LAYERS[0], window=window), LAYERS[1]), strict=True):
        k, v = (
            torch.tensor(tokens).float().view(1, 1, -1, 1).expand(1, spec.num_key_value_heads, -1, dim)
            for dim in (spec.head_dim, spec.value_dim)
        )
        keys, values = layer.update(k, -v, slots)
        assert torch.equal(keys[0, 0, :, 0], -values[0, -1, :, 0])
        mask = slots.visible(spec).dense()[0, 0]
        found.append([sorted(keys[0, 0, row, 0].long().tolist()) for row in mask])
    return found


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_window_is_what_is_seen_after_any_history(data: st.DataObject) -> None:
    window, headroom = data.draw(st.integers(1, 7)), data.draw(st.integers(0, 5))
    cache, oracle, fresh, highest = windowed(window, headroom), [], iter(range(1, 100_000)), 0
    for _ in range(data.draw(st.integers(1, 15))):
        action = data.draw(st.sampled_from(["step", "step", "step", "rewind", "reset", "abandon"]))
        if action in ("step", "abandon"):
            tokens = [next(fresh) for _ in range(data.draw(st.integers(1, 12)))]
            if len(oracle) + len(tokens) > 40:
                with pytest.raises(CacheError, match="CA-FULL"):
                    cache.begin(len(tokens))
                continue
            rows, everything = seen_by(cache, tokens, window)
            texts = [[*oracle, *tokens[: place + 1]] for place in range(len(tokens))]
            assert texts == everything
            assert [text[-window:] for text in texts] == rows
            if action == "step":
                kept = data.draw(st.integers(0, len(tokens)))
                cache.commit(kept)
                oracle += tokens[:kept]
            highest = max(highest, len(oracle), *([len(oracle) + len(tokens)] if len(tokens) <= headroom + 1 else [0]))
        elif action == "rewind":
            to = data.draw(st.integers(0, len(oracle)))
            try:
                cache.rewind(to)
                del oracle[to:]
                highest = highest if to else 0
            except CacheError as error:
                assert "CA-REWIND" in str(error) and highest - to > headroom
        else:
            cache.reset()
            oracle.clear()
            highest = 0
        assert len(oracle) == cache.length


def test_a_window_takes_its_size_and_headroom_and_a_long_one_the_whole_context() -> None:
    sizes = [windowed(window, 3).layers[0].keys.shape[2] for window in (1, 5, 37, 38, 500)]
    assert [4, 8, 40, 40, 40] == sizes
    assert 40 == windowed(5, 3).layers[1].keys.shape[2]


def test_a_rewind_within_the_headroom_is_exact_and_one_beyond_is_refused() -> None:
    cache = windowed(4, 3)
    for token in range(20):
        seen_by(cache, [token], 4)
        cache.commit(1)
    with pytest.raises(CacheError, match="CA-REWIND"):
        cache.rewind(15)
    assert 20 == cache.length
    cache.rewind(16)
    assert [[13, 14, 15, 100]] == seen_by(cache, [100], 4)[0]
