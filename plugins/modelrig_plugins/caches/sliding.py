"""Bytes of a cache whose layers with a window keep that window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import frozen

from modelrig.components import AttentionSpec, Reason, dtype_bytes
from modelrig.planning.needs import CacheNeed


@frozen
class SlidingOptions:
    """`headroom`: tokens beyond a window that its layers keep. So many can be forgotten again by a rewind, and a step of so many is
    written where it belongs at once."""

    headroom: int = 64


class SlidingPlanner:
    Options = SlidingOptions

    @staticmethod
    def check(need: CacheNeed, options: SlidingOptions) -> Iterable[Reason]:  # noqa: ARG004 - protocol
        if not isinstance(options.headroom, int) or isinstance(options.headroom, bool) or not 0 <= options.headroom < 1 << 31:
            yield Reason("cache.headroom", f"headroom {options.headroom!r}: a whole number of tokens, from 0 on, is accepted")

    @staticmethod
    def nbytes(layers: Sequence[AttentionSpec], batch: int, context: int, dtype: str, options: SlidingOptions) -> int:
        values = sum(room(spec, context, options) * spec.num_key_value_heads * (spec.head_dim + spec.value_dim) for spec in layers)
        return dtype_bytes(dtype, values * batch)


def room(spec: AttentionSpec, capacity: int, options: SlidingOptions | None) -> int:
    """Tokens for which a layer has room."""
    headroom = (options or SlidingOptions()).headroom
    return capacity if spec.window is None else min(capacity, spec.window + headroom)
