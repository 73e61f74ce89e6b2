"""Which names of a folder belong to a save, and what its own working files are called."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Sequence, Set

from attrs import frozen

from modelrig.checkpoint.layout import FileNames

MANIFEST = "modelrig.json"

#: Hugging Face's names, in the order in which its readers look for them
HUGGING_FACE = (FileNames("model", ".safetensors"), FileNames("pytorch_model", ".bin"))

_VARIANT = r"(?:\.([^./]+?))?"
_MARK = r"(?:-[0-9a-f]{12})?"  # of shards that must not be called like any other
_NUMBERS = r"(?:-\d{5,}-of-\d{5,})?"
_LONGEST = 180  # bytes of a folder's name that are repeated in the names of its lock and stages


def new_id() -> str:
    return uuid.uuid4().hex


def lock_name(folder: str) -> str:
    """The lock file of the folder called `folder`, beside it; of the folder itself, inside it, for ""."""
    return f".{_short(folder)}.modelrig.lock" if folder else ".modelrig.lock"


def stage_prefix(folder: str) -> str:
    """How stages of the folder called `folder` begin, beside it, or inside it, for ""; their id follows."""
    return f".{_short(folder)}.stage-" if folder else ".modelrig.stage-"


def is_stage(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and re.fullmatch(r"[0-9a-f]{32}", name[len(prefix) :]) is not None


def _short(folder: str) -> str:
    raw = folder.encode("utf-8", "surrogateescape")
    return folder if len(raw) <= _LONGEST else hashlib.sha256(raw).hexdigest()[:32]


@frozen
class Ownership:
    """What a save replaces or deletes: the tensor files of its own variant in any format, and what the manifest lists.

    Everything else is foreign: it is carried over.
    """

    formats: Sequence[FileNames]
    #: "" for none; None where the files of all variants are ours
    variants: frozenset[str] | None
    #: (name, bytes) of the files that manifests list
    listed: Set[tuple[str, int]]

    def owns(self, name: str, size: int) -> bool:
        """Whether the file `name`, which has `size` bytes, is ours. One that was listed and was edited since is not."""
        variant = tensor_file_variant(name, self.formats)
        if variant is not None:
            return self.variants is None or variant in self.variants
        return name in (MANIFEST, lock_name("")) or (name, size) in self.listed


def tensor_file_variant(name: str, formats: Sequence[FileNames]) -> str | None:
    """The variant of which `name` is a tensor file or index, "" for those without a mark; None if it is neither."""
    for one in formats:
        stem, suffix = re.escape(one.stem), re.escape(one.suffix)
        for pattern in (rf"{stem}{_VARIANT}{_MARK}{_NUMBERS}{suffix}", rf"{stem}{suffix}\.index{_VARIANT}\.json"):
            if found := re.fullmatch(pattern, name):
                return found[1] or ""
    return None
