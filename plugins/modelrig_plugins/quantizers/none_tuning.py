"""Measures the plain linear kernels for weights of given shapes: what `modelrig bench --tune` keeps for this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from modelrig.planning.environment import read_environment
from modelrig.planning.measured import Measured
from modelrig_plugins.quantizers.none import label
from modelrig_plugins.quantizers.none_module import IN_PLACE, Kernel

ROWS = (1, 2, 4, 8, 16, 64, 512)
POOL_BYTES = 192 << 20  # weights are taken in turn from a pool larger than most caches, as decoding does
SECONDS = 0.4  # for one shape and number of rows, all kernels together
ROUNDS = range(3, 25)  # fewest and most


def measure(shapes: Iterable[tuple[int, int]], dtype: str, progress: Callable[[str], None]) -> Measured:
    """Median seconds of each kernel for weights [out, in] of these shapes, for each of `ROWS`, all kernels in turn.

    Takes about `SECONDS` for each shape and number of rows, and memory for the pool twice, or the largest weight twice.
    `progress` is told what was measured, line by line. A shape for whose weight and copy there is no room is left out.
    """
    found = {}
    for shape in sorted(shapes):
        needed = 2 * max(POOL_BYTES, shape[0] * shape[1] * getattr(torch, dtype).itemsize)
        available = read_environment().available_bytes("cpu")
        if available is not None and needed > available:
            progress(f"{label(shape, dtype)}: left out, {needed:,} bytes are needed and {available:,} available")
            continue
        with torch.inference_mode():
            found[label(shape, dtype)] = _measure_shape(shape, getattr(torch, dtype), progress)
    return found


def _measure_shape(shape: tuple[int, int], dtype: torch.dtype, progress: Callable[[str], None]) -> dict[int, dict[str, float]]:
    first = torch.randn(shape).to(dtype)
    count = max(1, min(64, POOL_BYTES // first.nbytes))
    pool = [first, *(first.clone() for _ in range(count - 1))]
    kernels = {name: [make(weight, None) for weight in pool] for name, make in IN_PLACE.items()}
    if (packed := _packed(pool)) is not None:
        kernels["packed"] = packed
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, shape[1]).to(dtype)
        usable = {name: made for name, made in kernels.items() if (name != "mv" or rows == 1) and _serves(made[0], x)}
        found[rows] = _in_turn(usable, x)
        times = ", ".join(f"{name} {seconds * 1e6:,.0f}" for name, seconds in sorted(found[rows].items(), key=lambda one: one[1]))
        progress(f"{label(shape, str(dtype).removeprefix('torch.'))}, {rows} rows, microseconds: {times}")
    return found


def _packed(pool: list[Tensor]) -> list[Kernel] | None:
    """Kernels on packed copies, where oneDNN packs this dtype on this CPU."""

    def on(copy: Tensor) -> Kernel:
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, copy, None, "none", [], "")

    try:
        return [on(torch.ops.mkldnn._reorder_linear_weight(weight, 1)) for weight in pool]
    except RuntimeError:  # NotImplementedError is one
        return None


def _serves(kernel: Kernel, x: Tensor) -> bool:
    """Whether it knows this dtype on this CPU."""
    try:
        kernel(x)
    except RuntimeError:
        return False
    return True


def _in_turn(kernels: dict[str, list[Kernel]], x: Tensor) -> dict[str, float]:
    """Median seconds of one call, from rounds in which each kernel takes the next weights of the pool."""
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    calls = dict.fromkeys(kernels, 1)
    place, started = 0, time.perf_counter()
    for number in range(ROUNDS.stop):
        if number >= ROUNDS.start and time.perf_counter() - started > SECONDS:
            break
        for name, made in kernels.items():
            begun = time.perf_counter()
            for call in range(calls[name]):
                made[(place + call) % len(made)](x)
            taken = (time.perf_counter() - begun) / calls[name]
            seconds[name].append(taken)
            calls[name] = max(1, min(len(made), int(SECONDS / len(kernels) / ROUNDS.stop / taken)))
        place += max(calls.values())
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}
