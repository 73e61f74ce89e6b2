"""The header reader against the format's own library: what both accept is the same, and what the library refuses is refused."""

import json
from math import prod

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modelrig.checkpoint.headers import DTYPES, header_bytes, read_header
from modelrig.components import DTYPE_BITS
from modelrig.errors import FormatError
from tensorfiles import data_bytes, describe, encode

SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def bits(dtype):
    return DTYPE_BITS[DTYPES[dtype]]


shapes = st.lists(st.integers(0, 5), max_size=4)
tensors = st.tuples(st.sampled_from(sorted(DTYPES)), shapes).filter(lambda tensor: prod(tensor[1]) * bits(tensor[0]) % 8 == 0)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")
metadata = st.none() | st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4), st.text(max_size=4), max_size=3
)


@st.composite
def valid_files(draw):
    """(file, header): tensors of any dtype in any order of the header, spaces after it, data filled with a pattern."""
    header = describe(**draw(st.dictionaries(names, tensors, max_size=6)))
    size = data_bytes(header)
    header = dict(draw(st.permutations(list(header.items()))))
    if (about := draw(metadata)) is not None:
        header["__metadata__"] = about
    text = json.dumps(header, ensure_ascii=draw(st.booleans())) + " " * draw(st.integers(0, 9))
    return encode(text.encode("utf-8", "surrogatepass"), bytes(n % 251 for n in range(size))), header


def by_library(raw):
    """name → (dtype, shape, bytes) as safetensors itself reads it."""
    return {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in safetensors.deserialize(raw)}


def by_us(path):
    raw = path.read_bytes()
    stored = {ours: theirs for theirs, ours in DTYPES.items()}
    return {
        name: (stored[entry.dtype], entry.shape, raw[entry.offset : entry.offset + entry.nbytes])
        for name, entry in read_header(path).entries.items()
    }


@SAME_FOLDER
@given(valid_files())
def test_every_valid_file_is_read_as_the_library_reads_it(tmp_path, made):
    raw, _ = made
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    assert by_library(raw) == by_us(path)


@SAME_FOLDER
@given(st.dictionaries(names, tensors.filter(lambda tensor: bits(tensor[0]) >= 8), min_size=1, max_size=6), metadata)
def test_every_file_the_library_writes_is_accepted(tmp_path, whole, about):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape).to(getattr(torch, DTYPES[dtype])) for name, (dtype, shape) in whole.items()}, path, about)
    ours = read_header(path)
    assert {name: (DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in whole.items()} == {
        name: (entry.dtype, entry.shape) for name, entry in ours.entries.items()
    }
    assert (by_library(path.read_bytes()), about or {}) == (by_us(path), dict(ours.metadata))


@SAME_FOLDER
@given(valid_files(), st.data())
def test_whatever_is_done_to_a_file_what_we_accept_the_library_reads_the_same(tmp_path, made, data):
    raw = bytearray(made[0])
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(raw) - 1))
        raw[where : where + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=2) | st.sampled_from([b"[", b'"', b"0", b"}"])
        )
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    try:
        ours = by_us(path)
    except FormatError as error:
        assert str(path) == error.path
    else:
        assert by_library(bytes(raw)) == ours


def test_a_header_is_all_that_is_needed_when_the_size_is_told(tmp_path):
    header = describe(a=("F32", [4]), b=("BF16", [2, 2]))
    raw = encode(header, data_bytes(header))
    path = tmp_path / "model.safetensors"
    needed = header_bytes(raw[:8], len(raw))
    path.write_bytes(raw[:needed])
    made = read_header(path, size=len(raw), file=7)
    assert (needed, len(raw)) == (made.data_start, made.size)
    assert [("a", 7, needed, 16), ("b", 7, needed + 16, 8)] == [(e.name, e.file, e.offset, e.nbytes) for e in made.entries.values()]


def test_entries_come_in_file_order_and_names_are_never_merged(tmp_path):
    names = ["é", "e\u0301", "A", "a", "", "\0", "__metadata__.x", "../../x", "model." + "x" * 100_000]
    header = describe(**dict.fromkeys(names, ("U8", [1])))
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode(dict(reversed(header.items())), len(names)))
    assert names == list(read_header(path).entries)


def test_empty_tensors_scalars_and_files_without_tensors_are_accepted(tmp_path):
    path = tmp_path / "model.safetensors"
    header = describe(none=("F32", [0]), rows=("F16", [0, 5]), scalar=("F64", []), last=("I8", [3, 0]))
    path.write_bytes(encode(header, 8))
    assert [(0,), (0, 5), (3, 0), ()] == sorted(
        (entry.shape for entry in read_header(path).entries.values()), key=lambda s: (not s, s)
    )
    path.write_bytes(encode("{}"))
    assert {} == read_header(path).entries


# ---------------------------------------------------------------------------------------------- one rule broken at a time


def edited(change):
    """A lie told in the decoded header."""

    def lie(raw):
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        return encode(header, raw[8 + length :])

    return lie


def retold(change):
    """A lie told in the header's text."""

    def lie(raw):
        length = int.from_bytes(raw[:8], "little")
        text = raw[8 : 8 + length]
        changed = change(text)
        assert changed != text
        return encode(changed, raw[8 + length :])

    return lie


def setting(name, **fields):
    return edited(lambda header: header[name].update(fields))


NOTHING = {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}
LIES = {
    "cut by one byte": (lambda raw: raw[:-1], "ST-TRUNC", "w2"),
    "cut in the middle": (lambda raw: raw[:-40], "ST-TRUNC", "w1"),
    "one byte too many": (lambda raw: raw + b"\0", "ST-TRAIL", None),
    "another file appended": (lambda raw: raw + b"PK\3\4" * 99, "ST-TRAIL", None),
    "cut in the header": (lambda raw: raw[:50], "ST-HDRLEN", None),
    "7 bytes": (lambda raw: raw[:7], "ST-SHORT", None),
    "no bytes": (lambda raw: b"", "ST-SHORT", None),
    "length 0": (lambda raw: bytes(8) + raw[8:], "ST-HDRLEN", None),
    "length 2^63": (lambda raw: (1 << 63).to_bytes(8, "little") + raw[8:], "ST-HDRLEN", None),
    "length one beyond the file": (lambda raw: (len(raw) - 7).to_bytes(8, "little") + raw[8:], "ST-HDRLEN", None),
    "length big-endian": (lambda raw: raw[:8][::-1] + raw[8:], "ST-HDRLEN", None),
    "length one short": (lambda raw: (int.from_bytes(raw[:8], "little") - 1).to_bytes(8, "little") + raw[8:], "ST-JSON", None),
    "space first": (retold(lambda text: b" " + text), "ST-BRACE", None),
    "byte order mark": (retold(lambda text: b"\xef\xbb\xbf" + text), "ST-BRACE", None),
    "a list": (retold(lambda text: b"[" + text + b"]"), "ST-BRACE", None),
    "padded with zeros": (retold(lambda text: text + b"\0\0"), "ST-PAD", None),
    "padded with a tab": (retold(lambda text: text + b" \t "), "ST-PAD", None),
    "not UTF-8": (retold(lambda text: text.replace(b"w1", b"\xff\xfe")), "ST-UTF8", None),
    "half a surrogate pair": (retold(lambda text: text.replace(b"w1", b"\\udc00")), "ST-UTF8", None),
    "a second object": (retold(lambda text: text + b"{}"), "ST-JSON", None),
    "no closing brace": (retold(lambda text: text[:-1]), "ST-JSON", None),
    "NaN": (retold(lambda text: text.replace(b"[0, 16]", b"[NaN, 16]")), "ST-JSON", None),
    "an integer of 25 digits": (retold(lambda text: text.replace(b"[0, 16]", b"[0, " + b"1" * 25 + b"]")), "ST-JSON", None),
    "9 levels": (edited(lambda header: header.update(x=json.loads("[" * 8 + "]" * 8))), "ST-DEPTH", None),
    "100,000 levels": (retold(lambda text: text[:-1] + b', "x": ' + b"[" * 100_000), "ST-DEPTH", None),
    "the same tensor twice": (retold(lambda text: text[:-1] + b", " + text[1 : text.index(b"}") + 1] + b"}"), "ST-DUPKEY", "w0"),
    "a tensor at two ranges": (retold(lambda text: text[:-1] + b', "w1": 1}'), "ST-DUPKEY", "w1"),
    "two dtypes": (retold(lambda text: text.replace(b'"dtype": "F32"', b'"dtype": "F32", "dtype": 1', 1)), "ST-DUPKEY", "dtype"),
    "two metadata": (retold(lambda text: text[:-1] + b', "__metadata__": {}, "__metadata__": {}}'), "ST-DUPKEY", "__metadata__"),
    "a key of the metadata twice": (retold(lambda text: text[:-1] + b', "__metadata__": {"a": "1", "a": "1"}}'), "ST-DUPKEY", "a"),
    "metadata of numbers": (edited(lambda header: header.update(__metadata__={"a": 1})), "ST-META", "__metadata__.a"),
    "metadata a list": (edited(lambda header: header.update(__metadata__=["a"])), "ST-META", "__metadata__"),
    "a tensor that is a list": (edited(lambda header: header.update(w1=[1])), "ST-FIELD", "w1"),
    "an unknown field": (setting("w1", strides=[1]), "ST-FIELD", "w1"),
    "no dtype": (edited(lambda header: header["w1"].pop("dtype")), "ST-FIELD", "w1"),
    "no shape": (edited(lambda header: header["w1"].pop("shape")), "ST-FIELD", "w1"),
    "no range": (edited(lambda header: header["w1"].pop("data_offsets")), "ST-FIELD", "w1"),
    "an unknown dtype": (setting("w1", dtype="F128"), "ST-DTYPE", "w1"),
    "a dtype in small letters": (setting("w1", dtype="f32"), "ST-DTYPE", "w1"),
    "a dtype that is a list": (setting("w1", dtype=["F32"]), "ST-DTYPE", "w1"),
    "a shape that is a number": (setting("w1", shape=4), "ST-SHAPE", "w1"),
    "a size that is a float": (setting("w1", shape=[2.0, 3]), "ST-SHAPE", "w1"),
    "a size that is true": (setting("w1", shape=[True, 6]), "ST-SHAPE", "w1"),
    "a size that is a text": (setting("w1", shape=["2", 3]), "ST-SHAPE", "w1"),
    "two negative sizes": (setting("w1", shape=[-2, -3]), "ST-SHAPE", "w1"),
    "17 dimensions": (setting("w1", shape=[2, 3] + [1] * 15), "ST-SHAPE", "w1"),
    "sizes that overflow": (setting("w1", shape=[1 << 40, 1 << 40]), "ST-OVERFLOW", "w1"),
    "sizes that overflow to 6": (setting("w1", shape=[1 << 40, 1 << 24, 6]), "ST-OVERFLOW", "w1"),
    "no elements of impossible sizes": (setting("w1", shape=[0, 1 << 62, 1 << 62]), "ST-OVERFLOW", "w1"),
    "a size beyond 2^40": (setting("w1", shape=[(1 << 40) + 1]), "ST-OVERFLOW", "w1"),
    "three offsets": (setting("w1", data_offsets=[16, 40, 41]), "ST-OFFSET", "w1"),
    "offsets as an object": (setting("w1", data_offsets={"16": 1, "40": 2}), "ST-OFFSET", "w1"),
    "an offset that is a float": (setting("w1", data_offsets=[16.0, 40]), "ST-OFFSET", "w1"),
    "an offset that is false": (setting("w0", data_offsets=[False, 16]), "ST-OFFSET", "w0"),
    "an offset that is a text": (setting("w1", data_offsets=["16", 40]), "ST-OFFSET", "w1"),
    "a negative offset": (setting("w0", data_offsets=[-16, 0]), "ST-OFFSET", "w0"),
    "an end before its beginning": (setting("w1", data_offsets=[40, 16]), "ST-OFFSET", "w1"),
    "an offset beyond 2^53": (setting("w1", data_offsets=[16, (1 << 53) + 1]), "ST-OFFSET", "w1"),
    "three half-byte values": (setting("w1", dtype="F4", shape=[3]), "ST-ALIGN", "w1"),
    "a shape too small for the range": (setting("w1", shape=[2, 2]), "ST-SIZE", "w1"),
    "a dtype too wide for the range": (setting("w1", dtype="F64"), "ST-SIZE", "w1"),
    "two tensors on one range": (setting("w1", shape=[4], data_offsets=[0, 16]), "ST-OVERLAP", "w1"),
    "half of a tensor in another": (setting("w1", data_offsets=[8, 32]), "ST-OVERLAP", "w1"),
    "an empty tensor inside another": (edited(lambda header: header.update(x=NOTHING)), "ST-OVERLAP", "x"),
    "a hole": (edited(lambda header: header.pop("w1")), "ST-HOLE", "w2"),
    "a hole at the beginning": (edited(lambda header: header.pop("w0")), "ST-HOLE", "w1"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_one_broken_rule_is_refused_with_its_code_file_and_tensor(tmp_path, lie):
    tell, code, locus = LIES[lie]
    header = describe(w0=("F32", [4]), w1=("F32", [2, 3]), w2=("BF16", [10]))
    path = tmp_path / "model.safetensors"
    path.write_bytes(tell(encode(header, data_bytes(header))))
    with pytest.raises(FormatError) as caught:
        read_header(path)
    assert (code, str(path), locus) == (caught.value.code, caught.value.path, caught.value.locus)


@pytest.mark.parametrize(
    ("beginning", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b'{"error": "Access to this resource is restricted"}', "JSON text"),
        (b"PK\x03\x04\x14\x00\x08\x08\x08\x00\x00\x00\x00\x00", "zip archive"),
        (b"\x80\x02}q\x00(X\x01\x00\x00\x00", "pickle"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff" + bytes(600_000), "gzip"),
        (b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00", "GGUF"),
        (b"\x28\xb5\x2f\xfd\x04\x88\x01\x00\x00\x00", "zstandard"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_kind_of_file_under_this_name_is_recognised(tmp_path, beginning, says):
    path = tmp_path / "model.safetensors"
    path.write_bytes(beginning)
    with pytest.raises(FormatError) as caught:
        read_header(path)
    assert "ST-MAGIC" == caught.value.code
    assert says in str(caught.value)


def test_a_big_endian_length_is_recognised_and_other_wrong_lengths_are_not_called_so(tmp_path):
    path = tmp_path / "model.safetensors"
    header = describe(w=("F32", [4]))
    raw = encode(header, 16)
    hints = []
    for length in (raw[:8][::-1], b"\xff" * 8):
        path.write_bytes(length + raw[8:])
        with pytest.raises(FormatError) as caught:
            read_header(path)
        hints.append(caught.value.hint)
    assert "big-endian" in hints[0]
    assert hints[1] is None


def test_control_characters_of_a_name_are_escaped_in_the_message(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode(describe(**{"\x1b[31mred\n": ("F32", [4])}), 15))
    with pytest.raises(FormatError) as caught:
        read_header(path)
    assert "\x1b" not in str(caught.value)
    assert "\\x1b[31mred\\n" in str(caught.value)


@SAME_FOLDER
@example(0, 100)
@given(st.integers(0, (1 << 64) - 1), st.integers(8, 1 << 62))
def test_no_more_is_asked_for_than_the_file_has_or_the_format_allows(length, size):
    assert header_bytes(length.to_bytes(8, "little"), size) <= min(size, 100_000_008)
