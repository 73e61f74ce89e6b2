"""Which linear kernel reads weights fastest for one row? `F.linear`, `torch.mv` and friends over the shapes that decoding meets.

    python -m benchmarks.kernels [--repeats 30]

Weights are taken in turn from a pool larger than the caches, as decoding does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import table, write

SHAPES = (
    (2048, 2048), (256, 2048), (5632, 2048), (2048, 5632), (32000, 2048),
    (576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576),
)  # fmt: skip
KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.linear [1, K]": lambda w, x: F.linear(x[None], w),
    "mv": torch.mv,
}
POOL_BYTES = 1 << 30


def gigabytes_per_second(
    kernel: Callable[[Tensor, Tensor], Tensor], rows: int, columns: int, dtype: torch.dtype, repeats: int
) -> float:
    count = max(2, min(64, POOL_BYTES // (rows * columns * dtype.itemsize)))
    pool = [torch.randn(rows, columns).to(dtype) for _ in range(count)]
    x = torch.randn(columns).to(dtype)
    seconds = []
    with torch.inference_mode():
        for repeat in range(repeats + 2):
            started = time.perf_counter()
            for weight in pool:
                kernel(weight, x)
            if repeat > 1:
                seconds.append((time.perf_counter() - started) / count)
    return rows * columns * dtype.itemsize / statistics.median(seconds) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    figures = {}
    for dtype in (torch.bfloat16, torch.float32):
        rows = []
        for shape in SHAPES:
            rates = {name: round(gigabytes_per_second(kernel, *shape, dtype, repeats), 1) for name, kernel in KERNELS.items()}
            figures[f"{shape[0]}x{shape[1]} {dtype}".replace("torch.", "")] = rates
            rows.append([f"{shape[0]} × {shape[1]}", *rates.values()])
        print(f"\n{dtype}, GB/s of weights\n\n{table(['weight', *KERNELS], rows)}", flush=True)
    write("kernels", {"repeats": repeats, "gigabytes_per_second": figures})


if __name__ == "__main__":
    main()
