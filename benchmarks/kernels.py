"""Which linear kernel reads weights fastest for one row or a few, over the shapes that decoding meets?

    python -m benchmarks.kernels [--repeats 30] [--rows 1]

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
#: name → (how a weight is kept, how it multiplies x [rows, in]); the second takes what the first returns
KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "F.linear": (lambda w: w, lambda w, x: F.linear(x, w)),
    "mv": (lambda w: w, lambda w, x: torch.mv(w, x[0])),
    "bmm of 8 slices": (lambda w: w, lambda w, x: torch.bmm(x.expand(8, 1, -1), w.view(8, -1, x.shape[1]).transpose(1, 2))),
    "turned": (lambda w: w, lambda w, x: torch.mm(w, x.t()).t().contiguous()),
    "oneDNN, plain": (lambda w: w, lambda w, x: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")),
    "oneDNN, packed": (
        lambda w: torch.ops.mkldnn._reorder_linear_weight(w, 1),
        lambda w, x: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
    ),
}
ONE_ROW = ("mv", "bmm of 8 slices")  # cannot do more
POOL_BYTES = 1 << 28


def gigabytes_per_second(rows: int, columns: int, dtype: torch.dtype, repeats: int, tokens: int) -> dict[str, float]:
    """Median of each kernel, all of them in turn in every repeat, since the machine's mood changes."""
    count = max(2, min(64, POOL_BYTES // (rows * columns * dtype.itemsize)))
    pool = [torch.randn(rows, columns).to(dtype) for _ in range(count)]
    kernels = {name: kernel for name, kernel in KERNELS.items() if tokens == 1 or name not in ONE_ROW}
    kept = {name: [keep(weight) for weight in pool] for name, (keep, _) in kernels.items()}
    x = torch.randn(tokens, columns).to(dtype)
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for name, (_, multiply) in kernels.items():
                started = time.perf_counter()
                for weight in kept[name]:
                    multiply(weight, x)
                seconds[name].append((time.perf_counter() - started) / count)
    size = rows * columns * dtype.itemsize
    return {name: round(size / statistics.median(found[1:]) / 1e9, 1) for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rows", type=int, default=1)
    asked = parser.parse_args()
    figures = {}
    for dtype in (torch.bfloat16, torch.float32):
        rows = []
        for shape in SHAPES:
            rates = gigabytes_per_second(*shape, dtype, asked.repeats, asked.rows)
            figures[f"{shape[0]}x{shape[1]} {dtype}".replace("torch.", "")] = rates
            rows.append([f"{shape[0]} × {shape[1]}", *rates.values()])
        print(f"\n{dtype}, {asked.rows} rows, GB/s of weights\n\n{table(['weight', *rates], rows)}", flush=True)
    name = "kernels" if asked.rows == 1 else f"kernels-{asked.rows}-rows"
    write(name, {"repeats": asked.repeats, "rows": asked.rows, "gigabytes_per_second": figures})


if __name__ == "__main__":
    main()
