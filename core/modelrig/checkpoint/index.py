"""The index of a sharded checkpoint: a JSON file whose `weight_map` says which shard holds which tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from modelrig.checkpoint.paths import name_problem
from modelrig.checkpoint.strict_json import load_json
from modelrig.errors import IndexFileError, quoted

MAX_INDEX_BYTES = 200_000_000
MAX_TENSORS = 1_000_000
MAX_SHARDS = 100_000


@frozen(kw_only=True)
class ShardIndex:
    """A verified index.

    Attributes:
        weight_map: tensor name → shard name, each a plain name of a tensor file.
        shards: shard name → number of tensors the index places there, in name order.
        metadata: the index's own metadata, of which nothing is relied upon.
    """

    path: Path
    weight_map: Mapping[str, str]
    shards: Mapping[str, int]
    metadata: Mapping[str, Any]


def read_index(path: Path, *, suffix: str) -> ShardIndex:
    """Read the index `path`, whose shards' names must end in `suffix`. No shard is opened.

    Raises:
        IndexFileError: IX-JSON, IX-DUPKEY, IX-LIMIT, IX-FIELD, IX-PATH or IX-TYPE; the locus is the key or tensor.
        FileError: not a regular readable file.
    """
    table = load_json(path, error=IndexFileError, prefix="IX", max_bytes=MAX_INDEX_BYTES)
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        seen = "is missing" if "weight_map" not in table else f"is {quoted(weight_map)}"
        raise IndexFileError("IX-FIELD", f"{seen}; a map of tensor names to file names is needed", path=path, locus="weight_map")
    if len(weight_map) > MAX_TENSORS:
        raise IndexFileError("IX-LIMIT", f"{len(weight_map):,} tensors; at most {MAX_TENSORS:,} are accepted", path=path)
    if not {str}.issuperset(map(type, weight_map.values())):
        name, value = next(item for item in weight_map.items() if not isinstance(item[1], str))
        raise IndexFileError("IX-FIELD", f"{quoted(value)}; the name of a file is needed", path=path, locus=name)
    counts = Counter(weight_map.values())
    if len(counts) > MAX_SHARDS:
        raise IndexFileError("IX-LIMIT", f"{len(counts):,} files; at most {MAX_SHARDS:,} are accepted", path=path)
    for shard in counts:
        problem, code = name_problem(shard), "IX-PATH"
        if problem is None and not (shard.endswith(suffix) and shard != suffix):
            problem, code = f"is not the name of a {suffix} file", "IX-TYPE"
        if problem is not None:
            name = next(name for name, value in weight_map.items() if value == shard)
            raise IndexFileError(code, f"the file name {quoted(shard)} {problem}", path=path, locus=name)
    metadata = table.get("metadata")
    return ShardIndex(
        path=path,
        weight_map=weight_map,
        shards=dict(sorted(counts.items())),
        metadata=metadata if isinstance(metadata, dict) else {},
    )
