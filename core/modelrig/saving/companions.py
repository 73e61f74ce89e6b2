"""What lies beside the tensors of a checkpoint and goes with them: configs, tokenizer, templates, documents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelrig.checkpoint.catalog import TENSOR_SUFFIXES, file_names
from modelrig.checkpoint.paths import inside
from modelrig.checkpoint.saving.names import MANIFEST
from modelrig.components import Catalog, Snapshot
from modelrig.planning.identify import CONFIG, read_config

MAX_BYTES = 1 << 30  # a file beside the weights that is larger is no config


def companions(snapshot: Snapshot, catalog: Catalog, changes: Mapping[str, Any]) -> dict[str, bytes | Path]:
    """Name → contents or the file to copy: everything in the folder that holds no tensors and is not hidden.

    `changes` are keys of config.json with their new values; None leaves a key out.
    """
    found: dict[str, bytes | Path] = {}
    for name in file_names(snapshot):
        holds_tensors = name.lower().endswith(TENSOR_SUFFIXES) or (".index." in name and name.endswith(".json"))
        if holds_tensors or name.startswith(".") or name in (MANIFEST, catalog.index):
            continue
        path = inside(snapshot, name)
        if path.is_file() and path.stat().st_size <= MAX_BYTES:
            found[name] = path
    if changes and CONFIG in found:
        found[CONFIG] = edited(read_config(snapshot), changes)
    return found


def edited(config: Mapping[str, Any], changes: Mapping[str, Any]) -> bytes:
    """config.json with changed keys, as Hugging Face writes it."""
    values = {**config, **changes}
    kept = {key: value for key, value in values.items() if key not in changes or changes[key] is not None}
    return (json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def dtype_changes(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The keys that say which dtype the weights have, in the spelling the config uses (`torch_dtype` before transformers 5)."""
    if dtype is None:
        return {}
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return dict.fromkeys(keys, dtype)
