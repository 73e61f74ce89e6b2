"""Keys and values of one size, for kernels that know no other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def equal_widths(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [..., head_dim] and v [..., value_dim], the narrower padded with zeros: scores stay, outputs have zeros behind."""
    more = v.shape[-1] - q.shape[-1]
    if more < 0:
        v = F.pad(v, (0, -more))
    elif more > 0:
        q, k = F.pad(q, (0, more)), F.pad(k, (0, more))
    return q, k, v
