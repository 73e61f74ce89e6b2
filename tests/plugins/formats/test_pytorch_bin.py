"""The format `pytorch_bin`: which file it starts from, that its tensors are those torch loads, and what it refuses by name."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from binfiles import HOOKS, checkpoint, group, mapping, number, one_tensor, saved, storage, tensor, text, whole, word
from modelrig.components import Snapshot, TensorEntry
from modelrig.errors import FormatError, IndexFileError
from modelrig_plugins.formats.pytorch_bin import FILES, PytorchBinPlanner, first_file, read_header
from modelrig_plugins.formats.pytorch_bin_module import PytorchBinReader

SINGLE, INDEX = FILES.single(), FILES.index()
REBUILD = word("torch._utils", "_rebuild_tensor_v2")
DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "uint16", "uint32", "uint64",
    "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz",
)  # fmt: skip


def snapshot(folder: Path, **more):
    return Snapshot(reference=str(folder), root=folder, source="local", **more)


def read_all(folder: Path, **more) -> dict[str, torch.Tensor]:
    """Every tensor of the folder, decoded from the bytes its catalog names."""
    catalog = PytorchBinPlanner.catalog(snapshot(folder, **more))
    files = [torch.frombuffer(bytearray(file.path.read_bytes()), dtype=torch.uint8) for file in catalog.files]
    return {
        name: PytorchBinReader.decode(files[entry.file][entry.offset : entry.offset + entry.nbytes], entry)
        for name, entry in catalog.entries.items()
    }


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [value.detach().contiguous().reshape(-1) for value in (one, other)]
    return (one.dtype, one.shape) == (other.dtype, other.shape) and (
        not one.numel() or torch.equal(*(value.view(torch.uint8) for value in flat))
    )


def entries(path: Path, value) -> dict[str, TensorEntry]:
    path.write_bytes(value if isinstance(value, bytes) else saved(value))
    return dict(read_header(path).entries)


def refused(path: Path, value) -> FormatError:
    with pytest.raises(FormatError) as caught:
        entries(path, value)
    assert str(path) == caught.value.path
    return caught.value


# ------------------------------------------------------------------------------------------------ which file


@pytest.mark.parametrize(
    ("names", "variant", "first"),
    [
        ([SINGLE], None, SINGLE),
        ([INDEX, "pytorch_model-00001-of-00001.bin"], None, INDEX),
        ([SINGLE, INDEX], None, SINGLE),
        (["model.bin", "config.json"], None, "model.bin"),
        (["a.bin", "b.bin"], None, None),
        (["training_args.bin", "optimizer.bin"], None, None),
        (["training_args.bin", "a.bin"], None, "a.bin"),
        (["pytorch_model.fp16.bin"], None, None),
        (["pytorch_model.fp16.bin", SINGLE], None, SINGLE),
        (["pytorch_model.fp16.bin", SINGLE], "fp16", "pytorch_model.fp16.bin"),
        (["pytorch_model.bin.index.fp16.json"], "fp16", "pytorch_model.bin.index.fp16.json"),
        ([SINGLE], "fp16", None),
        (["model.safetensors"], None, None),
        ([], None, None),
    ],
)
def test_the_single_file_goes_before_the_index_and_trainers_files_are_none(tmp_path, names, variant, first):
    for name in names:
        (tmp_path / name).touch()
    assert (first, first) == (first_file(names, variant), PytorchBinPlanner.claims(snapshot(tmp_path, variant=variant)))


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], index: str = INDEX, **edits) -> None:
    for name, tensors in shards.items():
        torch.save(tensors, folder / name)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": {**weight_map, **edits}}))


def test_shards_are_read_as_their_index_says_and_variants_by_theirs(tmp_path):
    one, two = {"a": torch.ones(3)}, {"b": torch.zeros(2, dtype=torch.int64)}
    write_shards(tmp_path, {"pytorch_model-00001-of-00002.bin": one, "pytorch_model-00002-of-00002.bin": two})
    half = {"pytorch_model.fp16-00001-of-00002.bin": {"a": one["a"].half()}, "pytorch_model.fp16-00002-of-00002.bin": two}
    write_shards(tmp_path, half, "pytorch_model.bin.index.fp16.json")
    (tmp_path / "training_args.bin").write_bytes(b"never opened")
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        read = read_all(tmp_path, variant=variant)
        assert (["a", "b"], dtype) == (list(read), read["a"].dtype)


def test_an_index_and_its_shards_must_agree(tmp_path):
    shards = {"pytorch_model-00001-of-00002.bin": {"a": torch.ones(3)}, "pytorch_model-00002-of-00002.bin": {"b": torch.ones(3)}}
    for code, edits in (
        ("IX-NOTENSOR", {"a": "pytorch_model-00002-of-00002.bin"}),
        ("IX-MISSING", {"c": "pytorch_model-00003-of-00003.bin"}),
        ("IX-PATH", {"c": "../pytorch_model.bin"}),
        ("IX-TYPE", {"c": "model.safetensors"}),
    ):
        write_shards(tmp_path, shards, **edits)
        with pytest.raises(IndexFileError) as caught:
            PytorchBinPlanner.catalog(snapshot(tmp_path))
        assert code == caught.value.code


def test_ties_count_once_against_the_total_of_the_index(tmp_path):
    weight = torch.ones(3)
    write_shards(tmp_path, {"pytorch_model-00001-of-00001.bin": {"a": weight, "b": weight.detach()}})
    table = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps({**table, "metadata": {"total_size": 12}}))
    catalog = PytorchBinPlanner.catalog(snapshot(tmp_path))
    assert (12, ()) == (catalog.total_bytes, catalog.notes)


# ------------------------------------------------------------------------------------------------ what torch saves


@st.composite
def state_dicts(draw):
    """Tensors of all dtypes in all dense layouts, some of them views of one storage, some of them tied."""
    made: dict[str, torch.Tensor] = {}
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 32)))
    names = draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=4), min_size=1, max_size=6, unique=True))
    for name in names:
        dtype = getattr(torch, draw(st.sampled_from(DTYPES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, [*shape, dtype.itemsize], dtype=torch.uint8, generator=random)
        value = raw.view(dtype).view(shape) if raw.numel() else torch.empty(shape, dtype=dtype)
        kind = draw(st.sampled_from(["plain", "permuted", "tied", "halves", "parameter"]))
        if kind == "permuted":
            value = value.permute(draw(st.permutations(range(len(shape)))))
        elif kind == "tied":
            made[f"{name} tied"] = value.detach()
        elif kind == "halves" and shape and shape[0] > 1:
            made[f"{name} half"] = value[:1]
            value = value[1:]
        elif kind == "parameter" and dtype.is_floating_point and dtype.itemsize > 1:
            value = torch.nn.Parameter(value)
        made[name] = value
    return made


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(state_dicts())
def test_what_torch_saves_comes_back_bit_for_bit_in_its_strides(tmp_path, tensors):
    (tmp_path / SINGLE).write_bytes(saved(tensors))
    read = read_all(tmp_path)
    assert list(tensors) == list(read)
    for name, one in tensors.items():
        assert same_bits(one, read[name]), name
        moving = [axis for axis, size in enumerate(one.shape) if size > 1]
        if one.numel():
            assert [one.stride(axis) for axis in moving] == [read[name].stride(axis) for axis in moving]


def test_ranges_are_those_torch_tells_of_a_file_it_does_not_load(tmp_path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 5, dtype=torch.bfloat16).t(), "c": torch.tensor(7), "d": torch.ones(99)[9:]}
    found = entries(tmp_path / SINGLE, tensors)
    with FakeTensorMode():
        told = torch.load(tmp_path / SINGLE, weights_only=True)
    for name, one in told.items():
        offset = one.untyped_storage()._checkpoint_offset + one.storage_offset() * one.element_size()
        assert (offset, one.numel() * one.element_size()) == (found[name].offset, found[name].nbytes)


def test_a_module_saves_its_state_dict_with_attributes_that_are_left_out(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    for value in (module.state_dict(), {"state_dict": module.state_dict()}, dict(module.named_parameters())):
        expected = value.get("state_dict", value)
        (tmp_path / SINGLE).write_bytes(saved(value))
        read = read_all(tmp_path)
        assert list(expected) == list(read)
        assert all(same_bits(one, read[name]) for name, one in expected.items())


def test_parameters_and_tensors_with_attributes_are_plain_tensors(tmp_path):
    tagged, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(3))
    tagged.note, parameter.tag = "kept by torch", {"a": [1, None, 2.5]}
    found = entries(tmp_path / SINGLE, {"tagged": tagged, "parameter": parameter})
    assert [("float32", (2,)), ("float32", (3,))] == [(one.dtype, one.shape) for one in found.values()]


@pytest.mark.parametrize(
    ("value", "strides"),
    [
        (torch.zeros(3, 4), None),
        (torch.zeros(3, 4).t(), (1, 4)),
        (torch.zeros(1, 4).t(), None),
        (torch.zeros(4, 1).t(), None),
        (torch.zeros(2, 3, 4).permute(2, 0, 1), (1, 12, 4)),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), (60, 1, 15, 3)),
        (torch.zeros(3, 4)[1:2], None),
        (torch.zeros(3, 4)[:, :0], None),
        (torch.zeros(()), None),
        (torch.zeros(5, 1, 7).permute(2, 1, 0), (1, 1, 7)),
    ],
    ids=range(10),
)
def test_strides_are_told_only_where_they_are_another_dense_order(tmp_path, value, strides):
    (entry,) = entries(tmp_path / SINGLE, {"w": value}).values()
    assert (tuple(value.shape), strides) == (entry.shape, entry.strides)


def test_tied_tensors_share_a_range_and_views_of_one_storage_lie_apart(tmp_path):
    base = torch.arange(20.0)
    found = entries(tmp_path / SINGLE, {"a": base[:10], "b": base[10:], "c": base[10:].detach()})
    assert found["a"].offset + 40 == found["b"].offset == found["c"].offset
    assert [40, 40, 40] == [one.nbytes for one in found.values()]


# ------------------------------------------------------------------------------------------------ what is refused


class Sub(torch.Tensor):
    pass


plain = torch.arange(12.0).view(3, 4)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ODD = {
        "sparse": plain.to_sparse(),
        "compressed sparse": plain.to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "quantised by channel": torch.quantize_per_channel(plain, torch.ones(3), torch.zeros(3), 0, torch.quint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "meta": torch.empty(3, device="meta"),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "complex128": torch.zeros(2, dtype=torch.complex128),
        "conjugated": torch.zeros(2, dtype=torch.complex64).conj(),
        "negated": torch.zeros(2, dtype=torch.complex64).conj().imag,
        "subclass": plain.as_subclass(Sub),
        "two in a byte": torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_plain_dense_tensor_is_refused_by_name(tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = saved({"ok": plain, "odd": ODD[kind]})
    error = refused(tmp_path / SINGLE, raw)
    assert ("PK-LAYOUT", "odd") == (error.code, error.locus)


@pytest.mark.parametrize(
    ("value", "code", "says"),
    [
        (torch.ones(1).expand(5), "PK-STRIDE", "not dense: 5 values lie on 1 stored"),
        (torch.ones(1).expand(1 << 40), "PK-STRIDE", "lie on 1 stored"),
        (plain[:, 1:3], "PK-STRIDE", "6 values lie on 10 stored"),
        (plain[::2], "PK-STRIDE", ""),
        (torch.arange(10).unfold(0, 4, 2), "PK-STRIDE", ""),
        ("text", "PK-KEY", "is 'text'; every value must be a tensor"),
        ("x" * 10_000, "PK-KEY", "…"),
        (3, "PK-KEY", "is 3"),
        (None, "PK-KEY", "is None"),
        ([plain], "PK-KEY", "a list"),
        ({"x": plain}, "PK-KEY", "a dict"),
        (torch.Size([1]), "PK-KEY", "a tuple"),
        (torch.float32, "PK-KEY", "torch.float32"),
        (b"bytes", "PK-GLOBAL", "_codecs.encode"),
        (Path("x"), "PK-GLOBAL", "pathlib"),
    ],
    ids=range(15),
)
def test_a_value_that_is_no_dense_tensor_is_refused_by_name(tmp_path, value, code, says):
    error = refused(tmp_path / SINGLE, {"ok": plain, "odd": value})
    assert (code, "odd") == (error.code, error.locus)
    assert says in error.reason
    assert len(str(error)) < 1000


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (tensor((2, 3), (3, 1), offset=1), "PK-STRIDE", "beyond its storage of 24 bytes"),
        (tensor((1 << 39,), (1,)), "PK-STRIDE", "beyond its storage"),
        (tensor((1 << 41,), (1,)), "PK-LIMIT", "too large"),
        (tensor((1 << 39, 1 << 39), (1 << 39, 1)), "PK-LIMIT", "too large"),
        (tensor((0, 1 << 39, 1 << 39), (1, 1, 1)), "PK-LIMIT", "too large"),
        (tensor((1,) * 17, (1,) * 17), "PK-LIMIT", "17 dimensions"),
        (tensor((2, 3), (3,)), "PK-BAD", "two tuples"),
        (tensor((-2, 3), (3, 1)), "PK-BAD", "whole numbers"),
        (tensor((2, 3), (-3, 1)), "PK-BAD", "whole numbers"),
        (tensor((2, 3), (3, 1), offset=-1), "PK-BAD", "offset"),
        (tensor((2, 3), (0, 0)), "PK-STRIDE", "not dense"),
        (tensor(of=storage("1")), "ZP-RECORD", "data/1"),
        (tensor(of=storage("../data.pkl")), "ZP-RECORD", "../data.pkl"),
        (tensor(of=storage(numel=7)), "ZP-SIZE", "28"),
        (tensor(of=storage(numel=1 << 62)), "ZP-SIZE", ""),
        (tensor(of=storage(kind="DoubleStorage")), "ZP-SIZE", "48"),
        (REBUILD + group(storage(), text("x"), b")", b")", b"\x89", HOOKS) + b"R", "PK-BAD", ""),
        (REBUILD + group(storage(), number(0), text("x"), b")", b"\x89", HOOKS) + b"R", "PK-BAD", ""),
        (REBUILD + group(storage(), number(0), group(b"N"), group(b"N")) + b"R", "PK-BAD", ""),
        (REBUILD + group(storage(), number(0), group(b"\x88"), group(b"\x88")) + b"R", "PK-BAD", ""),
    ],
    ids=range(20),
)  # fmt: skip
def test_a_tensor_that_its_storage_cannot_hold_is_refused_by_name(tmp_path, body, code, says):
    error = refused(tmp_path / SINGLE, checkpoint(whole(mapping(ok=tensor(), odd=body))))
    assert (code, "odd") == (error.code, error.locus)
    assert says in error.reason


base = torch.arange(20.0)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": base[:11], "odd": base[10:]},
        {"a": base, "odd": base[3:4]},
        {"a": base.view(4, 5), "odd": base.view(5, 4)},
        {"a": base.view(4, 5), "odd": base.view(4, 5).t()},
        {"a": base[:4].view(2, 2), "odd": base[:4].view(2, 2).t()},
    ],
    ids=range(5),
)
def test_tensors_that_share_a_part_of_their_bytes_are_refused_with_both_names(tmp_path, tensors):
    error = refused(tmp_path / SINGLE, tensors)
    assert "PK-ALIAS" == error.code
    other = {"a": "odd", "odd": "a"}[error.locus]
    assert f"overlap {other!r}" in error.reason


def test_one_storage_read_as_two_dtypes_is_refused(tmp_path):
    rebuilt = word("torch._utils", "_rebuild_tensor_v3")

    def untyped(dtype: str) -> bytes:
        of = storage(kind="UntypedStorage", numel=24)
        return rebuilt + group(of, number(0), group(number(24)), group(number(1)), b"\x89", HOOKS, word("torch", dtype)) + b"R"

    raw = checkpoint(whole(mapping(a=untyped("float8_e5m2"), b=untyped("uint8"))))
    assert "PK-ALIAS" == refused(tmp_path / SINGLE, raw).code
    assert 2 == len(entries(tmp_path / SINGLE, checkpoint(whole(mapping(a=untyped("uint8"), b=untyped("uint8"))))))


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ([plain], "PK-ROOT"),
        (plain, "PK-ROOT"),
        (3, "PK-ROOT"),
        (None, "PK-ROOT"),
        ({3: plain}, "PK-KEY"),
        ({("a",): plain}, "PK-KEY"),
        ({b"a": plain}, "PK-GLOBAL"),
        ({"state_dict": {"w": plain}, "epoch": 3}, "PK-KEY"),
        ({"model": {"w": plain}}, "PK-KEY"),
        ({"state_dict": {"state_dict": {"w": plain}}}, "PK-KEY"),
        (torch.nn.Linear(2, 2), "PK-GLOBAL"),
    ],
    ids=range(11),
)
def test_a_root_that_is_no_dict_of_tensors_is_refused(tmp_path, value, code):
    assert code == refused(tmp_path / SINGLE, value).code


def test_an_empty_dict_is_an_empty_catalog(tmp_path):
    assert {} == entries(tmp_path / SINGLE, {})


def test_legacy_files_are_refused_with_how_to_convert_them(tmp_path):
    path = tmp_path / SINGLE
    torch.save({"w": plain}, path, _use_new_zipfile_serialization=False)
    error = refused(path, path.read_bytes())
    assert "PK-LEGACY" == error.code
    assert "torch.save(torch.load(" in str(error.hint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    assert "PK-LEGACY" == refused(path, path.read_bytes()).code


def test_a_file_repacked_with_compression_is_refused_by_record(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / SINGLE, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(zipfile.ZipInfo("archive/data.pkl"), one_tensor())
        file.writestr("archive/data/0", bytes(24))
    error = refused(tmp_path / SINGLE, (tmp_path / SINGLE).read_bytes())
    assert ("ZP-METHOD", "archive/data/0") == (error.code, error.locus)


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("dtype", ["float32", "bool", "uint8"])
def test_a_permuted_tensor_is_a_view_of_the_file_or_a_copy_where_its_address_is_odd(dtype):
    kind = getattr(torch, dtype)
    wanted = torch.arange(6).remainder(2).to(kind).view(2, 3).t()
    raw = wanted.t().reshape(-1).view(torch.uint8)
    for shift in range(5):
        file = torch.zeros(64, dtype=torch.uint8)
        file[shift : shift + raw.numel()] = raw
        entry = TensorEntry("w", dtype, (3, 2), 0, shift, raw.numel(), (1, 3))
        read = PytorchBinReader.decode(file[shift : shift + raw.numel()], entry)
        assert torch.equal(wanted, read)
        assert (1, 3) == read.stride()
        assert (dtype != "bool" and shift % kind.itemsize == 0) == (read.data_ptr() == file.data_ptr() + shift)


def test_the_planner_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import modelrig_plugins.formats, modelrig_plugins.formats.pytorch_bin"
    subprocess.run([sys.executable, "-c", code], check=True)
