"""What plugins register, and what each kind of component must do.

A component has three faces:

* its **descriptor** (`Source`, `Format`, ... below): frozen data, made while registering, imports nothing heavy;
* its **planner**: torch-free code named by the import string `planner`, imported when the component is considered;
* its **implementation**: the code that computes, named by `implementation`, imported at load and only if chosen.

The protocols at the end of each section say what planner and implementation must offer. An import string names a module-level
object that satisfies the protocol: usually a class with static methods, or an instance. Byte counts are exact unless
a name says `estimate`. dtypes are the names torch uses (`"bfloat16"`), devices are `"cpu"`, `"cuda"`, `"cuda:1"`.

A component with nothing to plan names `NOTHING_TO_PLAN`; its implementation is then the only file, `<name>.py`.

Where does a new cache go? `plugins/modelrig_plugins/caches/`: `<name>.py` holds its planner (a `CachePlanner`),
`<name>_module.py` its implementation (`CacheMaker` and `Cache`), and one line in that folder's `__init__.py` registers a
`CacheImplementation`. An outside package does the same under its own entry point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from attrs import Factory, field, frozen

if TYPE_CHECKING:
    from torch import Tensor, nn
    from typing_extensions import Buffer

    from modelrig.modules.slots import Slots, Visibility

API_VERSION = "1.0"

#: The kinds of component. Three are identified (exactly one claims the input), five are negotiated; a plan consists of these.
#: The last is no part of a plan: each call of `generate` chooses by what it asks for.
KINDS = ("sources", "formats", "architectures", "quantizers", "attention", "caches", "decoders", "compilers", "constraints")
IDENTIFIED = KINDS[:3]
#: request key → kind, for the negotiated kinds
SLOTS = {"quantizer": "quantizers", "attention": "attention", "cache": "caches", "decoder": "decoders", "compiler": "compilers"}
#: the kinds that a plan consists of
PLANNED = (*IDENTIFIED, *SLOTS.values())
#: import string of `NoPlanner`
NOTHING_TO_PLAN = "modelrig.components:NoPlanner"

DTYPE_BITS: dict[str, int] = {
    "bool": 8, "uint8": 8, "int8": 8, "uint16": 16, "int16": 16, "uint32": 32, "int32": 32, "uint64": 64, "int64": 64,
    "float16": 16, "bfloat16": 16, "float32": 32, "float64": 64, "complex64": 64,
    "float8_e4m3fn": 8, "float8_e5m2": 8, "float8_e8m0fnu": 8, "float8_e4m3fnuz": 8, "float8_e5m2fnuz": 8,
    "float4_e2m1fn_x2": 4, "float6_e2m3": 6, "float6_e3m2": 6,
}  # fmt: skip
#: dtypes a model may compute in
FLOATING = ("float32", "bfloat16", "float16", "float64")


def dtype_bytes(dtype: str, elements: int) -> int:
    """Bytes of `elements` values of `dtype`, packed."""
    return (DTYPE_BITS[dtype] * elements + 7) // 8


@frozen
class Reason:
    """Why a component was refused: a stable code such as `attention.head_dim`, a sentence, and what to do about it."""

    code: str
    text: str
    hint: str | None = None


@frozen
class Range:
    """Whole numbers from `low` to `high` (both included) that `multiple_of` divides."""

    low: int
    high: int
    multiple_of: int = 1

    def __contains__(self, value: int) -> bool:
        return self.low <= value <= self.high and value % self.multiple_of == 0


# ------------------------------------------------------------------------------------------------ descriptors


def _names(value: Iterable[str] | Mapping[str, Iterable[str]]) -> Any:
    if isinstance(value, str):  # its letters would pass for names
        raise TypeError(f"a set of names is needed, not the string {value!r}")
    return frozenset(value)


def _links(value: Mapping[str, Iterable[str]]) -> Mapping[str, frozenset[str]]:
    return {kind: _names(tokens) for kind, tokens in value.items()}


@frozen(kw_only=True)
class Component:
    """What every descriptor states.

    `offers` and `needs` link kinds with an open vocabulary: a component fits beside another only if each token it `needs` of that
    kind stands in the other's `offers`. Tokens of ours: `fixed_address`, `rewind` (caches), `layout:bhsd` (caches: keys and
    values as [batch, heads, slots, head_dim]), `uniform` (caches: every query sees the keys before it alike, none held twice, and
    their indices have no gap), `fullgraph` (attention, caches, quantizers: traceable without a graph break).
    """

    kind: ClassVar[str]

    name: str
    summary: str
    planner: str
    implementation: str
    requires: tuple[str, ...] = ()  # requirement specifiers, checked against installed metadata
    install: str | None = None  # the command shown when a requirement is missing
    offers: frozenset[str] = field(default=frozenset(), converter=_names)
    needs: Mapping[str, frozenset[str]] = field(factory=dict, converter=_links)
    rank: int = 50  # among equals, the lower rank is tried first
    experimental: bool = False
    plans_with_torch: bool = False  # an outside planner that cannot do without torch; the plan says so


@frozen(kw_only=True)
class Source(Component):
    """Where a checkpoint comes from. Planner: `SourcePlanner`; implementation: `SourceFetcher`."""

    kind: ClassVar[str] = "sources"


@frozen(kw_only=True)
class Format(Component):
    """How tensor files are read and written. Planner: `FormatPlanner`; implementation: `FormatReader`.

    Where a folder holds the files of several formats, one that `yields_to` another of them leaves it the claim.
    """

    kind: ClassVar[str] = "formats"
    yields_to: frozenset[str] = field(default=frozenset(), converter=_names)


@frozen(kw_only=True)
class Architecture(Component):
    """A model family, identified by config.json's `model_type`. Planner: `ArchitecturePlanner`; implementation: `ModuleBuilder`."""

    kind: ClassVar[str] = "architectures"
    model_types: frozenset[str] = field(converter=_names)


@frozen(kw_only=True)
class QuantizerCapabilities:
    """What a quantizer can do."""

    devices: frozenset[str] = field(converter=_names)  # device types
    dtypes: frozenset[str] = field(converter=_names)  # compute dtypes
    reads: frozenset[str] = field(converter=_names)  # checkpoint schemes: "none" for plain weights, "bitsandbytes_nf4", ...
    lossless: bool = False
    streams: bool = False  # its kernels use weights where they lie: they may be brought anew for each step


@frozen(kw_only=True)
class Quantizer(Component):
    """How 2-D weights are held and multiplied. Planner: `QuantizerPlanner`; implementation: `LinearMaker`."""

    kind: ClassVar[str] = "quantizers"
    capabilities: QuantizerCapabilities


@frozen(kw_only=True)
class AttentionCapabilities:
    """What an attention kernel can do."""

    devices: frozenset[str] = field(converter=_names)
    dtypes: frozenset[str] = field(converter=_names)
    head_dims: Range = Range(1, 65536)
    masks: frozenset[str] = field(converter=_names)  # of: causal, bidirectional, padding, window, bias
    grouped_heads: bool = False  # fewer key/value heads than query heads
    softcap: bool = False
    sinks: bool = False
    unequal_value_dim: bool = False


@frozen(kw_only=True)
class AttentionBackend(Component):
    """A kernel for softmax(q·k)·v. Planner: `Planner`; implementation: `AttentionKernel`."""

    kind: ClassVar[str] = "attention"
    capabilities: AttentionCapabilities


@frozen(kw_only=True)
class CacheCapabilities:
    """What a cache can hold."""

    devices: frozenset[str] = field(converter=_names)
    dtypes: frozenset[str] = field(converter=_names)
    layers: frozenset[str] = field(converter=_names)  # layer kinds it can hold: full, sliding
    batched: bool = True
    lossy: bool = False  # gives back other numbers than it was given; then `auto` never takes it


@frozen(kw_only=True)
class CacheImplementation(Component):
    """Where keys and values of past tokens live. Planner: `CachePlanner`; implementation: `CacheMaker`."""

    kind: ClassVar[str] = "caches"
    capabilities: CacheCapabilities


@frozen(kw_only=True)
class DecoderCapabilities:
    """What a decoder can do."""

    samples: bool = False  # can draw from the distribution, not only take its maximum
    batched: bool = True


@frozen(kw_only=True)
class Decoder(Component):
    """How tokens are proposed and accepted. Planner: `Planner`; implementation: `DecoderMaker`."""

    kind: ClassVar[str] = "decoders"
    capabilities: DecoderCapabilities


@frozen(kw_only=True)
class CompilerCapabilities:
    """What a compiler can compile for."""

    devices: frozenset[str] = field(converter=_names)


@frozen(kw_only=True)
class Compiler(Component):
    """What turns `model.step` into something faster. Planner: `Planner`; implementation: `StepCompiler`."""

    kind: ClassVar[str] = "compilers"
    capabilities: CompilerCapabilities


@frozen(kw_only=True)
class Constraint(Component):
    """What compiles grammars into masks of tokens, for calls that ask for a constraint. Implementation: `ConstraintCompiler`.

    `languages` are the words by which a call names a way to write constraints: `regex`, `json_schema` and `lark` are those of ours.
    There is nothing to plan.
    """

    kind: ClassVar[str] = "constraints"
    planner: str = NOTHING_TO_PLAN
    languages: frozenset[str] = field(converter=_names)


DESCRIPTORS: dict[str, type[Component]] = {
    descriptor.kind: descriptor
    for descriptor in (
        Source,
        Format,
        Architecture,
        Quantizer,
        AttentionBackend,
        CacheImplementation,
        Decoder,
        Compiler,
        Constraint,
    )
}

# ------------------------------------------------------------------------------------------------ planners in general


class Planner(Protocol):
    """What a planner of a negotiated kind may offer; all of it is optional.

    `Options` is an attrs class: the keys a user may set with `--set <slot>.<key>=<value>`.
    `check(need, options)` returns reasons that capabilities as data cannot express; an empty iterable means it fits.
    `settle(need, options)` returns the options as this model and machine will use them, once `check` found nothing: whatever
    `auto` in them means here. `notes(need, options)` are remarks for the plan, if the component is chosen.
    `need` is the kind's need (`modelrig.planning.needs`); `need.probe` tries out in a child process what only an import can tell.
    """

    Options: type[Any]

    def check(self, need: Any, options: Any) -> Iterable[Reason]:
        """What speaks against serving `need` with `options`."""
        ...


class NoPlanner:
    """The planner of a component about which data says everything."""


# ------------------------------------------------------------------------------------------------ sources


@frozen(kw_only=True)
class Snapshot:
    """A resolved checkpoint: a folder with its metadata files, and how big its tensor files are.

    A source that has not fetched the tensor files yet leaves them out of the folder and names them in `headers`: file name →
    (size of the file, a folder that holds a file of the same name with at least the header). Plans are made from headers.
    """

    reference: str
    root: Path
    source: str  # component name
    revision: str | None = None
    #: which of several sets of tensor files: "fp16" for model.fp16.safetensors; None for those without such a mark
    variant: str | None = None
    #: folders that links inside `root` may point into (the blobs folder of a hub cache)
    link_roots: tuple[Path, ...] = ()
    complete: bool = True  # every tensor file is on disk
    headers: Mapping[str, tuple[int, Path]] = Factory(dict)


class SourcePlanner(Protocol):
    """A source with a closed list of models may also offer `names()`, their references, for "did you mean"; one that fetches
    may offer `resolve_variant(reference, variant)`, called instead of `resolve` where a variant is asked for."""

    def claims(self, reference: str) -> str | None:
        """Why this source recognises `reference`, or None. Touches no network."""
        ...

    def resolve(self, reference: str) -> Snapshot:
        """Find configs and tensor headers. Raises `SourceError`."""
        ...


class SourceFetcher(Protocol):
    """Brings the tensor files of what its planner resolved. Called when a plan is loaded."""

    def fetch(self, snapshot: Snapshot, progress: Callable[[int, int], None] | None) -> Snapshot:
        """The same snapshot with every tensor file on disk. `progress` is called with (bytes done, bytes in all)."""
        ...


# ------------------------------------------------------------------------------------------------ formats


@frozen
class TensorEntry:
    """One stored tensor: verified byte range `[offset, offset + nbytes)` of file number `file` of its catalog.

    Entries with the same range are one tensor under several names (a tie); ranges never overlap otherwise.
    """

    name: str
    dtype: str  # torch's name
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None  # in elements, where they are another order of the same dense range than C's


@frozen
class TensorFile:
    """A tensor file as it was when it was catalogued. `identity` is (size, mtime_ns, inode, device) or None when not fetched."""

    name: str
    path: Path
    size: int
    identity: tuple[int, int, int, int] | None


@frozen(kw_only=True)
class Catalog:
    """Everything known of a checkpoint's tensors without reading them."""

    format: str
    files: tuple[TensorFile, ...]
    entries: Mapping[str, TensorEntry]
    index: str | None = None  # name of the index file, if sharded
    metadata: Mapping[str, str] = Factory(dict)
    notes: tuple[str, ...] = ()  # e.g. files in the folder that nothing refers to

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers not counted, ties once."""
        return sum({(entry.file, entry.offset): entry.nbytes for entry in self.entries.values() if entry.nbytes}.values())

    @property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Names that are one stored tensor, group by group."""
        names: dict[tuple[int, int], list[str]] = {}
        for entry in self.entries.values():
            if entry.nbytes:
                names.setdefault((entry.file, entry.offset), []).append(entry.name)
        return tuple(tuple(group) for group in names.values() if len(group) > 1)


@frozen
class StoredTensor:
    """A tensor to be written: its name in the file, torch's dtype name, shape. `aliases` are further names of the same tensor,
    which a format writes if it can store one tensor under several names, and leaves out otherwise."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Its bytes, packed."""
        return dtype_bytes(self.dtype, prod(self.shape))


class FormatPlanner(Protocol):
    """Finds and verifies a checkpoint's tensors by their headers.

    A format that can be written too has three more members: `files`, the names of its files
    (`modelrig.checkpoint.layout.FileNames`), `size` and `write`; and `stores_aliases = True` if it writes a tensor under its
    aliases too.
    """

    def claims(self, snapshot: Snapshot) -> str | None:
        """Why this format recognises the folder (the file it would start from), or None."""
        ...

    def catalog(self, snapshot: Snapshot) -> Catalog:
        """Every tensor with its verified byte range. Raises `FormatError`, `IndexFileError`, `FileError`."""
        ...

    def size(self, tensors: Sequence[StoredTensor], metadata: Mapping[str, str]) -> int:
        """Bytes of the file that `write` makes of the same arguments. Raises `FormatError` for what the format cannot hold."""
        ...

    def write(
        self,
        tensors: Sequence[StoredTensor],
        metadata: Mapping[str, str],
        read: Callable[[StoredTensor], Iterable[Buffer]],
        write: Callable[[Buffer], None],
    ) -> None:
        """One tensor file, from its first byte to its last.

        `read(tensor)` yields the bytes of a tensor in parts, little-endian and in C order; it is called once for each, in the
        order in which the file holds them, and a part is valid until the next one is asked for. `write` appends to the file.
        """
        ...


class FormatReader(Protocol):
    """Makes tensors of bytes."""

    def decode(self, data: Tensor, entry: TensorEntry) -> Tensor:
        """`data` is uint8 [entry.nbytes], a view of the file → `entry.shape` of `entry.dtype`, a view where it can be one.

        What is converted while loading comes in parts: `entry` is then a run of consecutive elements, as one dimension.
        """
        ...


# ------------------------------------------------------------------------------------------------ architectures


@frozen
class AttentionSpec:
    """What a layer's attention needs. Layers with equal specs share masks and kernels. `window` counts the current token."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    value_dim: int
    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


#: (start, stop) along each dimension of a tensor
Region = tuple[tuple[int, int], ...]


@frozen
class Part:
    """How one stored tensor becomes (a region of) a parameter. `modelrig.checkpoint.mapping` makes these of rules.

    The region `taken` of the stored tensor is viewed in the shape `axes`, its axes are permuted to `order`, and the elements, read
    in that order, are the region `into` of the parameter. None stands for: all of it, as it is.
    """

    name: str
    shape: tuple[int, ...]  # as stored
    taken: Region | None = None
    axes: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    into: Region | None = None


@frozen
class Parameter:
    """One parameter of the module: its name in the module and on disk, its shape, and what it is for.

    `stored_as` is the name of the one stored tensor that it is; None for a tie, which has no storage of its own, and for one
    that is put together of `parts`.
    """

    name: str
    shape: tuple[int, ...]
    role: str  # linear, embedding, head, norm, bias, experts, other
    stored_as: str | None
    block: int | None = None  # index into ModelFacts.blocks
    parts: tuple[Part, ...] = ()

    @property
    def sources(self) -> tuple[Part, ...]:
        """What it is read from; nothing for a tie."""
        return self.parts if self.stored_as is None else (Part(self.stored_as, self.shape),)


@frozen(kw_only=True)
class ModelFacts:
    """What an architecture's planner knows of a checkpoint from its config and headers."""

    architecture: str  # component name
    config: Any  # the planner's own frozen config, handed to the builder
    parameters: tuple[Parameter, ...]
    blocks: tuple[str, ...]  # module names of the blocks, in execution order
    layers: tuple[AttentionSpec, ...]  # one per block that attends
    ties: Mapping[str, str] = Factory(dict)  # module name → module name of the parameter it shares
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context_length: int  # longest sequence the config was made for
    dtype: str | None  # what config.json asks for
    generates: bool = True  # False for an encoder, which has neither cache nor decoder
    experts_per_token: int = 0  # of each stack of experts; 0 where there is none
    token_types: int = 0  # kinds of tokens that inputs tell apart (`token_type_ids`)
    position_limit: int | None = None  # no sequence can be longer, since positions are rows of a table
    ignored: tuple[str, ...] = ()  # stored tensors the module does not use, on purpose (e.g. rotary inv_freq)
    empty: tuple[str, ...] = ()  # modules without parameters that other tools' device maps name (e.g. model.rotary_emb)
    notes: tuple[str, ...] = ()

    @property
    def cached_layers(self) -> tuple[AttentionSpec, ...]:
        """Those that keep keys and values: what looks at later tokens too cannot be continued."""
        return tuple(spec for spec in self.layers if spec.causal)


class ArchitecturePlanner(Protocol):
    """Knows a model family without torch."""

    def describe(self, config: Mapping[str, Any], catalog: Catalog, path: Path) -> ModelFacts:
        """Facts from config.json (at `path`, for messages) and headers. Raises `ConfigError` with every problem it finds."""
        ...


class ModuleBuilder(Protocol):
    """Builds what its planner described."""

    def build(self, facts: ModelFacts, context: Any) -> nn.Module:
        """The module on the meta device, parameter names as in `facts`. `context` is a `modelrig.modules.network.BuildContext`.

        The module offers `step(ids, slots, last_only=False)`: ids int64 [batch, count] → logits [batch, count or 1, vocab];
        `init_buffers(device)`, which computes buffers that are not loaded; and `bind(linear)`, called last, which gives every
        weight of the linear slot its kernel.

        That of an encoder (`generates` is False) takes token types too, `step(ids, slots, last_only=False, token_types=None)`, and
        gives what its head does: tokens are the second of three axes, or there are none. It also offers
        `encode(ids, slots, token_types, all_layers)` → (hidden states [batch, count, hidden], the last block's or with `all_layers`
        the embeddings' and each block's; what is pooled of the last, [batch, hidden], or None).
        """
        ...


# ------------------------------------------------------------------------------------------------ quantizers


@frozen
class TensorSpec:
    """An output tensor of a quantizer, before it exists. `suffix` is appended to the weight's name; "" for the weight itself."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes, packed."""
        elements = 1
        for size in self.shape:
            elements *= size
        return dtype_bytes(self.dtype, elements)


class QuantizerPlanner(Protocol):
    """One more method is optional: `copies(parameter, dtype, options)` is an estimate of the bytes of a second copy that the kernel
    on CPU makes of a weight while generating."""

    def outputs(self, parameter: Parameter, dtype: str, options: Any) -> tuple[TensorSpec, ...]:
        """What `parameter` becomes in memory when the model computes in `dtype`."""
        ...


class LinearMaker(Protocol):
    """Created once per model: `implementation(options)`.

    `vector` says in which shape it wants a single token: [in] rather than [1, in]. Two things are optional. Kernels may have an
    attribute `name_at(rows)`, what multiplies so many rows, for `Model.kernels` (`modelrig.modules.linear.named`). A static method
    `tune(shapes, dtype, progress)` measures kernels for weights [out, in] of these shapes, telling `progress` a line for each, and
    returns {weight: {rows: {kernel: seconds}}}: `modelrig bench --tune` keeps it for this machine, under the component's full id,
    and the planner finds it again (`modelrig.planning.measured`).
    """

    vector: bool

    def make_linear(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The hot path for one weight [out, in] and its bias [out]: x [tokens, in] → [tokens, out], and with `vector` also
        [in] → [out]. Called once for each weight, after loading."""
        ...


# ------------------------------------------------------------------------------------------------ attention


class AttentionKernel(Protocol):
    """Created once per model: `implementation(options)`."""

    def prepare(self, spec: AttentionSpec, visible: Visibility) -> Any:
        """Lower the symbolic mask, once per step for each distinct spec. The result is handed to `attend` as is."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, spec: AttentionSpec) -> Tensor:
        """q [batch, heads, count, head_dim], k and v [batch, kv_heads, slots, head_dim | value_dim]
        → [batch, count, heads * value_dim]."""
        ...


# ------------------------------------------------------------------------------------------------ caches


class CachePlanner(Protocol):
    """Counts a cache's bytes. One whose bytes do not lie on the device that runs may offer
    `places(layers, batch, context, dtype, options, device)`: "cpu", "disk" or the `device` that runs → bytes there."""

    def nbytes(self, layers: Sequence[AttentionSpec], batch: int, context: int, dtype: str, options: Any) -> int:
        """Bytes of keys and values when `context` tokens of `batch` rows are held: what the cache's `nbytes` measures then."""
        ...


class LayerCache(Protocol):
    """Keys and values of one layer.

    Those of a cache that offers `fixed_address` also have `keys` and `values`, buffers [batch, kv_heads, slots, dim], and
    `place(slots)`: what `update` does with them in this step, as (int64 [count], the slots it writes; int64 [n], the index that
    each of the first n slots then holds, which are what it returns), or None if it does otherwise.
    """

    def update(self, k: Tensor, v: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Store k, v [batch, kv_heads, count, dim] of this step; returns what the step's queries may attend to, these included."""
        ...


class Cache(Protocol):
    """Owns positions and lengths. A step is `begin(n)` → `model.step(ids, slots)` → `commit(k)` with k ≤ n.

    An error in any method leaves the cache as it was. `padding` gives each row's number of pad tokens on the left;
    without it no row is padded.
    """

    batch: int
    capacity: int
    layers: Sequence[LayerCache]

    @property
    def length(self) -> int:
        """Tokens committed, padding included."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are allocated."""
        ...

    def begin(self, count: int) -> Slots:
        """Reserve `count` slots. Raises `CacheError` (CA-FULL) when they do not fit."""
        ...

    def commit(self, count: int) -> None:
        """Keep the first `count` reserved tokens, forget the rest."""
        ...

    def rewind(self, to: int) -> None:
        """Forget everything after the first `to` tokens; padding stays, also with 0. Raises `CacheError` (CA-REWIND) when that is
        beyond what is kept."""
        ...

    def reset(self, padding: Sequence[int] | None = None) -> None:
        """Forget everything; `padding` is that of the rows to come. What is allocated stays."""
        ...

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i go on as row `rows[i]` went, padding included. Raises `CacheError` (CA-ARGS) for rows there are not, and
        (CA-STATE) within a step."""
        ...

    def fork(self, copies: int) -> Cache:
        """A cache with `copies` of each row, side by side, that goes on from here; this one stays as it is."""
        ...

    def export(self) -> dict[str, Tensor]:
        """What is held, as tensors that depend on nothing else of this cache: `adopt` makes a cache of the same kind, layers and
        options go on from it, one of another capacity too if it has room."""
        ...

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Hold what `state` says instead. Raises `CacheError`: CA-STATE if it was not exported by such a cache, CA-FULL if there is
        no room; nothing has changed then."""
        ...


class CacheMaker(Protocol):
    """Makes caches."""

    def create(
        self,
        layers: Sequence[AttentionSpec],
        *,
        batch: int,
        capacity: int,
        dtype: Any,
        device: Any,
        padding: Sequence[int] | None = None,
        options: Any = None,
    ) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens; one of `Cache.layers` for each of `layers`.

        `dtype` and `device` are torch's, `options` the planner's `Options`. Raises `CacheError` (CA-ARGS) for impossible sizes.
        """
        ...


# ------------------------------------------------------------------------------------------------ decoders


class Choosing(Protocol):
    """How the options of a call choose tokens. `rows` are the rows that the logits are of; by default all, in order."""

    def score(self, logits: Tensor) -> Tensor:
        """[rows, vocab] → the log-probabilities, float32, that a search adds up: processed, with a temperature those drawn."""
        ...

    def choose(self, logits: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """[rows, vocab] → ids int64 [rows], processed, drawn (without a temperature the most likely) and noted."""
        ...

    def top(self, scores: Tensor, count: int, width: int) -> tuple[Tensor, Tensor]:
        """The `count` best of each `width` rows' scores together, [groups, width * vocab] → (scores, places) [groups, count]; with
        a temperature drawn by them without repeats."""
        ...

    def observe(self, ids: Tensor, rows: Sequence[int] | None = None) -> None:
        """Note the ids [rows] that were chosen; `choose` does so itself."""
        ...

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i go on as row `rows[i]` went."""
        ...

    def is_over(self, row: int) -> bool:
        """The row's constraint allows nothing more."""
        ...


@frozen(kw_only=True, eq=False)
class DecoderCall:
    """One generation call, for the decoder that is opened for it.

    Attributes:
        texts: the ids before the new ones, of each row to continue.
        limit: new tokens at most.
        vocab_size: ids below it can be chosen.
        returns: continuations wanted of each text.
        ends: whether new ids, the last of them just chosen, end there: at an id or a text to stop at, or at the limit.
        num_ends: how many ids end a text.
        choosing: what turns logits into tokens, with the call's options.
        padding: pad tokens on the left of each text, in the cache.
        companions: the further models that the planner named, loaded (`modelrig.model.Model`).
    """

    texts: Sequence[Sequence[int]]
    limit: int
    vocab_size: int
    returns: int
    ends: Callable[[Sequence[int]], bool]
    num_ends: int
    choosing: Choosing
    padding: Sequence[int]
    companions: Mapping[str, Any] = Factory(dict)


class DecoderRun(Protocol):
    """One call's decoder. The loop is: propose → step(1 + k tokens) → accept → commit. A draft is accepted if it is what `choosing`
    chooses there, so drafts change how fast tokens come, never which.

    A decoder that searches has, instead of `propose` and `learn`, three members: `advance(logits)`, which takes the last logits
    [rows, vocab] and returns the ids [rows] to go on with and the rows they continue (None: each its own); `is_over`; and
    `finish()`, called then, the ids of `returns` continuations of each text, best first.
    """

    def propose(self, new: Sequence[Sequence[int] | None], room: int) -> Sequence[Sequence[int]] | None:
        """Drafts, at most `room` ids of each row, to follow the `new` ids that the rows have so far (None for one that has ended);
        None for a plain step."""
        ...

    def learn(self, drafted: int, gained: int) -> None:
        """A step had up to `drafted` drafts, and brought every row `gained` tokens further than a plain one."""
        ...


class DecoderMaker(Protocol):
    """Opens a decoder for each generation call.

    It may have `copies(options)`, the rows in which each text is continued, where that is not one for each continuation wanted.
    The planner of such a decoder has the same method, for the ledger. A planner may also have `companions(options)`: role →
    reference of a model to plan and load beside; and `check_companions(facts, snapshot, companions)`: reasons against these plans,
    beside the model with `facts` in `snapshot`.
    """

    def open(self, call: DecoderCall, options: Any) -> DecoderRun:
        """Raises `GenerateError` (GN-ARGS) for what it cannot do."""
        ...


# ------------------------------------------------------------------------------------------------ compilers


class StepCompiler(Protocol):
    """Compiles what every token passes through."""

    def compile(self, module: nn.Module, options: Any) -> Callable[..., Any]:
        """A callable that does what `module.step(ids, slots, last_only)` does, or with an encoder's further argument.

        A module whose blocks can be compiled one by one has a `modelrig.modules.network.Blocks`. Where only steps of some widths
        are compiled, the callable says which in `widths`, in rising order: a step of fewer tokens is best padded to the next.
        """
        ...


# ------------------------------------------------------------------------------------------------ constraints


class TokenMask(Protocol):
    """Which tokens may come next in one row: a grammar, say. Made for each row of a call, at its beginning, all of a prompt alike:
    a search lets rows go on as others went."""

    def fill(self, bits: Tensor) -> None:
        """Set those bits of int32 [ceil(vocab / 32)], in main memory and all zero before, whose tokens may come next: token t is
        bit t % 32 of number t // 32. Where the text may end, the ids that end a row are among them. Bits beyond the vocabulary
        count for nothing. `modelrig.generation.constraints.allow` sets bits of ids."""
        ...

    def accept(self, token: int) -> None:
        """`token`, which was allowed, has come. An id that ends the row is not told, and after it nothing is asked."""
        ...

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens."""
        ...

    @property
    def is_over(self) -> bool:
        """The text is complete and nothing may follow: the row ends here, without an end-of-text id. Nothing more is asked then,
        but it may be rolled back."""
        ...


class ConstraintCompiler(Protocol):
    """Created once per model, when a call first needs it: `implementation(tokenizer, vocab_size)`.

    `tokenizer` is the model's (`modelrig.generation.tokenizer.Tokenizer`), `vocab_size` its number of logits, which may be more
    than there are tokens. Raises `GenerateError` (GN-CONSTRAINT) for a tokenizer it cannot work with.
    """

    def compile(self, language: str, text: str, end_ids: Sequence[int]) -> Callable[[], TokenMask]:
        """What makes a mask for each row of one call. `language` is one of the descriptor's, `end_ids` are the ids that end a row
        in this call: none if there are none, or the call ignores them.

        Raises `GenerateError` (GN-CONSTRAINT) for a text that is no such constraint, or too much of one. Time and memory are
        bounded.
        """
        ...
