"""Files that ``torch.save`` wrote, read without torch: the zip format and the one before 1.6.

The pickle inside says where each tensor lies in a storage (offset, shape, strides); `unpickle`
reads it as plain data, and the numbers are believed only where they fit the file.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .archive import members
from .files import (
    ITEM_SIZE,
    MAX_DIMENSIONS,
    NUMPY_TYPES,
    check_name,
    read_at,
    refuse,
    shown,
    size_of,
)
from .unpickle import MAX_PICKLE, Opaque, Table, Unpickler

STORAGES = {
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
}
DTYPES = {
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
}
MAGIC = 0x1950A86A20F9469CFC6C
# An expanded tensor is larger than its storage: fine for a vector, not for a bomb.
MAX_EXPANDED = 2**16
MAX_DEPTH, MAX_LEAVES = 32, 1_000_000
# Strided tensors are gathered in pieces of this many bytes.
PIECE = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Storage:
    """A flat array in the file: `numel` items of a kind, from item `offset` of the one at `key`."""

    key: str
    kind: str
    numel: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view into a storage; offset and strides count items of its own kind."""

    storage: Storage
    kind: str
    offset: int
    shape: tuple
    strides: tuple


class TorchFile:
    """The tensors of one file.

    Args:
        file: its path.

    Attributes:
        tensors: path -> (type, shape). A path is the tuple of keys that lead to a tensor.
        others: path -> kind, of every value that is no tensor.

    Raises:
        MCSDError: for anything but a whole file of tensors and plain values.
    """

    def __init__(self, file):
        self.file = Path(file)
        self.where = shown(file, 300)
        size = size_of(file)
        with open(file, "rb") as stream:
            start = read_at(stream, 0, min(size, 512))
            if start[257:262] == b"ustar":
                refuse(
                    f"{self.where} is in the tar format that torch wrote before 2017; load and save "
                    "it with torch."
                )
            self.swapped = False
            # Storage key -> (start, size) of its bytes.
            self.places = {}
            self.storages = {}
            if start[:4] == b"PK\3\4":
                root = self.open_archive(stream, size)
            else:
                root = self.open_legacy(stream, size)
        self.records, self.others = flatten(root, self.where)
        for path, record in self.records.items():
            check_name(".".join(path), file)
            self.check_place(".".join(path), record)
        self.tensors = {path: (t.kind, t.shape) for path, t in self.records.items()}

    def open_archive(self, stream, size):
        """Read the pickle of the zip format."""
        found = members(stream, size, self.where)
        roots = [name.removesuffix("/data.pkl") for name in found if name.endswith("/data.pkl")]
        if len(roots) != 1 or "/" in roots[0]:
            refuse(f"{self.where} must be a file that torch.save wrote but is another zip archive.")
        prefix = f"{roots[0]}/"
        if f"{prefix}constants.pkl" in found:
            refuse(f"{self.where} is a TorchScript program; save the model's state_dict() instead.")
        start, length = found[f"{prefix}data.pkl"]
        if length > MAX_PICKLE:
            refuse(f"{self.where} must be a file of tensors but its pickle has {length} bytes.")
        if f"{prefix}byteorder" in found:
            order = read_at(stream, *clip(found[f"{prefix}byteorder"]))
            if order not in (b"little", b"big"):
                refuse(f"{self.where} must have a byteorder little or big but has {shown(order)}.")
            self.swapped = order == b"big"
        self.places = {
            name.removeprefix(f"{prefix}data/"): place
            for name, place in found.items()
            if name.startswith(f"{prefix}data/")
        }
        return self.unpickler(read_at(stream, start, length)).load()

    def open_legacy(self, stream, size):
        """Read the pickles of the older format, and find the storages behind them."""
        data = read_at(stream, 0, min(size, MAX_PICKLE))
        unpickler = self.unpickler(data)
        magic, version = unpickler.load(), None
        if type(magic) is int and magic == MAGIC:
            version = unpickler.load()
        if type(version) is not int or version != 1001:
            refuse(f"{self.where} must be a file that torch.save wrote but is another pickle.")
        unpickler.load()  # sizes of C types; the data are little-endian on every machine
        root = unpickler.load()
        keys = unpickler.load()
        if type(keys) is not list or not all(type(key) is str for key in keys):
            unpickler.damaged()
        position = unpickler.position
        for key in keys:
            if key in self.places or key not in self.storages:
                unpickler.damaged()
            length = self.storages[key].numel * ITEM_SIZE[self.storages[key].kind]
            if position + 8 + length > size:
                unpickler.damaged()
            if int.from_bytes(read_at(stream, position, 8), "little") != self.storages[key].numel:
                unpickler.damaged()
            self.places[key] = (position + 8, length)
            position += 8 + length
        if position != size:
            unpickler.damaged()
        return root

    def unpickler(self, data):
        """The reader of this file's pickles."""
        return Unpickler(data, CONSTRUCTORS | {}, self.storage, self.where)

    def storage(self, saved):
        """The storage that a persistent id stands for."""
        if len(saved) == 6:  # the older format: None, or (key, offset, numel) of a view
            *saved, view = saved
        else:
            view = None
        if len(saved) != 5 or saved[0] != "storage":
            refuse(f"{self.where} must be a whole torch file but names an unknown kind of data.")
        _, kind, key, _, numel = saved
        kind = storage_kind(kind)
        if kind is None or type(key) is not str or not is_size(numel):
            refuse(f"{self.where} must be a whole torch file but a storage in it is malformed.")
        storage = Storage(key, kind, numel)
        if self.storages.setdefault(key, storage) != storage:
            refuse(f"{self.where} declares storage {shown(key)} twice, and differently.")
        if view is None:
            return storage
        if not (type(view) is tuple and len(view) == 3 and is_size(view[1]) and is_size(view[2])):
            refuse(f"{self.where} must be a whole torch file but a storage in it is malformed.")
        if view[1] + view[2] > numel:
            refuse(f"{self.where} has a view beyond the end of storage {shown(key)}.")
        return Storage(key, kind, view[2], view[1])

    def check_place(self, name, tensor):
        """Refuse a tensor that does not lie in the bytes of its storage."""
        storage = tensor.storage
        if storage.key not in self.places:
            refuse(f"{self.where} must hold the data of {name} but does not.")
        held = self.places[storage.key][1]
        declared = self.storages[storage.key]
        if declared.numel * ITEM_SIZE[declared.kind] != held:
            refuse(
                f"the data of {name} in {self.where} must have "
                f"{declared.numel * ITEM_SIZE[declared.kind]} bytes but have {held}."
            )
        item = ITEM_SIZE[tensor.kind]
        room = storage.numel * ITEM_SIZE[storage.kind]
        numel = math.prod(tensor.shape)
        last = tensor.offset + sum(
            (n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)
        )
        if numel and (last + 1) * item > room:
            refuse(f"{name} in {self.where} must lie in its storage but ends beyond it.")
        if numel * item > max(room, MAX_EXPANDED * item):
            refuse(f"{name} in {self.where} is expanded from a smaller tensor; save it contiguous.")
        if self.swapped and tensor.kind != storage.kind:
            refuse(f"{name} in {self.where} is big-endian and of an unusual type; save it again.")

    def read(self, path):
        """Return one tensor as a NumPy array of its own (see `NUMPY_TYPES`)."""
        tensor = self.records[path]
        dtype = np.dtype(NUMPY_TYPES[tensor.kind])
        start, _ = self.places[tensor.storage.key]
        start += tensor.storage.offset * ITEM_SIZE[tensor.storage.kind]
        out = np.empty(tensor.shape, dtype)
        with open(self.file, "rb") as stream:
            gather(stream, start + tensor.offset * dtype.itemsize, out, tensor.strides)
        return out.byteswap(inplace=True) if self.swapped else out


def gather(stream, start, out, strides):
    """Fill an array from items that lie `strides` apart, from position `start` of a file on."""
    if not out.size:
        return
    item = out.itemsize
    dense = [math.prod(out.shape[i + 1 :]) for i in range(out.ndim)]
    if out.flags.c_contiguous and all(
        n == 1 or s == d for n, s, d in zip(out.shape, strides, dense, strict=True)
    ):
        stream.seek(start)
        if stream.readinto(memoryview(out).cast("B") if out.ndim else out) != out.nbytes:
            refuse(f"{shown(stream.name, 300)} ended while it was being read.")
        return
    reach = [(n - 1) * s for n, s in zip(out.shape, strides, strict=True)]
    if (sum(reach) + 1) * item <= PIECE:
        flat = np.frombuffer(read_at(stream, start, (sum(reach) + 1) * item), out.dtype)
        steps = [s * item for s in strides]
        out[...] = np.lib.stride_tricks.as_strided(flat, out.shape, steps, writeable=False)
        return
    # Too far apart for one piece: some steps of the slowest axis at a time.
    axis = int(np.argmax(reach))
    step = max(1, (PIECE // item - (sum(reach) - reach[axis])) // strides[axis])
    step = min(step, (out.shape[axis] + 1) // 2)
    for first in range(0, out.shape[axis], step):
        part = out[(slice(None),) * axis + (slice(first, first + step),)]
        gather(stream, start + first * strides[axis] * item, part, strides)


def flatten(root, where):
    """Return {path: Tensor} and {path: kind of value} of what lies in nested tables and lists."""
    tensors, others, pending, count = {}, {}, [((), root)], 0
    while pending:
        path, value = pending.pop()
        count += 1
        if count > MAX_LEAVES or len(path) > MAX_DEPTH:
            refuse(f"{where} must be a file of tensors but is nested without end.")
        if isinstance(value, Table):
            pairs = value.pairs
        elif isinstance(value, list | tuple):
            pairs = list(enumerate(value))
        else:
            home = tensors if isinstance(value, Tensor) else others
            if path in tensors or path in others:
                refuse(f"{where} must name each value once but has {shown('.'.join(path))} twice.")
            home[path] = value if isinstance(value, Tensor) else kind_of(value)
            continue
        if count + len(pending) + len(pairs) > MAX_LEAVES:
            refuse(f"{where} must be a file of tensors but is nested without end.")
        for key, below in reversed(pairs):
            if type(key) not in (str, int):
                refuse(f"{where} must name its values by text but has a {kind_of(key)} as a name.")
            key = str(key) if type(key) is str else f"{key:d}" if abs(key) < 2**63 else "int"
            pending.append(((*path, key), below))
    return tensors, others


def kind_of(value):
    """What a value that is no tensor is called."""
    return value.kind if isinstance(value, Opaque) else type(value).__name__


def is_size(value):
    """Whether a value is a whole number that may count items."""
    return type(value) is int and 0 <= value < 2**62


def storage_kind(name):
    """The type of a storage class, or None."""
    module, name = getattr(name, "module", None), getattr(name, "name", "")
    if (module, name) == ("torch.storage", "UntypedStorage"):
        return "U8"
    return STORAGES.get(name.removesuffix("Storage")) if module in ("torch", "torch.cuda") else None


def malformed():
    """Refuse arguments that no torch writes."""
    refuse("a torch file must describe its tensors as torch does but one description is malformed.")


def rebuild(storage=None, offset=None, shape=None, strides=None, *rest):
    """A tensor: `_rebuild_tensor`, and with requires_grad, hooks and metadata, `_v2`."""
    if not isinstance(storage, Storage) or len(rest) > 3:
        malformed()
    if len(rest) == 3 and not (
        isinstance(rest[2], Table) and all(flag is False for _, flag in rest[2].pairs)
    ):
        malformed()  # conjugate or negative bits
    return tensor_of(storage, storage.kind, offset, shape, strides)


def rebuild_v3(
    storage=None, offset=None, shape=None, strides=None, grad=None, hooks=None, dtype=None, *rest
):
    """A tensor of a type that has no storage class of its own."""
    name = getattr(dtype, "name", None)
    if not isinstance(storage, Storage) or name not in DTYPES or rest:
        malformed()
    return tensor_of(storage, DTYPES[name], offset, shape, strides)


def tensor_of(storage, kind, offset, shape, strides):
    """The record, once its numbers are numbers."""
    for sizes in (shape, strides):
        if type(sizes) is not tuple or not all(map(is_size, sizes)):
            malformed()
    if not is_size(offset) or len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        malformed()
    return Tensor(storage, kind, offset, shape, strides)


def same_tensor(tensor=None, *rest):
    """A parameter is its tensor; attributes that someone set on it are not part of it."""
    if not isinstance(tensor, Tensor) or len(rest) > 3:
        malformed()
    return tensor


def rebuild_from_type(function=None, kind=None, arguments=None, *rest):
    """A tensor with attributes: the call that makes it, once more wrapped."""
    plain = (("torch", "Tensor"), ("torch.nn.parameter", "Parameter"))
    key = (getattr(function, "module", None), getattr(function, "name", None))
    if (
        key not in REBUILDERS
        or (getattr(kind, "module", None), getattr(kind, "name", None)) not in plain
        or type(arguments) is not tuple
    ):
        malformed()
    return REBUILDERS[key](*arguments)


def ordered(*arguments):
    """An OrderedDict, or a defaultdict: filled from pairs, or later."""
    pairs = arguments[-1] if arguments else []
    if not isinstance(pairs, list) or not all(
        type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs
    ):
        return Table()
    return Table([tuple(pair) for pair in pairs])


def sizes_of(*arguments):
    """A torch.Size is a tuple."""
    if len(arguments) != 1 or type(arguments[0]) not in (tuple, list):
        malformed()
    return tuple(arguments[0])


def opaque(kind):
    """A constructor of values that are no tensors."""
    return lambda *_: Opaque(kind)


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
    ("collections", "OrderedDict"): ordered,
    ("collections", "defaultdict"): ordered,
    ("collections", "Counter"): ordered,
    ("torch", "Size"): sizes_of,
    ("torch", "device"): opaque("torch.device"),
    ("_codecs", "encode"): opaque("bytes"),
    ("builtins", "set"): opaque("set"),
    ("builtins", "complex"): opaque("complex"),
    ("builtins", "bytearray"): opaque("bytearray"),
    # Named as types, never called.
    ("builtins", "dict"): None,
    ("builtins", "list"): None,
    ("builtins", "int"): None,
    ("torch", "Tensor"): None,
    ("torch.nn.parameter", "Parameter"): None,
    ("torch.storage", "UntypedStorage"): None,
    **{("torch", f"{name}Storage"): None for name in STORAGES},
    **{("torch.cuda", f"{name}Storage"): None for name in STORAGES},
    **{("torch", name): None for name in DTYPES},
}


def clip(place):
    """The place of a short text, which no honest file makes long."""
    start, length = place
    return start, min(length, 16)
