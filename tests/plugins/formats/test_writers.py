"""What the formats write: byte for byte what their own libraries write, and what those read back."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zlib

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from binfiles import raw_bytes, reading, saved, stored, written
from modelrig.checkpoint.headers import DTYPES
from modelrig.checkpoint.headers import read_header as read_safetensors
from modelrig.components import DTYPE_BITS, StoredTensor
from modelrig.errors import FormatError
from modelrig_plugins.formats.pytorch_bin import PytorchBinPlanner, read_header
from modelrig_plugins.formats.safetensors import ORDER, SafetensorsPlanner

PLANNERS = {"safetensors": SafetensorsPlanner, "pytorch_bin": PytorchBinPlanner}
BOTH = (
    "bool", "uint8", "int8", "int16", "uint16", "float16", "bfloat16", "int32", "uint32", "float32", "float64", "int64", "uint64",
    "float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz",
)  # fmt: skip
SAFETENSORS = (*BOTH, "complex64")


def random_tensor(dtype: str, shape, seed: int = 0) -> torch.Tensor:
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2 if dtype == "bool" else 256, [*shape, kind.itemsize], dtype=torch.uint8, generator=generator)
    return raw.view(kind).view(shape) if raw.numel() else torch.empty(shape, dtype=kind)


names = st.text(st.characters(codec="utf-8"), max_size=5)


def tensors(dtypes):
    described = st.tuples(st.sampled_from(dtypes), st.lists(st.integers(0, 4), max_size=5), st.integers(0, 1 << 32))
    return st.dictionaries(names.filter(lambda name: name != "__metadata__"), described, max_size=8).map(
        lambda found: {name: random_tensor(*one) for name, one in found.items()}
    )


def equal(one, other) -> bool:
    return list(one) == list(other) and all(
        (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape)
        and torch.equal(raw_bytes(one[name]), raw_bytes(other[name]))
        for name in one
    )


def without_id(archive: bytes) -> bytes:
    """The archive with the digits of its serialization id, and their checksum, blanked: they alone are our own."""
    for digits in re.findall(rb"Z(\d{40})PK\x07\x08(.{4})", archive, re.DOTALL):
        for own in digits:
            archive = archive.replace(own, bytes(len(own)))
    return archive


# ------------------------------------------------------------------------------------------------ safetensors


@settings(deadline=None)
@given(tensors(SAFETENSORS), st.none() | st.dictionaries(names, names, min_size=1, max_size=1))
def test_a_safetensors_file_is_what_the_library_writes_byte_for_byte(made, metadata):
    assert safetensors.torch.save(made, metadata) == written(SafetensorsPlanner, made, metadata)


def test_the_order_of_dtypes_is_the_librarys():
    assert set(DTYPES) == set(ORDER)
    made = {f"{number:02}": random_tensor(dtype, (8,)) for number, dtype in enumerate(SAFETENSORS)}
    made["f4"] = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    raw = safetensors.torch.save(made)
    table = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    theirs = [one["dtype"] for one in table.values()]
    assert [dtype for dtype in ORDER if dtype in theirs] == theirs
    assert set(ORDER) - set(theirs) == {"F6_E3M2", "F6_E2M3"}  # torch has none, so the library cannot be asked


def test_dtypes_below_a_byte_are_written_in_elements(tmp_path):
    path = tmp_path / "model.safetensors"
    made = [StoredTensor("a", "float4_e2m1fn_x2", (3, 4)), StoredTensor("b", "float6_e2m3", (4,))]
    out = bytearray()
    SafetensorsPlanner.write(made, {}, lambda one: [bytes(one.nbytes)], out.extend)
    path.write_bytes(out)
    found = read_safetensors(path).entries
    assert {one.name: (one.dtype, one.shape) for one in made} == {name: (one.dtype, one.shape) for name, one in found.items()}
    theirs = safetensors.torch.save({"a": torch.zeros(3, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)})
    out.clear()
    SafetensorsPlanner.write(made[:1], {}, lambda one: [bytes(one.nbytes)], out.extend)
    assert theirs == out


def test_metadata_of_several_keys_is_kept_as_given():
    metadata = {"format": "pt", "z": "1", "a": 'é"\n'}
    raw = written(SafetensorsPlanner, {"w": torch.ones(1)}, metadata)
    assert [*metadata.items()] == [*json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"].items()]
    assert torch.equal(torch.ones(1), safetensors.torch.load(raw)["w"])


def test_aliases_are_left_out_of_a_safetensors_file():
    weight = torch.arange(3.0)
    assert safetensors.torch.save({"a": weight}) == written(SafetensorsPlanner, {"a": weight, "b": weight})


# ------------------------------------------------------------------------------------------------ pytorch_bin


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors(BOTH))
def test_a_bin_file_is_what_torch_writes_byte_for_byte_but_for_its_id(tmp_path, made):
    made = {f"a {name}": one for name, one in made.items()}  # Python may hold a name as short as a key for the same object
    raw = written(PytorchBinPlanner, made, {"format": "pt"})
    assert without_id(saved(made)) == without_id(raw)
    path = tmp_path / "x.bin"
    path.write_bytes(raw)
    for mapped in (True, False):
        assert equal(made, torch.load(path, weights_only=True, mmap=mapped))
    assert list(made) == list(read_header(path).entries)


@pytest.mark.parametrize("count", [1, 2, 999, 1000, 1001, 2000, 2500])
def test_many_tensors_are_set_in_the_batches_of_python(count):
    made = {f"layer.{number}": torch.tensor(number) for number in range(count)}
    assert without_id(saved(made)) == without_id(written(PytorchBinPlanner, made))


@pytest.mark.parametrize("shape", [(256,), (65_535,), (65_536,), (1, 70_000), (0, 1 << 31), (0, 1 << 33), (0, 1 << 39)])
def test_numbers_of_every_length_are_written_as_python_does(shape):
    made = {"w": torch.zeros(shape, dtype=torch.int8), "v": torch.zeros(shape, dtype=torch.uint16)}
    assert without_id(saved(made)) == without_id(written(PytorchBinPlanner, made))


def test_names_of_one_tensor_share_a_storage_and_come_back_tied(tmp_path):
    weight, head = torch.arange(6.0).view(2, 3), torch.zeros(2, dtype=torch.float8_e5m2)
    made = {"a": weight, "b": weight.detach(), "c": head, "d": head.detach(), "e": torch.ones(1)}
    raw = written(PytorchBinPlanner, made)
    assert without_id(saved(made)) == without_id(raw)
    path = tmp_path / "x.bin"
    path.write_bytes(raw)
    for mapped in (True, False):
        read = torch.load(path, weights_only=True, mmap=mapped)
        assert read["a"].data_ptr() == read["b"].data_ptr()
        assert read["c"].data_ptr() == read["d"].data_ptr() != read["a"].data_ptr()
    found = read_header(path).entries
    assert (found["a"].offset, found["c"].offset) == (found["b"].offset, found["d"].offset)


def test_the_same_tensors_make_the_same_bytes_and_others_another_id():
    made = {"w": torch.arange(4.0)}
    one, again, other = (written(PytorchBinPlanner, value) for value in (made, made, {"w": torch.ones(4)}))
    assert one == again
    assert len({re.search(rb"Z(\d{40})PK", raw)[1] for raw in (one, other)}) == 2


def test_beyond_4_gib_headers_grow_as_torch_lets_them(tmp_path, monkeypatch):
    """The bytes around the data of a storage of 4 GiB and 5 bytes, with one after it, laid out as torch 2.13 does."""
    kept: dict[int, bytes] = {}
    path = tmp_path / "x.bin"

    def write(part) -> None:  # the zeros stay a hole
        if len(part) < 4096:
            kept[file.tell()] = bytes(part)
            file.write(part)
        else:
            file.seek(len(part), os.SEEK_CUR)

    many = [StoredTensor("s", "float32", (3,)), StoredTensor("a", "uint8", ((1 << 32) + 5,)), StoredTensor("b", "float32", (3,))]
    whole = memoryview(bytes(1 << 24))

    def read(one):
        for begin in range(0, one.nbytes, len(whole)):
            yield whole[: min(len(whole), one.nbytes - begin)]

    real = zlib.crc32  # that of 4 GiB takes seconds, and is not what this is about
    monkeypatch.setattr(zlib, "crc32", lambda data, value=0: real(data, value) if len(data) < 4096 else 0)
    with path.open("wb") as file:
        PytorchBinPlanner.write(many, {}, read, write)
    assert path.stat().st_size == PytorchBinPlanner.size(many, {})
    long = b"archive/data/1" + struct.pack("<2H2Q", 1, 16, (1 << 32) + 5, 0) + b"FB"
    assert [True] == [part.startswith(b"PK\3\4") for part in kept.values() if long in part]
    (end, descriptor), (at, header), (begin, data), (_, last) = [item for item in kept.items() if item[0] > 1 << 32][1:5]
    assert (b"PK\7\10", 24, end + 24) == (descriptor[:4], len(descriptor), at)
    assert b"archive/data/2" + struct.pack("<2HQ", 1, 8, at) + b"FB" in header
    assert (0, 12, 24) == (begin % 64, len(data), len(last))
    found = read_header(path).entries
    assert [12, (1 << 32) + 5, 12] == [one.nbytes for one in found.values()]
    assert (found["a"].offset + found["a"].nbytes, begin) == (end, found["b"].offset)


# ------------------------------------------------------------------------------------------------ both


@pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
def test_tensors_are_asked_for_once_in_the_order_of_the_file_and_written_in_parts(planner):
    made = {"b": random_tensor("float32", (50,)), "a": random_tensor("float16", (3, 3)), "c": random_tensor("bool", ())}
    asked, parts = [], []

    def read(one):
        asked.append(one.name)
        yield from reading(made, 10)(one)

    planner.write(stored(made), {}, read, parts.append)
    assert ["b", "a", "c"] == asked
    assert max(len(part) for part in parts if isinstance(part, memoryview)) <= 10


@pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
@pytest.mark.parametrize("given_", [3, 5])
def test_parts_that_are_not_as_long_as_the_tensor_are_an_error(planner, given_):
    with pytest.raises(AssertionError, match="'w', which has 4"):
        planner.write([StoredTensor("w", "uint8", (4,))], {}, lambda _: [bytes(given_)], lambda _: None)


@pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
def test_names_no_file_can_hold_are_refused_before_anything_is_written(planner):
    one, half = StoredTensor("w", "uint8", (4,)), StoredTensor("\ud800", "uint8", (4,))
    for given_ in ([one, one], [half]):
        for call in (lambda: planner.size(given_, {}), lambda: planner.write(given_, {}, lambda _: [], pytest.fail)):  # noqa: B023
            with pytest.raises(FormatError):
                call()
    with pytest.raises(FormatError):
        SafetensorsPlanner.size([StoredTensor("__metadata__", "uint8", (4,))], {})
    assert PytorchBinPlanner.size([StoredTensor("__metadata__", "uint8", (4,))], {})


@pytest.mark.parametrize(
    ("planner", "dtype", "code"),
    [
        (PytorchBinPlanner, "complex64", "PK-LAYOUT"),
        (PytorchBinPlanner, "float4_e2m1fn_x2", "PK-LAYOUT"),
        (PytorchBinPlanner, "float6_e2m3", "PK-LAYOUT"),
        (SafetensorsPlanner, "float4_e2m1fn_x2", "ST-ALIGN"),
    ],
)
def test_dtypes_a_format_cannot_hold_are_refused_with_the_tensor(planner, dtype, code):
    with pytest.raises(FormatError) as caught:
        planner.size([StoredTensor("w", dtype, (3,))], {})
    assert (code, "w") == (caught.value.code, caught.value.locus)


@pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
def test_no_tensors_make_a_file_too(planner, tmp_path):
    raw = written(planner, {})
    theirs = {SafetensorsPlanner: safetensors.torch.save({}), PytorchBinPlanner: saved({})}[planner]
    assert without_id(theirs) == without_id(raw)
    if planner is PytorchBinPlanner:
        assert {} == torch.load(io.BytesIO(raw), weights_only=True)


def test_every_dtype_that_is_whole_bytes_and_real_is_written_by_both():
    assert {name for name, bits in DTYPE_BITS.items() if bits >= 8 and not name.startswith("complex")} == set(BOTH)
