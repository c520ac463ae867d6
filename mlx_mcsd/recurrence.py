"""The one recurrence every fixed-decay mixer needs.

    h_{n+1} = lambda (h_n + x_n)                                     h_0 given, lambda per channel

The outputs are *exclusive*: at token n the reader gets h_n, what the tokens before n left behind.
Two forms compute it, `step` for one token and `chunked` for many, and `scan` picks one. They share
one signature:

    x       (B, N, C, Dc)   any float dtype
    lam     C floats        strictly between 0 and 1
    h0      (B, C, Dc)      float32; None is zero
    mask    (B, N)          bool; where False no token exists: the state passes it unchanged
    reset   (B, N)          bool; the state restarts at zero *before* this token; void where masked
    ->  h   (B, N, C, Dc)   float32, the state before each token; finite but void where masked
        h'  (B, C, Dc)      float32, the state after the last one

State and accumulation are float32 whatever the input is: the slowest decays are 1.0 in bfloat16.

Letters: B batch, N tokens, C channels, Dc features per channel, T tokens per chunk, n chunks.
"""

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

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
    form = step if x.ndim == 4 and x.shape[1] == 1 else chunked
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
    lam, h0 = _check(x, lam, h0, mask, reset)
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

    Inside a chunk that starts in state h, for i = 0..T, T being the next chunk's start,

        h_i = lambda^i h + sum_{j < i} lambda^(i-j) x_j

    Masked tokens are taken out before and the states put back in their places after, so that the
    exponents count the tokens that exist and a padded row gives what the row gives alone.

    Raises:
        MCSDError: if a shape, a dtype or a decay is unfit.
    """
    lam, h0 = _check(x, lam, h0, mask, reset)
    if x.shape[1] == 0:
        return x.astype(mx.float32), h0
    x = x.astype(mx.float32)
    if mask is None:
        return _states(x, lam, h0, reset)

    p, t = count_tokens(mx.zeros(x.shape[0], mx.int32), x.shape[1], mask)
    order = mx.argsort(~mask, axis=1)  # (B, N), stable: the existing tokens first, in order
    exists = mx.arange(x.shape[1]) < t[:, None]
    # `where`, not a product: a NaN in the padding must not survive, nor in the gradient.
    x = mx.where(
        exists[..., None, None], mx.take_along_axis(x, order[..., None, None], axis=1), 0.0
    )
    if reset is not None:
        reset = mx.take_along_axis(reset, order, axis=1) & exists
    h, h_last = _states(x, lam, h0, reset)

    h = mx.concatenate([h, h_last[:, None]], axis=1)  # (B, N+1, C, Dc), a state per clock reading
    clock = mx.concatenate([p, t[:, None]], axis=1)  # (B, N+1)
    h = mx.take_along_axis(h, clock[..., None, None], axis=1)
    return h[:, :-1], h[:, -1]


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
) -> tuple[mx.array, mx.array]:
    """Chunked form without masks, and the recursion that carries states from chunk to chunk.

    The starts H_k of the chunks obey ``H_{k+1} = lambda^T H_k + c_k``, the same recurrence once
    more. Level l therefore runs ``h_{n+1} = lambda^stride h_n + lambda^lag x_n`` with stride = T^l
    and lag = 1 for tokens, 0 for carries, and no level loops over its chunks.

    `cut` (B, N) drops the past at an element; like the decay it is felt at the state read there
    for tokens, one later for carries: H_k precedes whatever happens in chunk k.
    """
    B, N, C, Dc = x.shape
    T, n = CHUNK, -(-N // CHUNK)
    table, decay = _powers(lam, stride, lag)  # (C, T+1, T), (C, T+1)
    x = mx.pad(x, [(0, 0), (0, n * T - N), (0, 0), (0, 0)])
    x = mx.unflatten(x, 1, (n, T)).swapaxes(2, 3)  # (B, n, C, T, Dc)
    table, decay = table[None, None], decay[None, None]
    cuts = None
    if cut is not None:
        cut = mx.unflatten(mx.pad(cut, [(0, 0), (0, n * T - N)]), 1, (n, T))
        segment = mx.cumsum(cut.astype(mx.int32), axis=2)  # (B, n, T), cuts so far in the chunk
        at = mx.concatenate([mx.zeros_like(segment[..., :1]), segment, segment[..., -1:]], axis=2)
        at = at[..., lag : lag + T + 1]  # (B, n, T+1), as felt by each state
        same = at[..., None] == segment[..., None, :]  # (B, n, T+1, T)
        # Weights are zeroed, never differences taken: cancellation would leak the past.
        table = mx.where(same[:, :, None], table, 0.0)  # (B, n, C, T+1, T)
        decay = mx.where((at == 0)[:, :, None], decay, 0.0)  # (B, n, C, T+1)
        cuts = cut.any(axis=2)  # (B, n)
    h = table @ x  # (B, n, C, T+1, Dc)

    if n == 1:
        H = h0[:, None]  # (B, 1, C, Dc)
    else:
        H, _ = _states(h[..., T, :], lam, h0, cuts, stride * T, 0)  # (B, n, C, Dc)

    h = h + decay[..., None] * H[..., None, :]
    last = h[:, -1, :, N - (n - 1) * T]  # (B, C, Dc)
    h = h[..., :T, :].swapaxes(2, 3).reshape(B, n * T, C, Dc)
    return h[:, :N], last


@lru_cache(maxsize=64)
def _powers(lam: tuple[float, ...], stride: int, lag: int) -> tuple[mx.array, mx.array]:
    """Weight of input j in state i, (C, T+1, T), and of the chunk's start in it, (C, T+1).

    The powers are taken in float64: lambda^stride itself may not be known to float32.
    """
    base = np.array(lam, np.float64)[:, None]  # (C, 1)
    i = np.arange(CHUNK + 1)
    ago = i[:, None] - 1 - i[None, :-1]  # (T+1, T), elements between input j and state i
    weight = base[:, None] ** (stride * np.maximum(ago, 0) + lag) * (ago >= 0)
    decay = base ** (stride * i)
    return mx.array(weight.astype(np.float32)), mx.array(decay.astype(np.float32))


@lru_cache(maxsize=64)
def _column(lam: tuple[float, ...]) -> mx.array:
    """The decays as (C, 1) float32."""
    return mx.array(np.array(lam, np.float32)[:, None])


@lru_cache(maxsize=64)
def _check_decays(lam: tuple[float, ...]) -> None:
    for v in lam:
        if not 0.0 < v < 1.0:
            raise MCSDError(f"[scan] every decay must lie strictly between 0 and 1 but got {v}.")


def _check(x, lam, h0, mask, reset) -> tuple[tuple[float, ...], mx.array]:
    """Check the arguments; return lam as a tuple of floats and h0 as an array."""
    if x.ndim != 4 or not mx.issubdtype(x.dtype, mx.floating):
        raise MCSDError(f"[scan] x must be float (B, N, C, Dc) but got {x.dtype} {x.shape}.")
    B, N, C, Dc = x.shape
    if not isinstance(lam, tuple):
        lam = tuple(float(v) for v in lam)
    if len(lam) != C:
        raise MCSDError(f"[scan] lam must hold one decay per channel, {C}, but got {len(lam)}.")
    _check_decays(lam)
    if h0 is None:
        h0 = mx.zeros((B, C, Dc), mx.float32)
    elif h0.dtype != mx.float32 or h0.shape != (B, C, Dc):
        raise MCSDError(
            f"[scan] h0 must be float32 {(B, C, Dc)} but got {h0.dtype} {h0.shape}; "
            "a state is never cast."
        )
    for name, m in (("mask", mask), ("reset", reset)):
        if m is not None and (m.dtype != mx.bool_ or m.shape != (B, N)):
            raise MCSDError(f"[scan] {name} must be bool {(B, N)} but got {m.dtype} {m.shape}.")
    return lam, h0
