"""Safetensors shards written rows at a time, and read back.

Where every tensor goes is known before the first number is: each file's header is written first,
then rows wherever they belong, so that no more than a few rows are ever held.
"""

import json
import math
import os
from dataclasses import dataclass
from hashlib import sha256

import mlx.core as mx

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import one_line

SHARD_BYTES = 5_000_000_000
NAMES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
}


@dataclass
class Region:
    """A tensor's place in a file, and what of it is written: up to `position`, with `digest`."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    file: int  # a descriptor
    position: int
    end: int
    digest: object


class Shards:
    """`model*.safetensors` of at most 5 GB and their index; a context that closes the files.

    Args:
        directory: where to write; its files are made at once.
        groups: dictionaries name -> (dtype, shape) of what must share a file, in order. A group
            larger than a shard has one of its own.
        parameters: how many numbers the model has, for the index.
        metadata: of every file.
    """

    def __init__(self, directory, groups, parameters, metadata):
        self.directory = directory
        self.tensors = {name: spec for group in groups for name, spec in group.items()}
        shards, room = [], 0
        for group in groups:
            size = sum(n_bytes(spec) for spec in group.values())
            if size > room:
                shards.append({})
                room = SHARD_BYTES
            shards[-1] |= group
            room -= size
        self.files = {}  # name -> descriptor
        self.regions = {}  # tensor -> Region
        self.homes = {}  # tensor -> file name
        try:
            for number, shard in enumerate(shards, 1):
                name = f"model-{number:05}-of-{len(shards):05}.safetensors"
                self._open(name if len(shards) > 1 else "model.safetensors", shard, metadata)
        except BaseException:
            self.close()
            raise
        total = sum(map(n_bytes, self.tensors.values()))
        index = {
            "metadata": {"total_size": total, "total_parameters": parameters},
            "weight_map": dict(sorted(self.homes.items())),
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))

    def _open(self, file, shard, metadata):
        # Wide types first, so that each begins at a multiple of its own size.
        ordered = sorted(shard.items(), key=lambda item: -item[1][0].size)
        header, offset = {"__metadata__": metadata}, 0
        for name, (dtype, shape) in ordered:
            stop = offset + n_bytes((dtype, shape))
            header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self.files[file] = descriptor = os.open(self.directory / file, flags, 0o666)
        start = 8 + len(text)
        write_at(descriptor, len(text).to_bytes(8, "little") + text, 0)
        for name, spec in ordered:
            begin, stop = (start + offset for offset in header[name]["data_offsets"])
            self.regions[name] = Region(*spec, descriptor, begin, stop, sha256())
            self.homes[name] = file

    def append(self, name, rows):
        """Write the next rows of a tensor: (n, its last width), of its dtype."""
        region = self.regions[name]
        data = memoryview(mx.contiguous(rows).view(mx.uint8)).cast("B")
        if rows.dtype != region.dtype or len(data) > region.end - region.position:
            raise RuntimeError(f"{name} gets other rows than promised")
        write_at(region.file, data, region.position)
        region.position += len(data)
        region.digest.update(data)

    def verify(self):
        """Flush everything to the disk, then compare what MLX reads with what was meant, by bits.

        Raises:
            MCSDError: naming the file that differs.
        """
        for name, region in self.regions.items():
            if region.position != region.end:
                raise RuntimeError(f"{name} lacks {region.end - region.position} bytes")
        for descriptor in self.files.values():
            os.fsync(descriptor)
        for file in self.files:
            try:
                arrays = mx.load(str(self.directory / file))
                same = arrays.keys() == {name for name, home in self.homes.items() if home == file}
                while same and arrays:
                    name, array = arrays.popitem()  # one is in memory at a time
                    region = self.regions[name]
                    data = memoryview(array.view(mx.uint8)).cast("B")
                    same = (array.dtype, array.shape) == (region.dtype, region.shape)
                    same = same and sha256(data).digest() == region.digest.digest()
            except RuntimeError as error:
                raise MCSDError(
                    f"[convert] {file} cannot be read back: {one_line(error)}"
                ) from None
            if not same:
                raise MCSDError(
                    f"[convert] {file} must read back as it was written but differs; the disk may "
                    "be failing."
                )

    def close(self):
        """Close the files."""
        while self.files:
            os.close(self.files.popitem()[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def n_bytes(spec):
    """The bytes of (dtype, shape)."""
    dtype, shape = spec
    return dtype.size * math.prod(shape)


def write_at(descriptor, data, position):
    """Write all of `data`: the system may take less at a time."""
    data = memoryview(data)
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written
