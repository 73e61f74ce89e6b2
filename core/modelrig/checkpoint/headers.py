"""The strict reader of safetensors headers. Everybody else gets verified byte ranges and never parses a header again.

A file is: 8 bytes, the header's length as a little-endian number; the header, a JSON object padded with spaces; the data. The
header gives every tensor's dtype, shape and byte range within the data. What the format's own library lets pass (duplicate keys,
unknown fields, leading spaces) is refused here too: two readers of one file must not see two different models.

Nothing is allocated by a number that was not checked against the size of the file, and all sizes are checked by arithmetic alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from attrs import frozen

from modelrig.checkpoint.files import Identity, identity, open_regular, read_at
from modelrig.checkpoint.strict_json import DuplicateKeyError, NestingError, TooManyError, parse
from modelrig.components import DTYPE_BITS, TensorEntry
from modelrig.errors import FileError, FormatError, quoted

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 1_000_000
MAX_DEPTH = 8
MAX_CONTAINERS = 3 * MAX_TENSORS + 16  # an object and two lists for each tensor
MAX_DIMENSIONS = 16
MAX_DIMENSION = 1 << 40
MAX_OFFSET = 1 << 53  # beyond it JSON readers disagree about numbers
MAX_ELEMENTS = 1 << 63

#: the format's dtypes → torch's names
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2", "F6_E2M3": "float6_e2m3", "F6_E3M2": "float6_e3m2",
}  # fmt: skip

_KNOWN = {stored: (name, DTYPE_BITS[name]) for stored, name in DTYPES.items()}
_FIELDS = ("dtype", "shape", "data_offsets")
_TENSOR = frozenset(_FIELDS)
_WHOLE = frozenset({int})

#: how other files begin → what to say about them
_LOOKS_LIKE = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file it points to", "run `git lfs pull` in the folder it came from"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes", "convert it, or give it the name it had"),
    (b"\x80\x02", "a Python pickle, as old versions of torch.save wrote", "convert it, or give it the name it had"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive", "unpack it"),
    (b"GGUF", "a GGUF file", "use it under its own name, with a format that reads GGUF"),
    (b"\x93NUMPY", "a NumPy file", None),
    (b"\x89HDF", "an HDF5 file", None),
    (b"<", "an HTML or XML page, such as an error message of a server", "download it again"),
    (b"{", "JSON text, such as an error message of a server", "download it again"),
)


@frozen(kw_only=True)
class Header:
    """What one tensor file holds: its tensors in file order, their byte ranges verified and counted from the file's beginning."""

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int
    size: int
    identity: Identity


def read_header(path: Path, *, size: int | None = None, file: int = 0) -> Header:
    """Read and verify the header of the safetensors file `path`.

    Args:
        size: the true size, for a file of which only the beginning is here.
        file: the number the entries carry as theirs.

    Raises:
        FileError: not a regular readable file.
        FormatError: the first rule of the format that is broken, with the tensor as locus.
    """
    with open_regular(path) as (descriptor, status):
        size = status.st_size if size is None else size
        data = _read_text(descriptor, size, path)
        table = _parse_text(data, path)
        metadata = _take_metadata(table, path)
        return Header(
            entries=_verify(table, 8 + len(data), size, path, file),
            metadata=metadata,
            data_start=8 + len(data),
            size=size,
            identity=identity(status),
        )


def _read_text(descriptor: int, size: int, path: Path) -> bytes:
    if size < 8:
        hint = "an interrupted download? fetch it again" if size == 0 else None
        raise FormatError("ST-SHORT", f"{size} bytes; a header needs at least 8", path=path, hint=hint)
    head = read_at(descriptor, 64, 0, path)
    length = int.from_bytes(head[:8], "little")
    if length == 0:
        hint = None if any(head) else "the file begins with zeros: an interrupted download? fetch it again"
        raise FormatError("ST-HDRLEN", "the header's length is 0", path=path, hint=hint)
    if length > size - 8 or length > MAX_HEADER_BYTES:
        _refuse_foreign(head, path)
    if length > size - 8:
        swapped = int.from_bytes(head[:8], "big")
        hint = "read as a big-endian number it would fit: was the file written that way?" if 0 < swapped <= size - 8 else None
        raise FormatError("ST-HDRLEN", f"the header's length is {length:,}, the file has {size:,} bytes", path=path, hint=hint)
    if length > MAX_HEADER_BYTES:
        raise FormatError("ST-HDRBIG", f"the header's length is {length:,}; at most {MAX_HEADER_BYTES:,} is accepted", path=path)
    if head[8:9] != b"{":
        _refuse_foreign(head, path)
        raise FormatError("ST-BRACE", f"the header begins with {quoted(head[8:9])[1:]}; '{{' is needed", path=path)
    data = read_at(descriptor, length, 8, path)
    if len(data) < length:
        raise FileError("IO-CHANGED", f"ended at byte {8 + len(data):,} while its header was read", path=path)
    return data


def looks_like(head: bytes) -> tuple[str, str | None] | None:
    """What a file that begins with `head` seems to be, if it is none of those that hold tensors here, and what to do about it."""
    for beginning, kind, hint in _LOOKS_LIKE:
        # One letter may also be the lowest byte of a length; the upper bytes of a length are 0, those of a text are not.
        if head.startswith(beginning) and (len(beginning) > 1 or 0 not in head[:8]):
            return kind, hint
    return None


def _refuse_foreign(head: bytes, path: Path) -> None:
    if found := looks_like(head):
        raise FormatError("ST-MAGIC", f"not a safetensors file; it looks like {found[0]}", path=path, hint=found[1])


def _parse_text(data: bytes, path: Path) -> dict[str, Any]:
    text = data.rstrip(b" ")
    if not text.endswith(b"}") and text.rstrip(b"\0\t\r\n ").endswith(b"}"):
        raise FormatError("ST-PAD", f"the header is padded with {quoted(text[-1:])[1:]}; only spaces are allowed", path=path)
    # Told before parsing, which takes several times the memory; whoever hides the word behind escapes is found after it.
    count = text.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise _too_many(count, path)
    try:
        table = parse(text, max_depth=MAX_DEPTH, max_containers=MAX_CONTAINERS)
    except DuplicateKeyError as problem:
        raise FormatError("ST-DUPKEY", "is named twice in the header", path=path, locus=problem.key) from problem
    except TooManyError as problem:
        raise FormatError("ST-COUNT", f"the header is {problem}", path=path) from problem
    except MemoryError as problem:
        reason = f"there is not enough memory to read a header of {len(data):,} bytes"
        raise FormatError("ST-HDRBIG", reason, path=path) from problem
    except NestingError as problem:
        raise FormatError("ST-DEPTH", f"the header is {problem}", path=path) from problem
    except UnicodeDecodeError as problem:
        raise FormatError("ST-UTF8", f"the header is not UTF-8 at byte {8 + problem.start:,} of the file", path=path) from problem
    except UnicodeError as problem:
        raise FormatError("ST-UTF8", "the header has an escape that is half of a surrogate pair", path=path) from problem
    except json.JSONDecodeError as problem:
        where = f"line {problem.lineno}, column {problem.colno}"
        raise FormatError("ST-JSON", f"the header is not JSON: {problem.msg} at {where}", path=path) from problem
    except ValueError as problem:
        raise FormatError("ST-JSON", f"the header is not JSON: {problem}", path=path) from problem
    if len(table) > MAX_TENSORS + 1:  # one may be the metadata
        raise _too_many(len(table), path)
    return table  # it begins with "{", so it is a dict


def _too_many(count: int, path: Path) -> FormatError:
    return FormatError("ST-COUNT", f"{count:,} tensors; at most {MAX_TENSORS:,} are accepted", path=path)


def _take_metadata(table: dict[str, Any], path: Path) -> dict[str, str]:
    metadata = table.pop("__metadata__", None)
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise FormatError("ST-META", f"{quoted(metadata)}; a map of strings is needed", path=path, locus="__metadata__")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise FormatError("ST-META", f"{quoted(value)}; a string is needed", path=path, locus=f"__metadata__.{key}")
    return metadata


def _verify(table: dict[str, Any], start: int, size: int, path: Path, file: int) -> dict[str, TensorEntry]:
    """Entries in file order, every one consistent in itself and all of them filling the data without overlap or hole."""
    ranges = []
    for name, fields in table.items():
        # The common case in as few steps as possible; whatever does not pass is looked at again, rule by rule.
        try:
            stored, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
            dtype, bits = _KNOWN[stored]
            fits = (
                len(fields) == 3
                and type(begin) is int
                and type(end) is int
                and 0 <= begin < end <= MAX_OFFSET
                and type(shape) is list
                and _WHOLE.issuperset(map(type, shape))
                and len(shape) <= MAX_DIMENSIONS
                and prod(shape) * bits == (end - begin) * 8
                and (not shape or (min(shape) > 0 and max(shape) <= MAX_DIMENSION))
            )
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            dtype, shape, begin, end = _verify_by_rules(name, fields, path)
        ranges.append((begin, end, name, dtype, shape))
    ranges.sort(key=_by_range)
    entries = {}
    expected = 0
    for begin, end, name, dtype, shape in ranges:
        if begin != expected:
            _refuse_range(ranges, begin, end, expected, name, path)
        entries[name] = TensorEntry(name, dtype, tuple(shape), file, start + begin, end - begin)
        expected = end
    if start + expected != size:
        _refuse_size(entries, start, expected, size, path)
    return entries


def _by_range(item: tuple[int, int, str, str, list[int]]) -> tuple[int, int]:
    return item[0], item[1]


def _verify_by_rules(name: str, fields: Any, path: Path) -> tuple[str, list[int], int, int]:
    """The same checks one by one, so that the first broken rule can be told; also lets pass tensors without elements."""

    def refuse(code: str, reason: str) -> NoReturn:
        raise FormatError(code, reason, path=path, locus=name)

    if not isinstance(fields, dict):
        refuse("ST-FIELD", f"{quoted(fields)}; an object with {', '.join(_FIELDS)} is needed")
    if missing := [field for field in _FIELDS if field not in fields]:
        refuse("ST-FIELD", f"lacks {', '.join(missing)}")
    if unknown := [field for field in fields if field not in _TENSOR]:
        refuse("ST-FIELD", f"has the unknown field {quoted(unknown[0])}")
    stored, shape, offsets = (fields[field] for field in _FIELDS)
    if not isinstance(stored, str) or stored not in _KNOWN:
        refuse("ST-DTYPE", f"dtype {quoted(stored)}; known are {', '.join(DTYPES)}")
    dtype, bits = _KNOWN[stored]
    if not isinstance(shape, list) or not _WHOLE.issuperset(map(type, shape)) or min(shape, default=0) < 0:
        refuse("ST-SHAPE", f"shape {quoted(shape)}; a list of whole numbers from 0 is needed")
    if len(shape) > MAX_DIMENSIONS:
        refuse("ST-SHAPE", f"{len(shape)} dimensions; at most {MAX_DIMENSIONS} are accepted")
    if max(shape, default=0) > MAX_DIMENSION or prod(size or 1 for size in shape) >= MAX_ELEMENTS:
        refuse("ST-OVERFLOW", f"shape {quoted(shape)} is too large to exist")
    if not isinstance(offsets, list) or len(offsets) != 2 or not _WHOLE.issuperset(map(type, offsets)):
        refuse("ST-OFFSET", f"data_offsets {quoted(offsets)}; a list of two whole numbers is needed")
    begin, end = offsets
    if not 0 <= begin <= end <= MAX_OFFSET:
        refuse("ST-OFFSET", f"data_offsets {quoted(offsets)}; 0 ≤ begin ≤ end ≤ 2^53 is needed")
    if (needed := prod(shape) * bits) % 8:
        refuse("ST-ALIGN", f"shape {quoted(shape)} of {stored} has {needed} bits, which do not end on a byte")
    if needed // 8 != end - begin:
        refuse("ST-SIZE", f"shape {quoted(shape)} of {stored} has {needed // 8:,} bytes, its range has {end - begin:,}")
    return dtype, shape, begin, end


def _refuse_range(ranges: list[Any], begin: int, end: int, expected: int, name: str, path: Path) -> NoReturn:
    if begin > expected:
        raise FormatError("ST-HOLE", f"bytes [{expected:,}, {begin:,}) before it belong to no tensor", path=path, locus=name)
    other = next(item for item in ranges if item[1] == expected and item[2] != name and item[0] <= begin)
    reason = f"bytes [{begin:,}, {end:,}) overlap {quoted(other[2])} at [{other[0]:,}, {other[1]:,})"
    raise FormatError("ST-OVERLAP", reason, path=path, locus=name)


def _refuse_size(entries: dict[str, TensorEntry], start: int, expected: int, size: int, path: Path) -> NoReturn:
    if start + expected < size:
        raise FormatError("ST-TRAIL", f"{size - start - expected:,} bytes after the last tensor belong to none", path=path)
    first = next(entry for entry in entries.values() if entry.offset + entry.nbytes > size)
    reason = f"the file ends at byte {size:,} of {start + expected:,}: this is the first tensor that is not all there"
    raise FormatError("ST-TRUNC", reason, path=path, locus=first.name, hint="an interrupted download or copy? fetch it again")


def header_bytes(head: bytes, size: int) -> int:
    """How many bytes from the beginning `read_header` needs, told by the first 8: at most the file, and what the format allows."""
    length = int.from_bytes(head[:8], "little")
    return min(size, 8 + min(length, MAX_HEADER_BYTES))
