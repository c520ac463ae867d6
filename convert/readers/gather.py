"""Reading a tensor from where its items lie in a file, contiguous or not."""

import math

import numpy as np

from .files import read_at, refuse, shown

# Strided tensors are gathered in pieces of this many bytes.
PIECE = 64 * 2**20


def reach(shape, strides):
    """How many items the last one of a tensor lies behind the first."""
    return sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


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
    reaches = [(n - 1) * s for n, s in zip(out.shape, strides, strict=True)]
    if (sum(reaches) + 1) * item <= PIECE:
        flat = np.frombuffer(read_at(stream, start, (sum(reaches) + 1) * item), out.dtype)
        steps = [s * item for s in strides]
        out[...] = np.lib.stride_tricks.as_strided(flat, out.shape, steps, writeable=False)
        return
    # Too far apart for one piece: some steps of the slowest axis at a time.
    axis = int(np.argmax(reaches))
    step = max(1, (PIECE // item - (sum(reaches) - reaches[axis])) // strides[axis])
    step = min(step, (out.shape[axis] + 1) // 2)
    for first in range(0, out.shape[axis], step):
        part = out[(slice(None),) * axis + (slice(first, first + step),)]
        gather(stream, start + first * strides[axis] * item, part, strides)
