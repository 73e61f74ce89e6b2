"""The zip reader: what torch.save packs is found, what two readers could disagree about is refused."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from binfiles import Member, archive, checkpoint, one_tensor, saved
from modelrig.errors import FormatError
from modelrig_plugins.formats.pytorch_bin import read_header
from modelrig_plugins.formats.zip_scan import read_records

PICKLE = Member("archive/data.pkl", one_tensor())
ZERO = "archive/data/0"
DATA = Member(ZERO, bytes(24))


def records(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_records(descriptor, path.stat().st_size, path)
    finally:
        os.close(descriptor)


def refused(path: Path, raw: bytes) -> FormatError:
    path.write_bytes(raw)
    with pytest.raises(FormatError) as caught:
        read_header(path)
    assert str(path) == caught.value.path
    return caught.value


@pytest.mark.parametrize("made", ["torch", "zipfile", "folders"])
def test_records_are_where_another_reader_finds_them(tmp_path, made):
    path = tmp_path / "x.bin"
    if made == "torch":
        path.write_bytes(saved({"a": torch.arange(5), "b": torch.zeros(0), "c": torch.ones(300)}))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
            if made == "folders":
                file.mkdir("archive")
            file.writestr("archive/data.pkl", one_tensor())
            with file.open(zipfile.ZipInfo("archive/data/0"), "w", force_zip64=True) as member:
                member.write(bytes(range(24)))
    found, raw = records(path), path.read_bytes()
    with zipfile.ZipFile(path) as oracle:
        names = [info.filename for info in oracle.infolist() if not info.is_dir()]
        assert names == list(found)
        for name, record in found.items():
            assert oracle.read(name) == raw[record.offset : record.offset + record.nbytes]
            assert oracle.getinfo(name).CRC == record.crc


@pytest.mark.parametrize(
    ("extra", "header", "says"),
    [
        (struct.pack("<2HQ", 1, 8, 0), 0xFFFFFFFF, None),
        (b"", 0xFFFFFFFF, "zip64 field is missing"),
        (struct.pack("<2HI", 1, 4, 0), 0xFFFFFFFF, "zip64 field is missing or too short"),
        (struct.pack("<2HQ", 1, 8, 1 << 60), 0xFFFFFFFF, "header at byte 1,152,921,504,606,846,976"),
    ],
)
def test_a_number_that_is_full_is_taken_from_the_zip64_field(tmp_path, extra, header, says):
    raw = archive(Member("archive/data.pkl", one_tensor(), extra=extra, header=header), DATA)
    if says is None:
        (tmp_path / "x.bin").write_bytes(raw)
        assert ["w"] == list(read_header(tmp_path / "x.bin").entries)
    else:
        assert says in refused(tmp_path / "x.bin", raw).reason


CUT = checkpoint()
SECOND = archive(Member("archive/data.pkl", one_tensor(shape=(3, 2), strides=(2, 1))), DATA)

CASES: dict[str, tuple[bytes, str, str, str | None]] = {
    "nothing": (b"", "ZP-MAGIC", "0 bytes", None),
    "zeros": (bytes(1000), "ZP-MAGIC", "zeros", None),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "ZP-MAGIC", "git-lfs", None),
    "an error page": (b"<html>not found</html>", "ZP-MAGIC", "HTML", None),
    "safetensors": (b"\x40\0\0\0\0\0\0\0{}", "ZP-MAGIC", "nothing that is known", None),
    "a legacy pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "PK-LEGACY", "before version 1.6", None),
    "a legacy tar": (bytes(257).replace(b"\0", b"x") + b"ustar" + bytes(300), "PK-LEGACY", "tar", None),
    "one byte short": (CUT[:-1], "ZP-END", "end record", None),
    "half of it": (CUT[: len(CUT) // 2], "ZP-END", "not at the end", None),
    "a byte behind it": (CUT + b"x", "ZP-END", "follow", None),
    "a comment": (archive(PICKLE, DATA, comment=b"hello"), "ZP-END", "follow", None),
    "a second archive as comment": (archive(PICKLE, DATA, comment=SECOND), "ZP-DIRECTORY", "does not end", None),
    "an archive before it": (SECOND + CUT, "ZP-DIRECTORY", "does not end", None),
    "a comment that is not there": (CUT[:-2] + b"\5\0", "ZP-END", "promises", None),
    "a directory that begins late": (archive(PICKLE, DATA, start=10), "ZP-DIRECTORY", "does not end", None),
    "a directory of other length": (archive(PICKLE, DATA, length=10), "ZP-DIRECTORY", "does not end", None),
    "fewer entries than there are": (archive(PICKLE, DATA, count=1), "ZP-DIRECTORY", "belong to no entry", None),
    "more entries than there are": (archive(PICKLE, DATA, count=3), "ZP-DIRECTORY", "", None),
    "60,000 entries in 100 bytes": (archive(PICKLE, DATA, count=60_000), "ZP-DIRECTORY", "cannot be in", None),
    "a record twice": (archive(PICKLE, DATA, DATA), "ZP-DUP", "twice", ZERO),
    "compressed": (archive(PICKLE, Member(ZERO, bytes(9), method=8)), "ZP-METHOD", "compressed", ZERO),
    "compressed in its header alone": (
        archive(PICKLE, Member(ZERO, bytes(24), local_method=8)), "ZP-LOCAL", "method", ZERO,
    ),
    "smaller than it is": (archive(PICKLE, Member(ZERO, bytes(24), packed=9)), "ZP-METHOD", "", ZERO),
    "encrypted": (archive(PICKLE, Member(ZERO, bytes(24), flags=1)), "ZP-CRYPT", "", ZERO),
    "strange flags": (archive(PICKLE, Member(ZERO, bytes(24), flags=64)), "ZP-DIRECTORY", "0x40", ZERO),
    "an absolute name": (archive(PICKLE, DATA, Member("/etc/passwd")), "ZP-NAME", "'/etc/passwd'", None),
    "a name that goes up": (archive(PICKLE, DATA, Member("archive/../x")), "ZP-NAME", "'archive/../x'", None),
    "a name of Windows": (archive(PICKLE, DATA, Member("archive\\x")), "ZP-NAME", "", None),
    "a drive": (archive(PICKLE, DATA, Member("C:x")), "ZP-NAME", "", None),
    "a name with NUL": (archive(PICKLE, DATA, Member("archive/x\0y")), "ZP-NAME", "\\x00", None),
    "no name": (archive(PICKLE, DATA, Member("")), "ZP-NAME", "''", None),
    "a name that is not UTF-8": (archive(PICKLE, DATA, Member(b"archive/\xff")), "ZP-NAME", "UTF-8", None),
    "a name of 60,000 bytes": (archive(PICKLE, DATA, Member("a/" + "x" * 60_000)), "ZP-NAME", "60,002 bytes", None),
    "a record beside the folder": (archive(PICKLE, DATA, Member("other/x")), "ZP-NAME", "beside", "other/x"),
    "a folder with content": (archive(PICKLE, DATA, Member("archive/data/", b"x")), "ZP-NAME", "folder", "archive/data/"),
    "another name in the header": (
        archive(PICKLE, Member(ZERO, bytes(24), local_name=b"archive/data/1")), "ZP-LOCAL", "name", ZERO,
    ),
    "another size in the header": (
        archive(PICKLE, Member(ZERO, bytes(24), local_nbytes=23)), "ZP-LOCAL", "size", ZERO,
    ),
    "a header beyond the file": (archive(PICKLE, Member(ZERO, header=1 << 30)), "ZP-LOCAL", "", ZERO),
    "a header that is none": (archive(PICKLE, Member(ZERO, bytes(24), header=9)), "ZP-LOCAL", "no header", ZERO),
    "records over each other": (
        archive(PICKLE, Member(ZERO, bytes(24)), Member(ZERO, header=0)), "ZP-DUP", "", ZERO,
    ),
    "a record over the next": (
        archive(Member("archive/data.pkl", one_tensor(), nbytes=len(one_tensor()) + 9), DATA), "ZP-OVERLAP", "within", ZERO,
    ),
    "a record over the directory": (
        archive(PICKLE, Member(ZERO, bytes(24), nbytes=999)), "ZP-OVERLAP", "directory", ZERO,
    ),
    "no data.pkl": (archive(DATA), "ZP-PICKLE", "no record", None),
    "two data.pkl": (archive(PICKLE, DATA, Member("archive/x/data.pkl")), "ZP-PICKLE", "2 records", None),
    "TorchScript": (archive(PICKLE, DATA, Member("archive/constants.pkl")), "PK-LEGACY", "TorchScript", None),
    "TorchScript with code": (
        archive(PICKLE, Member("archive/code/x", method=8), Member("archive/constants.pkl")), "PK-LEGACY", "TorchScript", None,
    ),
    "big-endian": (archive(PICKLE, DATA, Member("archive/byteorder", b"big")), "ZP-ORDER", "", "archive/byteorder"),
    "a byte order of nobody": (archive(PICKLE, DATA, Member("archive/byteorder", bytes(99))), "ZP-ORDER", "", "archive/byteorder"),
    "a pickle of another checksum": (
        archive(Member("archive/data.pkl", one_tensor(), crc=7), DATA), "ZP-CRC", "00000007", "archive/data.pkl",
    ),
    "no storage": (archive(PICKLE), "ZP-RECORD", "data/0", "w"),
    "a storage too small": (archive(PICKLE, Member(ZERO, bytes(20))), "ZP-SIZE", "20 bytes", "w"),
    "a storage too large": (archive(PICKLE, Member(ZERO, bytes(28))), "ZP-SIZE", "28 bytes", "w"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_archive_of_torch_save_is_refused_with_what_is_wrong(tmp_path, name):
    raw, code, says, locus = CASES[name]
    error = refused(tmp_path / "x.bin", raw)
    assert (code, locus) == (error.code, locus and error.locus), str(error)
    assert says in error.reason


@pytest.mark.parametrize(
    ("at", "value"),
    [(4, 45), (24, 17), (32, 3), (40, 1 << 40), (48, 1 << 62)],  # length of the record, entries here, entries, bytes, offset
)
def test_a_zip64_end_record_that_lies_is_refused(tmp_path, at, value):
    raw = bytearray(saved({"a": torch.ones(3)}))
    begin = raw.rindex(b"PK\6\6")
    raw[begin + at : begin + at + 8] = struct.pack("<Q", value)
    assert "ZP-DIRECTORY" == refused(tmp_path / "x.bin", bytes(raw)).code


def test_every_truncation_and_every_changed_byte_ends_in_one_error_or_in_the_same_tensors(tmp_path):
    raw = saved({"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16).t()})
    path = tmp_path / "x.bin"
    path.write_bytes(raw)
    right = read_header(path).entries
    for cut in range(0, len(raw), 13):
        assert refused(path, raw[:cut]).code.startswith(("ZP-", "PK-"))
    for at in range(0, len(raw), 3):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x41]) + raw[at + 1 :])
        try:
            assert right == read_header(path).entries  # a byte of data, of padding, of a date
        except FormatError as error:
            assert error.code.startswith(("ZP-", "PK-"))
