"""From what a checkpoint's pickle describes to verified byte ranges: one for each tensor, none over another."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from attrs import Factory, define

from modelrig.checkpoint.headers import MAX_DIMENSION, MAX_DIMENSIONS, MAX_ELEMENTS, MAX_TENSORS
from modelrig.components import DTYPE_BITS, TensorEntry
from modelrig.errors import FormatError, quoted
from modelrig_plugins.formats.pickle_words import Storage, StoredView, Unsupported, told
from modelrig_plugins.formats.zip_scan import Record

WRAPPER = "state_dict"  # the one key under which a checkpoint may have its tensors
_WHOLE = frozenset({int})
_ITEM_BYTES = {name: bits // 8 for name, bits in DTYPE_BITS.items() if bits >= 8}


def entries_of(root: Any, records: Mapping[str, Record], layer: str, path: Path, file: int) -> dict[str, TensorEntry]:
    """The tensors of `root`, in its order. `records` are those of the archive, whose names begin with `layer`.

    Raises:
        FormatError: PK-ROOT, PK-KEY, PK-LAYOUT, PK-STRIDE, PK-ALIAS, PK-BAD, ZP-RECORD, ZP-SIZE.
    """
    maker = _Maker(records, layer, path, file)
    entries = {name: maker.entry(name, value) for name, value in _tensors(root, path).items()}
    if len(maker.known) < len(entries):  # else each has a record of its own
        _require_apart(entries, path)
    return entries


def _tensors(root: Any, path: Path) -> dict[str, Any]:
    if type(root) is dict and list(root) == [WRAPPER] and type(root[WRAPPER]) is dict:
        root = root[WRAPPER]
    if type(root) is not dict:
        raise FormatError("PK-ROOT", f"it holds {told(root)}; a dict from names to tensors is needed", path=path)
    if len(root) > MAX_TENSORS:
        raise FormatError("PK-LIMIT", f"{len(root):,} tensors; at most {MAX_TENSORS:,} are accepted", path=path)
    for name, value in root.items():
        if type(name) is not str:
            raise FormatError("PK-KEY", f"a key is {quoted(name)}; names are strings", path=path)
        if type(value) not in (StoredView, Unsupported):
            hint = f"save {WRAPPER}() alone; this looks like the state of a training" if type(value) is dict else None
            reason = f"is {told(value)}; every value must be a tensor"
            raise FormatError("PK-KEY", reason, path=path, locus=name, hint=hint)
    return root


@define
class _Maker:
    records: Mapping[str, Record]
    layer: str
    path: Path
    file: int
    known: dict[str, tuple[Storage, Record]] = Factory(dict)  # by key, checked
    geometries: dict[Any, tuple[int, tuple[int, ...] | None]] = Factory(dict)  # by shape and strides, checked

    def problem(self, code: str, name: str, reason: str) -> FormatError:
        return FormatError(code, reason, path=self.path, locus=name)

    def entry(self, name: str, value: StoredView | Unsupported) -> TensorEntry:
        if type(value) is Unsupported:
            raise self.problem("PK-LAYOUT", name, f"a tensor that is {value.kind}; plain dense ones are read")
        assert type(value) is StoredView
        storage, record = self.known.get(value.storage.key, (None, None))
        if storage != value.storage or record is None:
            record = self.record(name, value.storage)
        count, order = self.geometry(name, value)
        item, shape = _ITEM_BYTES[value.dtype], value.shape
        offset = value.offset
        if type(offset) is not int or offset < 0:
            raise self.problem("PK-BAD", name, f"storage offset {told(offset)}; a whole number from 0 is needed")
        if not count:
            return TensorEntry(name, value.dtype, shape, self.file, record.offset, 0)
        if (offset + count) * item > record.nbytes:
            reason = (
                f"elements [{offset:,}, {offset + count:,}) of {item} bytes reach beyond its storage of {record.nbytes:,} bytes"
            )
            raise self.problem("PK-STRIDE", name, reason)
        return TensorEntry(name, value.dtype, shape, self.file, record.offset + offset * item, count * item, order)

    def record(self, name: str, storage: Storage) -> Record:
        """The record with the bytes of `storage`, which must be as large as the pickle says."""
        record = self.records.get(f"{self.layer}data/{storage.key}")
        if record is None:
            raise self.problem("ZP-RECORD", name, f"the archive has no record data/{quoted(storage.key)[1:-1]} for its storage")
        needed = storage.numel * (1 if storage.dtype is None else _ITEM_BYTES[storage.dtype])
        if record.nbytes != needed:
            reason = f"its storage, record data/{storage.key}, has {record.nbytes:,} bytes; the pickle says {needed:,}"
            raise self.problem("ZP-SIZE", name, reason)
        self.known[storage.key] = storage, record
        return record

    def geometry(self, name: str, value: StoredView) -> tuple[int, tuple[int, ...] | None]:
        """(number of elements, strides where they are another order than C's) of a dense tensor."""
        shape, strides = value.shape, value.strides
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            raise self.problem("PK-BAD", name, "its size and strides are not two tuples of one length")
        if len(shape) > MAX_DIMENSIONS:
            raise self.problem("PK-LIMIT", name, f"{len(shape):,} dimensions; at most {MAX_DIMENSIONS} are accepted")
        if not _WHOLE.issuperset(map(type, shape + strides)) or min(shape + strides, default=0) < 0:
            raise self.problem("PK-BAD", name, "its size and strides are not whole numbers from 0")
        made = self.geometries.get((shape, strides))  # a model has few
        if made is None:
            if max(shape, default=0) > MAX_DIMENSION or prod(size or 1 for size in shape) >= MAX_ELEMENTS:
                raise self.problem("PK-LIMIT", name, f"shape {quoted(list(shape))} is too large to exist")
            count = prod(shape)
            made = self.geometries[shape, strides] = count, self.order(name, shape, strides) if count else None
        return made

    def order(self, name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
        """The strides, where they are another order of the same dense range than C's."""
        expected = 1  # where the size is 1, a stride means nothing
        for size, stride in zip(reversed(shape), reversed(strides), strict=True):
            if size != 1 and stride != expected:
                break
            expected *= size
        else:
            return None
        expected = 1
        for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size != 1):
            if stride != expected:
                spanned = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
                reason = (
                    f"shape {quoted(list(shape))} with strides {quoted(list(strides))} is not dense: {prod(shape):,} values lie on "
                    f"{spanned:,} stored; expanded and sliced tensors are not read"
                )
                raise self.problem("PK-STRIDE", name, reason)
            expected *= size
        return tuple(1 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))


def _require_apart(entries: Mapping[str, TensorEntry], path: Path) -> None:
    """Entries share all of their range, as the same tensor, or nothing of it."""
    ranges = sorted((one.offset, one.nbytes, name) for name, one in entries.items() if one.nbytes)
    for (begin, nbytes, name), (next_, next_bytes, other) in pairwise(ranges):
        if next_ >= begin + nbytes:
            continue
        one, two = entries[name], entries[other]
        if (next_, next_bytes, two.dtype, two.shape, two.strides) == (begin, nbytes, one.dtype, one.shape, one.strides):
            continue
        reason = (
            f"bytes [{next_:,}, {next_ + next_bytes:,}) overlap {quoted(name)} at [{begin:,}, {begin + nbytes:,}) "
            "without being the same tensor"
        )
        raise FormatError(
            "PK-ALIAS", reason, path=path, locus=other, hint="save clones of tensors that share a part of their storage"
        )
