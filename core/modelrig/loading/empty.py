"""Modules without memory for their weights."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

_patching = threading.RLock()


@contextmanager
def empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Modules built in this block have their parameters on the meta device: shapes and dtypes, no memory, no initialisation.

    Parameters that are already on a device are moved there when a module takes them, so that at most one exists at a time.
    Buffers are made as usual, because many are computed and stored nowhere (frequencies, position ids); with `include_buffers` they
    are on the meta device too, and those that no checkpoint holds stay without data.

    Holds for the thread that entered the block.
    """
    owner = threading.get_ident()
    replaced: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}  # what two modules share stays one
    with _patching:
        register = nn.Module.register_parameter

        def register_parameter(module: nn.Module, name: str, parameter: Any) -> None:
            register(module, name, parameter)
            kept = module._parameters.get(name)
            if threading.get_ident() != owner or kept is None or kept.is_meta or isinstance(kept, nn.UninitializedParameter):
                return
            known, empty = replaced.get(id(kept), (None, None))
            if empty is None or known is None or known() is not kept:
                empty = _emptied(kept)
                replaced[id(kept)] = weakref.ref(kept), empty
            module._parameters[name] = empty

        nn.Module.register_parameter = register_parameter  # type: ignore[method-assign,assignment]
        try:
            with torch.device("meta") if include_buffers else nullcontext():
                yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def _emptied(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.Tensor._make_subclass(type(parameter), torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    empty.__dict__.update(parameter.__dict__)
    return empty
