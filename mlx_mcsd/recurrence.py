"""The one recurrence every fixed-decay mixer needs.

    h_{n+1} = lambda (h_n + x_n)                                     h_0 given, lambda per channel

The outputs are *exclusive*: at token n the reader gets h_n, what the tokens before n left behind.
Two plain forms compute it, `step` for one token and `chunked` for many, and on a GPU the kernel
`kernels.decay_scan` does what `chunked` does; `scan` picks one. They share one signature:

    x       (B, N, C, Dc)   any float dtype
    lam     C floats        strictly between 0 and 1
    h0      (B, C, Dc)      float32; None is zero
    mask    (B, N)          bool; where False no token exists: the state passes it unchanged
    reset   (B, N)          bool; the state restarts at zero *before* this token; void where masked
    ->  h   (B, N, C, Dc)   float32, the state before each token
        h'  (B, C, Dc)      float32, the state after the last one

State and accumulation are float32 whatever the input is: the slowest decays are 1.0 in bfloat16.

Letters: B batch, N tokens, C channels, Dc features per channel, T tokens per chunk, n chunks.
"""

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from . import kernels
from .arguments import check_scan
from .errors import MCSDError

CHUNK = 64  # T


def scan(
    x: mx.array,
    lam: Sequence[float],
    h0: mx.array | None = None,
    mask: mx.array | None = None,
    reset: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Run the recurrence over x in the form that suits its length; see the module for shapes.

    Raises:
        MCSDError: if a shape, a dtype or a decay is unfit.
    """
    if x.ndim == 4 and x.shape[1] == 1:
        form = step
    else:
        form = kernels.decay_scan if kernels.available(x.dtype) else chunked
    return form(x, lam, h0, mask, reset)


def step(
    x: mx.array,
    lam: Sequence[float],
    h0: mx.array | None = None,
    mask: mx.array | None = None,
    reset: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Read one token, N = 1: ``h' = lambda (h + x)``, elementwise. A masked one leaves h as it is.

    Raises:
        MCSDError: if a shape, a dtype or a decay is unfit.
    """
    lam, h0 = check_scan(x, lam, h0, mask, reset)
    if x.shape[1] != 1:
        raise MCSDError(f"[step] x must hold one token, (B, 1, C, Dc), but got {x.shape}.")
    h = h0
    if reset is not None:
        restart = reset if mask is None else reset & mask
        h = mx.where(restart[..., None], 0.0, h)  # (B, C, Dc)
    h_next = _column(lam) * (h + x[:, 0].astype(mx.float32))  # (B, C, Dc)
    if mask is not None:
        h_next = mx.where(mask[..., None], h_next, h)
    return h[:, None], h_next


def chunked(
    x: mx.array,
    lam: Sequence[float],
    h0: mx.array | None = None,
    mask: mx.array | None = None,
    reset: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Read N tokens at once: one matmul per chunk of T tokens, all chunks in parallel.

    Inside a chunk that starts in state h, for i = 1..T, the last being the next chunk's start,

        h_i = lambda^i h + sum_{j < i} lambda^(i-j) x_j                         j = 0..T-1

    Masked tokens are taken out before and the states put back in their places after, so that the
    exponents count the tokens that exist and a padded row gives what the row gives alone.

    Raises:
        MCSDError: if a shape, a dtype or a decay is unfit.
    """
    lam, h0 = check_scan(x, lam, h0, mask, reset)
    B, N = x.shape[:2]
    x = x.astype(mx.float32)
    if N == 0:
        return x, h0
    if mask is None:
        states = _states(x, lam, h0, reset)
    else:
        p, t = count_tokens(mx.zeros(B, mx.int32), N, mask)
        clock = mx.concatenate([p, t[:, None]], axis=1)  # (B, N+1), tokens that exist before each
        exists = mx.arange(N) < t[:, None]
        row = mx.arange(B)[:, None]
        # The existing tokens first, in order; no two keys are equal, so any sort will do.
        order = mx.argsort(mx.where(mask, 0, N) + mx.arange(N), axis=1)  # (B, N)
        # `where`, not a product: a NaN in the padding must not survive, nor in the gradient.
        x = mx.where(exists[..., None, None], x[row, order], 0.0)
        if reset is not None:
            reset = reset & mask
        cut = None if reset is None else reset[row, order]
        states = _states(x, lam, h0, cut)[row, clock]
    h = states[:, :-1]
    if reset is not None:
        h = mx.where(reset[..., None, None], 0.0, h)
    # Gathered, not sliced: a view would keep all N states alive as long as the last one lives.
    return h, mx.take(states, mx.array(N), axis=1)


def count_tokens(
    count0: mx.array, N: int, mask: mx.array | None = None, reset: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Count, before each of N tokens and after the last, the tokens of the current document.

    Args:
        count0: (B,) int32, tokens of the document already read.
        N: tokens being read.
        mask: (B, N) bool, False where a token does not exist.
        reset: (B, N) bool, True where a document begins; void where masked.

    Returns:
        (B, N) int32 and (B,) int32.
    """
    if count0.dtype != mx.int32:
        raise MCSDError(f"[count_tokens] count0 must be int32 but got {count0.dtype}.")
    if mask is None and reset is None:
        if N == 1:
            return count0[:, None], count0 + 1
        return count0[:, None] + mx.arange(N, dtype=mx.int32), count0 + N
    m = mx.ones((count0.shape[0], N), mx.bool_) if mask is None else mask
    m = m.astype(mx.int32)
    c = count0[:, None] + mx.cumsum(m, axis=1) - m  # (B, N)
    c_last = count0 + m.sum(axis=1)
    if reset is None or N == 0:
        return c, c_last
    # The reading of c where the document began; 0 where none has begun, which keeps count0.
    start = mx.cummax(mx.where(reset, c * m, 0), axis=1)
    return c - start, c_last - start[:, -1]


def _states(
    x: mx.array,
    lam: tuple[float, ...],
    h0: mx.array,
    cut: mx.array | None = None,
    stride: int = 1,
    lag: int = 1,
) -> mx.array:
    """Return h0 and the state after each of N tokens, (B, N+1, C, Dc).

    The starts H_k of the chunks obey ``H_{k+1} = lambda^T H_k + c_k``, c_k being what chunk k alone
    leaves behind: the same recurrence once more. Level l therefore runs ``h_{n+1} = lambda^stride
    h_n + lambda^lag x_n`` with stride = T^l, and lag = 1 for tokens, 0 for carries; no level loops
    over its chunks. An element that is `cut`, (B, N) bool, drops h_n.
    """
    N, T = x.shape[1], CHUNK
    n = -(-N // T)
    weight, decay = _powers(lam, stride, lag)  # (C, T, T), (T, C)
    x = mx.pad(x, [(0, 0), (0, n * T - N), (0, 0), (0, 0)])
    x = mx.unflatten(x, 1, (n, T)).swapaxes(2, 3)  # (B, n, C, T, Dc)
    cuts = None
    if cut is not None:
        cut = mx.unflatten(mx.pad(cut, [(0, 0), (0, n * T - N)]), 1, (n, T))
        segment = mx.cumsum(cut.astype(mx.int32), axis=2)  # (B, n, T), cuts in the chunk so far
        same = segment[..., :, None] == segment[..., None, :]  # (B, n, T, T)
        # Weights are zeroed, never sums subtracted: cancellation would leak the past.
        weight = mx.where(same[:, :, None], weight, 0.0)  # (B, n, C, T, T)
        decay = mx.where((segment == 0)[..., None], decay, 0.0)  # (B, n, T, C)
        cuts = cut.any(axis=2)  # (B, n)

    h = weight @ x  # (B, n, C, T, Dc), from a start of zero
    H = h0[:, None]  # (B, n, C, Dc), the starts
    if n > 1:
        H = _states(h[..., -1, :], lam, h0, cuts, stride * T, 0)[:, :-1]
    h = h.swapaxes(2, 3) + decay[..., None] * H[:, :, None]  # (B, n, T, C, Dc)
    return mx.concatenate([h0[:, None], h.flatten(1, 2)[:, :N]], axis=1)


@lru_cache(maxsize=64)
def _powers(lam: tuple[float, ...], stride: int, lag: int) -> tuple[mx.array, mx.array]:
    """Weights, in the state after element i, of element j (C, T, T) and of the start (T, C).

    The powers are taken in float64: lambda^stride would lose its digits in float32.
    """
    base = np.array(lam, np.float64)  # (C,)
    i = np.arange(CHUNK)
    ago = i[:, None] - i  # (T, T)
    weight = np.where(ago >= 0, base[:, None, None] ** (stride * np.abs(ago) + lag), 0.0)
    decay = base ** (stride * (i[:, None] + 1))
    return mx.array(weight.astype(np.float32)), mx.array(decay.astype(np.float32))


@lru_cache(maxsize=64)
def _column(lam: tuple[float, ...]) -> mx.array:
    """The decays as (C, 1) float32."""
    return mx.array(np.array(lam, np.float32)[:, None])
