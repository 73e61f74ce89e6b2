"""Where a step writes and what it may see: the symbolic mask.

*Index* counts everything a row was fed, padding included; *position* counts the row's own tokens and is what rotary embeddings
use. A cache may keep keys anywhere (a *slot*), as long as it can say which index each slot holds.

    visible(query, key)  =  start <= key.index <= query.index  and  query.index - key.index < window

A lossy cache may hold a token twice, as it was and as it is packed: `seen_from` and `seen_until` then say which queries see which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from modelrig.modules.compiling import is_compiling

if TYPE_CHECKING:
    from modelrig.components import AttentionSpec, LayerCache


class Visibility(NamedTuple):
    """The symbolic mask of one step for one attention spec; each backend lowers it to what its kernel takes.

    `past` is the number of keys before this step's as a host integer, or None when slots are no plain range up to this step's: a
    compiled graph must not depend on it, then key_index covers the whole buffer; a ring has its tokens in another order.
    """

    query_index: Tensor  # int64 [count]
    key_index: Tensor  # int64 [slots]
    starts: Tensor | None  # int64 [batch], first index that is not padding; None when no row is padded
    window: int | None
    causal: bool
    past: int | None
    #: int64 [slots], or [batch, slots] where padded rows differ: the first query that sees the slot; None: its own
    seen_from: Tensor | None = None
    #: of the same shape: the query from which on the slot is not seen; None: all may see it
    seen_until: Tensor | None = None

    def dense(self) -> Tensor:
        """The mask as bool [batch or 1, 1, count, slots], true where a query may look.

        Every query sees at least its own key, so that a row of padding stays finite and cannot spoil the rows beside it.
        """
        query, key = self.query_index[:, None], self.key_index[None, :]
        seen = key <= query if self.causal else torch.ones_like(key <= query)
        if self.window is not None:
            seen = seen & (query - key < self.window)
        own = key == query
        if self.seen_from is not None:
            seen, own = (mask & (query >= self.seen_from[..., None, :]) for mask in (seen, own))
        if self.seen_until is not None:
            seen, own = (mask & (query < self.seen_until[..., None, :]) for mask in (seen, own))
        if self.starts is not None:
            seen = (seen & (key >= self.starts[:, None, None])) | own
        return seen[:, None] if seen.dim() == 3 else seen[None, None]


class Slots:
    """One step's place in a cache. Its tensors are updated in place by `Cache.begin`, so a compiled step sees new numbers in old
    storage; `past` is only read in eager mode."""

    def __init__(
        self,
        *,
        index: Tensor,
        positions: Tensor,
        key_index: Tensor,
        starts: Tensor | None,
        layers: Sequence[LayerCache],
        past: int,
    ) -> None:
        self.index, self.positions, self.key_index, self.starts = index, positions, key_index, starts
        self.layers, self.past = layers, past

    @property
    def end(self) -> int:
        """Slots in use once this step has written. Host integer, eager only."""
        return self.past + self.index.shape[0]

    def visible(self, spec: AttentionSpec) -> Visibility:
        if is_compiling():
            return Visibility(self.index, self.key_index, self.starts, spec.window, spec.causal, None)
        return Visibility(self.index, self.key_index[: self.end], self.starts, spec.window, spec.causal, self.past)

    def lower(self, prepare: Callable[[AttentionSpec, Visibility], Any], spec: AttentionSpec) -> Any:
        """The mask of the layers of `spec`, as a backend's `prepare` makes it; for compiled blocks, what they make it of."""
        return prepare(spec, self.visible(spec))


class _NoLayer:
    """Attends to this step's keys only."""

    def update(self, k: Tensor, v: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - the protocol's signature
        return k, v


def uncached_slots(batch: int, count: int, layers: int, padding: Tensor | None, device: torch.device) -> Slots:
    """Slots for one forward over `count` tokens without a cache; `padding` int64 [batch] counts pad tokens on the left."""
    index = torch.arange(count, device=device)
    positions = index.expand(batch, count)
    if padding is not None:
        positions = (positions - padding[:, None]).clamp_(min=0)
    return Slots(index=index, positions=positions, key_index=index, starts=padding, layers=[_NoLayer()] * layers, past=0)
