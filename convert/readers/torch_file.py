"""Files that ``torch.save`` wrote, read without torch: the zip format and the one before 1.6.

The pickle inside says where each tensor lies in a storage (offset, shape, strides); `unpickle`
reads it as plain data, and the numbers are believed only where they fit the file.
"""

import math
import re
from pathlib import Path

import numpy as np

from .archive import Member, members
from .files import ITEM_SIZE, NUMPY_TYPES, check_name, read_at, refuse, shown, size_of
from .gather import gather, reach
from .records import CONSTRUCTORS, STORAGES, Storage, Tensor, is_size, name_of
from .unpickle import MAX_PICKLE, Global, Opaque, Table, Unpickler

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
# Members that tell a number: of the format, of the alignment of data, of the file.
NUMBERS = ("version", ".format_version", ".storage_alignment", ".data/serialization_id")
# An expanded tensor is larger than its storage: fine for a vector, not for a bomb; and so are
# many tensors in one storage.
MAX_EXPANDED = 2**16
MAX_TIMES, FREE_BYTES = 64, 2**26
MAX_DEPTH, MAX_VALUES = 32, 1_000_000


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
        self.big_endian = False
        # Storage key -> what the pickle declares, and where its bytes lie; those found undamaged.
        self.storages, self.places, self.whole = {}, {}, set()
        size = size_of(file)
        with open(file, "rb") as stream:
            start = read_at(stream, 0, min(size, 512))
            if start[257:262] == b"ustar":
                refuse(
                    f"{self.where} must be in a format of this decade but is in the tar format of "
                    "torch before 2017; load and save it with torch."
                )
            is_zip = start[:4] == b"PK\3\4"
            root = self.open_zip(stream, size) if is_zip else self.open_legacy(stream, size)
        if not isinstance(root, Table | list | tuple):
            refuse(f"{self.where} must hold a state dict but holds a {type(root).__name__}.")
        self.records, self.others = flatten(root, self.where)
        for path, record in self.records.items():
            check_name(".".join(path), file)
            self.check_place(".".join(path), record)
        self.tensors = {path: (t.kind, t.shape) for path, t in self.records.items()}
        total = sum(math.prod(t.shape) * ITEM_SIZE[t.kind] for t in self.records.values())
        if total > MAX_TIMES * size + FREE_BYTES:
            refuse(
                f"{self.where} must hold its tensors but they take {total // size} times as much."
            )

    def open_zip(self, stream, size):
        """Read the pickle of the zip format, and find the storages beside it."""
        found = members(stream, size, self.where)
        roots = [name.removesuffix("data.pkl") for name in found if name.endswith("/data.pkl")]
        if len(roots) != 1 or roots[0].count("/") != 1:
            refuse(f"{self.where} must be a file that torch.save wrote but is another zip archive.")
        (root,) = roots
        if f"{root}constants.pkl" in found:
            refuse(f"{self.where} is a TorchScript program; save the model's state_dict() instead.")
        data = f"{root}data/"
        self.places = {
            name.removeprefix(data): place for name, place in found.items() if name.startswith(data)
        }
        if (length := found[f"{root}data.pkl"].size) > MAX_PICKLE:
            refuse(f"{self.where} must be a file of tensors but its pickle has {length} bytes.")
        small = {
            name.removeprefix(root): self.small(stream, name, place)
            for name, place in found.items()
            if name.removeprefix(root) in ("data.pkl", "byteorder", *NUMBERS)
        }
        for name in NUMBERS:
            if not re.fullmatch(rb"[0-9]{1,64}\n?", small.get(name, b"0")):
                refuse(f"{self.where} must have a number as {name} but is damaged.")
        if (order := small.get("byteorder", b"little")) not in (b"little", b"big"):
            refuse(f"{self.where} must be in little or big byte order but is in {order[:16]!r}.")
        self.big_endian = order == b"big"
        return Unpickler(small["data.pkl"], CONSTRUCTORS, self.storage, self.where).load()

    def small(self, stream, name, place):
        """The bytes of a member that is no tensor's data."""
        self.check_whole(stream, name, place)
        return read_at(stream, place.start, min(place.size, MAX_PICKLE))

    def check_whole(self, stream, name, place):
        """Refuse bytes whose checksum is not the one that was written with them."""
        if not place.is_whole(stream):
            refuse(f"{name} in {self.where} has another checksum than when it was written.")

    def open_legacy(self, stream, size):
        """Read the pickles of the older format, and find the storages behind them.

        Its data are little-endian whatever machine wrote them.
        """
        data = read_at(stream, 0, min(size, MAX_PICKLE))
        unpickler = Unpickler(data, CONSTRUCTORS, self.storage, self.where)
        for wanted in (MAGIC, VERSION):
            value = unpickler.load()
            if type(value) is not int or value != wanted:
                refuse(f"{self.where} must be a file that torch.save wrote but is another pickle.")
        unpickler.load()  # sizes of C's types, on the machine that wrote them
        root, keys = unpickler.load(), unpickler.load()
        if type(keys) is not list:
            unpickler.damaged()
        position = unpickler.position
        for key in keys:
            if type(key) is not str or key in self.places or key not in self.storages:
                unpickler.damaged()
            numel, length = self.storages[key].numel, self.storages[key].nbytes
            if position + 8 + length > size:
                unpickler.damaged()
            if int.from_bytes(read_at(stream, position, 8), "little") != numel:
                unpickler.damaged()
            self.places[key] = Member(position + 8, length, 0)
            position += 8 + length
        if position != size:
            unpickler.damaged()
        return root

    def storage(self, saved):
        """The storage that a persistent id stands for."""

        def malformed():
            refuse(f"{self.where} must be a whole torch file but a storage in it is malformed.")

        # The older format adds None, or (key, offset, numel) of a part that is used.
        *saved, part = saved if len(saved) == 6 else (*saved, None)
        if len(saved) != 5 or saved[0] != "storage":
            malformed()
        _, kind, key, _, numel = saved
        kind = STORAGES.get(name_of(kind))
        if kind is None or type(key) is not str or not is_size(numel):
            malformed()
        storage = Storage(key, kind, numel)
        if self.storages.setdefault(key, storage) != storage:
            malformed()
        if part is None:
            return storage
        if type(part) is not tuple or len(part) != 3 or not all(map(is_size, part[1:])):
            malformed()
        _, offset, count = part
        if offset + count > numel:
            malformed()
        return Storage(key, kind, count, offset)

    def check_place(self, name, tensor):
        """Refuse a tensor that does not lie in the bytes of its storage."""
        storage, item = tensor.storage, ITEM_SIZE[tensor.kind]
        if storage.key not in self.places:
            refuse(f"{self.where} must hold the data of {name} but does not.")
        held, declared = self.places[storage.key].size, self.storages[storage.key].nbytes
        if held != declared:
            refuse(f"{name} in {self.where} must lie in {declared} bytes of data but has {held}.")
        numel = math.prod(tensor.shape)
        last = tensor.offset + reach(tensor.shape, tensor.strides)
        if numel and (last + 1) * item > storage.nbytes:
            refuse(f"{name} in {self.where} must lie in its storage but ends beyond it.")
        if numel * item > max(storage.nbytes, MAX_EXPANDED * item):
            refuse(
                f"{name} in {self.where} must be as large as it looks but is expanded from a "
                "smaller tensor; save it contiguous."
            )
        if self.big_endian and tensor.kind != storage.kind:
            refuse(f"{name} in {self.where} has a type that is not read from big-endian files.")

    def read(self, path):
        """Return one tensor as a NumPy array of its own (see `NUMPY_TYPES`)."""
        tensor = self.records[path]
        dtype = np.dtype(NUMPY_TYPES[tensor.kind])
        place = self.places[tensor.storage.key]
        start = place.start + tensor.storage.offset * ITEM_SIZE[tensor.storage.kind]
        out = np.empty(tensor.shape, dtype)
        with open(self.file, "rb") as stream:
            if place not in self.whole:
                self.check_whole(stream, f"data/{tensor.storage.key}", place)
                self.whole.add(place)
            gather(stream, start + tensor.offset * dtype.itemsize, out, tensor.strides)
        return out.byteswap(inplace=True) if self.big_endian else out


def flatten(root, where):
    """Return {path: Tensor} and {path: kind of value} of what lies in nested tables and lists."""
    tensors, others, pending, count = {}, {}, [((), root)], 0
    while pending:
        path, value = pending.pop()
        if isinstance(value, Table | list | tuple):
            pairs = value.pairs if isinstance(value, Table) else list(enumerate(value))
            # Tables may hold themselves, or each other many times over.
            count += len(pairs)
            if count > MAX_VALUES or len(path) > MAX_DEPTH:
                refuse(f"{where} must be a file of tensors but is nested without end.")
            pending += [((*path, text_of(key, where)), below) for key, below in reversed(pairs)]
        elif path in tensors or path in others:
            refuse(f"{where} must use a name once but has {shown('.'.join(path))} twice.")
        elif isinstance(value, Tensor):
            tensors[path] = value
        else:
            others[path] = kind_of(value)
    return tensors, others


def kind_of(value):
    """What a value that is no tensor is called."""
    if isinstance(value, Opaque):
        return value.kind
    return str(value) if isinstance(value, Global) else type(value).__name__


def text_of(key, where):
    """A key as a part of a name."""
    if type(key) is int and abs(key) < 2**63:
        return str(key)
    if type(key) is not str:
        refuse(f"{where} must name values by text or number but has a {type(key).__name__} as key.")
    return key
