"""What every form of the recurrence, and every kernel of a block, asks of its arguments."""

from functools import lru_cache

import mlx.core as mx

from .errors import MCSDError

DTYPES = (mx.float32, mx.float16, mx.bfloat16)  # that kernels read


@lru_cache(maxsize=64)
def _check_decays(lam: tuple[float, ...]) -> None:
    for v in lam:
        if not 0.0 < v < 1.0:
            raise MCSDError(f"[scan] every decay must lie strictly between 0 and 1 but got {v}.")


def check_scan(x, lam, h0, mask, reset) -> tuple[tuple[float, ...], mx.array]:
    """Check a scan's arguments; return lam as a tuple of floats and h0 as an array.

    Raises:
        MCSDError: if a shape, a dtype or a decay is unfit.
    """
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


def check_block(op, tokens, states, n, gain, beta) -> None:
    """Check what a block's kernel would read past the end of, or take for another type.

    Raises:
        MCSDError: if a shape or a dtype is unfit.
    """
    U, step = tokens[0].shape, op == "mcsd_step"  # (B, N, C, Dc)
    if len(U) != 4 or (step and U[1] != 1):
        what = "one token, (B, 1, C, Dc)," if step else "tokens, (B, N, C, Dc),"
        raise MCSDError(f"[{op}] U must hold {what} but got {U}.")
    state = (U[0], *U[2:]) if step else U
    wanted = [(name, a, U, DTYPES) for name, a in zip("UVEF", tokens, strict=True)]
    wanted += [(name, a, state, (mx.float32,)) for name, a in zip("AH", states, strict=True)]
    wanted += [("n", n, state[:-2], (mx.int32,)), ("gain", gain, (U[2] * U[3],), DTYPES)]
    for name, a, fit, dtypes in wanted:
        if a.shape != fit or a.dtype not in dtypes:
            of = " or ".join(map(str, dtypes))
            cast = "; a state is never cast" if name in "AH" else ""
            raise MCSDError(f"[{op}] {name} must be {of} {fit} but got {a.dtype} {a.shape}{cast}.")
    if len(beta) != U[2]:
        raise MCSDError(f"[{op}] beta must hold one slope per channel, {U[2]}, but got {beta}.")
