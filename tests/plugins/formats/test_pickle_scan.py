"""The pickle interpreter: it reads what torch.save writes as torch reads it, and runs nothing."""

from __future__ import annotations

import io
import pickle
import pickletools
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from binfiles import HOOKS, called, group, mapping, number, storage, tensor, text, whole, word
from modelrig.errors import FormatError
from modelrig_plugins.formats.bin_writer import pickled
from modelrig_plugins.formats.pickle_scan import REFUSED, scan
from modelrig_plugins.formats.pickle_words import StoredView

FILE = Path("x.bin")
REBUILD = word("torch._utils", "_rebuild_tensor_v2")
OF_TYPE = word("torch._tensor", "_rebuild_from_type_v2")
SIX = (number(0), group(number(6)), group(number(1)), b"\x89", HOOKS)


def refused(data: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        scan(data, FILE)
    assert "x.bin" == caught.value.path
    return caught.value


#: what a pickle of plain data can hold
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=5) | st.tuples(inner, inner) | st.tuples(inner, inner, inner, inner)
    | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5) | st.integers(0, 1 << 31), inner, max_size=5),
    max_leaves=20,
)  # fmt: skip


@given(plain)
def test_plain_data_reads_as_python_reads_it(value):
    data = pickle.dumps(value, protocol=2)
    assert repr(pickle.loads(data)) == repr(scan(data, FILE))  # repr, since NaN differs from itself


def test_items_set_in_several_batches_come_in_order():
    value = {str(number): number for number in range(2001)}
    assert list(value.items()) == list(scan(pickle.dumps(value, protocol=2), FILE).items())
    assert dict.fromkeys(map(str, range(1000))) == scan(pickle.dumps(dict.fromkeys(map(str, range(1000))), protocol=2), FILE)


def test_a_tensor_is_told_with_storage_offset_shape_and_strides():
    view = scan(whole(mapping(w=tensor((2, 3), (1, 2), offset=4, of=storage("17", "HalfStorage", 99)))), FILE)["w"]
    assert type(view) is StoredView
    assert ("17", "float16", 99) == view.storage[:3]
    assert ("float16", 4, (2, 3), (1, 2)) == view[1:]


GLOBALS = [
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "bytearray"),
    ("builtins", "getattr"), ("builtins", "set"), ("pkgutil", "resolve_name"), ("torch._utils", "_import_dotted_name"),
    ("torch", "load"), ("torch.hub", "load"), ("torch.storage", "_load_from_bytes"), ("torch.serialization", "load"),
    ("transformers.dynamic_module_utils", "get_class_from_dynamic_module"), ("numpy", "dtype"), ("_codecs", "encode"),
    ("torch", "FloatTensor"), ("torch", "FloatStorage.__class__"), ("torch.FloatStorage", ""), ("", ""), ("collections", "Counter"),
    ("\u0441ollections", "OrderedDict"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), GLOBALS)
def test_a_global_beside_the_list_is_refused_by_name_with_its_place(module, name):
    error = refused(whole(mapping(ok=tensor(), w=called(word(module, name), text("true")))))
    assert ("PK-GLOBAL", "w") == (error.code, error.locus)
    assert f"{module}.{name}" in error.reason
    assert "opcode 63 at byte" in error.reason


@pytest.mark.parametrize(
    "body",
    [
        called(word("torch", "Tensor"), number(1 << 40)),
        called(word("torch.storage", "UntypedStorage"), number(1 << 40)),
        called(word("torch", "FloatStorage"), number(1 << 40)),
        called(word("torch.nn.parameter", "Parameter"), tensor()),
        called(word("collections", "OrderedDict"), b"](" + group(text("a"), number(1)) * 1000 + b"e"),
        called(word("torch", "Size"), number(3)),
        called(word("torch._utils", "_rebuild_parameter"), text("x"), b"\x89"),
        called(word("torch", "float32")),
        called(number(1)),
        called(OF_TYPE, OF_TYPE, word("torch", "Tensor"), group(), b"N"),
        called(OF_TYPE, word("collections", "OrderedDict"), word("torch", "Tensor"), b")", b"N"),
        REBUILD + text("a") + b"R",
        REBUILD + group() + b"R",
        REBUILD + group(storage()) + b"R",
        REBUILD + group(text("storage"), *SIX) + b"R",
        REBUILD + group(storage(kind="UntypedStorage"), *SIX) + b"R",
        word("torch._utils", "_rebuild_tensor_v3") + group(storage(), *SIX, text("float32")) + b"R",
        group(text("module"), word("torch", "FloatStorage"), text("0"), text("cpu"), number(6)) + b"Q",
        group(text("storage"), word("torch", "Size"), text("0"), text("cpu"), number(6)) + b"Q",
        group(text("storage"), text("FloatStorage"), text("0"), text("cpu"), number(6)) + b"Q",
        group(text("storage"), word("torch", "FloatStorage"), number(0), text("cpu"), number(6)) + b"Q",
        group(text("storage"), word("torch", "FloatStorage"), text("0"), text("cpu"), number(-6)) + b"Q",
        group(text("storage"), word("torch", "FloatStorage"), text("0"), text("cpu")) + b"Q",
        number(1) + b"Q",
        tensor() + b"}b",
        b"]" + text("state") + b"b",
    ],
    ids=range(26),
)  # fmt: skip
def test_a_listed_global_is_called_as_torch_calls_it_or_not_at_all(body):
    error = refused(whole(mapping(w=body)))
    assert ("PK-REDUCE", "w") == (error.code, error.locus)


@pytest.mark.parametrize("opcode", sorted(REFUSED))
def test_opcodes_torch_does_not_write_are_refused_by_name(opcode):
    names = {ord(one.code): one.name for one in pickletools.opcodes}
    assert names[opcode] == REFUSED[opcode]
    error = refused(b"\x80\x02" + mapping(a=number(1), w=bytes([opcode]) + bytes(20)))
    assert ("PK-OPCODE", "w") == (error.code, error.locus)
    assert REFUSED[opcode] in error.reason


def test_every_opcode_is_read_or_refused():
    for code in range(256):
        try:
            scan(bytes([code]) + bytes(300), FILE)
        except FormatError as error:
            assert error.code.startswith("PK-")


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5, 255])
def test_other_protocols_are_refused(protocol):
    assert f"protocol {protocol}" in refused(bytes([0x80, protocol]) + b"}.").reason


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "PK-TRUNC"),
        (b"\x80", "PK-TRUNC"),
        (b"\x80\x02", "PK-TRUNC"),
        (b"\x80\x02}", "PK-TRUNC"),
        (b"\x80\x02X\xff\xff\xff\xff", "PK-TRUNC"),
        (b"\x80\x02X\1\0", "PK-TRUNC"),
        (b"\x80\x02T\xff\xff\xff\xff", "PK-TRUNC"),
        (b"\x80\x02cos\nsystem", "PK-TRUNC"),
        (b"\x80\x02c" + b"x" * 100_000, "PK-TRUNC"),
        (b"\x80\x02\x8a\xff" + bytes(300), "PK-LIMIT"),
        (b"\x80\x02" + b"(" * 2_000_000, "PK-LIMIT"),
        (b"\x80\x02)" + b"\x85" * 2_000_000 + b".", "PK-LIMIT"),
        (b"\x80\x02" + b"]" * 2_000_000, "PK-LIMIT"),
        (b"\x80\x02" + b"}" * 2_000_000, "PK-LIMIT"),
        (b"\x80\x02]" + b"]a" * 1_000_000 + b".", "PK-LIMIT"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "PK-LIMIT"),
        (b"\x80\x02Nq\1.", "PK-LIMIT"),
        (b"\x80\x02h\0.", "PK-BAD"),
        (b"\x80\x02j\xff\xff\xff\xff.", "PK-BAD"),
        (b"\x80\x02N.N", "PK-BAD"),
        (b"\x80\x02NN.", "PK-BAD"),
        (b"\x80\x02(N.", "PK-BAD"),
        (b"\x80\x02.", "PK-BAD"),
        (b"\x80\x02\x85.", "PK-BAD"),
        (b"\x80\x02t.", "PK-BAD"),
        (b"\x80\x02NNs.", "PK-BAD"),
        (b"\x80\x02NNNs.", "PK-BAD"),
        (b"\x80\x02}(Nu.", "PK-BAD"),
        (b"\x80\x02NNa.", "PK-BAD"),
        (b"\x80\x02N(NNe.", "PK-BAD"),
        (b"\x80\x02X\1\0\0\0\xff.", "PK-BAD"),
        (b"\x80\x02N\x80\x02.", "PK-OPCODE"),
        (b"\x80\x02}]Ns.", "PK-KEY"),
        (b"\x80\x02})Ns.", "PK-KEY"),
        (whole(b"}" + (text("a") + number(1) + b"s") * 2), "PK-KEY"),
        (whole(b"}(" + (text("a") + number(1)) * 2 + b"u"), "PK-KEY"),
    ],
    ids=range(36),
)
def test_a_pickle_that_breaks_off_or_contradicts_itself_is_one_typed_error(data, code):
    assert code == refused(data).code


def test_a_list_in_itself_is_harmless():
    value = scan(b"\x80\x02]q\x00h\x00a.", FILE)
    assert value is value[0]


@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_one_typed_error(data):
    for beginning in (b"", b"\x80\x02", b"\x80\x02}(" + text("w") + REBUILD):
        try:
            scan(beginning + data, FILE)
        except FormatError as error:
            assert error.code.startswith("PK-")


@given(st.data())
def test_a_valid_pickle_with_bytes_changed_is_a_value_or_one_typed_error(data):
    raw = bytearray(whole(mapping(a=tensor(), w=tensor((2, 3, 4, 5), (60, 20, 5, 1), of=storage("1", "LongStorage", 120)))))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        scan(bytes(raw), FILE)
    except FormatError as error:
        assert error.code.startswith("PK-")


def test_torch_reads_what_the_writer_describes_as_this_reader_does():
    """The weights-only unpickler of torch is the oracle; storages are not looked at."""
    from torch._weights_only_unpickler import Unpickler

    from modelrig.components import StoredTensor

    tensors = [
        StoredTensor(f"layer.{number}", dtype, shape, (f"alias.{number}",) * (number % 2))
        for number, (dtype, shape) in enumerate(
            (dtype, shape)
            for dtype in ("float32", "bfloat16", "bool", "int64", "uint16", "float8_e5m2")
            for shape in ((), (0,), (3,), (2, 3, 70_000), (1, 2, 3, 4, 5), (0, 1 << 33))
        )
    ]

    def meta(pid):
        dtype = torch.uint8 if pid[1] is torch.UntypedStorage else pid[1].dtype
        data = torch.UntypedStorage(pid[4] * dtype.itemsize, device="meta")
        return torch.storage.TypedStorage(wrap_storage=data, dtype=dtype, _internal=True)

    data = pickled(tensors)
    reader = Unpickler(io.BytesIO(data), encoding="utf-8")
    reader.persistent_load = meta
    theirs, ours = reader.load(), scan(data, FILE)
    assert list(theirs) == list(ours)
    for name, one in theirs.items():
        assert (str(one.dtype), tuple(one.shape), one.stride()) == (f"torch.{ours[name].dtype}", *ours[name][3:])


def test_scanning_imports_and_runs_nothing():
    seen = []
    running = [True]
    sys.addaudithook(lambda event, _: seen.append(event) if running[0] else None)
    for module, name in GLOBALS:
        with pytest.raises(FormatError):
            scan(whole(mapping(w=called(word(module, name), text("true")))), FILE)
    running[0] = False
    assert not [event for event in seen if event.startswith(("import", "exec", "compile", "os.", "subprocess", "socket", "pickle"))]
