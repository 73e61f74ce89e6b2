"""Bytes of unquantised weights."""

from __future__ import annotations

from typing import Any

from modelrig.components import Parameter, TensorSpec


class NonePlanner:
    @staticmethod
    def outputs(parameter: Parameter, dtype: str, options: Any) -> tuple[TensorSpec, ...]:  # noqa: ARG004 - protocol
        return (TensorSpec("", dtype, parameter.shape),)
