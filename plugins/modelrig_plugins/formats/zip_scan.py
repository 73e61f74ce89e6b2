"""The strict reader of the zip archives that torch.save writes: where the bytes of each record lie, and nothing else.

Records are stored, never compressed, so a record is a range of the file. Everything two zip readers could disagree about is
refused: duplicate names, headers that contradict the directory, records over each other, bytes before the first or after the last.
Nothing is allocated by a number that was not checked against the size of the file; no data is read.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn

from attrs import frozen

from modelrig.checkpoint.files import read_at
from modelrig.checkpoint.headers import looks_like
from modelrig.errors import FileError, FormatError, quoted

MAX_RECORDS = 1_000_100  # a tensor each, and what torch.save puts beside them
MAX_DIRECTORY_BYTES = 256_000_000
MAX_NAME_BYTES = 1024

LOCAL = struct.Struct("<4s5H3I2H")  # signature version flags method time date crc packed size name extra
CENTRAL = struct.Struct("<4s6H3I5H2I")  # … version-made-by first; comment disk internal external offset last
END = struct.Struct("<4s4H2IH")  # disk directory-disk entries-here entries size offset comment
END64 = struct.Struct("<4sQ2H2I4Q")  # length made needed disk directory-disk entries-here entries size offset
LOCATOR64 = struct.Struct("<4sIQI")
LOCAL_MARK, CENTRAL_MARK, END_MARK, END64_MARK, LOCATOR64_MARK = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF  # "look in the zip64 field"
ENCRYPTED, SIZES_FOLLOW, UTF8 = 1, 8, 0x800
_OTHER_FLAGS = ~(ENCRYPTED | SIZES_FOLLOW | UTF8)
_PLAIN_NAME = re.compile(rb"\w[\w-]{0,99}/(?:data/\d{1,20}|\w{1,99}(?:\.pkl)?)")  # what nearly every record is called
_AGAIN = "an interrupted download or copy? fetch it again"


class Record(NamedTuple):
    """Bytes `[offset, offset + nbytes)` of the file; `crc` is what the directory says of them."""

    offset: int
    nbytes: int
    crc: int


def read_records(descriptor: int, size: int, path: Path) -> dict[str, Record]:
    """Every record of the archive, in the order of the directory. Raises `FormatError` (ZP-*) and `FileError`."""
    head = read_at(descriptor, min(size, 512), 0, path)
    _require_zip(head, size, path)
    start, length, count = _directory(descriptor, size, path)
    directory = read_at(descriptor, length, start, path)
    if len(directory) < length:
        raise FileError("IO-CHANGED", "was cut short while its directory was read", path=path)
    return _Walk(descriptor, path, start).records(directory, count)


def _require_zip(head: bytes, size: int, path: Path) -> None:
    if head.startswith(LOCAL_MARK):
        return
    if size == 0:
        raise FormatError("ZP-MAGIC", "0 bytes", path=path, hint=_AGAIN)
    convert = "convert it with torch.save(torch.load(file, weights_only=True), file)"
    if head[:1] == b"\x80" and head[1:2] <= b"\5":
        reason = "a pickle without an archive, as torch.save wrote before version 1.6; its data cannot be read without executing it"
        raise FormatError("PK-LEGACY", reason, path=path, hint=convert)
    if head[257:262] == b"ustar":
        hint = "convert it where no harm can be done, since reading it can run code, with torch.load(file, weights_only=False)"
        raise FormatError("PK-LEGACY", "a tar archive, as torch.save wrote before version 0.1.10", path=path, hint=hint)
    kind, what_to_do = looks_like(head) or ("nothing that is known here", None)
    if not any(head):
        kind, what_to_do = "zeros", _AGAIN
    raise FormatError("ZP-MAGIC", f"not the zip archive that torch.save writes; it looks like {kind}", path=path, hint=what_to_do)


# ------------------------------------------------------------------------------------------------ the end of the archive


def _directory(descriptor: int, size: int, path: Path) -> tuple[int, int, int]:
    """(offset, bytes, entries) of the directory, which ends where the end records begin."""

    def refuse(code: str, reason: str, hint: str | None = None) -> NoReturn:
        raise FormatError(code, reason, path=path, hint=hint)

    tail = read_at(descriptor, min(size, END.size + FULL16), max(0, size - END.size - FULL16), path)
    if len(tail) < END.size or tail[-END.size :][:4] != END_MARK:
        if tail.rfind(END_MARK) < 0:
            refuse("ZP-END", f"the archive's end record is not at the end of its {size:,} bytes", _AGAIN)
        refuse("ZP-END", "bytes or a comment follow the archive's end record")
    _, disk, directory_disk, here, count, length, start, comment = END.unpack(tail[-END.size :])
    if comment:
        refuse("ZP-END", f"the end record promises a comment of {comment:,} bytes, and none follows", _AGAIN)
    if disk or directory_disk or here != count:
        refuse("ZP-DIRECTORY", "an archive in several volumes")
    end = size - END.size
    near = tail[: -END.size]
    if near[-LOCATOR64.size :][:4] == LOCATOR64_MARK and len(near) >= LOCATOR64.size + END64.size:
        _, disk, at, disks = LOCATOR64.unpack(near[-LOCATOR64.size :])
        end -= LOCATOR64.size + END64.size
        mark, record, _, _, disk64, directory_disk, here, count64, length64, start64 = END64.unpack(
            near[-LOCATOR64.size - END64.size : -LOCATOR64.size]
        )
        if mark != END64_MARK or at != end or record != END64.size - 12:
            refuse("ZP-DIRECTORY", "its zip64 end record is not where its locator says")
        if disk or disk64 or directory_disk or disks != 1 or here != count64:
            refuse("ZP-DIRECTORY", "an archive in several volumes")
        for what, short, full, long in (
            ("entries", count, FULL16, count64), ("directory bytes", length, FULL32, length64), ("offset", start, FULL32, start64)
        ):  # fmt: skip
            if short not in (long, full):
                refuse("ZP-DIRECTORY", f"its end records contradict each other: {what} {short:,} and {long:,}")
        start, length, count = start64, length64, count64
    elif FULL32 in (start, length) or count == FULL16:
        refuse("ZP-DIRECTORY", "its zip64 end record is missing")
    if start + length != end:
        refuse(
            "ZP-DIRECTORY", f"its directory [{start:,}, {start + length:,}) does not end at byte {end:,}, where the end records are"
        )
    if count > MAX_RECORDS or length > MAX_DIRECTORY_BYTES:
        refuse("ZP-COUNT", f"{count:,} records in a directory of {length:,} bytes; at most {MAX_RECORDS:,} are accepted")
    if count * CENTRAL.size > length:
        refuse("ZP-DIRECTORY", f"{count:,} records cannot be in a directory of {length:,} bytes")
    return start, length, count


# ------------------------------------------------------------------------------------------------ its records


@frozen
class _Walk:
    """One pass over the directory of the archive `path`; data ends at `limit`."""

    descriptor: int
    path: Path
    limit: int

    def records(self, directory: bytes, count: int) -> dict[str, Record]:
        found: dict[str, Record] = {}
        spans: list[tuple[int, int, str]] = []
        at = 0
        for number in range(count):
            if at + CENTRAL.size > len(directory):
                raise self.problem("ZP-DIRECTORY", f"the directory ends in entry {number:,} of {count:,}")
            fields = CENTRAL.unpack_from(directory, at)
            mark, _, needed, flags, method, _, _, crc, packed, nbytes, name_bytes, extra, comment, disk, _, _, header = fields
            begin = at + CENTRAL.size
            at = begin + name_bytes + extra + comment
            if mark != CENTRAL_MARK or at > len(directory):
                raise self.problem("ZP-DIRECTORY", f"entry {number:,} of the directory is none, or ends behind it")
            raw = directory[begin : begin + name_bytes]
            name = self.name(raw)
            if FULL32 in (packed, nbytes, header):
                field = _zip64(directory[begin + name_bytes : begin + name_bytes + extra], (nbytes, packed, header))
                if field is None:
                    raise self.problem("ZP-DIRECTORY", "its zip64 field is missing or too short", name)
                nbytes, packed, header = field
            if flags & ENCRYPTED:
                raise self.problem("ZP-CRYPT", "is encrypted", name)
            if method != 0 and b"/constants.pkl" in directory:  # TorchScript compresses its code
                raise _torchscript(self.path)
            if method != 0 or packed != nbytes:
                raise self.problem("ZP-METHOD", f"is compressed (method {method}); torch.save stores", name, _REPACK)
            if flags & _OTHER_FLAGS or disk or needed > 45:
                raise self.problem("ZP-DIRECTORY", f"uses a feature of zip that is not read here (flags {flags:#x})", name)
            if name in found:
                raise self.problem("ZP-DUP", "is in the archive twice", name)
            offset = self.data_offset(raw, name, (flags, crc, nbytes, header))
            if offset + nbytes > self.limit:
                reason = f"bytes [{offset:,}, {offset + nbytes:,}) reach into the directory at {self.limit:,}"
                raise self.problem("ZP-OVERLAP", reason, name)
            spans.append((header, offset + nbytes, name))
            if not name.endswith("/"):
                found[name] = Record(offset, nbytes, crc)
            elif nbytes:
                raise self.problem("ZP-NAME", "a folder with content", name)
        if at != len(directory):
            raise self.problem("ZP-DIRECTORY", f"{len(directory) - at:,} bytes of the directory belong to no entry")
        self.require_disjoint(spans)
        return found

    def problem(self, code: str, reason: str, name: str | None = None, hint: str | None = None) -> FormatError:
        return FormatError(code, reason, path=self.path, locus=name, hint=hint)

    def name(self, raw: bytes) -> str:
        if _PLAIN_NAME.fullmatch(raw):
            return raw.decode()
        if len(raw) > MAX_NAME_BYTES:
            raise self.problem("ZP-NAME", f"the name of a record has {len(raw):,} bytes; at most {MAX_NAME_BYTES:,} are accepted")
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise self.problem("ZP-NAME", f"the name of a record is not UTF-8: {quoted(raw)[1:]}") from problem
        if name[:1] in ("", "/") or "\\" in name or "\0" in name or name[1:2] == ":" or (".." in name and ".." in name.split("/")):
            raise self.problem("ZP-NAME", f"a record is called {quoted(name)}, which no folder can hold")
        return name

    def data_offset(self, raw: bytes, name: str, said: tuple[int, int, int, int]) -> int:
        """Where the record's data begins, told by the header before it, which must say what the directory says."""
        flags, crc, nbytes, header = said
        if header + LOCAL.size + len(raw) > self.limit:
            raise self.problem("ZP-LOCAL", f"its header at byte {header:,} is none: the directory begins at {self.limit:,}", name)
        try:
            data = os.pread(self.descriptor, LOCAL.size + len(raw) + 24, header)
        except OSError as error:
            raise FileError("IO-READ", f"cannot be read at byte {header}: {error.strerror or error}", path=self.path) from error
        if len(data) < LOCAL.size + len(raw):
            raise FileError("IO-CHANGED", "was cut short while its headers were read", path=self.path)
        mark, _, local_flags, method, _, _, local_crc, packed, size, name_bytes, extra = LOCAL.unpack_from(data)
        if mark != LOCAL_MARK:
            raise self.problem("ZP-LOCAL", f"there is no header at byte {header:,}", name)
        if name_bytes != len(raw) or data[LOCAL.size : LOCAL.size + name_bytes] != raw:
            raise self.problem("ZP-LOCAL", f"the header at byte {header:,} has another name", name)
        if method != 0 or local_flags != flags:
            raise self.problem("ZP-LOCAL", "its header and the directory differ in flags or method", name)
        if not (flags & SIZES_FOLLOW and not (local_crc or packed or size)):  # zeros: they follow the data
            if FULL32 in (packed, size):
                start = LOCAL.size + name_bytes
                size, packed, _ = _zip64(data[start : start + extra], (size, packed, 0)) or (-1, -1, 0)
            if (local_crc, packed, size) != (crc, nbytes, nbytes):
                raise self.problem("ZP-LOCAL", "its header and the directory differ in size or checksum", name)
        return header + LOCAL.size + int(name_bytes) + int(extra)

    def require_disjoint(self, spans: list[tuple[int, int, str]]) -> None:
        spans.sort()
        if spans and spans[0][0] != 0:
            raise self.problem("ZP-OVERLAP", f"the first {spans[0][0]:,} bytes belong to no record", spans[0][2])
        for (_, end, before), (begin, _, name) in pairwise(spans):
            if begin < end:
                raise self.problem("ZP-OVERLAP", f"begins at byte {begin:,}, within {quoted(before)}, which ends at {end:,}", name)


_REPACK = "pack it again without compression (zip -0), or load and save it with torch"


def _zip64(extra: bytes, short: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """(size, packed size, header offset), of which those that are full stand in the zip64 field; None if they do not."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind != 1:
            at += 4 + length
            continue
        wanted = [index for index, value in enumerate(short) if value == FULL32]
        if length < 8 * len(wanted) or at + 4 + 8 * len(wanted) > len(extra):
            return None
        numbers = list(short)
        for index, value in zip(wanted, struct.unpack_from(f"<{len(wanted)}Q", extra, at + 4), strict=True):
            numbers[index] = value
        return numbers[0], numbers[1], numbers[2]
    return None


def _torchscript(path: Path) -> FormatError:
    hint = "load it with torch.jit.load and save its state_dict() with torch.save"
    return FormatError("PK-LEGACY", "a TorchScript archive: a program, not tensors", path=path, hint=hint)


def layer_of(records: Mapping[str, Record], path: Path) -> str:
    """The folder all records of a checkpoint lie in, with its slash: "archive/".

    Raises:
        FormatError: ZP-PICKLE unless there is exactly one data.pkl; PK-LEGACY for a TorchScript archive.
    """
    pickles = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        there = f"{len(pickles)} records called data.pkl; one is needed" if pickles else "no record called data.pkl"
        raise FormatError("ZP-PICKLE", f"{there}: not what torch.save writes", path=path)
    layer = pickles[0].removesuffix("data.pkl")
    if f"{layer}constants.pkl" in records or any(name.startswith(f"{layer}code/") for name in records):
        raise _torchscript(path)
    if stray := [name for name in records if not name.startswith(layer)]:
        raise FormatError("ZP-NAME", f"lies beside the folder {quoted(layer)} that torch.save makes", path=path, locus=stray[0])
    return layer
