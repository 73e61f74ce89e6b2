"""Bytes per device and moment, before anything is read.

Three moments: `load_peak` (the most while loading), `steady` (loaded and idle), `run` (generating at the planned context and
batch). The lines of one moment add up to what is needed then. Weights and cache are exact: they are what the chosen parts' planners
say, and what the loaded model measures. Activations are an estimate.

On CPU a weight whose dtype stays is a view of its mapped file. Its pages are the page cache's: the kernel drops and rereads them
under pressure, so they count in the ledger, but a plan is not refused because they exceed free memory. It is when the limit
counts them too: `max_memory`, or RLIMIT_AS.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from attrs import frozen

from modelrig.checkpoint.mounts import is_on_network
from modelrig.components import DTYPE_BITS, AttentionSpec, Catalog, ModelFacts, Parameter, TensorEntry, dtype_bytes

MOMENTS = ("load_peak", "steady", "run")
PREFILL_TOKENS = 512  # of a prompt per step; `modelrig.generation` runs prompts in such parts
PIECE_BYTES = 4 << 20  # of a plain tensor read and cast at a time; `modelrig.loading` converts in such parts
GPU_CONTEXT_BYTES = 500_000_000  # what CUDA takes for itself in each process, roughly
QUANTIZED_ROLES = ("linear",)
MULTIPLIED_ROLES = ("linear", "head")

WEIGHTS = "weights"
MAPPED = "weights, mapped from their files"
COPIES = "weights in a kernel's own layout, made while generating"
STAGING = "what is being converted"
CACHE = "key/value cache"
ACTIVATIONS = "activations (512 prompt tokens × 4 hidden, 2 feed-forward and all q, k, v widths; logits)"
GPU_CONTEXT = "GPU context"


@frozen(kw_only=True)
class Line:
    """One item. `exact` is False for an estimate."""

    device: str
    moment: str
    what: str
    bytes: int
    exact: bool = True


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

    def peak(self, device: str, *, with_mapped: bool) -> int:
        """The most bytes `device` needs at any moment, with or without what it can do without.

        That is pages the kernel can drop, and copies that are only made where there is room.
        """
        counted = [line for line in self.lines if line.device == device and (with_mapped or line.what not in (MAPPED, COPIES))]
        return max(sum(line.bytes for line in counted if line.moment == moment) for moment in MOMENTS)

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"device": one.device, "moment": one.moment, "what": one.what, "bytes": one.bytes, "exact": one.exact}
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


def weigh(facts: ModelFacts, catalog: Catalog, quantizer: Any, options: Any, dtype: str, device: str) -> Weights:
    """Add up the parameters, ties once. `quantizer` is the chosen one's planner: linear 2-D weights are what its `outputs` say."""
    mapped = allocated = staging = copies = replaced = 0
    on_cpu = device == "cpu"
    copy_of = getattr(quantizer, "copies", None)
    read_only = {number for number, file in enumerate(catalog.files) if is_on_network(file.path)} if on_cpu else set()
    entries, bits, outputs = catalog.entries, DTYPE_BITS[dtype], quantizer.outputs
    for parameter in facts.parameters:
        copy = 0
        if copy_of is not None and on_cpu and parameter.role in MULTIPLIED_ROLES:
            copy = copy_of(parameter, dtype, options)
            copies += copy
        if parameter.stored_as is None:
            continue
        entry = entries.get(parameter.stored_as)
        size, into, beside = (bits * math.prod(parameter.shape) + 7) // 8, dtype, 0
        if parameter.role in QUANTIZED_ROLES and len(parameter.shape) == 2:
            specs = outputs(parameter, dtype, options)
            kept = next((spec for spec in specs if spec.suffix == "" and spec.shape == parameter.shape), None)
            size, into = (0, "") if kept is None else (kept.nbytes, kept.dtype)
            beside = sum(spec.nbytes for spec in specs if spec is not kept)
        allocated += beside
        if on_cpu and entry is not None and entry.file not in read_only and _is_view(entry, into, parameter):
            mapped += size
            replaced += size if copy else 0
            continue
        allocated += size
        if entry is not None:
            staging = max(staging, entry.nbytes if into != dtype or beside else min(entry.nbytes, PIECE_BYTES))
    return Weights(mapped=mapped, allocated=allocated, staging=staging, copies=copies, replaced=replaced)


def _is_view(entry: TensorEntry, dtype: str, parameter: Parameter) -> bool:
    """Whether the stored bytes serve as they are: same dtype and shape, at an address the dtype allows."""
    return entry.dtype == dtype and entry.shape == parameter.shape and entry.offset % max(1, DTYPE_BITS[entry.dtype] // 8) == 0


def activation_bytes(facts: ModelFacts, batch: int, context: int, dtype: str) -> int:
    """An estimate of what one step of a prompt takes beside weights and cache: the formula is in `ACTIVATIONS`."""
    tokens = batch * min(context, PREFILL_TOKENS)
    heads = max((_projected(spec) for spec in facts.layers), default=0)
    widths = 4 * facts.hidden_size + 2 * facts.intermediate_size + heads
    # The logits of one position per row: in the compute dtype, then in float32 for the sampler.
    logits = dtype_bytes(dtype, batch * facts.vocab_size) + dtype_bytes("float32", batch * facts.vocab_size)
    return dtype_bytes(dtype, tokens * widths) + logits


def _projected(spec: AttentionSpec) -> int:
    return spec.num_heads * (spec.head_dim + spec.value_dim) + spec.num_key_value_heads * (spec.head_dim + spec.value_dim)


@frozen(kw_only=True)
class Account:
    """What the ledger of one rig is drawn up from; `draw` makes it for any context and batch."""

    device: str
    dtype: str
    facts: ModelFacts
    weights: Weights
    cache: Any  # the chosen cache's planner
    cache_options: Any

    def cache_bytes(self, context: int, batch: int) -> int:
        layers: Sequence[AttentionSpec] = self.facts.layers
        return int(self.cache.nbytes(layers, batch, context, self.dtype, self.cache_options)) if layers else 0

    def draw(self, context: int, batch: int) -> Ledger:
        """The ledger at `context` tokens of `batch` sequences."""
        weights = self.weights
        always = (
            (MAPPED, weights.mapped, True),
            (WEIGHTS, weights.allocated, True),
            (GPU_CONTEXT, 0 if self.device == "cpu" else GPU_CONTEXT_BYTES, False),
        )
        items = [(self.device, moment, *item) for moment in MOMENTS[:2] for item in always]
        items += [(self.device, "run", MAPPED, weights.mapped - weights.replaced, True)]
        items += [(self.device, "run", *item) for item in always[1:]]
        items.append(("cpu", "load_peak", STAGING, weights.staging, False))
        items.append((self.device, "run", COPIES, weights.copies, False))
        items.append((self.device, "run", CACHE, self.cache_bytes(context, batch), True))
        items.append((self.device, "run", ACTIVATIONS, activation_bytes(self.facts, batch, context, self.dtype), False))
        items.sort(key=lambda item: (item[0] != self.device, MOMENTS.index(item[1])))
        lines = (Line(device=d, moment=m, what=what, bytes=size, exact=exact) for d, m, what, size, exact in items if size)
        return Ledger(tuple(lines))
