"""Rotary position settings as configs spell them, without torch: `modules/rotary.py` computes with the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from modelrig.errors import quoted

if TYPE_CHECKING:
    from modelrig.checkpoint.config import ConfigReader

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
#: the kinds whose frequencies depend on where the model was first trained to
TRAINED_LENGTH = ("llama3", "yarn", "longrope")
#: beyond these the frequencies of a head are no longer finite float32 numbers
THETA = (1e-6, 1e15)


@frozen(kw_only=True)
class RopeSpec:
    """Everything that fixes the rotary frequencies of one layer kind."""

    kind: str
    theta: float
    dim: int  # dimensions of a head that are turned, from the first on
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
    short_factors: tuple[float, ...] = ()  # longrope: what each pair's wavelength is multiplied by, up to `original_positions`
    long_factors: tuple[float, ...] = ()  # and beyond
    proportion: float = 1.0  # proportional: of the pairs, how many turn at all

    @property
    def context_length(self) -> int:
        """The longest sequence these settings were made for."""
        if self.kind in ("linear", "dynamic"):
            return max(1, int(self.max_positions * self.factor))
        if self.kind == "yarn" and self.original_positions:
            return max(self.max_positions, int(self.original_positions * self.factor))
        return self.max_positions

    @property
    def stable_length(self) -> int | None:
        """Frequencies change with the length of a sequence beyond this one, so that one forward over a longer prompt differs from
        several over its parts; None where they never change."""
        return {"dynamic": self.max_positions, "longrope": self.original_positions}.get(self.kind)


def read_rope(
    reader: ConfigReader,
    head_dim: int,
    max_positions: int,
    *,
    theta: float = 10_000.0,
    theta_key: str = "rope_theta",
    partial: float | None = None,
    partial_key: str = "partial_rotary_factor",
    renamed: Mapping[str, str] | None = None,
    original: int | None = None,
) -> RopeSpec:
    """Rotary settings from `rope_parameters` (v5), or `rope_scaling` and keys of their own (v4). Problems are left in `reader`.

    `rope_type` wins over the older `type`. Where both spellings are there they must not say different things.

    Args:
        theta, original: for configs that lack the key. `original` is then the length the model was trained to.
        theta_key, partial_key: the v4 keys.
        partial: the part of a head that turns in configs that lack the key; None for an architecture that turns whole heads.
        renamed: kinds this family calls otherwise.
    """
    top_theta = reader.number(theta_key, *THETA, default=theta)
    settings, older = reader.child("rope_parameters"), reader.child("rope_scaling")
    if settings is not None and settings.values:
        _require_same(reader, settings.values, theta_key)
    else:
        settings = older
    top_partial = None if partial is None else reader.number(partial_key, 0.0, 1.0, default=partial, exclusive=True)
    trained = reader.integer("original_max_position_embeddings", low=1, high=2**40, default=original)
    spec = rope_from(settings, head_dim, max_positions, theta=top_theta, partial=top_partial, renamed=renamed, original=trained)
    if partial is not None:
        nested = settings is not None and "partial_rotary_factor" in settings
        where = f"{settings.prefix}partial_rotary_factor" if settings is not None and nested else partial_key
        text = f"{spec.dim} of {head_dim} dimensions of a head would turn, and rotary embeddings turn pairs"
        reader.require(spec.dim % 2 == 0 and spec.dim > 0, "CF-REL", where, text, uses=("head_dim", "hidden_size"))
    return spec


def rope_from(
    settings: ConfigReader | None,
    head_dim: int,
    max_positions: int,
    *,
    theta: float,
    partial: float | None = None,
    renamed: Mapping[str, str] | None = None,
    original: int | None = None,
) -> RopeSpec:
    """What one object of settings says; `original`, where it is not None, wins over its own key, as in transformers."""
    if settings is None:
        return RopeSpec(kind="default", theta=theta, dim=int(head_dim * (partial or 1.0)), max_positions=max_positions)
    names = renamed or {}
    kinds = (*KINDS, *names)
    kind = settings.choice("rope_type", kinds, default=settings.choice("type", kinds, default="default"))
    kind = names.get(kind, kind)
    part = settings.number("partial_rotary_factor", low=0.0, high=1.0, default=partial or 1.0, exclusive=True)
    is_whole = partial is not None or part == 1.0 or kind == "proportional"
    settings.require(is_whole, "CF-RANGE", "partial_rotary_factor", "this architecture rotates whole heads: must be 1.0")
    theta = settings.number("rope_theta", *THETA, default=theta)
    dim = head_dim if kind == "proportional" else int(head_dim * part)
    spec = RopeSpec(kind=kind, theta=theta, dim=dim, max_positions=max_positions, proportion=part)
    return spec if kind == "default" else _scaled(spec, settings, original)


def _scaled(spec: RopeSpec, settings: ConfigReader, original: int | None) -> RopeSpec:
    kind = spec.kind
    if kind in TRAINED_LENGTH and original is None:
        original = settings.integer("original_max_position_embeddings", low=1, high=2**40, default=spec.max_positions)
    if kind in ("yarn", "longrope") and original is not None and "factor" not in settings:
        factor = spec.max_positions / original
    elif kind == "proportional":
        factor = settings.number("factor", low=1e-6, high=1e9, default=1.0)
    else:
        factor = settings.number("factor", low=1e-6, high=1e9)
    low = high = 1.0
    if kind == "llama3":
        low = settings.number("low_freq_factor", low=0.0, high=1e9, exclusive=True)
        high = settings.number("high_freq_factor", low=0.0, high=1e9, exclusive=True)
        settings.require(high > low, "CF-REL", "high_freq_factor", f"must be greater than low_freq_factor ({low})")
    if kind == "dynamic":
        settings.require(
            spec.dim > 2, "CF-REL", "rope_type", f"dynamic scaling needs a head_dim above 2, this model's is {spec.dim}"
        )
    if kind == "yarn":
        settings.require(spec.theta != 1.0, "CF-RANGE", "rope_theta", "yarn needs a rope_theta other than 1")
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    if kind == "longrope":
        short, long = (_factors(settings, key, spec.dim // 2) for key in ("short_factor", "long_factor"))
        is_defined = original != 1 or factor <= 1 or "attention_factor" in settings
        settings.require(is_defined, "CF-RANGE", "original_max_position_embeddings", "1; longrope needs a length of at least 2")
    return evolve(
        spec,
        factor=factor,
        original_positions=original if kind in TRAINED_LENGTH else None,
        low_frequency_factor=low,
        high_frequency_factor=high,
        beta_fast=_rotations(settings, "beta_fast", 32.0),
        beta_slow=_rotations(settings, "beta_slow", 1.0),
        attention_factor=settings.number("attention_factor", low=0.0, high=1e9, default=None),
        mscale=settings.number("mscale", low=0.0, high=1e9, default=None),
        mscale_all_dim=settings.number("mscale_all_dim", low=0.0, high=1e9, default=None),
        truncate=settings.boolean("truncate", default=True),
        short_factors=short,
        long_factors=long,
    )


def _factors(settings: ConfigReader, key: str, pairs: int) -> tuple[float, ...]:
    factors = settings.numbers(key, 1e-6, 1e9)
    settings.require(len(factors) == pairs, "CF-REL", key, f"{len(factors)} numbers for {pairs} pairs of dimensions")
    return factors


def _rotations(settings: ConfigReader, key: str, usual: float) -> float:
    """A bound of yarn's ramp; 0 stands for the usual one, as in transformers."""
    value = settings.number(key, low=0.0, high=1e9, default=0.0)
    settings.require(value == 0 or value >= 1e-6, "CF-RANGE", key, f"{value}; 0 for {usual:g}, or 1e-06 to 1e+09 is accepted")
    return value or usual


def _require_same(reader: ConfigReader, settings: Mapping[str, Any], theta_key: str) -> None:
    """Other programs read the v4 keys: where they say something else than `rope_parameters`, nobody knows what the weights need."""
    older = reader.child("rope_scaling")
    said = [(theta_key, "rope_theta", reader.values.get(theta_key))]
    said += [(f"rope_scaling.{key}", key, value) for key, value in (older.values if older else {}).items()]
    for where, key, value in said:
        name = "rope_type" if key == "type" else key
        other = settings.get(name, settings.get(key, value if where == theta_key else None))
        if value is not None and other != value:
            reader.problem("CF-REL", where, f"{quoted(value)}, but rope_parameters.{name} is {quoted(other)}")
