"""Bytes per device and moment, before anything is read.

Three moments: `load_peak` (the most while loading), `steady` (loaded and idle), `run` (generating at the planned context and
batch). The lines of one moment add up to what is needed then. Weights and cache are exact: they are what the chosen parts' planners
say, and what the loaded model measures. Activations are an estimate.

On CPU a weight whose dtype stays is a view of its mapped file. Its pages are the page cache's: the kernel drops and rereads them
under pressure, so they count in the ledger, but a plan is not refused because they exceed free memory. It is when the limit
counts them too: `max_memory`, or RLIMIT_AS.

Weights that are streamed count where they lie, and twice the largest block of them as slots on the device that runs. What stays
on disk has lines of its own, for the device "disk": these bytes are no memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from attrs import Factory, evolve, frozen

from modelrig.checkpoint.in_place import find_stitches, run_of
from modelrig.checkpoint.mounts import is_on_network
from modelrig.components import DTYPE_BITS, AttentionSpec, Catalog, ModelFacts, Parameter, Part, TensorEntry, dtype_bytes
from modelrig.planning.units import CPU, DISK, is_gpu

MOMENTS = ("load_peak", "steady", "run")
PREFILL_TOKENS = 512  # of a prompt per step; `modelrig.generation` runs prompts in such parts
PIECE_BYTES = 4 << 20  # of plain tensors read and cast at a time: what all readers of `modelrig.loading` hold together
GPU_CONTEXT_BYTES = 500_000_000  # what CUDA takes for itself in each process, roughly
QUANTIZED_ROLES = ("linear",)
MULTIPLIED_ROLES = ("linear", "head")
LOOKED_UP = "embedding"  # the role of weights of which a step needs a row for each token

WEIGHTS = "weights"
MAPPED = "weights, mapped from their files"
COPIES = "weights in a kernel's own layout, made while generating"
ON_DISK = "weights that stay on disk, no memory"
SLOTS = "slots for blocks that are streamed"
STAGING = "what is being converted"
CACHE = "key/value cache"
CACHE_ON_DISK = "key/value cache on disk, no memory"
ACTIVATIONS = "activations (512 prompt tokens × 4 hidden, 2 feed-forward and all q, k, v widths; logits)"
ENCODING = "activations (all tokens × 4 hidden, 2 feed-forward and all q, k, v widths; outputs)"
GPU_CONTEXT = "GPU context"


@frozen(kw_only=True)
class Line:
    """One item. `exact` is False for an estimate; `model` says of which further model it is, "" for the planned one."""

    device: str
    moment: str
    what: str
    bytes: int
    exact: bool = True
    model: str = ""


@frozen
class Ledger:
    """All lines. Iterating gives them in order."""

    lines: tuple[Line, ...]

    def __iter__(self) -> Iterator[Line]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(line.device for line in self.lines))

    def total(self, moment: str, device: str | None = None) -> int:
        """Bytes at `moment`, on `device` or on all."""
        return sum(line.bytes for line in self.lines if line.moment == moment and device in (None, line.device))

    def bytes_of(self, what: str, device: str, moment: str) -> int:
        """Bytes of one item."""
        return sum(one.bytes for one in self.lines if (one.what, one.device, one.moment) == (what, device, moment))

    def peak(self, device: str, *, with_mapped: bool, with_copies: bool | None = None) -> int:
        """The most bytes `device` needs at any moment, with or without what it can do without.

        That is pages the kernel can drop, and copies that are only made where there is room; these go with the pages unless
        `with_copies` says otherwise. A page whose weight is copied is not needed any more, so without copies it is.
        """
        copies = with_mapped if with_copies is None else with_copies
        lines = [line for line in self.lines if line.device == device]
        peaks = []
        for moment in MOMENTS:
            now = [line for line in lines if line.moment == moment]
            copied = sum(line.bytes for line in now if line.what == COPIES) if copies else 0
            pages = [line for line in (now if copied else lines) if line.what == MAPPED]
            mapped = max((line.bytes for line in pages), default=0) if with_mapped else 0
            peaks.append(mapped + copied + sum(line.bytes for line in now if line.what not in (MAPPED, COPIES)))
        return max(peaks)

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"device": one.device, "moment": one.moment, "what": one.what, "bytes": one.bytes, "exact": one.exact}
            | ({"model": one.model} if one.model else {})
            for one in self.lines
        ]


@frozen(kw_only=True)
class Weights:
    """Bytes of all parameters in memory.

    Attributes:
        mapped: views of their files.
        allocated: everything else.
        staging: the most of one tensor that is converted at a time: a part of a plain one, the whole of one to quantise.
        copies: what kernels make of them while generating, in a layout of their own.
        replaced: the part of `mapped` whose pages are dropped once there is such a copy.
    """

    mapped: int
    allocated: int
    staging: int
    copies: int = 0
    replaced: int = 0


class Weighed(NamedTuple):
    """One parameter in memory.

    Attributes:
        size: bytes under its own name.
        beside: bytes of what a quantizer adds to it.
        mapped: bytes of it that main memory can show as they lie in its files.
        staging: what of it is converted at a time, unless all of it is shown so.
        copy: what a kernel on CPU makes of it while generating.
    """

    parameter: Parameter
    size: int
    beside: int
    mapped: int
    staging: int
    copy: int

    @property
    def is_view(self) -> bool:
        """Main memory can show all of it as it lies in its files."""
        return 0 < self.size == self.mapped


NO_WEIGHTS = Weights(mapped=0, allocated=0, staging=0)


def weigh(facts: ModelFacts, catalog: Catalog, quantizer: Any, options: Any, dtype: str, device: str) -> Weights:
    """Add up the parameters, ties once. `quantizer` is the chosen one's planner: linear 2-D weights are what its `outputs` say."""
    return add_up(weigh_each(facts, catalog, quantizer, options, dtype, is_mapped=device == CPU), device)[device]


def weigh_each(
    facts: ModelFacts, catalog: Catalog, quantizer: Any, options: Any, dtype: str, *, is_mapped: bool = True
) -> Iterator[Weighed]:
    """Every parameter, in the model's order; a tie has no bytes of its own. Without `is_mapped` nothing is a view."""
    copy_of = getattr(quantizer, "copies", None)
    read_only = {number for number, file in enumerate(catalog.files) if is_on_network(file.path)} if is_mapped else set()
    entries, bits, outputs = catalog.entries, DTYPE_BITS[dtype], quantizer.outputs
    for parameter in facts.parameters:
        copy = copy_of(parameter, dtype, options) if copy_of is not None and parameter.role in MULTIPLIED_ROLES else 0
        if parameter.stored_as is None and not parameter.parts:
            yield Weighed(parameter, 0, 0, 0, 0, copy)
            continue
        size, into, beside = (bits * math.prod(parameter.shape) + 7) // 8, dtype, 0
        if parameter.role in QUANTIZED_ROLES and len(parameter.shape) == 2:
            specs = outputs(parameter, dtype, options)
            kept = next((spec for spec in specs if spec.suffix == "" and spec.shape == parameter.shape), None)
            size, into = (0, "") if kept is None else (kept.nbytes, kept.dtype)
            beside = sum(spec.nbytes for spec in specs if spec is not kept)
        sources = [part for part in parameter.sources if part.name in entries]
        read = [_read_bytes(entries[part.name], part) for part in sources]
        whole, largest = sum(read), max(read, default=0)
        can_map = is_mapped and into != "" and not any(entries[part.name].file in read_only for part in sources)
        mapped = _mapped_bytes(parameter, sources, into, entries) if can_map else 0
        in_parts = into == dtype and not beside
        yield Weighed(parameter, size, beside, mapped, min(largest, PIECE_BYTES) if in_parts else whole, copy)


def _mapped_bytes(parameter: Parameter, sources: Sequence[Part], dtype: str, entries: Mapping[str, TensorEntry]) -> int:
    """Stored bytes that serve as they are: one run, where the dtype allows it, or whole pages of several parts."""
    if len(sources) > 1:
        stitches = find_stitches(parameter.shape, dtype, sources, entries)
        return 0 if stitches is None else stitches.nbytes
    if not sources:
        return 0
    entry = entries[sources[0].name]
    is_same = entry.dtype == dtype and entry.strides is None and entry.offset % max(1, DTYPE_BITS[dtype] // 8) == 0
    run = run_of(entry, sources[0], parameter.shape) if is_same else None
    return 0 if run is None or run.shape != parameter.shape else run.nbytes


def _read_bytes(entry: TensorEntry, part: Part) -> int:
    if part.taken is None:
        return entry.nbytes
    return dtype_bytes(entry.dtype, math.prod(stop - start for start, stop in part.taken))


def add_up(weighed: Iterable[Weighed], main: str, where: Mapping[str, str] | None = None) -> dict[str, Weights]:
    """Device → its weights. `where` says each parameter's device; without it everything is on `main`, the device that runs."""
    sums: dict[str, list[int]] = {main: [0] * 5}
    for one in weighed:
        parameter, size, beside, mapped, staging, copy = one
        device = main if where is None else where[parameter.name]
        total = sums.setdefault(device, [0] * 5)
        copy = copy if device == main == CPU else 0
        if mapped and device == CPU:
            total[0] += mapped
            total[1] += size - mapped + beside
            # A tensor that is a view needs no conversion, what a quantizer puts beside it does.
            total[2] = max(total[2], staging if beside or not one.is_view else 0)
            total[4] += mapped if copy else 0
        else:
            total[1] += size + beside
            total[2] = max(total[2], staging)
        total[3] += copy
    return {
        device: Weights(mapped=mapped, allocated=allocated, staging=staging, copies=copies, replaced=replaced)
        for device, (mapped, allocated, staging, copies, replaced) in sums.items()
    }


def activation_bytes(facts: ModelFacts, batch: int, context: int, dtype: str) -> int:
    """An estimate of what one step of a prompt takes beside weights and cache: the formula is in `ACTIVATIONS`, or `ENCODING`."""
    tokens = batch * (min(context, PREFILL_TOKENS) if facts.generates else context)
    heads = max((_projected(spec) for spec in facts.layers), default=0)
    widths = 4 * facts.hidden_size + 2 * facts.intermediate_size + heads
    if not facts.generates:
        widths += sum(one.shape[0] for one in facts.parameters if one.role == "head")
        return dtype_bytes(dtype, tokens * widths)
    # The logits of one position per row: in the compute dtype, then in float32 for the sampler.
    logits = dtype_bytes(dtype, batch * facts.vocab_size) + dtype_bytes("float32", batch * facts.vocab_size)
    return dtype_bytes(dtype, tokens * widths) + logits


def _projected(spec: AttentionSpec) -> int:
    return spec.num_heads * (spec.head_dim + spec.value_dim) + spec.num_key_value_heads * (spec.head_dim + spec.value_dim)


@frozen(kw_only=True)
class Account:
    """What the ledger of one rig is drawn up from; `draw` makes it for any context and batch.

    Attributes:
        device: the one that runs, with `weights`.
        elsewhere: every other device of a map, and its weights.
        slots: bytes for what is streamed to `device`.
        layers: GPU → the layers whose cache is there, where several run; if empty all of them are on `device`.
        copies: rows in which the decoder continues each text, beside the one of its prompt; 0 if it is the same one.
        beside: the lines of further models.
    """

    device: str
    dtype: str
    facts: ModelFacts
    weights: Weights
    cache: Any  # the chosen cache's planner; None where nothing is cached
    cache_options: Any
    elsewhere: Mapping[str, Weights] = Factory(dict)
    slots: int = 0
    layers: Mapping[str, Sequence[AttentionSpec]] = Factory(dict)
    copies: int = 0
    beside: tuple[Line, ...] = ()

    def cache_places(self, device: str, context: int, batch: int, layers: Sequence[AttentionSpec]) -> dict[str, int]:
        """Where the bytes of `layers`, which `device` runs, lie: device → bytes; a cache of prompts and one of copies are two."""
        total: dict[str, int] = {}
        for rows in [batch, batch * self.copies] if self.copies else [batch]:
            for place, size in cache_places(self.cache, self.cache_options, self.dtype, device, context, rows, layers).items():
                total[place] = total.get(place, 0) + size
        return total

    def draw(self, context: int, batch: int) -> Ledger:
        """The ledger at `context` tokens of `batch` sequences."""
        parts = {self.device: self.weights, **self.elsewhere}
        items = [(device, *item) for device, weights in parts.items() for item in self._weights(device, weights)]
        staging = max(weights.staging for device, weights in parts.items() if device != DISK)
        items.append((CPU, "load_peak", STAGING, staging, False))
        items += [(self.device, moment, SLOTS, self.slots, True) for moment in MOMENTS[1:]]
        items += [item for device in parts if self._runs(device) for item in self._running(device, context, batch)]
        there = {CPU, *parts, *(item[0] for item in items)}
        order = sorted(there, key=lambda device: (device != self.device, device == DISK, device == CPU, device))
        items.sort(key=lambda item: (order.index(item[0]), MOMENTS.index(item[1])))
        lines = (Line(device=d, moment=m, what=what, bytes=size, exact=exact) for d, m, what, size, exact in items if size)
        return Ledger((*lines, *self.beside))

    def reserve(self, device: str, context: int, batch: int, *, with_cache: bool = True) -> int:
        """What `device` needs beside weights and slots, at the moment it needs most."""
        ledger = evolve(self, elsewhere={device: NO_WEIGHTS} if device != self.device else {}).draw(context, batch)
        weights = (MAPPED, WEIGHTS, ON_DISK, COPIES, SLOTS, *(() if with_cache else (CACHE, CACHE_ON_DISK)))
        return max(
            sum(
                line.bytes
                for line in ledger
                if (line.device, line.moment) == (device, moment) and (line.what not in weights or line.model)
            )
            for moment in MOMENTS
        )

    def _runs(self, device: str) -> bool:
        return device == self.device or (is_gpu(device) and is_gpu(self.device))

    def _weights(self, device: str, weights: Weights) -> Iterator[tuple[str, str, int, bool]]:
        for moment in MOMENTS:
            if device == DISK:
                yield (moment, ON_DISK, weights.mapped + weights.allocated, True)
                continue
            yield (moment, MAPPED, weights.mapped - (weights.replaced if moment == "run" else 0), True)
            yield (moment, WEIGHTS, weights.allocated, True)
            if is_gpu(device):
                yield (moment, GPU_CONTEXT, GPU_CONTEXT_BYTES, False)

    def _running(self, device: str, context: int, batch: int) -> Iterator[tuple[str, str, str, int, bool]]:
        weights = self.weights if device == self.device else self.elsewhere[device]
        yield (device, "run", COPIES, weights.copies, False)
        layers = self.layers.get(device, ()) if self.layers else self.facts.cached_layers if device == self.device else ()
        for place, size in self.cache_places(device, context, batch, layers).items():
            yield (place, "run", CACHE_ON_DISK if place == DISK else CACHE, size, True)
        what = ACTIVATIONS if self.facts.generates else ENCODING
        yield (device, "run", what, activation_bytes(self.facts, batch, context, self.dtype), False)


def cache_places(
    planner: Any, options: Any, dtype: str, device: str, context: int, batch: int, layers: Sequence[AttentionSpec]
) -> dict[str, int]:
    """Where the bytes of a cache lie whose `layers` run on `device`: device → bytes."""
    if not layers:
        return {}
    if (places := getattr(planner, "places", None)) is None:
        return {device: int(planner.nbytes(layers, batch, context, dtype, options))}
    return {place: int(size) for place, size in places(layers, batch, context, dtype, options, device).items()}
