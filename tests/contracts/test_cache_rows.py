"""Every registered cache: rows reordered and forked, states exported and adopted."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from modelrig.components import AttentionSpec
from modelrig.errors import CacheError
from modelrig.registry import current

WINDOW = 5
WIDE = AttentionSpec(num_heads=6, num_key_value_heads=3, head_dim=4, value_dim=7, scale=1.0)
LAYERS = (WIDE, evolve(WIDE, num_key_value_heads=2, head_dim=10, value_dim=10, window=WINDOW))
CACHES = ["dynamic", "static", "sliding", "quantized", "offloaded"]


def make(name: str, batch: int = 3, capacity: int = 40, padding: list[int] | None = None, dtype: Any = torch.float32) -> Any:
    component = current().find("caches", name)
    planner = component.planner()
    options = planner.Options() if hasattr(planner, "Options") else None
    if hasattr(options, "headroom"):
        options = evolve(options, headroom=3)
    return component.implementation().create(
        LAYERS, batch=batch, capacity=capacity, dtype=dtype, device=torch.device("cpu"), padding=padding, options=options
    )


def step(cache: Any, tokens: list[list[int]], kept: int | None = None) -> list[list[list[int]]]:
    """Feed `tokens` [batch][count], keep `kept` of them; what the last query of each row sees in each layer, in order."""
    count = len(tokens[0])
    slots, seen = cache.begin(count), []
    for layer, spec in zip(cache.layers, LAYERS, strict=True):
        k, v = (
            torch.tensor(tokens, dtype=torch.float32)[:, None, :, None].expand(-1, spec.num_key_value_heads, -1, size)
            for size in (spec.head_dim, spec.value_dim)
        )
        keys, values = layer.update(k, -v, slots)
        assert torch.equal(keys[:, 0, :, 0], -values[:, -1, :, -1])
        mask = slots.visible(spec).dense().expand(cache.batch, -1, -1, -1)[:, 0, -1]
        seen.append([sorted(keys[row, -1, mask[row], -1].long().tolist()) for row in range(cache.batch)])
    cache.commit(count if kept is None else kept)
    return seen


def expected(rows: list[list[int]], padding: list[int]) -> list[list[list[int]]]:
    """What `step` must return when `rows` are all tokens of each row."""
    own = [row[min(pad, len(row) - 1) :] for row, pad in zip(rows, padding, strict=True)]
    return [[sorted(row) for row in own], [sorted(row[-WINDOW:]) for row in own]]


@pytest.mark.parametrize("name", CACHES)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_rows_are_lists_whatever_becomes_of_them(name: str, data: st.DataObject) -> None:
    fresh = iter(range(1, 100_000))

    def tokens(count: int) -> list[list[int]]:
        return [[next(fresh) for _ in range(count)] for _ in range(cache.batch)]

    padding = data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=2))
    cache, rows = make(name, batch=2, padding=padding), [[], []]
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["step", "step", "step", "rewind", "reset", "abandon", "reorder", "fork", "move"]))
        if action in ("step", "abandon"):
            new = tokens(data.draw(st.integers(1, 9)))
            if cache.length + len(new[0]) > 40:
                continue
            kept = 0 if action == "abandon" else data.draw(st.integers(0, len(new[0])))
            if action == "abandon":
                cache.begin(len(new[0]))  # it failed: never committed
                continue
            assert expected([a + b for a, b in zip(rows, new, strict=True)], padding) == step(cache, new, kept)
            rows = [a + b[:kept] for a, b in zip(rows, new, strict=True)]
        elif action == "rewind":
            to = data.draw(st.integers(0, cache.length))
            try:
                cache.rewind(to)
                rows = [row[:to] for row in rows]
            except CacheError as error:
                assert "CA-REWIND" == error.code
        elif action == "reset":
            padding = data.draw(st.lists(st.integers(0, 3), min_size=cache.batch, max_size=cache.batch))
            cache.reset(padding)
            rows = [[] for _ in rows]
        elif action == "reorder":
            cache.rewind(cache.length)  # a step that failed is over
            order = data.draw(st.lists(st.integers(0, cache.batch - 1), min_size=cache.batch, max_size=cache.batch))
            cache.reorder(order)
            rows, padding = [list(rows[row]) for row in order], [padding[row] for row in order]
        elif action == "fork" and cache.batch < 9:
            old, copies = cache, data.draw(st.integers(1, 3))
            cache = old.fork(copies)
            assert (old.batch * copies, old.length, old.capacity) == (cache.batch, cache.length, cache.capacity)
            if data.draw(st.booleans()) and old.length < 40:  # nothing is shared
                step(old, [[0]] * old.batch)
            rows, padding = [row for row in rows for _ in range(copies)], [pad for pad in padding for _ in range(copies)]
        elif action == "move":
            state, cache = cache.export(), make(name, cache.batch, data.draw(st.integers(max(4, cache.length), 60)))
            cache.adopt(state)
            old, cache = cache, make(name, cache.batch)
            step(cache, tokens(3))
            cache.adopt(old.export())  # what it held before is gone
        assert len(rows[0]) == cache.length


@pytest.mark.parametrize("name", CACHES)
def test_a_fork_leaves_its_origin_as_it_was_and_shares_nothing(name: str) -> None:
    cache = make(name, padding=[0, 2, 1])
    step(cache, [[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]])
    before = cache.export()
    fork = cache.fork(2)
    assert [0, 0, 2, 2, 1, 1] == fork.padding
    step(fork, [[99]] * 6)
    after = cache.export()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert expected([[10, 11, 12, 13, 1], [20, 21, 22, 23, 2], [30, 31, 32, 33, 3]], [0, 2, 1]) == step(cache, [[1], [2], [3]])


@pytest.mark.parametrize("name", CACHES)
def test_reordering_moves_nothing_that_a_compiled_step_may_hold(name: str) -> None:
    cache = make(name, padding=[0, 2, 1])
    step(cache, [[1, 2, 3]] * 3)
    slots = cache.begin(1)
    cache.commit(0)
    tensors = [cache.starts, slots.positions, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))]
    addresses = [tensor.data_ptr() for tensor in tensors]
    cache.reorder([2, 0, 1])
    assert slots is cache.begin(1) and slots.starts is cache.starts
    assert [[2], [3], [1]] == slots.positions.tolist()
    now = [cache.starts, slots.positions, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))]
    assert addresses == [tensor.data_ptr() for tensor in now]


@pytest.mark.parametrize("name", CACHES)
def test_a_state_holds_what_is_held_and_no_more(name: str) -> None:
    cache = make(name, capacity=40)
    step(cache, [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    state = cache.export()
    assert [4] == state["length"].tolist() and [0, 0, 0] == state["padding"].tolist()
    assert state["0.keys"].shape == (3, 3, 4, 4)
    assert all(tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())
    step(cache, [[0]] * 3)
    assert [1, 2, 3, 4] == state["0.keys"][0, 0, :, 0].tolist()


def changed(**tensors: Any) -> Any:
    """A change of a state: the tensors of these names (`_0_keys` for `0.keys`), None for one that is missing."""
    names = {name.removeprefix("_").replace("_", ".", 1) if name.startswith("_") else name: one for name, one in tensors.items()}
    return lambda state: {name: one for name, one in {**state, **names}.items() if one is not None}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize(
    ("change", "code", "locus"),
    [
        (lambda state: list(state.items()), "CA-STATE", "state"),
        (changed(length=None), "CA-STATE", "length"),
        (changed(length=torch.tensor(2)), "CA-STATE", "length"),
        (changed(length=torch.tensor([-1])), "CA-STATE", "length"),
        (changed(length=torch.tensor([2.0])), "CA-STATE", "length"),
        (changed(length=torch.tensor([1])), "CA-STATE", "0."),
        (changed(length=torch.tensor([1 << 62])), "CA-FULL", "length"),
        (changed(padding=torch.tensor([0, 0])), "CA-STATE", "padding"),
        (changed(padding=torch.tensor([0, 0, -1])), "CA-STATE", "padding"),
        (changed(padding=torch.tensor([0, 0, 40])), "CA-FULL", "padding"),
        (changed(more=torch.zeros(1)), "CA-STATE", "more"),
        (changed(_1_keys=None), "CA-STATE", "1.keys"),
        (changed(_1_keys=7), "CA-STATE", "1.keys"),
        (changed(_1_keys=torch.zeros(3, 2, 2, 10, dtype=torch.float16)), "CA-STATE", "1.keys"),
        (changed(_1_keys=torch.zeros(3, 2, 2, 9)), "CA-STATE", "1.keys"),
        (changed(_1_keys=torch.zeros(3, 2, 1, 10)), "CA-STATE", "1.keys"),
        (changed(_1_values=torch.zeros(3, 2, 3, 10)), "CA-STATE", "1.values"),
    ],
)
def test_a_state_of_another_cache_is_refused_and_nothing_changes(name: str, change: Any, code: str, locus: str) -> None:
    cache, other = make(name), make(name, padding=[0, 1, 0])
    step(cache, [[1], [2], [3]])
    step(other, [[4, 5], [6, 7], [8, 9]])
    with pytest.raises(CacheError) as caught:
        cache.adopt(change(other.export()))
    assert code == caught.value.code
    assert (caught.value.locus or "").startswith(locus)
    assert expected([[1, 7], [2, 8], [3, 9]], [0, 0, 0]) == step(cache, [[7], [8], [9]])


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 3], [0, 1, -1], [0, 1, True], [0, 1, 1.0], [0, 1, 2, 0], []])
def test_rows_there_are_not_cannot_be_gone_on_from(name: str, rows: list[Any]) -> None:
    cache = make(name)
    step(cache, [[1], [2], [3]])
    with pytest.raises(CacheError, match="CA-ARGS"):
        cache.reorder(rows)
    assert expected([[1, 7], [2, 8], [3, 9]], [0, 0, 0]) == step(cache, [[7], [8], [9]])


@pytest.mark.parametrize("name", CACHES)
def test_rows_are_not_reordered_within_a_step(name: str) -> None:
    cache = make(name)
    cache.begin(1)
    with pytest.raises(CacheError, match="CA-STATE"):
        cache.reorder([1, 0, 2])
    cache.commit(1)
    cache.reorder([1, 0, 2])


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("copies", [0, -1, True, 1.0])
def test_a_fork_needs_a_number_of_copies(name: str, copies: Any) -> None:
    with pytest.raises(CacheError, match="CA-ARGS"):
        make(name).fork(copies)


@pytest.mark.parametrize("name", CACHES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_nothing_forgotten_spoils_a_later_step(name: str, data: st.DataObject) -> None:
    """A kernel that masks a slot multiplies it by zero: NaN and infinity in it would survive that."""
    cache = make(name, batch=1)
    for _ in range(data.draw(st.integers(1, 10))):
        count = data.draw(st.integers(1, min(9, 40 - cache.length)))
        is_kept = data.draw(st.booleans())
        slots = cache.begin(count)
        for layer, spec in zip(cache.layers, LAYERS, strict=True):
            value = 1.0 if is_kept else data.draw(st.sampled_from([float("nan"), float("inf")]))
            k, v = (torch.full((1, spec.num_key_value_heads, count, size), value) for size in (spec.head_dim, spec.value_dim))
            seen = layer.update(k, v, slots)
            if is_kept:
                assert all(tensor.isfinite().all() for tensor in (*seen, layer.keys, layer.values))
        before = cache.length
        cache.commit(count if is_kept else data.draw(st.integers(0, count)))
        if not is_kept and before < cache.length:
            try:
                cache.rewind(before)
            except CacheError:
                cache.reset()
        elif cache.length == 40 or data.draw(st.booleans()):
            with contextlib.suppress(CacheError):
                cache.rewind(data.draw(st.integers(0, cache.length - 1)) if cache.length > 1 else 0)
        if cache.length == 40:
            cache.reset()
