"""The numbers of a parameter, a bounded number at a time, checked on their way."""

from hashlib import sha256
from itertools import groupby

import mlx.core as mx

from mlx_mcsd.errors import MCSDError

CHUNK = 64_000_000
"""Bytes of rows that are worked on at a time; every temporary array is about as large."""


def chunks(rows):
    """Yield an array (n, width) in runs of rows of about `CHUNK` bytes, at least one row each."""
    step = max(1, CHUNK // max(1, rows.nbytes // rows.shape[0]))
    for start in range(0, rows.shape[0], step):
        yield rows[start : start + step]


class Reader:
    """Reads the tensors of a checkpoint for a model.

    Args:
        checkpoint: a `Checkpoint`.
        dtype: what the weights are cast to, or None.
        allow_nonfinite: let NaN and infinity through.
    """

    def __init__(self, checkpoint, dtype=None, allow_nonfinite=False):
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.allow_nonfinite = allow_nonfinite

    def read(self, name):
        """Return one tensor, checked.

        Raises:
            MCSDError: it holds NaN or infinity, or numbers that `dtype` does not.
        """
        tensor = self.checkpoint.load(name)
        finite = fits = 0
        for rows in chunks(tensor.reshape(-1, tensor.shape[-1])):
            finite += mx.isfinite(rows).sum().item()
            if self.dtype is not None:
                fits += mx.isfinite(rows.astype(self.dtype)).sum().item()
        if finite < tensor.size and not self.allow_nonfinite:
            raise MCSDError(
                f"[convert] {name} must be finite but {tensor.size - finite} of its {tensor.size} "
                "numbers are NaN or infinite; --allow-nonfinite takes them."
            )
        if self.dtype is not None and fits < finite:
            raise MCSDError(
                f"[convert] {name} must lie within {mx.finfo(self.dtype).max:g} for this --dtype "
                "but does not; use float32."
            )
        return tensor

    def rows(self, parameter):
        """Yield the rows of a parameter in their order, (n, width), cast and ready to store.

        One source tensor is in memory at a time; those of per-channel projections, whose rows
        alternate, are all.
        """
        for rows in self._channelwise(parameter) if parameter.shape[2:] else self._plain(parameter):
            for chunk in chunks(rows):
                yield chunk.astype(parameter.dtype)

    def _plain(self, parameter):
        for name, parts in groupby(parameter.parts, lambda part: part.source):
            tensor = self.read(name)
            tensor = tensor.reshape(-1, tensor.shape[-1])
            for part in parts:
                n = tensor.shape[0] // part.count
                yield tensor[part.index * n : (part.index + 1) * n]
            del tensor  # before the next one is read

    def _channelwise(self, parameter):
        C, _, Dc = parameter.shape
        tensors = {part.source: self.read(part.source) for part in parameter.parts}
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                tensors[name] = diagonal_blocks(name, tensor, C)
        for c in range(C):
            blocks = []
            for part in parameter.parts:
                tensor = tensors[part.source]  # (C, count Dc, Dc)
                blocks.append(tensor[c, part.index * Dc : (part.index + 1) * Dc])
            yield mx.concatenate(blocks)


def diagonal_blocks(name, tensor, C):
    """Compact matrices with C blocks on their diagonal: (count D, D) -> (C, count Dc, Dc).

    Raises:
        MCSDError: naming the tensor and its largest number off the blocks, unless all are zero.
    """
    D = tensor.shape[1]
    Dc = D // C
    stacked = tensor.reshape(-1, C, Dc, D)  # (count, C, Dc, D)
    blocks, off = [], []
    for c in range(C):
        rows = stacked[:, c]  # (count, Dc, D)
        blocks.append(rows[..., c * Dc : (c + 1) * Dc])
        for outside in (rows[..., : c * Dc], rows[..., (c + 1) * Dc :]):
            if outside.size and mx.any(outside != 0):
                off.append(mx.abs(outside).max().item())
    if off:
        raise MCSDError(
            f"[convert] {name} must be zero off its {C} diagonal blocks for per-channel "
            f"projections but holds up to {max(off):g} there; dense ones are "
            "--config projection=dense."
        )
    return mx.stack([block.reshape(-1, Dc) for block in blocks])


def fingerprint(tensor):
    """Return a digest of an array's numbers, whatever the type they are stored in."""
    digest = sha256()
    for rows in chunks(tensor.reshape(-1, tensor.shape[-1])):
        digest.update(memoryview(rows.astype(mx.float32) + 0.0))  # -0 is 0
    return digest.digest()
