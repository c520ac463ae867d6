"""`bench kernels`: every Metal kernel against its plain form, then against the speed of a copy.

The kernel runs on the GPU, the plain form in float32 on the CPU, on the same numbers. A kernel is
timed only where every output, state and gradient agrees. Its GB/s count the fewest bytes that the
operation can move, each input read and each output written once, so that a copy is the ceiling.

Letters: B batch, N tokens, C channels, Dc features per channel, D = C Dc.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from .. import kernels, recurrence
from ..errors import MCSDError
from ..mixers.mcsd import decay, decays, slope, slopes

EPS = 1e-6
NAMES = tuple(kernels.SIGNATURES)
SHAPES = [(1, 1, 1, 4), (3, 1, 3, 60), (3, 65, 3, 60), (2, 33, 10, 256), (1, 1025, 3, 20)]
# What is rounded to a narrow type is rounded once, from float32 that agrees to 1e-5.
TOLERANCE = {
    mx.float32: 1e-5,
    mx.float16: 1e-5 + 2.0**-11,
    mx.bfloat16: 1e-5 + 2.0**-8,
    mx.int32: 1e-5,  # a count below 100,000: every one of it
}


class Case(NamedTuple):
    """One operation on given numbers: as a kernel, as plain operations, and the bytes it moves."""

    kernel: Callable[[], list[mx.array]]
    plain: Callable[[], list[mx.array]]
    bytes: int


def run(args) -> dict:
    """Check every kernel, time those that are right, print a table and return it.

    Returns:
        ``ok``, True if every kernel is right; ``device``; ``copy_gbps``; and ``rows``, one for each
        kernel and dtype: kernel, dtype, shape, bytes, checks, max_rel_error and tolerance (those of
        the output nearest to its tolerance), ok, and gbps, spread, microseconds and fraction (of
        copy_gbps), which are None where the kernel is wrong.

    Raises:
        MCSDError: if no kernel can run here.
    """
    D, C = args.hidden_size, args.num_channels
    if D % C:
        raise MCSDError(
            f"[bench kernels] --hidden-size must be divisible by --num-channels but got {D} and "
            f"{C}."
        )
    if not kernels.available(mx.float32):
        raise MCSDError(
            "[bench kernels] kernels run on a GPU with Metal, the default device, and with "
            "MLX_MCSD_KERNELS not off; here they do not run, so there is nothing to time."
        )
    copy = copy_bandwidth(args.repeats)
    rows = []
    for name in tqdm(NAMES, desc="kernels", leave=False):
        N = 1 if name == "mcsd_step" else args.tokens
        for dtype in kernels.DTYPES:
            row = check(name, dtype)
            row["shape"] = [args.batch_size, N, C, D // C]
            rows.append(row | timed(name, dtype, row, copy, args.repeats))
    ok = all(row["ok"] for row in rows)
    device = mx.device_info().get("device_name", "?")
    print(f"{device}: a copy moves {copy:.1f} GB/s\n\n{table(rows)}")
    if not ok:
        print("\nFAILED: a kernel differs from its plain form; its speed means nothing.")
    return {"ok": ok, "device": device, "copy_gbps": copy, "rows": rows}


def table(rows: list[dict]) -> str:
    """Return the rows as text, without a speed where the check failed."""
    head = ("kernel", "dtype", "checks", "error", "tolerance", "us", "GB/s", "spread", "of copy")
    lines = [head]
    for r in rows:
        speed = ("FAILED", "-", "-", "-")
        if r["ok"]:
            speed = (
                f"{r['microseconds']:.1f}",
                f"{r['gbps']:.1f}",
                f"{r['spread']:.0%}",
                f"{r['fraction']:.0%}",
            )
        error, tolerance = f"{r['max_rel_error']:.1e}", f"{r['tolerance']:.1e}"
        lines.append((r["kernel"], r["dtype"], str(r["checks"]), error, tolerance, *speed))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells):
        left = [c.ljust(w) for c, w in zip(cells[:2], widths, strict=False)]
        return "  ".join(left + [c.rjust(w) for c, w in zip(cells[2:], widths[2:], strict=True)])

    return "\n".join(map(line, lines))


# --- right -------------------------------------------------------------------------------------


def check(name: str, dtype: mx.Dtype) -> dict:
    """Compare a kernel with its plain form at odd sizes, with and without flags, in both fusions.

    Returns:
        The part of the kernel's row that is about correctness.
    """
    worst, of, checks = 0.0, TOLERANCE[mx.float32], 0
    fusions = (False, True) if name.startswith("mcsd") else (False,)
    for seed, (B, N, C, Dc) in enumerate(SHAPES):
        if name == "mcsd_step":
            B, N = min(B * N, 9), 1
        for concat in fusions:
            for flags in (False, True):
                make = case(name, (B, N, C, Dc), dtype, concat=concat, flags=flags, seed=seed)
                checks += 1
                for got, want in zip(_poisoned(make.kernel()), _on_cpu(make.plain), strict=True):
                    error, tolerance = _distance(got, want), TOLERANCE[got.dtype]
                    if error / tolerance > worst / of:
                        worst, of = error, tolerance
    return {
        "kernel": name,
        "dtype": str(dtype).removeprefix("mlx.core."),
        "checks": checks,
        "max_rel_error": worst,
        "tolerance": of,
        "ok": worst <= of,
    }


def _poisoned(outputs: list[mx.array]) -> list[mx.array]:
    """Evaluate outputs in memory that held NaN, so that none is right because it was right before.

    MLX gives the buffers just freed to the next arrays of their size.
    """
    nan = [mx.full(o.shape, math.nan, o.dtype) for o in outputs if o.dtype != mx.int32]
    mx.eval(nan)
    del nan
    mx.eval(outputs)
    return outputs


def _on_cpu(plain: Callable[[], list[mx.array]]) -> list[mx.array]:
    """Evaluate plain operations where products are float32 and not a GPU's narrower ones."""
    with mx.stream(mx.cpu):
        outputs = plain()
        mx.eval(outputs)
    return outputs


def _distance(got: mx.array, want: mx.array) -> float:
    """Return the largest difference, relative to the largest number wanted."""
    a, b = (np.array(v.astype(mx.float32), np.float64) for v in (got, want))
    if a.shape != b.shape or not np.isfinite([a, b]).all():
        return math.inf
    scale = np.abs(b).max(initial=0.0)
    return float(np.abs(a - b).max(initial=0.0) / (scale or 1.0))


# --- fast --------------------------------------------------------------------------------------


def timed(name: str, dtype: mx.Dtype, row: dict, copy: float, repeats: int) -> dict:
    """Return a row's shape in bytes and, if its kernel is right, how fast it moves them."""
    make = case(name, row["shape"], dtype, concat=True)  # the sizes' fusion
    speed = dict.fromkeys(("gbps", "spread", "microseconds", "fraction"))
    if row["ok"]:
        seconds, spread = measure(make.kernel, repeats)
        gbps = make.bytes / seconds / 1e9
        speed = dict(gbps=gbps, spread=spread, microseconds=1e6 * seconds, fraction=gbps / copy)
    return {"bytes": make.bytes, **speed}


def copy_bandwidth(repeats: int, size: int = 1 << 26) -> float:
    """Return the GB/s at which this machine reads float32 and writes as many."""
    x = mx.ones(size)
    return 2 * x.nbytes / measure(lambda: [-x], repeats)[0] / 1e9


def measure(launch: Callable[[], list[mx.array]], repeats: int) -> tuple[float, float]:
    """Return the median seconds of a launch, and from fastest to slowest relative to that.

    Launches are evaluated together, for some 10 ms at a time: one alone would mostly be waited for.
    """

    def seconds(launches):
        start = time.perf_counter()
        mx.eval([launch() for _ in range(launches)])
        return (time.perf_counter() - start) / launches

    seconds(1)  # compiles
    launches = min(max(1, math.ceil(0.01 / seconds(1))), 64)
    times = [seconds(launches) for _ in range(repeats)]
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


# --- the operations ----------------------------------------------------------------------------


def case(
    name: str,
    shape: tuple[int, int, int, int],
    dtype: mx.Dtype,
    *,
    concat: bool = False,
    flags: bool = False,
    seed: int = 0,
) -> Case:
    """Return an operation by its kernel's name, on random numbers of a shape (B, N, C, Dc)."""
    B, N, C, Dc = shape
    D, size, w = C * Dc, B * N * C * Dc, dtype.size
    rng = np.random.default_rng(seed)

    def draw(*shape, to=mx.float32):
        return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(to)

    # One projection's output, read as it lies: U, V, E, F side by side.
    tokens = [t.reshape(shape) for t in mx.split(draw(B, N, 4 * D, to=dtype), 4, axis=-1)]
    mask = mx.array(rng.random((B, N)) < 0.7) if flags else None
    reset = mx.array(rng.random((B, N)) < 0.1) if flags else None
    state = [draw(B, C, Dc) for _ in "AH"]
    gain = mx.array(rng.uniform(0.5, 2, D).astype(np.float32)).astype(dtype)
    theta = (B, N, D * (1 + concat))
    mx.eval(tokens, mask, reset, state, gain)

    if name.startswith("decay_scan"):
        x, lam = tokens[1], decays(C)
        primals, cotangents = [x, state[0]], [draw(*shape), draw(B, C, Dc)]

        def scan(form):
            return lambda x, h0: form(x, lam, h0, mask, reset)

        forms = scan(kernels.decay_scan), scan(recurrence.chunked)
        moved = 4 + w  # read x or dh, write h or dx
    elif name == "mcsd_step":
        count = mx.array(rng.integers(0, 4000, B) * (rng.random(B) < 0.7), mx.int32)
        primals, cotangents = [*tokens, *state, gain], []
        beta, alpha = slopes(C), decays(C)
        rest = dict(beta=beta, alpha=alpha, eps=EPS, concat=concat, mask=mask, reset=reset)
        forms = tuple(
            lambda *a, form=form: form(*a[:6], count, a[6], **rest)
            for form in (kernels.mcsd_step, plain_step)
        )
        moved = 4 * w + (1 + concat) * w + 16
    else:
        n, _ = recurrence.count_tokens(mx.zeros(B, mx.int32), N, mask, reset)
        primals = [*tokens, draw(*shape), draw(*shape), gain]
        cotangents = [draw(*theta, to=dtype)]
        rest = dict(beta=slopes(C), eps=EPS, concat=concat)
        forms = tuple(
            lambda *a, form=form: [form(*a[:6], n, a[6], **rest)]
            for form in (kernels.mcsd_mix, plain_mix)
        )
        moved = 2 * w + 8 + (1 + concat) * w
        if name.endswith("grad"):
            moved += 4 * w + 8

    mx.eval(primals, cotangents)
    backwards = name.endswith("grad")

    def outputs(form, primals, cotangents):
        return list(mx.vjp(form, primals, cotangents)[1] if backwards else form(*primals))

    wide = [[a.astype(mx.float32) for a in arrays] for arrays in (primals, cotangents)]
    return Case(
        lambda: outputs(forms[0], primals, cotangents),
        lambda: outputs(forms[1], *wide),
        moved * size + (D * w if name.startswith("mcsd") else 0),
    )


def plain_mix(U, V, E, F, A, H, n, gain, *, beta, eps, concat=False) -> mx.array:
    """Do what `kernels.mcsd_mix` does in MLX operations; theta leaves in float32."""
    n = n[..., None, None]  # (B, N, 1, 1)
    parts = [slope(U, V, A, n, mx.array(beta)[:, None]), decay(F, E, H, n, gain, eps)]
    theta = mx.concatenate(parts, axis=-1) if concat else sum(parts)  # (B, N, C, Dc or 2 Dc)
    return theta.flatten(2)


def plain_step(U, V, E, F, A, H, count, gain, *, beta, alpha, eps, concat, mask, reset):
    """Do what `kernels.mcsd_step` does in MLX operations; theta leaves in float32."""
    n, count = recurrence.count_tokens(count, 1, mask, reset)
    lam = tuple(math.exp(-b) for b in beta)
    A, A_next = recurrence.step(V, lam, A, mask, reset)
    H, H_next = recurrence.step(E, alpha, H, mask, reset)
    theta = plain_mix(U, V, E, F, A, H, n, gain, beta=beta, eps=eps, concat=concat)
    return theta, A_next, H_next, count
