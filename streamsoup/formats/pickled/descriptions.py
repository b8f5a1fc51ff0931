"""What may stand in a pickle of tensors, and what is built of it: descriptions, never objects.

A pickle names functions and classes by module and name. Here a name is only ever looked up in the
tables below; a name that is in none of them refuses the file. What a builder returns are the
classes of this module, of plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from streamsoup.errors import CorruptFileError, UnsafePickleError, printable
from streamsoup.tensors import TORCH_NAMES

__all__ = [
    *("DTYPE_NAMES", "Global", "Items", "Record", "Storage", "Tensor", "build", "extend"),
    *("find_global", "put", "set_state", "storage_of"),
]

MOST_DIMENSIONS = 64
"""Dimensions of a tensor at most, as in torch."""


class Global:
    """A function or class that a pickle names."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        """Keep the name, such as ``torch.FloatStorage``."""
        self.name = name


class Items:
    """The items of a mapping, in order. Keys are not hashed: they may be anything."""

    __slots__ = ("pairs",)

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.pairs: list[tuple[Any, Any]] = []


class Record:
    """An object that is not looked into, or only by who knows its kind."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: Any) -> None:
        """Keep the name of its class and what it was made of."""
        self.kind, self.args = kind, args
        self.state: Any = None


class Storage:
    """A storage: which member of the archive, and how many elements of what."""

    __slots__ = ("dtype", "key", "n_elements")

    def __init__(self, key: str, dtype: str, n_elements: int) -> None:
        """Keep what the pickle says. `dtype` is a safetensors name, or torch's for others."""
        self.key, self.dtype, self.n_elements = key, dtype, n_elements


class Tensor:
    """A tensor: a strided range of a storage."""

    __slots__ = ("dtype", "offset", "shape", "storage", "strange", "strides")

    def __init__(
        self,
        storage: Storage | None,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: str,
        strange: str = "",
    ) -> None:
        """Keep what the pickle says; offset and strides count elements.

        `strange` says why it cannot be read, if it cannot.
        """
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides
        self.dtype, self.strange = dtype, strange


_SMALL = {
    "F4": "float4_e2m1fn_x2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
DTYPE_NAMES = {
    **{f"torch.{torch}": name for name, torch in (TORCH_NAMES | _SMALL).items()},
    **{f"torch.{name}": name for name in ("complex32", "complex128", "quint8", "qint8", "qint32")},
    **{f"torch.{name}": name for name in ("quint4x2", "quint2x4", "bits8", "bits16")},
}
"""Dtypes by the names that pickles have for them: safetensors names, or torch's for others."""

_STORAGES = {
    "Double": "F64",
    "Float": "F32",
    "Half": "F16",
    "BFloat16": "BF16",
    "Long": "I64",
    "Int": "I32",
    "Short": "I16",
    "Char": "I8",
    "Byte": "U8",
    "Bool": "BOOL",
    "ComplexFloat": "C64",
    "ComplexDouble": "complex128",
    "QInt8": "qint8",
    "QUInt8": "quint8",
    "QInt32": "qint32",
    "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
}
_STORAGE_NAMES = {f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()} | {
    "torch.storage.UntypedStorage": "U8"
}

_INERT = {
    # plain containers and values
    *("builtins.set", "builtins.frozenset", "builtins.bytearray", "builtins.complex"),
    *("builtins.slice", "builtins.range", "builtins.object", "builtins.list", "builtins.tuple"),
    *("builtins.int", "builtins.float", "builtins.bool", "builtins.str", "builtins.bytes"),
    *("collections.deque", "argparse.Namespace", "types.SimpleNamespace", "_codecs.encode"),
    *(f"pathlib.{pure}{os}Path" for pure in ("", "Pure") for os in ("Posix", "Windows")),
    *(f"pathlib._local.{pure}{os}Path" for pure in ("", "Pure") for os in ("Posix", "Windows")),
    *("datetime.datetime", "datetime.date", "datetime.timedelta", "datetime.timezone"),
    *("decimal.Decimal", "fractions.Fraction", "uuid.UUID", "enum.Enum"),
    # what trainers save beside weights
    *("torch.device", "torch.Generator", "torch.strided", "torch.nn.parameter.Parameter"),
    *("torch.per_tensor_affine", "torch.per_channel_affine"),
    *("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Buffer"),
    *("torch.serialization._get_layout", "torch.contiguous_format", "torch.preserve_format"),
    *(f"numpy.{core}.multiarray.{f}" for core in ("core", "_core") for f in ("scalar",)),
    *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    *("numpy.dtype", "numpy.ndarray", "numpy.bool_", "numpy.float64", "numpy.int64"),
    *(
        "lightning_fabric.utilities.data.AttributeDict",
        "lightning.fabric.utilities.data.AttributeDict",
    ),
    *("pytorch_lightning.utilities.parsing.AttributeDict",),
    # distributed checkpoints
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties"),
            *("ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        )
    ),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
}
"""Classes whose objects are kept as records, and not looked into."""

_MAPPINGS = (
    *("collections.OrderedDict", "collections.defaultdict", "collections.Counter"),
    *("builtins.dict",),
)
"""Classes whose objects are mappings."""

_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg", "UserDict": "collections"}
"""Modules that Python 2 called otherwise; pickles of protocols 0 to 2 still do."""


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`: requires_grad, hooks and metadata follow."""
    metadata = rest[2] if len(rest) > 2 else None
    bits = [key for key, value in metadata.pairs if value] if isinstance(metadata, Items) else []
    what = printable(bits[0], 40) if bits and isinstance(bits[0], str) else "an unknown"
    strange = f"is a view with the {what} bit" if bits else ""
    return _checked(storage, offset, shape, strides, getattr(storage, "dtype", ""), strange)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v3`: requires_grad, hooks and a dtype follow."""
    dtype = DTYPE_NAMES.get(rest[2].name) if isinstance(rest[2], Global) else None
    if dtype is None:
        raise CorruptFileError("has a tensor without a dtype")
    metadata = rest[3] if len(rest) > 3 else None
    strange = "has metadata of its own" if isinstance(metadata, Items) and metadata.pairs else ""
    return _checked(storage, offset, shape, strides, dtype, strange)


def _checked(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: str, strange: str
) -> Tensor:
    if not isinstance(storage, Storage) or not _are_sizes((offset,)):
        raise CorruptFileError("has a tensor without a storage, or an offset into it")
    if not _are_sizes(shape) or not _are_sizes(strides) or len(shape) != len(strides):
        raise CorruptFileError("has a tensor whose shape and strides are not lists of sizes")
    return Tensor(storage, offset, tuple(shape), tuple(strides), dtype, strange)


def _are_sizes(given: Any) -> bool:
    if not isinstance(given, (tuple, list)) or len(given) > MOST_DIMENSIONS:
        return False
    return all(type(n) is int and 0 <= n < 1 << 63 for n in given)


def _parameter(data: Any, *rest: Any) -> Any:
    """`torch._utils._rebuild_parameter`, with or without state."""
    if not isinstance(data, Tensor):
        raise CorruptFileError("has a parameter that is not a tensor")
    return data


def _of_type(function: Any, kind: Any, args: Any, *rest: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with attributes, which are left out."""
    plain = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")
    if not isinstance(kind, Global) or kind.name not in plain:
        raise UnsafePickleError("has a tensor of a class of its own")
    if not isinstance(function, Global) or not function.name.startswith("torch._utils._rebuild_"):
        raise UnsafePickleError("has a tensor that is not made as torch makes them")
    return build(function, args)


def _strange(what: str) -> Callable[..., Tensor]:
    def make(*args: Any) -> Tensor:
        return Tensor(None, 0, (1,), (1,), "F32", what)

    return make


def _size(*args: Any) -> tuple[Any, ...]:
    """`torch.Size`."""
    if len(args) == 1 and _are_sizes(args[0]):
        return tuple(args[0])
    raise CorruptFileError("has a torch.Size that is not made of sizes")


def _mapping(*args: Any) -> Items:
    """Return the items of a mapping; of a defaultdict, the factory comes first."""
    made = Items()
    for given in args:
        if isinstance(given, Items):
            made.pairs.extend(given.pairs)
        elif isinstance(given, list):
            for pair in given:
                if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                    raise CorruptFileError("has a mapping that is not made of pairs")
                made.pairs.append((pair[0], pair[1]))
    return made


_ENUMS = ("torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",)


def _member(of: Any, name: Any, *rest: Any) -> Record:
    """`getattr`, by which Python 3.11.0 to 3.11.3 pickles a member of an enumeration."""
    if not isinstance(of, Global) or of.name not in _ENUMS or not isinstance(name, str) or rest:
        raise UnsafePickleError(
            "needs builtins.getattr of what is no enumeration of torch's, which is not on the list "
            "of what weights are made of, and could run code"
        )
    return Record(of.name, (name,))


def _reconstruct(kind: Any, *rest: Any) -> Any:
    """`copyreg._reconstructor` of protocols 0 and 1."""
    return build(kind, ())


_BUILDERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_MAPPINGS, _mapping),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._utils._rebuild_sparse_tensor": _strange("is sparse"),
    "torch._utils._rebuild_nested_tensor": _strange("is nested"),
    "torch._utils._rebuild_qtensor": _strange("is quantised"),
    "torch._utils._rebuild_meta_tensor_no_storage": _strange("is on the meta device, without data"),
    "torch._utils._rebuild_wrapper_subclass": _strange("is of a class of its own"),
    "torch.Size": _size,
    "copyreg._reconstructor": _reconstruct,
    "builtins.getattr": _member,
}
"""Functions and classes that may be called, by what is built instead."""

_KNOWN = {name: Global(name) for name in {*_BUILDERS, *_INERT, *DTYPE_NAMES, *_STORAGE_NAMES}}


def find_global(module: str, name: str) -> Global:
    """Return what a pickle names. Raise `UnsafePickleError` for all that is not listed."""
    whole = f"{_RENAMED.get(module, module)}.{name}"
    known = _KNOWN.get(whole)
    if known is None:
        raise UnsafePickleError(
            f"needs {printable(f'{module}.{name}', 120)}, which is not on the list of what "
            "weights are made of, and could run code"
        )
    return known


def build(function: Any, args: Any) -> Any:
    """Return the description of what a call would make.

    Raises:
        UnsafePickleError: The function is not one that is listed.
        CorruptFileError: The arguments do not fit it.
    """
    if not isinstance(function, Global):
        raise UnsafePickleError("calls what is not a function")
    if not isinstance(args, (tuple, list)):
        raise CorruptFileError(f"calls {function.name} without a tuple of arguments")
    builder = _BUILDERS.get(function.name)
    if builder is not None:
        try:
            return builder(*args)
        except (TypeError, IndexError):
            raise CorruptFileError(
                f"calls {function.name} with {len(args)} arguments that do not fit it"
            ) from None
    if function.name in _INERT:
        return Record(function.name, args)
    raise UnsafePickleError(f"calls {function.name}, which is a name alone")


def storage_of(pid: Any) -> Storage:
    """Return the storage of a persistent id: ``("storage", type, key, location, n_elements)``."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise CorruptFileError("refers to something outside the pickle that is not a storage")
    _, kind, key, _, n = pid[:5]
    dtype = _STORAGE_NAMES.get(kind.name) if isinstance(kind, Global) else None
    if dtype is None or not isinstance(key, str) or not _are_sizes((n,)):
        raise CorruptFileError("refers to a storage of an unknown form")
    return Storage(key, dtype, n)


def set_state(target: Any, given: Any) -> None:
    """Set the state of an object: records keep it; of mappings and tensors it is not needed."""
    if isinstance(target, Record):
        target.state = given
    elif not isinstance(target, (Items, Tensor)):
        raise UnsafePickleError("sets the state of what is not an object")


def extend(target: Any, values: Sequence[Any]) -> None:
    """Append to a list; what is appended to a record is left out."""
    if isinstance(target, list):
        target.extend(values)
    elif not isinstance(target, Record):
        raise CorruptFileError("appends to what is not a list")


def put(target: Any, values: Sequence[Any]) -> None:
    """Put keys and values, by turns, into a mapping; those of a record are left out."""
    if len(values) % 2:
        raise CorruptFileError("has a key without a value")
    if isinstance(target, Items):
        target.pairs.extend(zip(values[::2], values[1::2], strict=True))
    elif not isinstance(target, Record):
        raise CorruptFileError("puts items into what is not a mapping")
