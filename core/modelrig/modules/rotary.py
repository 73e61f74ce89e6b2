"""Rotary position embeddings: frequencies per scaling kind, and their application to queries and keys.

The formulas are those of the papers: RoPE (Su et al. 2021), position interpolation (Chen et al. 2023), dynamic NTK (bloc97,
emozilla 2023), YaRN (Peng et al. 2023), LongRoPE (Ding et al. 2024), and Llama 3.1's smoothing between wavelengths; constants and
conventions follow transformers' `modeling_rope_utils.py`, so that logits agree.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modelrig.checkpoint.rope import RopeSpec


def inverse_frequencies(spec: RopeSpec) -> tuple[Tensor, float]:
    """Inverse frequencies float32 [dim / 2] and the factor for cos and sin, for lengths up to `spec.max_positions`."""
    steps = torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim
    plain = 1.0 / (spec.theta**steps)
    if spec.kind == "linear":
        return plain / spec.factor, 1.0
    if spec.kind == "llama3":
        return _smooth(plain, spec), 1.0
    if spec.kind == "yarn":
        return _yarn(plain, spec), _yarn_attention_factor(spec)
    if spec.kind == "longrope":
        return _long(spec, spec.short_factors), _long_attention_factor(spec)
    if spec.kind == "proportional":
        return torch.where(torch.arange(spec.dim // 2) < int(spec.proportion * spec.dim // 2), plain / spec.factor, 0.0), 1.0
    return plain, 1.0


def _long(spec: RopeSpec, factors: tuple[float, ...]) -> Tensor:
    steps = torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * spec.theta**steps)


def _long_attention_factor(spec: RopeSpec) -> float:
    assert spec.original_positions is not None
    if spec.attention_factor is not None:
        return spec.attention_factor
    return 1.0 if spec.factor <= 1 else math.sqrt(1 + math.log(spec.factor) / math.log(spec.original_positions))


def _smooth(plain: Tensor, spec: RopeSpec) -> Tensor:
    """Llama 3.1: long wavelengths are interpolated, short ones kept, those between blended."""
    assert spec.original_positions is not None
    low, high, trained = spec.low_frequency_factor, spec.high_frequency_factor, spec.original_positions
    wavelength = 2 * math.pi / plain
    blend = ((trained / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / spec.factor + blend * plain


def _yarn(plain: Tensor, spec: RopeSpec) -> Tensor:
    assert spec.original_positions is not None

    def dimension_of(rotations: float) -> float:
        return spec.dim * math.log(spec.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(spec.theta))  # type: ignore[operator]

    low, high = dimension_of(spec.beta_fast), dimension_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(spec.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / spec.factor * ramp + plain * (1 - ramp)


def _yarn_attention_factor(spec: RopeSpec) -> float:
    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return magnitude(spec.factor, spec.mscale) / magnitude(spec.factor, spec.mscale_all_dim)
    return magnitude(spec.factor)


class Rotation(NamedTuple):
    """How far to turn each pair of dimensions: [batch, 1, count, dim], in the model's dtype.

    The sign of rotate-half is folded into sin: its first half is negated, so that `apply_rotary` needs no negation.
    """

    cos: Tensor
    sin: Tensor


class Rotary(nn.Module):
    """Positions [batch, count] → their `Rotation`."""

    inverse: Tensor
    longer: Tensor  # longrope: beyond the length the model was trained to

    def __init__(self, spec: RopeSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        self.register_buffer("inverse", torch.empty(spec.dim // 2, dtype=torch.float32, device="meta"), persistent=False)
        longer = spec.dim // 2 if spec.kind == "longrope" else 0
        self.register_buffer("longer", torch.empty(longer, dtype=torch.float32, device="meta"), persistent=False)
        self.scale = 1.0

    def init_buffers(self, device: torch.device) -> None:
        inverse, self.scale = inverse_frequencies(self.spec)
        self.inverse = inverse.to(device)
        self.longer = (
            _long(self.spec, self.spec.long_factors).to(device) if self.spec.kind == "longrope" else inverse[:0].to(device)
        )

    def forward(self, positions: Tensor) -> Rotation:
        inverse = self._stretched(positions) if self.spec.stable_length is not None else self.inverse
        angles = (positions[:, :, None].to(torch.float32) * inverse)[:, None]
        cos, sin = angles.cos(), angles.sin()
        if self.scale != 1.0:
            cos, sin = cos * self.scale, sin * self.scale
        return Rotation(torch.cat((cos, cos), dim=-1).to(self.dtype), torch.cat((-sin, sin), dim=-1).to(self.dtype))

    def _stretched(self, positions: Tensor) -> Tensor:
        """Inverse frequencies [batch, 1, dim / 2] by each row's own length, rows being independent."""
        spec = self.spec
        length = (positions.amax(dim=1) + 1)[:, None, None]
        if spec.original_positions is not None:
            return torch.where(length > spec.original_positions, self.longer, self.inverse)
        length = length.clamp(min=spec.max_positions).to(torch.float32)
        stretch = (spec.factor * length / spec.max_positions - (spec.factor - 1)) ** (spec.dim / (spec.dim - 2))
        steps = torch.arange(0, spec.dim, 2, dtype=torch.float32, device=positions.device) / spec.dim
        return 1.0 / ((spec.theta * stretch) ** steps)


def apply_rotary(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate x [batch, heads, count, head_dim]; of a rotation of fewer dimensions, the first of each head."""
    cos, sin = rotation
    dim = cos.shape[-1]
    if dim == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(dim // 2, dims=-1), sin)
    turned, kept = x[..., :dim], x[..., dim:]
    return torch.cat((torch.addcmul(turned * cos, turned.roll(dim // 2, dims=-1), sin), kept), dim=-1)
