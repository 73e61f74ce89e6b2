"""Files of torch.save made byte by byte, right or wrong on purpose; and torch's own, for comparison."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from attrs import define

from modelrig.components import StoredTensor

OPCODES = {"proto": b"\x80\x02", "dict": b"}", "stop": b".", "reduce": b"R", "set": b"s", "pid": b"Q", "none": b"N", "build": b"b"}


# ------------------------------------------------------------------------------------------------ pickles


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(8, "little", signed=True)
    return b"\x8a\x08" + raw


def group(*parts: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(parts) + b"t"


def word(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + group(*arguments) + b"R"


def storage(key: str = "0", kind: str = "FloatStorage", numel: int = 6) -> bytes:
    module = "torch.storage" if kind in ("UntypedStorage", "TypedStorage") else "torch"
    return group(text("storage"), word(module, kind), text(key), text("cpu"), number(numel)) + b"Q"


HOOKS = called(word("collections", "OrderedDict"))


def tensor(
    shape: Iterable[int] = (2, 3), strides: Iterable[int] = (3, 1), *, offset: int = 0, of: bytes | None = None, more: bytes = b""
) -> bytes:
    sizes = (group(*map(number, numbers)) for numbers in (shape, strides))
    of = storage() if of is None else of
    return word("torch._utils", "_rebuild_tensor_v2") + group(of, number(offset), *sizes, b"\x89", HOOKS, more) + b"R"


def mapping(**values: bytes) -> bytes:
    """A dict, without protocol and end."""
    return b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"


def whole(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def one_tensor(**changes: Any) -> bytes:
    """The pickle of a dict with one tensor, `w`."""
    return whole(mapping(w=tensor(**changes)))


# ------------------------------------------------------------------------------------------------ archives


@define
class Member:
    """A record as it goes into an archive; what is None is told truthfully."""

    name: str | bytes
    data: bytes = b""
    flags: int = 0
    method: int = 0
    crc: int | None = None
    nbytes: int | None = None  # as the directory says
    packed: int | None = None
    header: int | None = None  # where the directory says it begins
    local_name: bytes | None = None
    local_method: int | None = None
    local_nbytes: int | None = None
    extra: bytes = b""  # of the directory
    comment: bytes = b""


def archive(*members: Member, comment: bytes = b"", **end: Any) -> bytes:
    """A zip archive of these records. `end`: count, length, start of the end record."""
    out, directory = bytearray(), bytearray()
    for one in members:
        raw = one.name.encode() if isinstance(one.name, str) else one.name
        crc = zlib.crc32(one.data) if one.crc is None else one.crc
        nbytes = len(one.data) if one.nbytes is None else one.nbytes
        packed = nbytes if one.packed is None else one.packed
        local_nbytes = min(nbytes, 0xFFFFFFFF) if one.local_nbytes is None else one.local_nbytes
        at = len(out) if one.header is None else one.header
        local = raw if one.local_name is None else one.local_name
        method = one.method if one.local_method is None else one.local_method
        out += struct.pack("<4s5H3I2H", b"PK\3\4", 0, one.flags, method, 0, 0, crc, local_nbytes, local_nbytes, len(local), 0)
        out += local + one.data
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 0, 0, one.flags, one.method, 0, 0, crc, packed, nbytes,
            len(raw), len(one.extra), len(one.comment), 0, 0, 0, at,
        )  # fmt: skip
        directory += raw + one.extra + one.comment
    count, length, start = (end.get(*pair) for pair in (("count", len(members)), ("length", len(directory)), ("start", len(out))))
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, length, start, len(comment))
    return bytes(out + directory + tail + comment)


def checkpoint(pickle: bytes | None = None, *more: Member, data: bytes = bytes(24), layer: str = "archive") -> bytes:
    """An archive with this pickle and storage 0."""
    members = [Member(f"{layer}/data.pkl", one_tensor() if pickle is None else pickle), Member(f"{layer}/data/0", data)]
    return archive(*members, *more)


# ------------------------------------------------------------------------------------------------ torch's own


def saved(tensors: Any) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def stored(tensors: Mapping[str, torch.Tensor]) -> list[StoredTensor]:
    """What is to be written for these tensors: those of one storage are a tensor and its aliases."""
    names: dict[Any, list[str]] = {}
    for name, one in tensors.items():
        names.setdefault(one.data_ptr() if one.numel() else name, []).append(name)
    return [
        StoredTensor(first, str(tensors[first].dtype).removeprefix("torch."), tuple(tensors[first].shape), tuple(others))
        for first, *others in names.values()
    ]


def raw_bytes(one: torch.Tensor) -> torch.Tensor:
    """uint8, in C order."""
    flat = one.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def reading(tensors: Mapping[str, torch.Tensor], step: int = 7) -> Any:
    """The `read` that a writer asks for, in parts of `step` bytes."""

    def read(wanted: StoredTensor) -> Iterator[memoryview]:
        raw = memoryview(raw_bytes(tensors[wanted.name]).numpy())
        for begin in range(0, len(raw), step):
            yield raw[begin : begin + step]

    return read


def written(planner: Any, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """What a format's writer makes of them; as long as it promises."""
    out = bytearray()
    planner.write(stored(tensors), metadata or {}, reading(tensors), out.extend)
    assert len(out) == planner.size(stored(tensors), metadata or {})
    return bytes(out)
