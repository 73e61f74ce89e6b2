"""The words a pickle of tensors is made of: the closed list of globals, and what calling each stands for.

Calling makes plain data here. A name that is not on the list is refused before anything is looked up by it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any, NamedTuple

from attrs import frozen

from modelrig.errors import quoted


class Storage(NamedTuple):
    """A storage the pickle speaks of: record `data/<key>` of the archive, `numel` values of `dtype` (bytes where that is None)."""

    key: str
    dtype: str | None
    numel: int
    unsupported: str | None = None  # the kind of tensor it is for


class StoredView(NamedTuple):
    """A tensor: a view of a storage, counted in elements. Nothing of it has been checked yet."""

    storage: Storage
    dtype: str
    offset: Any
    shape: Any
    strides: Any


@frozen
class Unsupported:
    """A tensor of a kind that is not read: "sparse"."""

    kind: str


@frozen
class Global:
    """A name from the closed list. `make` is what calling it stands for; None if it may be named but not called."""

    name: str
    make: Callable[[tuple[Any, ...]], Any] | None = None
    dtype: str | None = None
    unsupported: str | None = None  # the kind of tensor that it stands for


class Refusal(Exception):  # noqa: N818 - caught in `scan`, which knows the file and the place
    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


def told(value: Any) -> str:
    """What `value` is, for a message. Never its contents: they may be as large as the file."""
    if type(value) is Global:
        return value.name
    if type(value) in (str, int, float, bool, NoneType):
        return quoted(value)
    kinds = {
        dict: "a dict",
        list: "a list",
        tuple: "a tuple",
        StoredView: "a tensor",
        Unsupported: "a tensor",
        Storage: "a storage",
    }
    return kinds[type(value)]


# ------------------------------------------------------------------------------------------------ what calls make


def _tensor(arguments: tuple[Any, ...]) -> StoredView | Unsupported:
    """(storage, offset, size, stride[, requires_grad, backward_hooks[, metadata]])"""
    if len(arguments) not in (4, 6, 7) or type(arguments[0]) is not Storage:
        raise Refusal("PK-REDUCE", "a tensor is made of a storage, an offset, a size and strides")
    if len(arguments) == 7 and arguments[6]:
        return Unsupported("conjugated or negated")
    storage = arguments[0]
    if storage.unsupported is not None:
        return Unsupported(storage.unsupported)
    if storage.dtype is None:
        raise Refusal("PK-REDUCE", "a tensor without a dtype")
    return StoredView(storage, storage.dtype, arguments[1], arguments[2], arguments[3])


def _tensor_with_dtype(arguments: tuple[Any, ...]) -> StoredView | Unsupported:
    """(storage, offset, size, stride, requires_grad, backward_hooks, dtype[, metadata])"""
    if not 7 <= len(arguments) <= 8 or type(arguments[0]) is not Storage or type(arguments[6]) is not Global:
        raise Refusal("PK-REDUCE", "a tensor is made of a storage, an offset, a size, strides and a dtype")
    if len(arguments) == 8 and arguments[7]:
        return Unsupported("conjugated or negated")
    if arguments[6].dtype is None:
        return Unsupported(arguments[6].unsupported or f"{arguments[6].name} is no dtype that is known")
    return StoredView(arguments[0], arguments[6].dtype, arguments[1], arguments[2], arguments[3])


def _parameter(arguments: tuple[Any, ...]) -> Any:
    """(tensor, requires_grad, backward_hooks[, state]) → the tensor"""
    if not 2 <= len(arguments) <= 4 or type(arguments[0]) not in (StoredView, Unsupported):
        raise Refusal("PK-REDUCE", "a parameter is made of a tensor")
    return arguments[0]


def _of_type(arguments: tuple[Any, ...]) -> Any:
    """(function, type, its arguments, state): a tensor with attributes, or of a subclass"""
    if len(arguments) != 4 or type(arguments[0]) is not Global or type(arguments[2]) is not tuple:
        raise Refusal("PK-REDUCE", "a tensor with attributes is made of a function, a type, arguments and a state")
    function, kind = arguments[0], arguments[1]
    if type(kind) is not Global or kind.name not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        return Unsupported("of a subclass")
    if function.make is not _tensor and function.make is not _tensor_with_dtype:
        raise Refusal("PK-REDUCE", f"a tensor is made by {function.name}")
    return function.make(arguments[2])


def _ordered(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise Refusal("PK-REDUCE", "an OrderedDict is made of nothing, and filled afterwards")
    return {}


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(arguments) != 1 or type(arguments[0]) is not tuple:
        raise Refusal("PK-REDUCE", "a size is made of a tuple")
    return arguments[0]


def _ignored(arguments: tuple[Any, ...]) -> None:
    """A device says where a tensor was, which does not matter."""


def _other(kind: str) -> Callable[[tuple[Any, ...]], Unsupported]:
    return lambda _: Unsupported(kind)


# ------------------------------------------------------------------------------------------------ the closed list

STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool",
}  # fmt: skip
OTHER_STORAGES = {
    "ComplexFloatStorage": "complex", "ComplexDoubleStorage": "complex",
    **dict.fromkeys(("QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage"), "quantised"),
}  # fmt: skip
DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "uint16", "uint32", "uint64",
    "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz",
)  # fmt: skip
OTHER_DTYPES = {
    **dict.fromkeys(("complex32", "complex64", "complex128"), "complex"),
    **dict.fromkeys(("qint8", "quint8", "qint32", "quint4x2", "quint2x4"), "quantised"),
    "float4_e2m1fn_x2": "of two values in a byte",
    **{f"{sign}int{bits}": "of values smaller than a byte" for sign in ("", "u") for bits in range(1, 8)},
    **dict.fromkeys(("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"), "of bits without a meaning"),
}
#: functions of torch._utils that rebuild a tensor of a kind that is not read
OTHER_TENSORS = {
    "_rebuild_sparse_tensor": "sparse", "_rebuild_sparse_csr_tensor": "sparse", "_rebuild_nested_tensor": "nested",
    "_rebuild_qtensor": "quantised", "_rebuild_meta_tensor_no_storage": "without data (meta)",
    "_rebuild_wrapper_subclass": "of a subclass", "_rebuild_device_tensor_from_numpy": "of a device without storages",
    "_rebuild_device_tensor_from_cpu_tensor": "of a device without storages", "_rebuild_xla_tensor": "of a device without storages",
}  # fmt: skip


def _globals() -> dict[bytes, Global]:
    listed = [
        Global("collections.OrderedDict", _ordered),
        Global("torch._utils._rebuild_tensor", _tensor),
        Global("torch._utils._rebuild_tensor_v2", _tensor),
        Global("torch._utils._rebuild_tensor_v3", _tensor_with_dtype),
        Global("torch._utils._rebuild_parameter", _parameter),
        Global("torch._utils._rebuild_parameter_with_state", _parameter),
        Global("torch._tensor._rebuild_from_type_v2", _of_type),
        Global("torch.Size", _size),
        Global("torch.device", _ignored),
        Global("torch.serialization._get_layout", _ignored),  # what a sparse tensor is told by
        Global("torch.Tensor"),
        Global("torch.nn.parameter.Parameter"),
        *(Global(f"torch.{name}", dtype=dtype) for name, dtype in STORAGES.items()),
        *(Global(f"torch.{name}", unsupported=kind) for name, kind in OTHER_STORAGES.items()),
        *(Global(f"torch.{name}", dtype=name) for name in DTYPES),
        *(Global(f"torch.{name}", unsupported=kind) for name, kind in OTHER_DTYPES.items()),
        Global("torch.per_tensor_affine"),
        Global("torch.per_channel_affine"),
        Global("torch.storage.UntypedStorage"),
        Global("torch.storage.TypedStorage"),
        Global("torch.UntypedStorage"),
        *(Global(f"torch._utils.{name}", _other(kind), unsupported=kind) for name, kind in OTHER_TENSORS.items()),
    ]
    return {" ".join(one.name.rsplit(".", 1)).encode(): one for one in listed}


#: b"module name" → what it stands for
GLOBALS = _globals()
_STORAGE_KINDS = frozenset(one.name for one in GLOBALS.values() if one.name.endswith("Storage"))


def storage_of(value: Any) -> Storage:
    """("storage", class, key, location, number of elements)"""
    if type(value) is not tuple or len(value) != 5 or value[0] != "storage" or type(value[1]) is not Global:
        raise Refusal("PK-REDUCE", "a persistent id that is not that of a storage")
    _, kind, key, location, numel = value
    if kind.name not in _STORAGE_KINDS or type(key) is not str or type(location) is not str or type(numel) is not int or numel < 0:
        raise Refusal("PK-REDUCE", f"a storage of {told(kind)} that is not described as torch.save does")
    return Storage(key, kind.dtype, numel, kind.unsupported)
