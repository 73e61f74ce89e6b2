"""Feed-forwards of which each token uses a few: their config, and their weights, stored one by one or stacked. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attrs import frozen

from modelrig.checkpoint.config import ConfigReader
from modelrig.components import Catalog, Parameter, Part
from modelrig_plugins.architectures.reading import stored_number

EXPERT_LIMIT = 1 << 16
LISTED = 10_000  # missing tensors that are listed


@frozen(kw_only=True)
class ExpertsConfig:
    """The experts of a model.

    Attributes:
        chosen: experts that a token uses.
        size: width of one.
        renormalises: the weights of those a token uses add up to 1.
        layers: whether each layer has experts, or one feed-forward like any other.
        folder: where the checkpoint keeps them within a layer.
        names: what it calls gate, up and down of one; None where all are stacked, as in memory.
    """

    count: int
    chosen: int
    size: int
    renormalises: bool
    layers: tuple[bool, ...]
    folder: str
    names: tuple[str, str, str] | None

    @property
    def busy_size(self) -> int:
        """Width of all experts that a token uses."""
        return self.chosen * self.size


def read_experts(
    reader: ConfigReader,
    catalog: Catalog,
    *,
    count_keys: tuple[str, str],
    usual: tuple[int, int],
    size: int,
    renormalises: bool,
    layers: tuple[bool, ...],
    folder: str,
    names: tuple[str, str, str],
) -> ExpertsConfig | None:
    """None where no layer has any. `usual` are how many there are, and how many a token uses, in configs that lack the key."""
    if not any(layers):
        return None
    key, alias = count_keys
    count = reader.integer(key, 1, EXPERT_LIMIT, default=usual[0], aliases=(alias,))
    chosen = reader.integer("num_experts_per_tok", 1, EXPERT_LIMIT, default=usual[1])
    uses = (key, alias)
    reader.require(chosen <= count, "CF-REL", "num_experts_per_tok", f"{chosen} of {count} experts", uses=uses)
    is_stacked = any(name.endswith(".mlp.experts.gate_up_proj") for name in catalog.entries)
    if not is_stacked:
        stored = stored_number(catalog, f".{folder}.experts.")
        reader.require(
            stored in (0, count), "CF-REL", key, f"{count}, but the tensor files hold experts 0 to {stored - 1}", uses=uses
        )
        # A number in a config or a name must not make a plan long: what is lacking is listed one by one only where it is little.
        needed, there = 3 * count * sum(layers), len(catalog.entries)
        text = f"{count} in each of {sum(layers)} layers are {needed} tensors, the tensor files hold {there}"
        reader.require(needed <= there + LISTED, "CF-REL", key, text, uses=uses)
        count = min(count, max(stored, 1)) if needed <= there + LISTED else 1
    return ExpertsConfig(
        count=count,
        chosen=chosen,
        size=size,
        renormalises=renormalises,
        layers=layers,
        folder="mlp" if is_stacked else folder,
        names=None if is_stacked else names,
    )


def list_experts(experts: ExpertsConfig, hidden: int, module: str, stored: str, block: int) -> Iterator[Parameter]:
    """Router and experts of one layer, whose names begin with `module` in the model and `stored` in the checkpoint."""
    count, size = experts.count, experts.size
    folder = f"{stored}{experts.folder}."
    yield Parameter(f"{module}mlp.gate.weight", (count, hidden), "other", f"{folder}gate.weight", block)
    for name, shape, row_names in (
        ("gate_up_proj", (count, 2 * size, hidden), (0, 1)),
        ("down_proj", (count, hidden, size), (2,)),
    ):
        if experts.names is None:
            yield Parameter(f"{module}mlp.experts.{name}", shape, "experts", f"{folder}experts.{name}", block)
            continue
        files = [[f"{folder}experts.{e}.{experts.names[which]}.weight" for which in row_names] for e in range(count)]
        yield Parameter(f"{module}mlp.experts.{name}", shape, "experts", None, block, tuple(_stack(files, shape)))


def _stack(files: Sequence[Sequence[str]], shape: tuple[int, int, int]) -> Iterator[Part]:
    """For each expert, its tensors one below the other."""
    for expert, names in enumerate(files):
        rows = shape[1] // len(names)
        for place, name in enumerate(names):
            into = ((expert, expert + 1), (place * rows, (place + 1) * rows), (0, shape[2]))
            yield Part(name, (rows, shape[2]), into=into)
