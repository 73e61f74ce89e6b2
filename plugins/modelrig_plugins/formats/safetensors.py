"""safetensors: which file of a folder to start from, the catalog of what it and its shards hold, and how a file is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from modelrig.checkpoint.catalog import catalog_sharded, catalog_single, file_names
from modelrig.checkpoint.headers import DTYPES, MAX_HEADER_BYTES, read_header
from modelrig.checkpoint.layout import FileNames
from modelrig.components import DTYPE_BITS, Catalog, Snapshot, StoredTensor
from modelrig.errors import FormatError
from modelrig_plugins.formats.writing import parts_of, require_names

if TYPE_CHECKING:
    from typing_extensions import Buffer

NAME = "safetensors"
FILES = FileNames("model", ".safetensors")
METADATA = "__metadata__"
ALIGNMENT = 8
#: the library's order of dtypes, in which a file holds its tensors: the widest first, so that all begin at multiples of their size
ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0",
    "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip
_STORED = {DTYPES[stored]: (rank, stored) for rank, stored in enumerate(ORDER)}


def first_file(names: Collection[str], variant: str | None = None) -> str | None:
    """Where a folder with these files is read from: `model.safetensors`, else the index, else the only safetensors file."""
    return FILES.first(names, variant)


class SafetensorsPlanner:
    files = FILES

    @staticmethod
    def claims(snapshot: Snapshot) -> str | None:
        """The file it would start from, or None."""
        return first_file(file_names(snapshot), snapshot.variant)

    @staticmethod
    def catalog(snapshot: Snapshot) -> Catalog:
        """Every tensor with its verified byte range. Raises `FileError`, `FormatError` and `IndexFileError`."""
        names = file_names(snapshot)
        index = FILES.index(snapshot.variant)
        first = first_file(names, snapshot.variant) or FILES.single(snapshot.variant)
        if first == index:
            return catalog_sharded(snapshot, index, format=NAME, suffix=FILES.suffix, read_header=read_header)
        others = [name for name in names if name.endswith(FILES.suffix) and name != first]
        notes = [f"{first} is used; {name} beside it is not" for name in (index, *others) if name in names]
        return catalog_single(snapshot, first, format=NAME, read_header=read_header, notes=notes)

    @staticmethod
    def size(tensors: Sequence[StoredTensor], metadata: Mapping[str, str]) -> int:
        """Bytes of the file that `write` makes. Raises `FormatError`: ST-DUPKEY, ST-DTYPE, ST-ALIGN, ST-HDRBIG."""
        return len(_header(_ordered(tensors), metadata)) + sum(tensor.nbytes for tensor in tensors)

    @staticmethod
    def write(
        tensors: Sequence[StoredTensor],
        metadata: Mapping[str, str],
        read: Callable[[StoredTensor], Iterable[Buffer]],
        write: Callable[[Buffer], None],
    ) -> None:
        """The bytes that the format's own library makes of the same tensors. Aliases are left out: the format knows no ties."""
        ordered = _ordered(tensors)
        write(_header(ordered, metadata))
        for tensor in ordered:
            for part in parts_of(tensor, read):
                write(part)


def _ordered(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    require_names([*(tensor.name for tensor in tensors), METADATA], "ST-DUPKEY")
    for tensor in tensors:
        if tensor.dtype not in _STORED:
            raise FormatError("ST-DTYPE", f"dtype {tensor.dtype}; the format has {', '.join(_STORED)}", locus=tensor.name)
        if tensor.nbytes * 8 != DTYPE_BITS[tensor.dtype] * prod(tensor.shape):
            raise FormatError("ST-ALIGN", f"{list(tensor.shape)} values of {tensor.dtype} do not end on a byte", locus=tensor.name)
    return sorted(tensors, key=lambda tensor: (_STORED[tensor.dtype][0], tensor.name))  # by code point, as by bytes of UTF-8


def _header(ordered: Sequence[StoredTensor], metadata: Mapping[str, str]) -> bytes:
    """Length, JSON without spaces, and spaces up to a multiple of 8."""
    table: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.nbytes
        table[tensor.name] = {
            "dtype": _STORED[tensor.dtype][1],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(
            "ST-HDRBIG", f"a header of {len(text):,} bytes; at most {MAX_HEADER_BYTES:,} are allowed: use more shards"
        )
    return len(text).to_bytes(8, "little") + text
