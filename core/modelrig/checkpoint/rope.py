"""Rotary position settings as configs spell them, without torch: `modules/rotary.py` computes with the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from modelrig.errors import quoted

if TYPE_CHECKING:
    from modelrig.checkpoint.config import ConfigReader

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
#: the kinds whose frequencies depend on where the model was first trained to
TRAINED_LENGTH = ("llama3", "yarn")
#: beyond these the frequencies of a head are no longer finite float32 numbers
THETA = (1e-6, 1e15)


@frozen(kw_only=True)
class RopeSpec:
    """Everything that fixes the rotary frequencies of one layer kind."""

    kind: str
    theta: float
    dim: int  # rotated dimensions of a head
    max_positions: int  # config's max_position_embeddings
    factor: float = 1.0
    original_positions: int | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def context_length(self) -> int:
        """The longest sequence these settings were made for."""
        if self.kind in ("linear", "dynamic"):
            return max(1, int(self.max_positions * self.factor))
        if self.kind == "yarn" and self.original_positions:
            return max(self.max_positions, int(self.original_positions * self.factor))
        return self.max_positions

    @property
    def depends_on_length(self) -> bool:
        """Frequencies change with the length of the sequence, so one forward over a prompt differs from several over its parts."""
        return self.kind == "dynamic"


def read_rope(reader: ConfigReader, dim: int, max_positions: int) -> RopeSpec:
    """Rotary settings from `rope_parameters` (v5), or `rope_scaling` and a top-level `rope_theta` (v4).

    `rope_type` wins over the older `type`. Where both spellings are there they must not say different things. Problems are left
    in `reader`.
    """
    top_theta = reader.number("rope_theta", *THETA, default=10_000.0)
    settings, older = reader.child("rope_parameters"), reader.child("rope_scaling")
    if settings is not None and settings.values:
        _require_same(reader, settings.values)
    else:
        settings = older
    if settings is None:
        return RopeSpec(kind="default", theta=top_theta, dim=dim, max_positions=max_positions)
    kind = settings.choice("rope_type", KINDS, default=settings.choice("type", KINDS, default="default"))
    partial = settings.number("partial_rotary_factor", low=0.0, high=1.0, default=1.0, exclusive=True)
    settings.require(partial == 1.0, "CF-RANGE", "partial_rotary_factor", "this architecture rotates whole heads: must be 1.0")
    theta = settings.number("rope_theta", *THETA, default=top_theta)
    if kind == "default":
        return RopeSpec(kind=kind, theta=theta, dim=dim, max_positions=max_positions)
    original = None
    if kind in TRAINED_LENGTH:
        outer = reader.integer("original_max_position_embeddings", low=1, high=2**40, default=max_positions)
        original = settings.integer("original_max_position_embeddings", low=1, high=2**40, default=outer)
    if kind == "yarn" and original is not None and "factor" not in settings:
        factor = max_positions / original
    else:
        factor = settings.number("factor", low=1e-6, high=1e9)
    low = high = 1.0
    if kind == "llama3":
        low = settings.number("low_freq_factor", low=0.0, high=1e9, exclusive=True)
        high = settings.number("high_freq_factor", low=0.0, high=1e9, exclusive=True)
        settings.require(high > low, "CF-REL", "high_freq_factor", f"must be greater than low_freq_factor ({low})")
    if kind == "dynamic":
        settings.require(dim > 2, "CF-REL", "rope_type", f"dynamic scaling needs a head_dim above 2, this model's is {dim}")
    if kind == "yarn":
        settings.require(theta != 1.0, "CF-RANGE", "rope_theta", "yarn needs a rope_theta other than 1")
    return RopeSpec(
        kind=kind,
        theta=theta,
        dim=dim,
        max_positions=max_positions,
        factor=factor,
        original_positions=original,
        low_frequency_factor=low,
        high_frequency_factor=high,
        beta_fast=_rotations(settings, "beta_fast", 32.0),
        beta_slow=_rotations(settings, "beta_slow", 1.0),
        attention_factor=settings.number("attention_factor", low=0.0, high=1e9, default=None),
        mscale=settings.number("mscale", low=0.0, high=1e9, default=None),
        mscale_all_dim=settings.number("mscale_all_dim", low=0.0, high=1e9, default=None),
        truncate=settings.boolean("truncate", default=True),
    )


def _rotations(settings: ConfigReader, key: str, usual: float) -> float:
    """A bound of yarn's ramp; 0 stands for the usual one, as in transformers."""
    value = settings.number(key, low=0.0, high=1e9, default=0.0)
    settings.require(value == 0 or value >= 1e-6, "CF-RANGE", key, f"{value}; 0 for {usual:g}, or 1e-06 to 1e+09 is accepted")
    return value or usual


def _require_same(reader: ConfigReader, settings: Mapping[str, Any]) -> None:
    """Other programs read the v4 keys: where they say something else than `rope_parameters`, nobody knows what the weights need."""
    older = reader.child("rope_scaling")
    said = [("rope_theta", "rope_theta", reader.values.get("rope_theta"))]
    said += [(f"rope_scaling.{key}", key, value) for key, value in (older.values if older else {}).items()]
    for where, key, value in said:
        name = "rope_type" if key == "type" else key
        other = settings.get(name, settings.get(key, value if where == "rope_theta" else None))
        if value is not None and other != value:
            reader.problem("CF-REL", where, f"{quoted(value)}, but rope_parameters.{name} is {quoted(other)}")
