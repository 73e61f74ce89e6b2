"""Bytes of a file as a tensor, without copying them where that is possible: what every format of dense tensors does."""

from __future__ import annotations

import torch
from torch import Tensor

from modelrig.components import DTYPE_BITS, TensorEntry
from modelrig.errors import LoadError


def decode(data: Tensor, entry: TensorEntry) -> Tensor:
    """uint8 [entry.nbytes] → entry.shape of entry.dtype: a view of `data`, or a copy where its address does not fit the dtype.

    No format promises alignment, and a tensor must begin at a multiple of its item size. Strides of the entry are kept.

    Raises:
        LoadError: LD-DTYPE for a dtype that torch has no whole-byte type for.
    """
    dtype = getattr(torch, entry.dtype, None)
    if dtype is None or DTYPE_BITS[entry.dtype] < 8:
        reason = f"{entry.dtype} has no dtype in torch with one value per element; only a quantizer could read it"
        raise LoadError("LD-DTYPE", reason, locus=entry.name)
    if entry.nbytes == 0:  # nothing to view; an empty slice may even lie at an odd address
        return torch.empty(entry.shape, dtype=dtype, device=data.device)
    if dtype == torch.bool:
        data = data.ne(0)  # a stored 2 is true, and must not stay a 2
    # The address must fit, and so must the offset into the storage, which torch counts in items.
    elif data.data_ptr() % dtype.itemsize or data.storage_offset() % dtype.itemsize:
        data = data.clone()
    values = data.view(dtype)
    return values.view(entry.shape) if entry.strides is None else values.as_strided(entry.shape, entry.strides)
