"""Bytes of a contiguous cache at its full length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelrig.components import AttentionSpec, dtype_bytes


class StaticPlanner:
    @staticmethod
    def nbytes(layers: Sequence[AttentionSpec], batch: int, context: int, dtype: str, options: Any) -> int:  # noqa: ARG004 - protocol
        per_token = sum(spec.num_key_value_heads * (spec.head_dim + spec.value_dim) for spec in layers)
        return dtype_bytes(dtype, per_token * batch * context)
