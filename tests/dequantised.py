"""What the cache `quantized` must show, written down plainly: one token, one channel at a time.

A query at place i of its row sees the token at place j packed if it stands `residual` tokens or more behind the end of j's block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from modelrig.components import AttentionSpec
from modelrig.modules.slots import Slots, Visibility


class Form(NamedTuple):
    """The options of the cache that matter."""

    bits: int = 8
    group: int = 32
    residual: int = 64


def is_packed(query: int, token: int, form: Form) -> bool:
    return query >= (token // form.group + 1) * form.group + form.residual


def rounded(numbers: Tensor, bits: int) -> Tensor:
    """Numbers [n] that have a scale in common, as they are read from what was packed. For dtypes whose scales are not rounded."""
    levels = 2**bits - 1
    low, high = numbers.min(), numbers.max()
    scale = (high - low) / levels
    return low + scale * ((numbers - low) / (scale if scale > 0 else 1)).round()


def dequantised(keys: Tensor, values: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """One row's own keys and values [heads, tokens, dim] with every whole block packed and read again."""
    keys, values = keys.clone(), values.clone()
    size = values.shape[2]
    width = 32 if size % 32 == 0 else size
    for head in range(keys.shape[0]):
        for first in range(0, keys.shape[1] - form.group + 1, form.group):
            tokens = slice(first, first + form.group)
            for channel in range(keys.shape[2]):
                keys[head, tokens, channel] = rounded(keys[head, tokens, channel], form.bits)
            for token in range(first, first + form.group):
                for channel in range(0, size, width):
                    part = slice(channel, channel + width)
                    values[head, token, part] = rounded(values[head, token, part], form.bits)
    return keys, values


class _BothForms:
    """A layer without a cache that offers each token in both forms."""

    def __init__(self, form: Form, padding: list[int]) -> None:
        self.form, self.padding = form, padding

    def update(self, k: Tensor, v: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        packed = k.clone(), v.clone()
        for row, start in enumerate(self.padding):
            packed[0][row, :, start:], packed[1][row, :, start:] = dequantised(k[row, :, start:], v[row, :, start:], self.form)
        return torch.cat((packed[0], k), dim=2), torch.cat((packed[1], v), dim=2)


class _Seen(Slots):
    form: Form
    padding: list[int]

    def visible(self, spec: AttentionSpec) -> Visibility:
        index, (_, group, residual) = self.index, self.form
        starts = torch.tensor(self.padding)[:, None]
        bound = starts + torch.div(index - starts, group, rounding_mode="floor") * group + group + residual
        seen_from, seen_until = (torch.cat(pair, dim=1) for pair in ((bound, bound * 0), (bound * 0 + 10**9, bound)))
        keys = torch.cat((index, index))
        return Visibility(index, keys, self.starts, spec.window, spec.causal, None, seen_from, seen_until)


def reference(model: Any, ids: Tensor, form: Form, padding: list[int] | None = None) -> Tensor:
    """Logits [batch, tokens, vocab] of one forward over `ids` without a cache, each query seeing tokens in the form it must."""
    batch, count = ids.shape
    padding = padding or [0] * batch
    index, starts = torch.arange(count), torch.tensor(padding)
    positions = (index - starts[:, None]).clamp(min=0)
    layers = [_BothForms(form, padding)] * len(model.plan.facts.cached_layers)
    slots = _Seen(index=index, positions=positions, key_index=index, starts=starts if any(padding) else None, layers=layers, past=0)
    slots.form, slots.padding = form, padding
    with torch.no_grad():
        return model.module.step(ids, slots)
