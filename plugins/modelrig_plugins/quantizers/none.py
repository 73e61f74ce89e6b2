"""Bytes of unquantised weights, and which kernel multiplies them: by rule, or as measured on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import ClassVar

from attrs import evolve, frozen

from modelrig.components import Parameter, Reason, TensorSpec, dtype_bytes
from modelrig.planning.measured import NotMeasuredError, read_measured
from modelrig.planning.needs import QuantizerNeed

ID = "quantizers:none"
COMMAND = "modelrig bench --tune MODEL --set quantizer.kernel=auto"
KERNELS = ("auto", "linear", "mv", "packed", "tuned", "tuned_packed")
#: kernels that were measured and may serve, the plainest first: one before another that is hardly faster
IN_PLACE = ("linear", "mv", "turned", "onednn")
HARDLY_FASTER = 0.97
#: rows of a step are sorted by powers of two: 1, 2, 3 to 4 and so on count as 1, 2, 2, 4; from the last on they are many
CLASSES = 10
MOST_STEPPED = 32  # as many rows are a prompt, fewer a step: a token, drafts under verification, a batch


@frozen
class NoneOptions:
    """`kernel`: how steps of few tokens are multiplied on CPU. `linear` and `mv` use the weights as they are mapped; `packed` keeps
    a copy of each in oneDNN's layout once decoding has gone on for some tokens; `auto` takes `linear` or `mv`, by the CPU's
    instructions. `tuned` takes for each shape and number of rows what was fastest when `modelrig bench --tune` measured it, of
    those that keep no copies, `tuned_packed` of all."""

    kernel: str = "auto"


@frozen
class TunedOptions(NoneOptions):
    """What `tuned` and `tuned_packed` became: for each weight, as "out x in", the kernels for 1, 2, 4 ... rows."""

    table: Mapping[str, tuple[str, ...]] = {}


class NonePlanner:
    Options: ClassVar[type[NoneOptions]] = NoneOptions

    @staticmethod
    def check(need: QuantizerNeed, options: NoneOptions) -> Iterable[Reason]:
        kernel = options.kernel
        if kernel not in KERNELS:
            yield Reason("quantizer.kernel", f"there is no kernel {kernel!r}; accepted is {', '.join(KERNELS)}")
        elif kernel == "packed" and not can_pack(need):
            yield Reason("quantizer.kernel", "packed is for bfloat16 on a CPU with the flag avx512_bf16")
        elif kernel in ("packed", "tuned_packed") and need.streamed:
            yield Reason("quantizer.kernel", f"{kernel} keeps copies of weights, and some are brought from disk for each step")
        elif kernel in ("tuned", "tuned_packed"):
            if need.device != "cpu":
                yield Reason("quantizer.kernel", f"{kernel} is for CPUs")
                return
            try:
                _table(need, packs=kernel == "tuned_packed")
            except NotMeasuredError as error:
                yield Reason("quantizer.kernel", f"{error}; measure with: {COMMAND}")

    @staticmethod
    def settle(need: QuantizerNeed, options: NoneOptions) -> NoneOptions:
        """By the CPU's instructions, as measured on machines of each sort (docs/decisions/0005), or by the file of this one."""
        if options.kernel == "auto":
            return evolve(options, kernel=single_row_kernel(need))
        if options.kernel in ("tuned", "tuned_packed"):
            return TunedOptions(options.kernel, _table(need, packs=options.kernel == "tuned_packed"))
        return options

    @staticmethod
    def outputs(parameter: Parameter, dtype: str, options: NoneOptions) -> tuple[TensorSpec, ...]:  # noqa: ARG004 - protocol
        return (TensorSpec("", dtype, parameter.shape),)

    @staticmethod
    def copies(parameter: Parameter, dtype: str, options: NoneOptions) -> int:
        if isinstance(options, TunedOptions):
            is_packed = "packed" in options.table.get(label(parameter.shape[-2:]), ())
        else:
            is_packed = options.kernel == "packed"
        return dtype_bytes(dtype, prod(parameter.shape)) if is_packed else 0


# ------------------------------------------------------------------------------------------------ by rule


def can_pack(need: QuantizerNeed) -> bool:
    return need.device == "cpu" and need.dtype == "bfloat16" and "avx512_bf16" in need.cpu_flags


def single_row_kernel(need: QuantizerNeed) -> str:
    """Where oneDNN multiplies bfloat16 without tiles `F.linear` reads faster than `mv`, elsewhere it is the other way round."""
    return "linear" if need.device != "cpu" or (can_pack(need) and "amx_tile" not in need.cpu_flags) else "mv"


def few_rows_kernel(dtype: str, cpu_flags: frozenset[str], rows: int) -> str:
    """For 2 to 31 rows: with tiles the product is turned, so that oneDNN rearranges the rows rather than the weight; in float32
    oneDNN is asked from 4 rows on, where `F.linear` asks MKL."""
    if dtype == "bfloat16" and "amx_bf16" in cpu_flags:
        return "turned"
    return "onednn" if dtype == "float32" and rows >= 4 and "avx512f" in cpu_flags else "linear"


# ------------------------------------------------------------------------------------------------ as measured


def label(shape: Iterable[int], dtype: str = "") -> str:
    """A weight [out, in] as measurements name it."""
    return " x ".join(map(str, shape)) + (f" {dtype}" if dtype else "")


def choose(seconds: Mapping[str, float], allowed: Iterable[str]) -> str | None:
    """The fastest, or a plainer one that is hardly slower; None if none of the allowed was measured."""
    measured = [(name, seconds[name]) for name in allowed if name in seconds]
    fastest = min((time for _, time in measured), default=0.0)
    return next((name for name, time in measured if fastest >= HARDLY_FASTER * time), None)


def _table(need: QuantizerNeed, *, packs: bool) -> dict[str, tuple[str, ...]]:
    """The kernels of every weight of the model that was measured. Raises `NotMeasuredError` if none was."""
    measured = read_measured(need.machine, ID)
    table = {}
    for shape in sorted(need.multiplied):
        rows = measured.get(label(shape, need.dtype), {})
        chosen = {count: choose(seconds, (*IN_PLACE, *(("packed",) if packs else ()))) for count, seconds in rows.items()}
        if 1 in chosen and None not in chosen.values():
            table[label(shape)] = tuple(_at(chosen, 1 << place) for place in range(CLASSES))
    if not table:
        raise NotMeasuredError(f"of this model's weights none was measured in {need.dtype} on this machine")
    return table


def _at(chosen: Mapping[int, str | None], rows: int) -> str:
    """What was chosen for the most rows that are no more than these."""
    name = chosen[max(count for count in chosen if count <= rows)]
    assert name is not None
    return "linear" if name == "mv" and rows > 1 else name
