"""Safetensors files made byte by byte, right or wrong on purpose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from modelrig.checkpoint.headers import DTYPES
from modelrig.components import DTYPE_BITS


def describe(**tensors: tuple[str, list[int]]) -> dict[str, Any]:
    """A valid header: name=(dtype, shape), laid out in this order."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = prod(shape) * DTYPE_BITS[DTYPES[dtype]] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    return header


def data_bytes(header: Mapping[str, Any]) -> int:
    return max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)


def encode(header: Mapping[str, Any] | str | bytes, data: bytes | int = b"") -> bytes:
    """The file: length, header, data; `data` may be a number of zero bytes."""
    text = json.dumps(header) if isinstance(header, Mapping) else header
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + (bytes(data) if isinstance(data, int) else data)


def write_valid(path: Path, **tensors: tuple[str, list[int]]) -> Path:
    """A valid file of zeros."""
    header = describe(**tensors)
    path.write_bytes(encode(header, data_bytes(header)))
    return path


def write_sharded(folder: Path, shards: Mapping[str, list[str]], **index: Any) -> Path:
    """Shard name → tensor names, each F32 [2, 3], with an index that agrees; `index` overrides its keys."""
    for shard, names in shards.items():
        write_valid(folder / shard, **dict.fromkeys(names, ("F32", [2, 3])))
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    table = {"metadata": {"total_size": 24 * len(weight_map)}, "weight_map": weight_map, **index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    return folder
