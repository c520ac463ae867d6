"""The Metal kernels: the bodies in metal/, built once, called, and differentiated.

A function here gives what the operations give that run where no GPU is, to rounding. Only
:func:`available` asks for a GPU, so a graph with kernels in it can be made and exported anywhere.

Letters: B batch, N tokens, C channels, Dc features per channel, D = C Dc, S segments of time.
"""

import io
import os
import sys
from collections.abc import Sequence
from functools import cache, lru_cache, partial
from importlib.resources import files

import mlx.core as mx
import numpy as np

from .arguments import DTYPES, check_block, check_scan
from .errors import MCSDError
from .pieces import in_pieces, send

LANES = 32  # of a simdgroup
FULL_GRID = 16_384  # threads below which a GPU starves: time is then split into segments
SEGMENTS = (4, 8, 16)  # one simdgroup each, at most 512 threads; of two, one would always wait
SEGMENT_TOKENS = 32  # at least, or combining the segments costs more than they save
STEP_FEATURES = 4  # of a lane, for one channel of one token: enough to outweigh its constants
STEP_SIMDGROUPS = 16  # at most, for the same
NOT_CONSTANT = 8  # elements: MLX puts an input of fewer into Metal's constant memory
MIX_TOKENS = 16  # that a simdgroup takes in turn, its share of the gain held in registers


def available(dtype: mx.Dtype) -> bool:
    """Tell whether kernels run here: Metal, a GPU as the default device, and a dtype they read.

    ``MLX_MCSD_KERNELS=off`` forces the plain forms, and is answered on stderr once.

    Raises:
        MCSDError: if that variable is neither "on" nor "off".
    """
    return (
        _wanted(os.environ.get("MLX_MCSD_KERNELS", "on"))
        and dtype in DTYPES
        and mx.metal.is_available()
        and mx.default_device() == mx.gpu
    )


@cache
def _wanted(setting: str) -> bool:
    if setting not in ("on", "off"):
        raise MCSDError(f"[kernels] MLX_MCSD_KERNELS must be on or off but got {setting!r}.")
    if setting == "off":
        print("MLX_MCSD_KERNELS=off: running the plain forms, no Metal kernel.", file=sys.stderr)
    return setting == "on"


def decay_scan(
    x: mx.array,
    lam: Sequence[float],
    h0: mx.array | None = None,
    mask: mx.array | None = None,
    reset: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Run ``h_{n+1} = lambda (h_n + x_n)``, exclusive; see :mod:`mlx_mcsd.recurrence` for shapes.

    x is read in the strides it has. The gradient runs through :func:`decay_scan_grad`.

    Raises:
        MCSDError: if a shape, a dtype or a decay is unfit.
    """
    lam, h0 = check_scan(x, lam, h0, mask, reset)
    _check_dtype(x)
    if x.size == 0:
        return mx.zeros(x.shape, mx.float32), h0
    return in_pieces(partial(_scan, lam), h0, x, mask, reset)


def decay_scan_grad(
    dh: mx.array,
    lam: Sequence[float],
    dlast: mx.array | None = None,
    mask: mx.array | None = None,
    reset: mx.array | None = None,
    dtype: mx.Dtype = mx.float32,
) -> tuple[mx.array, mx.array]:
    """Return what :func:`decay_scan` passes back to x and h0: the same recurrence, from the end.

    Args:
        dh: (B, N, C, Dc), any float dtype, the cotangent of every h.
        lam: C floats.
        dlast: (B, C, Dc) float32, the cotangent of the last state; None is zero.
        mask: (B, N) bool, as the scan had it.
        reset: (B, N) bool, as the scan had it.
        dtype: of dx, that is of x.

    Returns:
        dx (B, N, C, Dc) and dh0 (B, C, Dc) float32.

    Raises:
        MCSDError: if a shape, a dtype or a decay is unfit.
    """
    lam, dlast = check_scan(dh, lam, dlast, mask, reset)
    _check_dtype(dh)
    if dh.size == 0:
        return mx.zeros(dh.shape, dtype), dlast
    return in_pieces(partial(_scan_grad, lam, dtype), dlast, dh, mask, reset, backwards=True)


def mcsd_step(
    U: mx.array,
    V: mx.array,
    E: mx.array,
    F: mx.array,
    A: mx.array,
    H: mx.array,
    count: mx.array,
    gain: mx.array,
    *,
    beta: tuple[float, ...],
    alpha: tuple[float, ...],
    eps: float,
    concat: bool = False,
    mask: mx.array | None = None,
    reset: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Read one token in a slope and a decay section: gates, norm, fusion and the new state.

    One dispatch does what lies between the projections and the next product; for inference, since
    it has no gradient. See :mod:`mlx_mcsd.mixers.mcsd` for the symbols.

    Args:
        U: (B, 1, C, Dc), any dtype of DTYPES and any strides; V, E and F likewise.
        V: the slope's history.
        E: the decay's history.
        F: the decay's current token.
        A: (B, C, Dc) float32, the slope state.
        H: (B, C, Dc) float32, the decay state.
        count: (B,) int32, tokens read before.
        gain: (D,), the norm's.
        beta: C slopes.
        alpha: C decays.
        eps: the norm's.
        concat: theta holds both sections side by side, rather than their sum.
        mask: (B, 1) bool, False where no token exists.
        reset: (B, 1) bool, True where a document begins; void where masked.

    Returns:
        theta (B, 1, D) or (B, 1, 2D) in U's dtype, and the new A, H and count.

    Raises:
        MCSDError: if a shape or a dtype is unfit.
    """
    check_block("mcsd_step", (U, V, E, F), (A, H), count, gain, beta)
    check_scan(V, alpha, A, mask, reset)
    B, _, C, Dc = U.shape
    shape = (B, 1, C * Dc * (2 if concat else 1))
    if U.size == 0:
        return mx.zeros(shape, U.dtype), A, H, count
    W = min(-(-Dc // (LANES * STEP_FEATURES)), STEP_SIMDGROUPS)
    sizes = [("W", W), ("PER_LANE", -(-Dc // (LANES * W)))]
    theta, A, H, count = kernel("mcsd_step")(
        inputs=[U, V, E, F, A, H, count, gain, _rates(beta, alpha, eps), *_flags(mask, reset)],
        template=[("T", U.dtype), *sizes, ("CONCAT", concat), *_presence(mask, reset)],
        grid=(LANES * W, C, B),
        threadgroup=(LANES * W, 1, 1),
        output_shapes=[shape, A.shape, H.shape, count.shape],
        output_dtypes=[U.dtype, mx.float32, mx.float32, mx.int32],
    )
    return theta, A, H, count


def mcsd_mix(
    U: mx.array,
    V: mx.array,
    E: mx.array,
    F: mx.array,
    A: mx.array,
    H: mx.array,
    n: mx.array,
    gain: mx.array,
    *,
    beta: tuple[float, ...],
    eps: float,
    concat: bool = False,
) -> mx.array:
    """Make theta of a slope and a decay section and their states: weights, gates, norm, fusion.

    Args:
        U: (B, N, C, Dc), any dtype of DTYPES and any strides; V, E and F likewise.
        V: the slope's history, read at a row's first token.
        E: the decay's history, read at a row's first token.
        F: the decay's current token.
        A: (B, N, C, Dc) float32, the slope state before each token.
        H: (B, N, C, Dc) float32, the decay state before each token.
        n: (B, N) int32, tokens read before each.
        gain: (D,), the norm's.
        beta: C slopes.
        eps: the norm's.
        concat: theta holds both sections side by side, rather than their sum.

    Returns:
        (B, N, D) or (B, N, 2D) in U's dtype. Differentiable in U, V, E, F, A, H and gain.

    Raises:
        MCSDError: if a shape or a dtype is unfit.
    """
    check_block("mcsd_mix", (U, V, E, F), (A, H), n, gain, beta)
    B, N, C, Dc = U.shape
    shape = (B, N, C * Dc * (2 if concat else 1))
    if U.size == 0:
        return mx.zeros(shape, U.dtype)
    blocks = -(-N // MIX_TOKENS)
    sizes = [("TOKENS", MIX_TOKENS), ("PER_LANE", -(-Dc // LANES))]
    options = dict(
        template=[("T", U.dtype), *sizes, ("CONCAT", concat)],
        grid=(LANES, C, B * blocks),
        threadgroup=(LANES, 1, 1),
    )
    rates = _gate_rates(beta, eps)

    def mix(*inputs):
        (theta,) = kernel("mcsd_mix")(
            inputs=[*inputs, rates],
            output_shapes=[shape],
            output_dtypes=[U.dtype],
            **options,
        )
        return theta

    def mix_vjp(primals, dtheta, _):
        n, gain = primals[6:]
        *grads, dgain = kernel("mcsd_mix_grad")(
            inputs=[dtheta, *primals, rates],
            output_shapes=[U.shape] * 6 + [(B * blocks, C * Dc)],
            output_dtypes=[U.dtype] * 4 + [mx.float32] * 3,
            **options,
        )
        return *grads, n, dgain.sum(axis=0).astype(gain.dtype)

    return _differentiable(mix, mix_vjp)(U, V, E, F, A, H, n, gain)


def _check_dtype(x) -> None:
    if x.dtype not in DTYPES:
        raise MCSDError(f"[kernels] kernels read {', '.join(map(str, DTYPES))} but got {x.dtype}.")


def _scan(lam, h0, x, mask, reset) -> tuple[mx.array, mx.array]:
    """One piece of the scan, with its gradient."""

    def launch(x, h0, mask, reset):
        return _launch("decay_scan", [], lam, x, h0, mask, reset)

    def vjp(primals, cotangents, _):
        x, _, mask, reset = primals
        dh, dlast = cotangents
        dx, dh0 = _scan_grad(lam, x.dtype, dlast, dh, mask, reset)
        return dx, dh0, mask, reset  # the last two stand where there is no gradient

    return _differentiable(launch, vjp)(x, h0, mask, reset)


def _scan_grad(lam, dtype, dlast, dh, mask, reset) -> tuple[mx.array, mx.array]:
    """One piece of the adjoint."""
    return _launch("decay_scan_grad", [("T", dtype)], lam, dh, dlast, mask, reset)


def _differentiable(launch, vjp):
    """Join a kernel and its gradient, unless the graph is to be exported."""

    def run(*arrays):
        if _only_exports(arrays[0]):
            return launch(*arrays)
        function = mx.custom_function(launch)
        function.vjp(vjp)
        return function(*arrays)

    return run


def _only_exports(x: mx.array) -> bool:
    """Tell whether x is traced for an export, on a machine that could not run the kernel anyway.

    MLX exports a kernel but no `custom_function`, so a bare kernel is exported, unless a gradient
    is traced: only its graph says that, in which what is differentiated begins as a copy.
    """
    # Nothing is evaluated on a Mac here; to export a model from there, turn kernels off.
    if mx.metal.is_available() or send(x):
        return False
    mx.export_to_dot(graph := io.StringIO(), x)
    return '"Copy"' not in graph.getvalue()


SIGNATURES = {
    "decay_scan": (["x", "decay", "h0", "mask", "reset"], ["h", "last"]),
    "decay_scan_grad": (["dh", "decay", "dlast", "mask", "reset"], ["dx", "dh0"]),
    "mcsd_mix": ([*"UVEFAH", "n", "gain", "rates"], ["theta"]),
    "mcsd_mix_grad": (
        ["dtheta", *"UVEFAH", "n", "gain", "rates"],
        ["dU", "dV", "dE", "dF", "dA", "dH", "dgain"],
    ),
    "mcsd_step": (
        [*"UVEFAH", "count", "gain", "rates", "mask", "reset"],
        ["theta", "A_next", "H_next", "count_next"],
    ),
}


@cache
def kernel(name: str):
    """Return the kernel whose body is metal/NAME.metal, built on first use."""
    inputs, outputs = SIGNATURES[name]
    return mx.fast.metal_kernel(
        name=f"mlx_mcsd_{name}",
        input_names=inputs,
        output_names=outputs,
        source=files("mlx_mcsd.metal").joinpath(f"{name}.metal").read_text(encoding="utf-8"),
        # A slice of the fused projection is read as it lies; the copy would cost a third pass.
        ensure_row_contiguous=False,
    )


def _launch(name, types, lam, x, state, mask, reset) -> tuple[mx.array, mx.array]:
    """Dispatch a scan kernel over x (B, N, C, Dc), with the types its template names, if any."""
    B, N, C, Dc = x.shape
    S = segments(B, N, C * Dc)
    out, state = kernel(name)(
        inputs=[x, _decay(lam), state, *_flags(mask, reset)],
        template=[*types, ("S", S), *_presence(mask, reset)],
        grid=(-(-C * Dc // LANES) * LANES, S, B),
        threadgroup=(LANES, S, 1),
        output_shapes=[x.shape, state.shape],
        output_dtypes=[dict(types).get("T", mx.float32), mx.float32],
    )
    return out, state


def segments(B: int, N: int, D: int) -> int:
    """Return into how many segments time is split: one, unless B D threads would starve a GPU."""
    S = 1
    for more in SEGMENTS:
        if S * B * D < FULL_GRID and (more + 2) * SEGMENT_TOKENS <= N:
            S = more
    return S


@lru_cache(maxsize=64)
def _decay(lam: tuple[float, ...]) -> mx.array:
    """Lambda as a pair of floats, and log2(lambda): (3, C) float32, computed in float64."""
    return mx.array(np.stack([*_pair(lam), np.log2(lam)]).astype(np.float32))


@lru_cache(maxsize=64)
def _rates(beta: tuple[float, ...], alpha: tuple[float, ...], eps: float) -> mx.array:
    """A channel's constants in mcsd_step.metal, (C, 7) float32."""
    beta = np.array(beta, np.float64)
    rates = [*_pair(np.exp(-beta)), *_pair(alpha), beta, np.expm1(beta), np.full_like(beta, eps)]
    return mx.array(np.stack(rates, axis=1).astype(np.float32))


@lru_cache(maxsize=64)
def _gate_rates(beta: tuple[float, ...], eps: float) -> mx.array:
    """A channel's constants in mcsd_mix.metal, (C, 3) float32."""
    beta = np.array(beta, np.float64)
    rates = [beta, np.expm1(beta), np.full_like(beta, eps)]
    return mx.array(np.stack(rates, axis=1).astype(np.float32))


def _pair(values) -> tuple[np.ndarray, np.ndarray]:
    """Return float64 values rounded to float32, and what that lost."""
    exact = np.array(values, np.float64)
    rounded = exact.astype(np.float32)
    return rounded, exact - rounded


def _flags(mask, reset) -> list[mx.array]:
    """The mask and the reset, or what a kernel is given for one it will not read.

    Constant memory begins at multiples of 4 bytes, and a slice of a small mask anywhere. So a mask
    has a last axis, of stride 0, that makes it large: a view, nothing is launched or copied.
    """
    return [
        _absent() if m is None else mx.broadcast_to(mx.expand_dims(m, -1), (*m.shape, NOT_CONSTANT))
        for m in (mask, reset)
    ]


def _presence(mask, reset) -> list[tuple[str, bool]]:
    """Which of them there are, for the template."""
    return [("HAS_MASK", mask is not None), ("HAS_RESET", reset is not None)]


@cache
def _absent() -> mx.array:
    return mx.array([[False]])
