"""The numbers of a parameter, a bounded number at a time, checked on their way."""

from hashlib import sha256
from itertools import groupby

import mlx.core as mx
import numpy as np

from mlx_mcsd.errors import MCSDError

CHUNK = 64_000_000
"""Bytes of rows that are worked on at a time; every temporary array is about as large."""


class Reader:
    """Reads the tensors of a checkpoint for a model.

    A tensor is held once, as it is stored; everything else is done to a few of its rows.

    Args:
        checkpoint: a `Checkpoint`.
        dtype: what the weights are cast to, or None.
        allow_nonfinite: let NaN and infinity through.
    """

    def __init__(self, checkpoint, dtype=None, allow_nonfinite=False):
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.allow_nonfinite = allow_nonfinite

    def rows(self, parameter):
        """Yield the rows of a parameter in their order, (n, width), cast and ready to store.

        One source tensor is in memory at a time; those of per-channel projections, whose rows
        alternate, are all.

        Raises:
            MCSDError: see `read`, `diagonal_blocks`.
        """
        for rows in self._channelwise(parameter) if parameter.shape[2:] else self._plain(parameter):
            yield rows.astype(parameter.dtype)

    def _plain(self, parameter):
        for name, parts in groupby(parameter.parts, lambda part: part.source):
            values = self.read(name)
            for part in parts:
                n = values.shape[0] // part.count
                yield from self.chunks(name, values[part.index * n : (part.index + 1) * n])
            del values  # before the next ones are read

    def _channelwise(self, parameter):
        C, _, Dc = parameter.shape
        sources = {part.source: self.read(part.source, C) for part in parameter.parts}
        for c in range(C):
            blocks = []
            for part in parameter.parts:
                rows = sources[part.source][c, part.index * Dc : (part.index + 1) * Dc]
                blocks.append(self.checkpoint.arrive(part.source, rows))  # (Dc, Dc)
            yield mx.concatenate(blocks)

    def read(self, name, C=None):
        """Return the values of a tensor, checked, as rows; or, given C, as (C, count Dc, Dc).

        Raises:
            MCSDError: it holds NaN or infinity, or numbers that `dtype` does not.
        """
        values = self.checkpoint.values(name)
        rows = values.reshape(-1, values.shape[-1])
        finite = fits = 0
        for chunk in self.chunks(name, rows):
            finite += mx.isfinite(chunk).sum().item()
            if self.dtype is not None:
                fits += mx.isfinite(chunk.astype(self.dtype)).sum().item()
        if finite < values.size and not self.allow_nonfinite:
            raise MCSDError(
                f"[convert] {name} must be finite but {values.size - finite} of its {values.size} "
                "numbers are NaN or infinite; --allow-nonfinite takes them."
            )
        if self.dtype is not None and fits < finite:
            raise MCSDError(
                f"[convert] {name} must lie within {mx.finfo(self.dtype).max:g} for this --dtype "
                "but does not; use float32."
            )
        if C is None:
            return rows
        return self.diagonal_blocks(name, values, C) if values.ndim == 2 else values

    def chunks(self, name, rows):
        """Yield rows as MLX arrays, in runs of about `CHUNK` bytes, at least one row each."""
        step = max(1, CHUNK // max(1, rows.nbytes // rows.shape[0]))
        for start in range(0, rows.shape[0], step):
            yield self.checkpoint.arrive(name, rows[start : start + step])

    def diagonal_blocks(self, name, values, C):
        """Compact matrices with C blocks on their diagonal: (count D, D) -> (C, count Dc, Dc).

        Raises:
            MCSDError: naming the tensor and its largest number off the blocks, unless all are zero.
        """
        D = values.shape[1]
        Dc = D // C
        stacked = values.reshape(-1, C, Dc, D)  # (count, C, Dc, D)
        blocks, off = [], []
        for c in range(C):
            rows, block = stacked[:, c], slice(c * Dc, (c + 1) * Dc)  # (count, Dc, D)
            blocks.append(rows[..., block].reshape(-1, Dc))
            outside = self.checkpoint.arrive(name, np.delete(rows, block, axis=-1))
            if outside.size and mx.any(outside != 0):
                off.append(mx.abs(outside).max().item())
        if off:
            raise MCSDError(
                f"[convert] {name} must be zero off its {C} diagonal blocks for per-channel "
                f"projections but holds up to {max(off):g} there; dense ones are "
                "--config projection=dense."
            )
        return np.stack(blocks)

    def fingerprint(self, name):
        """Return a digest of a tensor's numbers, whatever the type they are stored in."""
        digest = sha256()
        for chunk in self.chunks(name, self.read(name)):
            digest.update(memoryview(chunk.astype(mx.float32) + 0.0))  # -0 is 0
        return digest.digest()
