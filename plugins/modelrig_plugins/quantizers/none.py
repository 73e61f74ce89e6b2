"""Bytes of unquantised weights, and which kernel multiplies them."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from attrs import evolve, frozen

from modelrig.components import Parameter, Reason, TensorSpec, dtype_bytes
from modelrig.planning.needs import QuantizerNeed

KERNELS = ("auto", "linear", "mv", "packed")


@frozen
class NoneOptions:
    """`kernel`: how single tokens are multiplied on CPU. `linear` and `mv` use the weights as they are mapped; `packed` keeps a
    copy of each bfloat16 weight in oneDNN's layout once decoding has gone on for some tokens; `auto` takes what suits the CPU."""

    kernel: str = "auto"


class NonePlanner:
    Options = NoneOptions

    @staticmethod
    def check(need: QuantizerNeed, options: NoneOptions) -> Iterable[Reason]:
        if options.kernel not in KERNELS:
            yield Reason("quantizer.kernel", f"there is no kernel {options.kernel!r}; accepted is {', '.join(KERNELS)}")
        elif options.kernel == "packed" and not _can_pack(need):
            yield Reason("quantizer.kernel", "packed is for bfloat16 on a CPU with the flag avx512_bf16")
        elif options.kernel == "packed" and need.streamed:
            yield Reason("quantizer.kernel", "packed keeps a copy of every weight, and some are brought from disk for each step")

    @staticmethod
    def settle(need: QuantizerNeed, options: NoneOptions) -> NoneOptions:
        """By the CPU's instructions, as measured on machines of each sort (docs/decisions/0005)."""
        if options.kernel != "auto":
            return options
        if need.device != "cpu":
            return evolve(options, kernel="linear")
        pays = _can_pack(need) and "amx_tile" not in need.cpu_flags and not need.streamed
        return evolve(options, kernel="packed" if pays else "mv")

    @staticmethod
    def outputs(parameter: Parameter, dtype: str, options: NoneOptions) -> tuple[TensorSpec, ...]:  # noqa: ARG004 - protocol
        return (TensorSpec("", dtype, parameter.shape),)

    @staticmethod
    def copies(parameter: Parameter, dtype: str, options: NoneOptions) -> int:
        return dtype_bytes(dtype, prod(parameter.shape)) if options.kernel == "packed" else 0


def _can_pack(need: QuantizerNeed) -> bool:
    return need.device == "cpu" and need.dtype == "bfloat16" and "avx512_bf16" in need.cpu_flags
