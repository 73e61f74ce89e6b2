"""Short steps on a GPU: compiled whole by torch.compile, and recorded as CUDA graphs.

Not run where no GPU is present. The buffers of the cache have fixed addresses, so a graph may write to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modelrig.modules.slots import Slots


class RecordedStep:
    """`module.step`; of `widths` tokens as one graph for each number of rows and tokens.

    Attributes:
        compiled: graphs that had to be compiled so far.
        loaded: 0; torch keeps what it compiled in a folder of its own, and does not say when it finds it.
    """

    def __init__(self, module: nn.Module, widths: tuple[int, ...]) -> None:
        self.widths, self.compiled, self.loaded = widths, 0, 0
        self.eager: Callable[..., Tensor] = module.step  # type: ignore[assignment]
        self.graphs: dict[tuple[int, int, bool], Callable[..., Tensor]] = {}

    def __call__(self, ids: Tensor, slots: Slots, last_only: bool = False, *others: Any) -> Tensor:
        b, t = ids.shape
        if (t > 1 and last_only) or slots.past == 0 or t not in self.widths or others:
            return self.eager(ids, slots, last_only, *others)
        key = (b, t, slots.starts is None)
        graph = self.graphs.get(key)
        if graph is None:
            graph = self.graphs[key] = torch.compile(self.eager, fullgraph=True, dynamic=False, mode="reduce-overhead")
            self.compiled += 1
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return graph(ids, slots).clone()  # the next step overwrites what a graph returned
