"""Which tensor goes into which file: Hugging Face's rule, names and index."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from attrs import frozen

from modelrig.checkpoint.layout import FileNames
from modelrig.checkpoint.sizes import size
from modelrig.components import StoredTensor
from modelrig.errors import SaveError

_NUMBERS = re.compile(r"(-\d{5,}-of-\d{5,}\.[^-]*)$")


@frozen
class Shard:
    """One tensor file to be written."""

    name: str
    tensors: tuple[StoredTensor, ...]


@frozen
class Layout:
    """All tensor files, and the index where there are several: its name and its bytes."""

    shards: tuple[Shard, ...]
    index: tuple[str, bytes] | None

    @property
    def entry(self) -> str:
        """The file a reader starts from."""
        return self.index[0] if self.index else self.shards[0].name


def lay_out(
    tensors: Sequence[StoredTensor],
    max_shard_size: int | str,
    names: FileNames,
    *,
    variant: str | None = None,
    mark: str | None = None,
    with_aliases: bool = False,
) -> Layout:
    """Tensor files of at most `max_shard_size` bytes of tensors each.

    Args:
        mark: goes into the names of shards, so that they are like nobody else's: `model-<mark>-00001-of-00002.safetensors`.
        with_aliases: the format writes a tensor under its aliases too, so the index names them.

    Raises:
        SaveError: SV-ARGS for a size that is none.
    """
    groups = split(tensors, shard_bytes(max_shard_size))
    if len(groups) == 1:
        return Layout((Shard(names.single(variant), tuple(groups[0])),), None)
    shards = tuple(
        Shard(_marked(names.shard(number, len(groups), variant), mark), tuple(group)) for number, group in enumerate(groups, 1)
    )
    weight_map = {
        name: shard.name
        for shard in shards
        for tensor in shard.tensors
        for name in (tensor.name, *(tensor.aliases if with_aliases else ()))
    }
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": weight_map}
    return Layout(shards, (names.index(variant), (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()))


def _marked(name: str, mark: str | None) -> str:
    return name if mark is None else _NUMBERS.sub(rf"-{mark}\1", name)


def shard_bytes(max_shard_size: int | str) -> int:
    """`"5GB"` → 5,000,000,000. Raises `SaveError` (SV-ARGS) for what is no size."""
    try:
        return size(max_shard_size)
    except ValueError as error:
        raise SaveError("SV-ARGS", str(error), locus="max_shard_size") from None


def split(tensors: Sequence[StoredTensor], limit: int) -> list[list[StoredTensor]]:
    """Tensors in groups, as huggingface_hub's `split_state_dict_into_shards_factory` groups them.

    In the given order, a group is closed when the next tensor would not fit. A tensor larger than the limit gets a group of
    its own, which comes before the one that is open. No tensors are one empty group: an empty file can be read back.
    """
    groups: list[list[StoredTensor]] = []
    current: list[StoredTensor] = []
    held = 0
    for tensor in tensors:
        if tensor.nbytes > limit:
            groups.append([tensor])
            continue
        if held + tensor.nbytes > limit:
            groups.append(current)
            current, held = [], 0
        current.append(tensor)
        held += tensor.nbytes
    if current or not groups:
        groups.append(current)
    return groups
