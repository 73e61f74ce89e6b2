"""From main memory to a GPU through a ring of page-locked buffers, while the GPU computes."""

from __future__ import annotations

import torch
from torch import Tensor

BUFFERS = 4
BUFFER_BYTES = 8 << 20


class PinnedRing:
    """Copies tensors to a GPU on `stream`; one thread uses it.

    A GPU fetches page-locked memory by itself, and anything else only through a buffer of the driver while its thread waits. So
    each buffer is filled while those before it are on their way. On a machine without a GPU, `stream` is None and the buffers are
    ordinary ones.
    """

    def __init__(self, stream: torch.cuda.Stream | None, *, buffers: int = BUFFERS, size: int = BUFFER_BYTES) -> None:
        self.stream = stream
        self._buffers = [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=stream is not None) for _ in range(buffers)]
        self._sent: list[torch.cuda.Event | None] = [None] * buffers
        self._turn = 0

    def send(self, source: Tensor, target: Tensor) -> None:
        """Begin to copy `source` in main memory to `target`, contiguous, of the same dtype and shape. `source` may change when
        this returns, unless it is page-locked itself."""
        with torch.cuda.stream(self.stream):  # does nothing for None
            if source.is_pinned():
                target.copy_(source, non_blocking=True)
                return
            taken, given = source.contiguous().view(-1).view(torch.uint8), target.view(-1).view(torch.uint8)
            size = self._buffers[0].numel()
            for start in range(0, taken.numel(), size):
                self._send(taken[start : start + size], given[start : start + size])

    def _send(self, taken: Tensor, given: Tensor) -> None:
        turn, self._turn = self._turn, (self._turn + 1) % len(self._buffers)
        sent = self._sent[turn]
        if sent is not None:
            sent.synchronize()
        buffer = self._buffers[turn][: taken.numel()]
        buffer.copy_(taken)
        given.copy_(buffer, non_blocking=True)
        if self.stream is not None:
            self._sent[turn] = self.stream.record_event()
