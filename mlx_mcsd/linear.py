"""mlx's linear and embedding layers, whose matrix a decode step on the CPU reads in packed form.

OpenBLAS multiplies a few tokens by a large matrix only after copying the matrix, block by block,
into the order in which it reads it; small matrices it reads as they are. `pack` stores a matrix as
small ones in that order, once: 1.8 times the speed for one token, 1.6 for sixteen, at the price of
a second copy. On a GPU nothing is packed.

Letters: M tokens, D features in, R features out (the rows of the matrix), k blocks of R/k rows.
"""

import threading
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

PRODUCTS = 1_000_000  # M D R/k: above, OpenBLAS copies
FEW_TOKENS = 16  # M: up to these, matrices are packed for
WIDTHS = range(64, 31, -1)  # R/k: outside, blocks are slower than the whole
LIMIT = 2**30  # bytes of all packed matrices together: speed on a CPU is for small models

_local = threading.local()


class _Rows:
    """A matrix as it is stored, and perhaps packed; packed, it counts only inside `packed`."""

    def times_rows(self, x: mx.array) -> mx.array:
        """Return x W^T, (..., D) -> (..., R)."""
        blocks = self.get("_packed") if getattr(_local, "packed", False) else None
        D = x.shape[-1]
        if blocks is None or (M := x.size // D) * D * blocks.shape[-1] > PRODUCTS:
            return x @ self["weight"].T
        y = x.reshape(M, D) @ blocks  # (k, M, R/k)
        if M > 1:
            y = y.swapaxes(0, 1)
        return y.reshape(*x.shape[:-1], -1)

    def pack(self) -> None:
        """Pack the matrix, unless that was done since it was last replaced."""
        # Names with an underscore are not parameters: they are neither trained nor saved.
        if self.get("_packed_from") is self["weight"]:
            return
        self.keep_packed()
        R, D = self["weight"].shape
        widths = [w for w in WIDTHS if R % w == 0]
        if not widths or self["weight"].dtype != mx.float32:
            self.pop("_packed", None)
        else:
            width = next((w for w in widths if FEW_TOKENS * D * w <= PRODUCTS), widths[-1])
            blocks = self["weight"].reshape(R // width, width, D).swapaxes(1, 2)
            self["_packed"] = mx.contiguous(blocks)  # (k, D, R/k)
            mx.eval(self["_packed"])

    def keep_packed(self) -> None:
        """Take the matrix for what was packed: a compiled call replaces its inputs by equals."""
        self["_packed_from"] = self["weight"]


class Linear(_Rows, nn.Linear):
    """``y = x W^T``: `mlx.nn.Linear` without a bias."""

    def __init__(self, input_dims: int, output_dims: int):
        super().__init__(input_dims, output_dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., D) -> (..., R)."""
        return self.times_rows(x)


class Embedding(_Rows, nn.Embedding):
    """`mlx.nn.Embedding`, whose transpose serves as a tied head."""

    def as_linear(self, x: mx.array) -> mx.array:
        """(..., D) -> (..., R), R being the size of the vocabulary."""
        return self.times_rows(x)


def matrices(model: nn.Module) -> list[_Rows]:
    """Return the layers of a model that are a matrix; a quantized one is another layer."""
    return [module for module in model.modules() if isinstance(module, _Rows)]


def packable(model: nn.Module) -> list[_Rows]:
    """Return the layers whose `pack` pays: all within the limit, on Linux's CPU; else none."""
    layers = matrices(model)
    small = sum(layer["weight"].nbytes for layer in layers) <= LIMIT
    # Apple's own BLAS, which serves the CPU of a Mac, was never measured.
    here = mx.default_device() == mx.cpu and not mx.metal.is_available()
    return layers if small and here else []


@contextmanager
def packed():
    """Let layers of this thread read their packed matrices, which the caller has brought up."""
    _local.packed = True
    try:
        yield
    finally:
        _local.packed = False
