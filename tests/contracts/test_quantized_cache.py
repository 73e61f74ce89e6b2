"""The cache `quantized` against a plain account of it: whatever the steps were, who sees which form of a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from dequantised import Form, dequantised, is_packed
from modelrig.components import AttentionSpec
from modelrig.errors import CacheError
from modelrig.planning.needs import CacheNeed
from modelrig.registry import current
from modelrig_plugins.caches.packing import pack, unpack_into

WIDE = AttentionSpec(num_heads=2, num_key_value_heads=1, head_dim=3, value_dim=5, scale=1.0)
LAYERS = (WIDE, evolve(WIDE, num_key_value_heads=2, value_dim=64), evolve(WIDE, window=6))


def make(form: Form, headroom: int = 3, batch: int = 2, capacity: int = 60, padding: Any = None, dtype: Any = torch.float32) -> Any:
    component = current().find("caches", "quantized")
    options = component.planner().Options(*form, headroom)
    cache = component.implementation().create(
        LAYERS, batch=batch, capacity=capacity, dtype=dtype, device=torch.device("cpu"), padding=padding, options=options
    )
    name = str(dtype).removeprefix("torch.")
    assert component.planner().nbytes(LAYERS, batch, capacity, name, options) == cache.nbytes
    return cache


class Oracle:
    """All keys and values of each row and layer, as they were given."""

    def __init__(self, padding: list[int]) -> None:
        self.padding = padding
        self.tokens = [[torch.zeros(s.num_key_value_heads, 0, s.head_dim + s.value_dim) for _ in padding] for s in LAYERS]

    def extended(self, new: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        pairs = zip(self.tokens, new, strict=True)
        return [[torch.cat(both, dim=1) for both in zip(rows, layer, strict=True)] for rows, layer in pairs]

    def cut(self, length: int) -> None:
        self.tokens = [[row[:, :length] for row in rows] for rows in self.tokens]

    def rows(self, order: list[int]) -> None:
        self.tokens = [[rows[row] for row in order] for rows in self.tokens]
        self.padding = [self.padding[row] for row in order]


def check_step(cache: Any, oracle: Oracle, form: Form, count: int) -> list[list[torch.Tensor]]:
    """A step of random tokens; returns the oracle's tokens with them. What each query sees must be what the plain account says."""
    new = [torch.randn(cache.batch, s.num_key_value_heads, count, s.head_dim + s.value_dim) for s in LAYERS]
    everything = oracle.extended(new)
    slots = cache.begin(count)
    for number, (spec, layer) in enumerate(zip(LAYERS, cache.layers, strict=True)):
        k, v = new[number].split((spec.head_dim, spec.value_dim), dim=3)
        keys, values = layer.update(k, v, slots)
        visible = slots.visible(spec)
        mask = visible.dense().expand(cache.batch, -1, -1, -1)[:, 0]
        for row, start in enumerate(oracle.padding):
            own = everything[number][row][:, start:]
            plain_keys, plain_values = own.split((spec.head_dim, spec.value_dim), dim=2)
            packed_keys, packed_values = dequantised(plain_keys, plain_values, form)
            for place in range(count):
                query = cache.length + place - start
                if query < 0:
                    assert 1 == mask[row, place].sum()
                    continue
                first = 0 if spec.window is None else max(0, query - spec.window + 1)
                found = mask[row, place].nonzero()[:, 0]
                index = visible.key_index[found]
                assert [*range(first, query + 1)] == sorted((index - start).tolist())
                slot = found[index.argsort()]
                is_old = torch.tensor([is_packed(query, token, form) for token in range(first, query + 1)])[:, None]
                seen = slice(first, query + 1)
                torch.testing.assert_close(keys[row, :, slot], torch.where(is_old, packed_keys[:, seen], plain_keys[:, seen]))
                torch.testing.assert_close(values[row, :, slot], torch.where(is_old, packed_values[:, seen], plain_values[:, seen]))
    return everything


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_who_sees_which_form_of_a_token_after_any_history(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    form = Form(data.draw(st.sampled_from([4, 8])), data.draw(st.integers(1, 5)), data.draw(st.integers(0, 6)))
    headroom, highest = data.draw(st.integers(0, 4)), 0
    padding = data.draw(st.sampled_from([[0, 0], [0, 3], [4, 1], [2, 2]]))
    cache, oracle = make(form, headroom, padding=padding), Oracle(padding)
    for _ in range(data.draw(st.integers(1, 10))):
        match data.draw(st.sampled_from(["step", "step", "step", "step", "rewind", "reset", "reorder", "fork", "move"])):
            case "step":
                count = data.draw(st.sampled_from([1, 1, 2, 3, 5, 8, 17]))
                if cache.length + count > 60:
                    continue
                oracle.tokens = check_step(cache, oracle, form, count)
                highest = max(highest, cache.length + (count if count <= headroom + 1 else 0))
                kept = data.draw(st.sampled_from([count, count, count - 1, 0]))
                if kept or data.draw(st.booleans()):
                    cache.commit(kept)
                oracle.cut(cache.length)
                highest = max(highest, cache.length)
            case "rewind":
                to = data.draw(st.integers(max(0, cache.length - 8), cache.length))
                try:
                    cache.rewind(to)
                    oracle.cut(to)
                    highest = highest if to else 0
                except CacheError as error:
                    assert "CA-REWIND" == error.code and to < highest - headroom
            case "reset":
                padding = data.draw(st.lists(st.integers(0, 4), min_size=cache.batch, max_size=cache.batch))
                cache.reset(padding)
                oracle, highest = Oracle(padding), 0
            case "reorder":
                cache.rewind(cache.length)
                order = data.draw(st.lists(st.integers(0, cache.batch - 1), min_size=cache.batch, max_size=cache.batch))
                cache.reorder(order)
                oracle.rows(order)
            case "fork" if cache.batch < 4:
                cache = cache.fork(2)
                oracle.rows([row for row in range(cache.batch // 2) for _ in range(2)])
            case "move":
                state = cache.export()
                cache = make(form, headroom, cache.batch, data.draw(st.integers(max(5, cache.length), 70)))
                check_step(cache, Oracle(cache.padding), form, 4)
                cache.adopt(state)
                if cache.capacity < 60:
                    bigger = make(form, headroom, cache.batch)
                    bigger.adopt(cache.export())
                    cache = bigger
        assert oracle.tokens[0][0].shape[1] == cache.length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1, 5, 32])
def test_no_number_is_further_off_than_half_a_step(dtype: torch.dtype, bits: int, size: int) -> None:
    torch.manual_seed(0)
    for scale, shift in ((1.0, 0.0), (1e-3, 5.0), (1e3, -3e4), (1e-7, 0.0)):
        numbers = (torch.randn(40, 3, size) * scale + shift).to(dtype)
        numbers[0, 0] = 0
        packed, out = pack(numbers, -1, bits), torch.empty_like(numbers)
        unpack_into(out, packed, bits)
        wide = numbers.double()
        rounding = torch.finfo(dtype).eps * wide.abs() + torch.finfo(dtype).tiny
        step = packed.scale.double()
        assert ((out.double() - wide).abs() <= step / 2 * (1 + 1e-5) + rounding).all()
        assert (step <= (wide.amax(-1, keepdim=True) - wide.amin(-1, keepdim=True)) / (2**bits - 1) * 1.02 + rounding).all()


def test_a_padded_row_is_packed_as_it_is_alone() -> None:
    form = Form(4, 4, 3)
    cache, alone = make(form, padding=[0, 3], capacity=40), make(form, batch=1, capacity=40)
    torch.manual_seed(1)
    for count in (14, 1, 5, 2, 1, 9):
        slots, single = cache.begin(count), alone.begin(count if alone.length else count - 3)
        for spec, layer, other in zip(LAYERS, cache.layers, alone.layers, strict=True):
            k, v = (torch.randn(2, spec.num_key_value_heads, count, size) for size in (spec.head_dim, spec.value_dim))
            skipped = count - single.index.shape[0]
            batched, one = layer.update(k, v, slots), other.update(k[1:, :, skipped:], v[1:, :, skipped:], single)
            places = []
            for made, rows in ((slots, 2), (single, 1)):
                visible = made.visible(spec)
                found = visible.dense().expand(rows, -1, -1, -1)[-1, 0, -1].nonzero()[:, 0]
                places.append(found[visible.key_index[found].argsort()])
            seen, wanted = places
            for found, expected in zip(batched, one, strict=True):
                assert torch.equal(found[1, :, seen], expected[0, :, wanted])
        cache.commit(count)
        alone.commit(single.index.shape[0])


@pytest.mark.parametrize(("bits", "is_less_than"), [(8, 0.65), (4, 0.4)])
def test_it_is_smaller_than_what_it_packs(bits: int, is_less_than: float) -> None:
    spec = AttentionSpec(num_heads=32, num_key_value_heads=4, head_dim=64, value_dim=64, scale=1.0)
    planner = current().find("caches", "quantized").planner()
    plain = current().find("caches", "static").planner().nbytes([spec] * 22, 1, 4096, "bfloat16", None)
    assert planner.nbytes([spec] * 22, 1, 4096, "bfloat16", planner.Options(bits=bits)) < is_less_than * plain


@pytest.mark.parametrize(
    "options", [{"bits": 2}, {"bits": True}, {"group": 0}, {"group": 1.5}, {"residual": -1}, {"headroom": -1}, {"headroom": "4"}]
)
def test_options_it_cannot_serve_are_reasons(options: dict[str, Any]) -> None:
    planner = current().find("caches", "quantized").planner()
    need = CacheNeed.__new__(CacheNeed)
    (reason,) = planner.check(need, planner.Options(**options))
    assert f"cache.{next(iter(options))}" == reason.code
    assert not list(planner.check(need, planner.Options()))


def test_what_is_adopted_within_a_step_knows_nothing_of_it() -> None:
    form = Form(bits=8, group=2, residual=1)
    state, oracle = make(form, 0).export(), Oracle([0, 0])
    cache = make(form, 0)
    check_step(cache, Oracle([0, 0]), form, 4)  # longer than the ring, and never committed
    cache.adopt(state)
    for count in (1, 1, 1, 2, 5):
        oracle.tokens = check_step(cache, oracle, form, count)
        cache.commit(count)
