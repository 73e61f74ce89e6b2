"""The format `safetensors`: which file it starts from, and that its tensors are the bytes of the file."""

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modelrig.components import DTYPE_BITS, Snapshot, TensorEntry
from modelrig.errors import FormatError, LoadError
from modelrig_plugins.formats.safetensors import FILES, SafetensorsPlanner, first_file
from modelrig_plugins.formats.safetensors_module import SafetensorsReader
from tensorfiles import write_sharded, write_valid

SINGLE, INDEX = FILES.single(), FILES.index()
DTYPES = sorted(name for name in DTYPE_BITS if isinstance(getattr(torch, name, None), torch.dtype) and DTYPE_BITS[name] >= 8)

tensor_names = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
shapes = st.lists(st.integers(0, 4), max_size=3)
described_tensors = st.dictionaries(tensor_names, st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=5)


def snapshot(folder):
    return Snapshot(reference=str(folder), root=folder, source="local")


def read_all(folder):
    """Every tensor of the folder, decoded from the bytes its catalog names."""
    catalog = SafetensorsPlanner.catalog(snapshot(folder))
    files = [torch.frombuffer(bytearray(file.path.read_bytes() or b"\0"), dtype=torch.uint8) for file in catalog.files]
    return {
        name: SafetensorsReader.decode(files[entry.file][entry.offset : entry.offset + entry.nbytes], entry)
        for name, entry in catalog.entries.items()
    }


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ([SINGLE], SINGLE),
        ([INDEX, "model-00001-of-00001.safetensors"], INDEX),
        ([SINGLE, INDEX], SINGLE),
        (["model.fp16.safetensors", "config.json"], None),
        (["model.fp16.safetensors", "other.safetensors"], "other.safetensors"),
        (["a.safetensors", "b.safetensors"], None),
        (["a.safetensors", "b.safetensors", INDEX], INDEX),
        (["pytorch_model.bin", "model.gguf"], None),
        ([], None),
    ],
)
def test_the_single_file_goes_before_the_index_and_that_before_an_only_file(tmp_path, names, first):
    for name in names:
        (tmp_path / name).touch()
    assert (first, first) == (first_file(names), SafetensorsPlanner.claims(snapshot(tmp_path)))


def test_an_index_beside_a_single_file_is_noted(tmp_path):
    write_sharded(tmp_path, {"model-00001-of-00001.safetensors": ["a"]})
    write_valid(tmp_path / SINGLE, b=("F32", [1]))
    made = SafetensorsPlanner.catalog(snapshot(tmp_path))
    assert (["b"], None) == (list(made.entries), made.index)
    assert [f"{SINGLE} is used; {name} beside it is not" for name in (INDEX, "model-00001-of-00001.safetensors")] == list(
        made.notes
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(described_tensors, st.integers(0, 2**32))
def test_what_the_library_saves_comes_back_bit_for_bit(tmp_path, described, seed):
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (dtype, shape) in described.items():
        size = DTYPE_BITS[dtype] // 8
        raw = torch.randint(0, 2 if dtype == "bool" else 256, [*shape, size], dtype=torch.uint8, generator=draw)
        tensors[name] = (
            raw.view(getattr(torch, dtype)).view(shape) if raw.numel() else torch.empty(shape, dtype=getattr(torch, dtype))
        )
    save_file(tensors, tmp_path / SINGLE)
    read = read_all(tmp_path)
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {name: (t.dtype, t.shape) for name, t in read.items()}
    for name, tensor in tensors.items():
        if tensor.numel():
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), read[name].reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "complex64", "uint8", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(2, 3), (), (0,), (0, 5)])
def test_an_aligned_tensor_is_a_view_and_any_other_a_copy_of_equal_value(dtype, shape):
    kind = getattr(torch, dtype)
    wanted = torch.arange(1, 7).to(kind)[: torch.Size(shape).numel()].reshape(shape)
    raw = wanted.reshape(-1).view(torch.uint8)
    for shift in range(9):
        file = torch.zeros(8 + 9 + raw.numel(), dtype=torch.uint8)
        file[shift : shift + raw.numel()] = raw
        entry = TensorEntry("w", dtype, shape, 0, shift, raw.numel())
        read = SafetensorsReader.decode(file[shift : shift + raw.numel()], entry)
        assert (kind, shape) == (read.dtype, tuple(read.shape))
        assert torch.equal(wanted.reshape(-1).view(torch.uint8), read.reshape(-1).view(torch.uint8))
        is_view = raw.numel() > 0 and read.data_ptr() == file.data_ptr() + shift
        assert (raw.numel() > 0 and shift % kind.itemsize == 0) == is_view


def test_a_view_of_memory_at_an_odd_address_is_copied():
    memory = torch.frombuffer(bytearray(33), dtype=torch.uint8)
    odd = torch.frombuffer(memoryview(bytearray(33))[1:], dtype=torch.uint8)
    for data in (memory[:16], odd[:16], memory[1:17], odd[7:23]):
        assert (16,) == SafetensorsReader.decode(data, TensorEntry("w", "uint8", (16,), 0, 0, 16)).shape
        assert (2,) == SafetensorsReader.decode(data, TensorEntry("w", "float64", (2,), 0, 0, 16)).shape


def test_a_stored_truth_value_beyond_one_is_true_and_not_kept():
    read = SafetensorsReader.decode(torch.tensor([0, 1, 2, 255], dtype=torch.uint8), TensorEntry("mask", "bool", (4,), 0, 0, 4))
    assert [0, 1, 1, 1] == read.view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", ["float4_e2m1fn_x2", "float6_e2m3", "float6_e3m2"])
def test_a_dtype_below_a_byte_is_refused_with_the_tensor(dtype):
    entry = TensorEntry("blocks", dtype, (8,), 0, 0, DTYPE_BITS[dtype])
    with pytest.raises(LoadError) as caught:
        SafetensorsReader.decode(torch.zeros(entry.nbytes, dtype=torch.uint8), entry)
    assert ("LD-DTYPE", "blocks") == (caught.value.code, caught.value.locus)


def test_the_only_file_is_read_under_its_own_name_and_named_when_it_is_wrong(tmp_path):
    write_valid(tmp_path / "other.safetensors", a=("F32", [1]))
    assert ["a"] == list(SafetensorsPlanner.catalog(snapshot(tmp_path)).entries)
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(FormatError) as caught:
        SafetensorsPlanner.catalog(snapshot(tmp_path))
    assert str(tmp_path / "other.safetensors") == caught.value.path


def test_the_planner_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import modelrig_plugins.formats, modelrig_plugins.formats.safetensors"
    subprocess.run([sys.executable, "-c", code], check=True)
