"""Writing what torch.save writes for a dict of tensors, byte for byte, in one pass and without torch.

The archive is that of miniz as torch drives it: records are stored, their data begins at multiples of 64 behind a padding field
"FB", sizes and checksums follow the data, the directory is at the end. torch.load finds the storages of a mapped file by repeating
this arithmetic, so none of it is free. Only the 40 digits of `.data/serialization_id` are our own: a digest of names and
checksums, as torch's are.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from math import prod
from typing import TYPE_CHECKING, Any

from attrs import define, field

from modelrig.components import StoredTensor
from modelrig.errors import FormatError
from modelrig_plugins.formats.pickle_words import DTYPES, STORAGES
from modelrig_plugins.formats.writing import parts_of, require_names
from modelrig_plugins.formats.zip_scan import (
    CENTRAL,
    CENTRAL_MARK,
    END,
    END64,
    END64_MARK,
    END_MARK,
    FULL16,
    FULL32,
    LOCAL,
    LOCAL_MARK,
    LOCATOR64,
    LOCATOR64_MARK,
    SIZES_FOLLOW,
    UTF8,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

LAYER = "archive"
ALIGNMENT = 64
BATCH = 1000  # items that Python's pickler sets at once
STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}  # the other dtypes lie in untyped storages
ID_DIGITS = 40
ID = f"{LAYER}/.data/serialization_id"

# ------------------------------------------------------------------------------------------------ the pickle


@define
class _Pickler:
    """Opcodes of protocol 2 as Python's pickler chooses them. What was written once is taken from the memo, names excepted:
    Python looks whether it is the same object, and a name is another than a storage's key that reads the same."""

    out: bytearray = field(factory=lambda: bytearray(b"\x80\x02"))
    memo: dict[Any, int] = field(factory=dict)
    count: int = 0

    def keep(self, key: Any = None) -> None:
        self.out += b"q%c" % self.count if self.count < 256 else b"r" + struct.pack("<I", self.count)
        if key is not None:
            self.memo[key] = self.count
        self.count += 1

    def recall(self, key: Any) -> bool:
        index = self.memo.get(key)
        if index is None:
            return False
        self.out += b"h%c" % index if index < 256 else b"j" + struct.pack("<I", index)
        return True

    def name(self, value: str) -> None:
        raw = value.encode()
        self.out += b"X" + struct.pack("<I", len(raw)) + raw
        self.keep()

    def text(self, value: str) -> None:
        if not self.recall(value):
            self.memo[value] = self.count
            self.name(value)

    def word(self, module: str, name: str) -> None:
        if not self.recall((module, name)):
            self.out += f"c{module}\n{name}\n".encode()
            self.keep((module, name))

    def number(self, value: int) -> None:
        if value < 1 << 8:
            self.out += b"K%c" % value
        elif value < 1 << 16:
            self.out += b"M" + struct.pack("<H", value)
        elif value < 1 << 31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little")
            self.out += b"\x8a%c" % len(raw) + raw

    def numbers(self, values: Sequence[int]) -> None:
        """A tuple of whole numbers."""
        if len(values) > 3:
            self.out += b"("
        for value in values:
            self.number(value)
        self.out += (b")", b"\x85", b"\x86", b"\x87", b"t")[min(len(values), 4)]
        if values:
            self.keep()

    def tensor(self, tensor: StoredTensor, key: int) -> None:
        typed = STORAGE_OF.get(tensor.dtype)
        count = prod(tensor.shape)
        self.word("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.out += b"(("
        self.text("storage")
        self.word("torch" if typed else "torch.storage", typed or "UntypedStorage")
        self.text(str(key))
        self.text("cpu")
        self.number(count if typed else tensor.nbytes)
        self.out += b"t"
        self.keep()
        self.out += b"Q"
        self.number(0)  # offset in the storage
        self.numbers(tensor.shape)
        self.numbers([prod(size or 1 for size in tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))])
        self.out += b"\x89"  # requires_grad
        self.word("collections", "OrderedDict")  # hooks
        self.out += b")R"
        self.keep()
        if not typed:
            self.word("torch", tensor.dtype)
        self.out += b"t"
        self.keep()
        self.out += b"R"
        self.keep()


def pickled(tensors: Sequence[StoredTensor]) -> bytes:
    """data.pkl: a dict from each name and alias to a tensor. Names of one tensor share its storage, whose key is its number."""
    made = _Pickler()
    made.out += b"}"
    made.keep()
    items = [(name, tensor, key) for key, tensor in enumerate(tensors) for name in (tensor.name, *tensor.aliases)]
    for begin in range(0, len(items) + (len(items) > 1), BATCH):
        made.out += b"(" if len(items) > 1 else b""
        for name, tensor, key in items[begin : begin + BATCH]:
            made.name(name)
            made.tensor(tensor, key)
        made.out += b"u" if len(items) > 1 else b"s"
    return bytes(made.out + b".")


# ------------------------------------------------------------------------------------------------ the archive


def _local_header(name: bytes, nbytes: int, cursor: int) -> bytes:
    """What stands before the data of a record whose header begins at `cursor`: its sizes follow the data."""
    long = [*([nbytes, 0] if nbytes >= FULL32 else []), *([cursor] if cursor >= FULL32 else [])]
    field64 = struct.pack(f"<2H{len(long)}Q", 1, 8 * len(long), *long) if long else b""
    padding = -(cursor + LOCAL.size + len(name) + len(field64) + 4) % ALIGNMENT
    extra = field64 + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    return LOCAL.pack(LOCAL_MARK, 0, _flags(nbytes), 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra


def _flags(nbytes: int) -> int:
    return UTF8 | (SIZES_FOLLOW if nbytes else 0)


def _descriptor(crc: int, nbytes: int, cursor: int) -> bytes:
    """What stands behind the data."""
    if not nbytes:
        return b""
    return struct.pack("<4sI2Q" if max(nbytes, cursor) >= FULL32 else "<4s3I", b"PK\7\10", crc, nbytes, nbytes)


def _central_header(name: bytes, nbytes: int, cursor: int, crc: int) -> bytes:
    long = [*([nbytes, nbytes] if nbytes >= FULL32 else []), *([cursor] if cursor >= FULL32 else [])]
    field64 = struct.pack(f"<2H{len(long)}Q", 1, 8 * len(long), *long) if long else b""
    short = min(nbytes, FULL32)
    numbers = (0, 0, _flags(nbytes), 0, 0, 0, crc, short, short, len(name), len(field64), 0, 0, 0, 0, min(cursor, FULL32))
    return CENTRAL.pack(CENTRAL_MARK, *numbers) + name + field64


def _end(count: int, start: int, length: int) -> bytes:
    at = start + length
    return b"".join(
        (
            END64.pack(END64_MARK, END64.size - 12, 0x31E, 45, 0, 0, count, count, length, start),
            LOCATOR64.pack(LOCATOR64_MARK, 0, at, 1),
            END.pack(END_MARK, 0, 0, min(count, FULL16), min(count, FULL16), min(length, FULL32), min(start, FULL32), 0),
        )
    )


def _records(tensors: Sequence[StoredTensor], pickle: bytes) -> Iterator[tuple[str, bytes | StoredTensor]]:
    yield f"{LAYER}/data.pkl", pickle
    yield f"{LAYER}/.format_version", b"1"
    yield f"{LAYER}/.storage_alignment", str(ALIGNMENT).encode()
    yield f"{LAYER}/byteorder", b"little"
    for key, tensor in enumerate(tensors):
        yield f"{LAYER}/data/{key}", tensor
    yield f"{LAYER}/version", b"3\n"
    yield ID, b"0" * ID_DIGITS  # told at the end


def _nbytes(content: bytes | StoredTensor) -> int:
    return len(content) if isinstance(content, bytes) else content.nbytes


def archive_bytes(tensors: Sequence[StoredTensor]) -> int:
    """Size of the archive that `write_archive` makes. Raises `FormatError`: PK-KEY, PK-LAYOUT."""
    _require_writable(tensors)
    cursor = directory = count = 0
    for name, content in _records(tensors, pickled(tensors)):
        nbytes = _nbytes(content)
        directory += len(_central_header(name.encode(), nbytes, cursor, 0))
        cursor += len(_local_header(name.encode(), nbytes, cursor)) + nbytes + len(_descriptor(0, nbytes, cursor))
        count += 1
    return cursor + directory + len(_end(count, cursor, directory))


def write_archive(
    tensors: Sequence[StoredTensor], read: Callable[[StoredTensor], Iterable[Buffer]], write: Callable[[Buffer], None]
) -> None:
    """The archive from its first byte to its last; see `modelrig.components.FormatPlanner.write`."""
    _require_writable(tensors)
    cursor, directory, digest = 0, [], sha256()
    for name, content in _records(tensors, pickled(tensors)):
        raw, nbytes, crc = name.encode(), _nbytes(content), 0
        if name == ID:
            content = b"%020d%020d" % struct.unpack_from("<2Q", digest.digest())
        header = _local_header(raw, nbytes, cursor)
        write(header)
        for part in [content] if isinstance(content, bytes) else parts_of(content, read):
            crc = zlib.crc32(part, crc)
            write(part)
        descriptor = _descriptor(crc, nbytes, cursor)
        write(descriptor)
        directory.append(_central_header(raw, nbytes, cursor, crc))
        cursor += len(header) + nbytes + len(descriptor)
        digest.update(struct.pack("<2I", len(raw), crc) + raw)
    listed = b"".join(directory)
    write(listed)
    write(_end(len(directory), cursor, len(listed)))


def _require_writable(tensors: Sequence[StoredTensor]) -> None:
    require_names([name for tensor in tensors for name in (tensor.name, *tensor.aliases)], "PK-KEY")
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            reason = f"{tensor.dtype} is no dtype that is read back from a .bin file; write safetensors"
            raise FormatError("PK-LAYOUT", reason, locus=tensor.name)
