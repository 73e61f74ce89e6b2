"""Numbers as codes of 8 or 4 bits, a scale and a minimum: number = minimum + scale * code, to within half a scale."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """`scale` and `low` have size 1 along the axis that was packed together."""

    codes: Tensor  # uint8: of the numbers' shape, or with 4 bits half as many on the last axis
    scale: Tensor
    low: Tensor


def pack(numbers: Tensor, axis: int, bits: int) -> Packed:
    """`numbers` [..., size], those along `axis` with a scale and a minimum in common, which are of their dtype."""
    wide = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
    levels = (1 << bits) - 1
    low = numbers.amin(axis, keepdim=True)
    scale = _round_up((wide.amax(axis, keepdim=True) - low) / levels, numbers.dtype)
    divisor = torch.where(scale == 0, 1, scale.to(wide.dtype))
    codes = ((wide - low) / divisor).round_().clamp_(0, levels).to(torch.uint8)
    return Packed(codes if bits == 8 else _fold(codes), scale, low)


def unpack_into(out: Tensor, packed: Packed, bits: int) -> None:
    """Write the numbers of `packed` to `out` [..., size]; scale and minimum are broadcast along it."""
    if bits == 8:
        out.copy_(packed.codes)
    else:
        half = packed.codes.shape[-1]
        out[..., :half].copy_(packed.codes & 15)
        out[..., half:].copy_((packed.codes >> 4)[..., : out.shape[-1] - half])
    torch.addcmul(packed.low, packed.scale, out, out=out)  # rounds once


def _fold(codes: Tensor) -> Tensor:
    """Two codes of 4 bits in a byte: the first half of the last axis in the lower bits, the second in the upper ones."""
    half = (codes.shape[-1] + 1) // 2
    folded = codes[..., :half].clone()
    folded[..., : codes.shape[-1] - half] |= codes[..., half:] << 4
    return folded


def _round_up(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers from 0 on in `dtype`, none smaller than it was: a maximum must not need a code more than there are."""
    rounded, limits = numbers.to(dtype), torch.finfo(dtype)
    margin = numbers * limits.eps + limits.smallest_normal * limits.eps
    return torch.where(rounded.to(numbers.dtype) < numbers, (numbers + margin).to(dtype), rounded)
