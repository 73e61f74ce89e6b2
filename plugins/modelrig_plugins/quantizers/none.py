"""Bytes of unquantised weights, and how they may be multiplied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attrs import frozen

from modelrig.components import Parameter, Reason, TensorSpec

KERNELS = ("auto", "linear", "mv", "packed")


@frozen
class NoneOptions:
    """`kernel`: how one token is multiplied on CPU. `linear` and `mv` use the weights as they are mapped; `packed` keeps a copy
    of each bfloat16 weight in oneDNN's layout once decoding has gone on for some tokens; `auto` takes what suits the CPU."""

    kernel: str = "auto"


class NonePlanner:
    Options = NoneOptions

    @staticmethod
    def check(need: Any, options: NoneOptions) -> Iterable[Reason]:  # noqa: ARG004 - protocol
        if options.kernel not in KERNELS:
            yield Reason("quantizers.kernel", f"there is no kernel {options.kernel!r}; accepted is {', '.join(KERNELS)}")

    @staticmethod
    def outputs(parameter: Parameter, dtype: str, options: Any) -> tuple[TensorSpec, ...]:  # noqa: ARG004 - protocol
        return (TensorSpec("", dtype, parameter.shape),)
