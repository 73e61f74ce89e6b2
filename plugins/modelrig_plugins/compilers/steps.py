"""A step's place in a cache, as compiled code takes it: every tensor by itself, and no host number.

Shapes: b batch, t tokens of this step, g key/value heads, s slots of the buffers, n slots in use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from modelrig.components import AttentionSpec
from modelrig.errors import PluginError
from modelrig.modules.slots import Slots, Visibility


class Placed(NamedTuple):
    """Where one layer's keys and values of this step go, in place of its `LayerCache`."""

    keys: Tensor  # [b, g, s, d]
    values: Tensor
    where: Tensor  # int64 [t]
    key_index: Tensor  # int64 [n]


def places(slots: Slots) -> list[Placed] | None:
    """Of every layer; None if this step is none that compiled code can take: a layer does something else with it than writing it
    to its place.

    Raises:
        PluginError: PL-CONTRACT, a layer has no `place`.
    """
    placed = []
    for layer in slots.layers:
        place = getattr(layer, "place", None)
        if place is None:
            text = f"{type(layer).__qualname__} has no place(slots), as layers of a cache that offers fixed_address have"
            raise PluginError("PL-CONTRACT", text, hint="use a cache of the model's own new_cache")
        found = place(slots)
        keys, values = layer.keys, layer.values  # type: ignore[attr-defined]
        if found is None or not keys.is_contiguous() or not values.is_contiguous():
            return None
        placed.append(Placed(keys, values, *found))
    return placed


class Unlowered(NamedTuple):
    """What a mask is made of, in its place: it is lowered within the graph."""

    prepare: Callable[[AttentionSpec, Visibility], Any]
    spec: AttentionSpec


class ShortSlots(Slots):
    """Slots of a step whose blocks run compiled; they alone see its layers, which are `Placed`, and its masks, `Unlowered`."""

    def __init__(self, slots: Slots, placed: Sequence[Placed]) -> None:
        super().__init__(
            index=slots.index,
            positions=slots.positions,
            key_index=slots.key_index,
            starts=slots.starts,
            layers=placed,  # type: ignore[arg-type]
            past=slots.past,
        )

    def lower(self, prepare: Callable[[AttentionSpec, Visibility], Any], spec: AttentionSpec) -> Unlowered:
        return Unlowered(prepare, spec)


class TracedLayer:
    """The cache of one layer within a graph."""

    def __init__(self, placed: Placed) -> None:
        self.keys, self.values, self.where, self.key_index = placed

    def update(self, k: Tensor, v: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - protocol
        self.keys.index_copy_(2, self.where, k)
        self.values.index_copy_(2, self.where, v)
        used = self.key_index.shape[0]
        return self.keys[:, :, :used], self.values[:, :, :used]


class TracedSlots(Slots):
    """A step's slots within a graph. `seen` are, by spec, the index that each slot in use holds."""

    def __init__(
        self, index: Tensor, positions: Tensor, starts: Tensor | None, layers: Sequence[TracedLayer], seen: Mapping[Any, Tensor]
    ):
        super().__init__(index=index, positions=positions, key_index=index, starts=starts, layers=layers, past=0)
        self.seen = seen

    def visible(self, spec: AttentionSpec) -> Visibility:
        """Without `past` where there is a window, so that the graph is one before and after the window is full."""
        key_index = self.seen[spec]
        past = None if spec.window is not None else key_index.shape[0] - self.index.shape[0]
        return Visibility(self.index, key_index, self.starts, spec.window, spec.causal, past)
