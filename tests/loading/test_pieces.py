"""Pieces of stored tensors: together they put each element where whole-tensor computation puts it, and none is large."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fillers import filled, raw
from modelrig.components import Part, TensorEntry
from modelrig.loading import pieces as module
from modelrig.loading.pieces import pieces
from modelrig_plugins.formats.decoding import decode

SIZES = (1, 2, 3, 4, 6, 8)


@pytest.fixture(autouse=True)
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 64)


def bring(stored: torch.Tensor, part: Part, target: torch.Tensor, strides: tuple[int, ...] | None = None) -> list[int]:
    """Fill `target` piece by piece from the bytes of `stored`; the sizes of the pieces."""
    order = range(stored.dim()) if strides is None else sorted(range(stored.dim()), key=lambda dim: strides[dim], reverse=True)
    data = torch.frombuffer(bytearray(b"\x55" * 8 + raw(stored.permute([*order]))), dtype=torch.uint8)
    entry = TensorEntry("t", str(stored.dtype).removeprefix("torch."), tuple(stored.shape), 0, 8, data.numel() - 8, strides)
    sizes = []
    touched = torch.zeros(target.shape, dtype=torch.int8)
    marks = pieces(entry, part, touched)
    for piece in pieces(entry, part, target):
        run = piece.entry
        assert 8 <= run.offset and run.offset + run.nbytes <= data.numel()
        piece.into.copy_(piece.shaped(decode(data[run.offset : run.offset + run.nbytes], run)))
        next(marks).into.add_(1)
        sizes.append(run.nbytes)
    assert next(marks, None) is None
    assert int(touched.max() if touched.numel() else 0) <= 1
    return sizes


@st.composite
def parts(draw: Any) -> tuple[tuple[int, ...], Part, tuple[int, ...]]:
    """(stored shape, a part of it, shape of the tensor that it is put into)."""
    shape = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=0, max_size=3)))
    taken = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        taken.append((start, draw(st.integers(start + 1, size))) if draw(st.booleans()) else (0, size))
    axes: list[int] = []
    for start, stop in taken:  # each dimension in factors, with some of size 1 between
        left = stop - start
        while left > 1:
            axes.append(draw(st.sampled_from([factor for factor in range(2, left + 1) if left % factor == 0])))
            left //= axes[-1]
        axes.extend([1] * draw(st.integers(0, 1)))
    order = draw(st.permutations(range(len(axes))))
    groups: list[int] = []  # the dimensions of the region: products of neighbours
    for place in order:
        if groups and draw(st.booleans()):
            groups[-1] *= axes[place]
        else:
            groups.append(axes[place])
    margins = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in groups]
    into = tuple((before, before + size) for size, (before, _) in zip(groups, margins, strict=True))
    target = tuple(before + size + after for size, (before, after) in zip(groups, margins, strict=True))
    return shape, Part("t", shape, tuple(taken), tuple(axes), tuple(order), into), target


@settings(max_examples=300, deadline=None)
@given(parts(), st.sampled_from([torch.int8, torch.int32, torch.float64]))
def test_any_part_is_put_where_whole_tensors_say(case: Any, dtype: torch.dtype) -> None:
    shape, part, size = case
    stored = torch.arange(1, prod(shape) + 1).to(dtype).view(shape)
    target = torch.zeros(size, dtype=dtype)
    sizes = bring(stored, part, target)
    assert torch.equal(filled(part, stored, size), target)
    assert max(sizes) <= max(64, 8 * dtype.itemsize)


@settings(max_examples=150, deadline=None)
@given(parts(), st.randoms(use_true_random=False))
def test_tensors_in_another_order_than_cs_are_put_there_too(case: Any, random: Any) -> None:
    shape, part, size = case
    order = list(range(len(shape)))
    random.shuffle(order)
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim], step = step, step * shape[dim]
    stored = torch.arange(1, prod(shape) + 1, dtype=torch.int32).view(shape)
    for one in (part, Part("t", shape, part.taken, into=part.taken)):
        into = size if one is part else shape
        target = torch.zeros(into, dtype=torch.int32)
        sizes = bring(stored, one, target, tuple(strides))
        assert torch.equal(filled(one, stored, into), target)
    assert max(sizes) <= 64  # as it is, in its own order: in pieces


def test_a_run_is_cut_into_even_pieces() -> None:
    stored = torch.arange(100, dtype=torch.float64)
    target = torch.zeros(100, dtype=torch.float64)
    assert [64] * 12 + [32] == bring(stored, Part("t", (100,)), target)
    assert torch.equal(stored, target)


def test_rows_of_which_little_is_wanted_are_not_read_where_they_are_long() -> None:
    stored = torch.arange(5 * 40, dtype=torch.float64).view(5, 40)
    part = Part("t", (5, 40), taken=((1, 4), (30, 32)))
    target = torch.zeros(3, 2, dtype=torch.float64)
    assert [16] * 3 == bring(stored, part, target)
    assert torch.equal(stored[1:4, 30:32], target)


BOUNDED = {
    "a row that is longer than a piece": ((3, 50), (50, 3), [1, 0], None),
    "a stack that is transposed": ((40, 50), (1, 50, 40), [0, 2, 1], (1, 40, 50)),
    "one head": ((48, 5), (48, 5), [1, 0, 2], (24, 2, 5)),
    "heads of many rows": ((480, 3), (480, 3), [0, 2, 1, 3], (2, 120, 2, 3)),
    "stored stacks transposed": ((2, 30, 20), (2, 20, 30), [0, 2, 1], None),
}


@pytest.mark.parametrize(("shape", "into", "order", "axes"), BOUNDED.values(), ids=BOUNDED)
def test_pieces_are_bounded_whatever_the_layout(shape: Any, into: Any, order: Any, axes: Any) -> None:
    stored = torch.arange(prod(shape), dtype=torch.float64).view(shape)
    part = Part("t", shape, axes=axes or shape, order=tuple(order))
    target = torch.zeros(into, dtype=torch.float64)
    sizes = bring(stored, part, target)
    assert torch.equal(filled(part, stored, into), target)
    assert max(sizes) <= 64
    assert sum(sizes) == stored.nbytes


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_nothing_is_read_for_nothing(shape: tuple[int, ...]) -> None:
    assert [] == bring(torch.zeros(shape), Part("t", shape), torch.zeros(shape))


def test_a_scalar_is_one_piece() -> None:
    target = torch.zeros((), dtype=torch.float64)
    assert [8] == bring(torch.tensor(7.0, dtype=torch.float64), Part("t", ()), target)
    assert 7.0 == target.item()
    stacked = torch.zeros(3, dtype=torch.float64)
    bring(torch.tensor(7.0, dtype=torch.float64), Part("t", (), into=((1, 2),)), stacked)
    assert [0.0, 7.0, 0.0] == stacked.tolist()


@pytest.mark.parametrize("dtype", ["float6_e2m3", "float6_e3m2", "float4_e2m1fn_x2"])
def test_runs_of_parts_of_bytes_begin_and_end_at_whole_bytes(dtype: str) -> None:
    bits = {"4": 4, "6": 6}[dtype[5]]
    count = 1000
    entry = TensorEntry("t", dtype, (count,), 0, 0, count * bits // 8)
    runs = [piece.entry for piece in pieces(entry, Part("t", (count,)), torch.zeros(count, dtype=torch.uint8))]
    assert len(runs) > 1
    assert count * bits // 8 == sum(run.nbytes for run in runs)
    assert [run.offset + run.nbytes for run in runs[:-1]] == [run.offset for run in runs[1:]]
    assert max(run.nbytes for run in runs) <= 64
