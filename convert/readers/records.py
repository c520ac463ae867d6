"""What a pickle of ``torch.save`` describes: tensors as numbers, built by torch's names for them.

The constructors stand for torch's own and run nothing; what they are given is checked for its
kind here, and for its place in the file by `torch_file`.
"""

from dataclasses import dataclass

from .files import ITEM_SIZE, MAX_DIMENSIONS
from .unpickle import Global, Malformed, Opaque, Table

# (module, name) of torch's classes and types -> stored type.
STORAGES = {("torch.storage", "UntypedStorage"): "U8"} | {
    (module, f"{name}Storage"): kind
    for module in ("torch", "torch.cuda")
    for name, kind in {
        "Bool": "BOOL",
        "Byte": "U8",
        "Char": "I8",
        "Short": "I16",
        "Int": "I32",
        "Long": "I64",
        "Half": "F16",
        "BFloat16": "BF16",
        "Float": "F32",
        "Double": "F64",
        "ComplexFloat": "C64",
    }.items()
}
DTYPES = {
    ("torch", name): kind
    for name, kind in {
        "bool": "BOOL",
        "uint8": "U8",
        "int8": "I8",
        "uint16": "U16",
        "int16": "I16",
        "uint32": "U32",
        "int32": "I32",
        "uint64": "U64",
        "int64": "I64",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e5m2": "F8_E5M2",
        "float16": "F16",
        "bfloat16": "BF16",
        "float32": "F32",
        "float64": "F64",
        "complex64": "C64",
    }.items()
}


@dataclass(frozen=True, slots=True)
class Storage:
    """A flat array in the file: `numel` items of a kind, from item `offset` of the one at `key`."""

    key: str
    kind: str
    numel: int
    offset: int = 0

    @property
    def nbytes(self):
        """Its size."""
        return self.numel * ITEM_SIZE[self.kind]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view into a storage; offset and strides count items of its own kind."""

    storage: Storage
    kind: str
    offset: int
    shape: tuple
    strides: tuple


def is_size(value):
    """Whether a value is a whole number that may count items."""
    return type(value) is int and 0 <= value < 2**62


def name_of(value):
    """(module, name) of a mentioned name; of anything else, nothing that a table has."""
    return (value.module, value.name) if isinstance(value, Global) else None


def tensor(storage, kind, offset, shape, strides):
    """The record, once its numbers are numbers."""
    for sizes in (shape, strides):
        if type(sizes) is not tuple or not all(map(is_size, sizes)):
            raise Malformed("a shape is none")
    if not is_size(offset) or len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise Malformed("a shape is none")
    return Tensor(storage, kind, offset, shape, strides)


def rebuild(storage=None, offset=None, shape=None, strides=None, *rest):
    """A tensor: `_rebuild_tensor`, and with requires_grad, hooks and metadata, `_v2`."""
    if not isinstance(storage, Storage) or len(rest) > 3:
        raise Malformed("a tensor has no storage")
    if rest and type(rest[0]) is not bool:
        raise Malformed("a tensor's requires_grad is neither true nor false")
    if len(rest) == 3 and any(flag is not False for _, flag in getattr(rest[2], "pairs", [(0, 0)])):
        raise Malformed("a tensor is conjugate or negated; save it with .resolve_conj()")
    return tensor(storage, storage.kind, offset, shape, strides)


def rebuild_v3(
    storage=None, offset=None, shape=None, strides=None, grad=None, hooks=None, dtype=None, *rest
):
    """A tensor of a type that has no storage class of its own."""
    kind = DTYPES.get(name_of(dtype))
    if not isinstance(storage, Storage) or kind is None or rest or type(grad) is not bool:
        raise Malformed("a tensor has no storage or type")
    return tensor(storage, kind, offset, shape, strides)


def same_tensor(record=None, grad=None, *rest):
    """A parameter is its tensor; attributes that someone set on it are not part of it."""
    if not isinstance(record, Tensor) or type(grad) is not bool or len(rest) > 2:
        raise Malformed("a parameter has no tensor")
    return record


def rebuild_from_type(function=None, kind=None, arguments=None, *rest):
    """A tensor with attributes: the call that makes it, once more wrapped."""
    builder = REBUILDERS.get(name_of(function))
    if builder is None or name_of(kind) not in PLAIN or type(arguments) is not tuple:
        raise Malformed("a tensor is of an unknown class")
    return builder(*arguments)


def table(*arguments):
    """An OrderedDict, defaultdict or Counter, filled from pairs, from a dict, or later."""
    pairs = arguments[-1] if arguments else None
    if isinstance(pairs, Table):
        return Table(list(pairs.pairs))
    if pairs is None or isinstance(pairs, Global):
        return Table()
    if type(pairs) is not list or not all(
        type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs
    ):
        raise Malformed("a dict is filled with no pairs")
    return Table([tuple(pair) for pair in pairs])


def size(*arguments):
    """A torch.Size is a tuple."""
    if len(arguments) != 1 or type(arguments[0]) not in (tuple, list):
        raise Malformed("a size is none")
    return tuple(arguments[0])


def opaque(kind):
    """A constructor of values that are no tensors."""
    return lambda *_: Opaque(kind)


PLAIN = {("torch", "Tensor"), ("torch.nn.parameter", "Parameter")}
REBUILDERS = {
    ("torch._utils", "_rebuild_tensor"): rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): same_tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): same_tensor,
}
CONSTRUCTORS = {
    **REBUILDERS,
    ("torch._tensor", "_rebuild_from_type_v2"): rebuild_from_type,
    ("collections", "OrderedDict"): table,
    ("collections", "defaultdict"): table,
    ("collections", "Counter"): table,
    ("torch", "Size"): size,
    ("torch", "device"): opaque("torch.device"),
    ("_codecs", "encode"): opaque("bytes"),
    ("builtins", "set"): opaque("set"),
    ("builtins", "complex"): opaque("complex"),
    ("builtins", "bytearray"): opaque("bytearray"),
    # Named as types, never called.
    **dict.fromkeys([("builtins", name) for name in ("dict", "list", "int", "float")]),
    **dict.fromkeys([*PLAIN, *STORAGES, *DTYPES]),
}
