"""Copies through a ring of small buffers: nothing is lost, mixed up or sent before it is there."""

from __future__ import annotations

import pytest
import torch

from modelrig.loading.ring import PinnedRing


@pytest.mark.parametrize("size", [16, 40, 1 << 12])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tensors_of_any_size_arrive_whole(device: str, size: int) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    stream = torch.cuda.Stream() if device == "cuda" else None  # type: ignore[no-untyped-call]
    ring = PinnedRing(stream, buffers=3, size=size)
    sources = [
        torch.randn(7, 13),
        torch.randn(5, 3).bfloat16(),
        torch.arange(11, dtype=torch.int8),
        torch.tensor(3.5, dtype=torch.float64),
        torch.empty(0, 4),
        torch.randn(9, 6).t(),
        torch.rand(33) > 0.5,
    ]
    targets = [torch.empty(source.shape, dtype=source.dtype, device=device) for source in sources]
    for source, target in zip(sources, targets, strict=True):
        before = source.clone()
        ring.send(source, target)
        source.zero_()  # it was taken
        source.copy_(before)
    if stream is not None:
        stream.synchronize()
    assert all(torch.equal(source, target.cpu()) for source, target in zip(sources, targets, strict=True))
