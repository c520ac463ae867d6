"""Safetensors files: the header checked to the last number, the data read one tensor at a time."""

import json
from pathlib import Path

import numpy as np

from .files import (
    ITEM_SIZE,
    MAX_DIMENSIONS,
    NUMPY_TYPES,
    check_name,
    number_of_bytes,
    read_at,
    refuse,
    shown,
    size_of,
)

# A tensor takes about a hundred bytes.
MAX_HEADER = 16 * 2**20


class SafetensorsFile:
    """The tensors of one file.

    Args:
        file: its path.

    Attributes:
        tensors: path -> (type, shape). A path is a tuple of the name alone.
        others: nothing; every value is a tensor.

    Raises:
        MCSDError: for a header that is not exactly what the format asks for: every byte behind it
            belongs to one tensor, whose type and shape take that many bytes.
    """

    def __init__(self, file):
        self.file = Path(file)
        self.where = shown(file, 300)
        self.others = {}
        size = size_of(file)
        if size < 8:
            self.damaged(f"it has {size} bytes")
        with open(file, "rb") as stream:
            length = int.from_bytes(read_at(stream, 0, 8), "little")
            if length > min(size - 8, MAX_HEADER):
                self.damaged(f"its header is said to have {length} bytes")
            header = self.parse(read_at(stream, 8, length))
        self.start = 8 + length
        self.entries = {}
        for name, entry in header.items():
            check_name(name, file)
            self.entries[name,] = self.check(name, entry)
        reached = 0
        for (name,), (_, _, (first, last)) in sorted(
            self.entries.items(), key=lambda item: item[1][2]
        ):
            if first != reached:
                self.damaged(f"the data of {name} do not begin where those before it end")
            reached = last
        if reached != size - self.start:
            self.damaged(f"it should have {self.start + reached} bytes but has {size}")
        self.tensors = {path: entry[:2] for path, entry in self.entries.items()}

    def damaged(self, reason):
        """Refuse a file that is not what it says."""
        refuse(f"{self.where} must be a whole safetensors file but {reason}.")

    def parse(self, text):
        """The header's entries, without its metadata."""

        def once(pairs):
            found = dict(pairs)
            if len(found) != len(pairs):
                raise ValueError("a name is given twice")
            return found

        def no_number(text):
            raise ValueError(f"{text} is no number")

        try:
            header = json.loads(
                text.decode("utf-8"), object_pairs_hook=once, parse_constant=no_number
            )
        except (ValueError, RecursionError) as error:
            self.damaged(f"its header does not parse: {shown(error)}")
        metadata = header.pop("__metadata__", None) if type(header) is dict else ()
        if metadata is not None and not (
            type(metadata) is dict and all(type(value) is str for value in metadata.values())
        ):
            self.damaged("its header is no table of tensors")
        return header

    def check(self, name, entry):
        """Return (type, shape, (first, last)) of an entry whose numbers agree."""
        if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
            self.damaged(f"the entry of {name} is malformed")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if type(kind) is not str or kind not in ITEM_SIZE:
            refuse(f"{name} in {self.where} has a type that is not known: {shown(repr(kind))}.")
        for sizes in (shape, offsets):
            if type(sizes) is not list or not all(
                type(size) is int and 0 <= size < 2**62 for size in sizes
            ):
                self.damaged(f"the sizes of {name} are malformed")
        if len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
            self.damaged(f"the sizes of {name} are malformed")
        if offsets[1] - offsets[0] != number_of_bytes(kind, shape):
            self.damaged(f"the data of {name} have not the size that its shape asks for")
        return kind, tuple(shape), tuple(offsets)

    def read(self, path):
        """Return one tensor as a NumPy array of its own (see `NUMPY_TYPES`)."""
        kind, shape, (first, _) = self.entries[path]
        out = np.empty(shape, NUMPY_TYPES[kind])
        with open(self.file, "rb") as stream:
            stream.seek(self.start + first)
            if stream.readinto(out.reshape(-1).view(np.uint8)) != out.nbytes:
                self.damaged("it ended while it was being read")
        return out
