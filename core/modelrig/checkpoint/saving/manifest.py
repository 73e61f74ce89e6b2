"""`modelrig.json`, written last by every save: which files belong together, their sizes and their SHA-256."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from modelrig.checkpoint.paths import is_pending, name_problem
from modelrig.checkpoint.saving.names import MANIFEST
from modelrig.checkpoint.strict_json import load_json
from modelrig.errors import IntegrityError, quoted

SCHEMA = 1
MAX_BYTES = 64 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{32}")


@frozen
class SavedFile:
    """One file of a save."""

    name: str
    bytes: int
    sha256: str


@frozen(kw_only=True)
class Manifest:
    """What a save wrote. Files of the folder that it does not list are none of its."""

    save_id: str
    tool: str
    files: Mapping[str, SavedFile]
    #: further name of a tensor → the name it is stored under
    ties: Mapping[str, str] = field(factory=dict)
    schema: int = SCHEMA

    def encode(self) -> bytes:
        """The text of the file: the same for the same content."""
        table = {
            "schema": self.schema,
            "tool": self.tool,
            "save_id": self.save_id,
            "files": {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in sorted(self.files.items())},
            "ties": dict(sorted(self.ties.items())),
        }
        return (json.dumps(table, indent=2) + "\n").encode()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of `folder`, or None if it has none.

    Raises:
        IntegrityError: IT-JSON, IT-MANIFEST with the key.
        FileError: not a regular readable file.
    """
    path = folder / MANIFEST
    if not path.exists() and (is_pending(path) or not path.is_symlink()):
        return None
    table = load_json(path, error=IntegrityError, prefix="IT", max_bytes=MAX_BYTES)
    rows, ties = _typed(table, "files", dict, path), _typed(table, "ties", dict, path)
    schema, save_id, tool = (_typed(table, key, kind, path) for key, kind in (("schema", int), ("save_id", str), ("tool", str)))
    if schema != SCHEMA:
        hint = "a newer version of Modelrig wrote it" if schema > SCHEMA else None
        raise _refuse(path, "schema", f"{quoted(schema)}; {SCHEMA} is known", hint)
    if not _ID.fullmatch(save_id):
        raise _refuse(path, "save_id", f"{quoted(save_id)}; 32 hexadecimal digits are needed")
    for alias, name in ties.items():
        if not isinstance(name, str):
            raise _refuse(path, f"ties.{alias}", f"{quoted(name)}; the name of a tensor is needed")
    return Manifest(save_id=save_id, tool=tool, files={name: _row(path, name, row) for name, row in rows.items()}, ties=ties)


def _typed(table: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    value = table.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        seen = quoted(value) if key in table else "is missing"
        kinds = {dict: "an object", int: "an integer", str: "a text"}
        raise _refuse(path, key, f"{seen}; {kinds[kind]} is needed")
    return value


def _row(path: Path, name: str, row: Any) -> SavedFile:
    if problem := name_problem(name):
        raise _refuse(path, "files", f"the file name {quoted(name)} {problem}")
    if name == MANIFEST:
        raise _refuse(path, "files", "it lists itself")
    if not isinstance(row, dict) or row.keys() != {"bytes", "sha256"}:
        raise _refuse(path, f"files.{name}", f"{quoted(row)}; bytes and sha256 are needed")
    count, digest = row["bytes"], row["sha256"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise _refuse(path, f"files.{name}.bytes", f"{quoted(count)}; a number of bytes is needed")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise _refuse(path, f"files.{name}.sha256", f"{quoted(digest)}; 64 hexadecimal digits are needed")
    return SavedFile(name, count, digest)


def _refuse(path: Path, locus: str, reason: str, hint: str | None = None) -> IntegrityError:
    return IntegrityError("IT-MANIFEST", reason, path=path, locus=locus, hint=hint)
