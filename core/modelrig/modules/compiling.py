"""Whether this thread is tracing a step for a compiler. torch.compiler.is_compiling() is true in all threads while one compiles."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_THREAD = threading.local()


def is_compiling() -> bool:
    """What dynamo traces sees a constant here; what torch.export traces as plain Python is within `exporting`."""
    return torch.compiler.is_dynamo_compiling() or getattr(_THREAD, "exports", False)


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Around a call of torch.export that is not strict."""
    _THREAD.exports = True
    try:
        yield
    finally:
        _THREAD.exports = False
