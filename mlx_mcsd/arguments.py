"""What every form of the recurrence, plain or kernel, asks of its arguments."""

from functools import lru_cache

import mlx.core as mx

from .errors import MCSDError


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
