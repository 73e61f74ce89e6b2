"""Bytes of tensors in parts: those of the whole, whatever the shape, order and size of a part."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelrig.checkpoint.mapping import Origin
from modelrig.components import Part
from modelrig.saving import streams
from modelrig.saving.streams import bytes_of, bytes_of_stored

SHAPES = [(), (0,), (7,), (5, 3), (2, 0, 3), (3, 4, 5), (1, 1, 9), (13, 1)]


def whole(tensor: torch.Tensor) -> bytes:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("part", [1, 24, 64, 1 << 22])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_together_are_the_tensor(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], part: int) -> None:
    monkeypatch.setattr(streams, "PART_BYTES", part)
    tensor = torch.randn(shape)
    views = [tensor, *(tensor.transpose(0, -1) for _ in range(len(shape) > 1)), *(tensor[::2] for _ in range(len(shape) > 0))]
    for view in views:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            parts = [bytes(one) for one in bytes_of(view, dtype)]
            assert whole(view.to(dtype)) == b"".join(parts)
            assert all(len(one) <= max(part, 8) for one in parts)


@given(st.data())
def test_a_stored_tensor_is_put_together_from_wherever_its_regions_went(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 6))
    stored = torch.arange(float(rows * columns)).view(rows, columns)
    dim = data.draw(st.integers(0, 1))
    cut = data.draw(st.integers(0, stored.shape[dim]))
    size = stored.shape[dim]
    regions = [
        tuple((low, high) if d == dim else (0, n) for d, n in enumerate(stored.shape)) for low, high in ((0, cut), (cut, size))
    ]
    halves = {"a": stored.narrow(dim, 0, cut), "b": stored.narrow(dim, cut, size - cut).t().contiguous()}
    order = data.draw(st.permutations([0, 1]))
    origins = [
        Origin("a", Part("x", (rows, columns), taken=regions[0])),
        Origin("b", Part("x", (rows, columns), taken=regions[1], axes=tuple(h - low for low, h in regions[1]), order=(1, 0))),
    ]
    found = b"".join(map(bytes, bytes_of_stored((rows, columns), [origins[one] for one in order], halves, torch.float32)))
    assert whole(stored) == found
