"""`bench training`: a step of a mixer's training, forwards and backwards, by the form of its sums.

    kernels     the Metal kernels, where there is a GPU
    chunked     the plain operations that replace them elsewhere: memory linear in N
    quadratic   the paper's matrices as printed, Eqs. 3-20: C of N x N for each section

The matrices hold constants, so they are made once and not timed. A form is timed only where its
outputs, states and gradients are those of the quadratic form at the longest N that has one.

Letters: B batch, N tokens, D hidden size, C channels, Dc = D / C.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .. import kernels
from ..config import ModelArgs
from ..errors import MCSDError
from ..mixers.mcsd import MCSD, decays, slopes
from . import compare, flags
from .measure import TOLERANCE, distance, interleaved, peak

Matrices = tuple[mx.array, mx.array]
FORMS = ("kernels", "chunked", "quadratic")
GATE_TOKENS = 100  # no multiple of a chunk
COPIES = 4  # of one of the matrices, in memory while they are made


def run(args) -> dict:
    """Check and time the forms, print a table, save it; the result is :func:`compare.finish`'s.

    Raises:
        MCSDError: if the sizes do not fit, or the folder cannot be made.
    """
    default = flags.QUICK_TRAINING if args.quick else {}
    D, C, B = args.hidden_size, args.num_channels, args.batch_size
    if D % C:
        raise MCSDError(
            f"[bench training] --hidden-size must be divisible by --num-channels but got {D} and "
            f"{C}."
        )
    mx.random.seed(0)
    sizes = dict(vocab_size=1, num_hidden_layers=1, intermediate_size=1, projection=args.projection)
    mixer = MCSD(ModelArgs(model_type="mcsd", hidden_size=D, num_channels=C, **sizes))
    repeats = args.repeats or default.get("repeats", flags.TRAINING_REPEATS)
    limit = args.memory_limit * 2**30
    errors, rows = {}, []
    measure(mixer, B, GATE_TOKENS, float("inf"), 0, errors)
    for N in sorted(args.tokens or default.get("tokens", flags.TRAINING_TOKENS)):
        rows += measure(mixer, B, N, limit, repeats, errors)
    failed = "a form differs from the quadratic one; its speed means nothing."
    return compare.finish(rows, "training", args.output_dir, failed)


def measure(
    mixer: MCSD, B: int, N: int, limit: float, repeats: int, errors: dict[str, float]
) -> list[dict]:
    """Return a row for each form at N tokens; `errors` of the forms are replaced where N has them.

    Without repeats nothing is timed.
    """
    fits = limit >= COPIES * 4 * mixer.C * N * N
    usable = {"kernels": kernels.available(mx.float32), "chunked": True, "quadratic": fits}
    running = [form for form in FORMS if usable[form]]
    x, dy = mx.random.normal((2, B, N, mixer.C * mixer.Dc))
    steps, found, peaks = {}, {}, {}
    for form in running:  # in this order: the matrices are no other form's memory
        steps[form] = make_step(mixer, form, x, dy)
        peaks[form] = peak(lambda form=form: mx.eval(steps[form]()))
        found[form] = [np.array(a, np.float64) for a in steps[form]()]
    if fits:
        errors |= {form: worst(found[form], found["quadratic"]) for form in running}
    if not repeats:
        return []
    runs = {form: timed(steps[form]) for form in running if errors[form] <= TOLERANCE}
    seconds = interleaved(runs, repeats, f"training {N}")
    rows = []
    for form in [*running, *([] if fits else ["quadratic"])]:
        row = {"bench": "training", "model": form, "tokens": N, "batch": B}
        row |= {"error": errors[form], "ok": errors[form] <= TOLERANCE}
        if form not in running:
            row["note"] = f"over {limit / 2**30:g} GiB"
        elif row["ok"]:
            t = seconds[form]
            row |= {"seconds": t._asdict(), "tokens_per_second": B * N / t.median}
            row |= {"peak_bytes": peaks[form]}
            if fits:
                row["of_quadratic"] = seconds["quadratic"].median / t.median
        rows.append(row)
    return rows


def make_step(mixer: MCSD, form: str, x: mx.array, dy: mx.array) -> Callable[[], list[mx.array]]:
    """Return a step: y, the state, and what dy (B, N, D) passes back to the weights and to x."""
    matrices = make_matrices(x.shape[1], mixer.C) if form == "quadratic" else None

    def loss(weights, x):
        mixer.update(weights)
        y, state = mixer(x) if matrices is None else quadratic(mixer, x, matrices)
        return (y * dy).sum(), (y, state)

    def step():
        weights = mixer.trainable_parameters()
        with nullcontext() if form == "kernels" else plain_forms():
            (_, outputs), gradients = mx.value_and_grad(loss, argnums=(0, 1))(weights, x)
        mixer.update(weights)
        return [a for _, a in tree_flatten([outputs, gradients])]

    return step


@contextmanager
def plain_forms() -> Iterator[None]:
    """Keep the mixer from its kernels."""
    before, kernels.available = kernels.available, lambda dtype: False
    try:
        yield
    finally:
        kernels.available = before


def make_matrices(N: int, C: int) -> Matrices:
    """Return the mixing matrices of the sections (Eqs. 3, 5, 9), (C, N, N) each.

    Rows are tokens: e^(-j beta) and alpha^j at lag j > 0, those of the slope divided by their sum;
    the first row is 1 at the first token.
    """
    lag = mx.arange(N)[:, None] - mx.arange(N)  # (N, N)
    rates = [-np.array(slopes(C)), np.log(decays(C))]
    matrices = []
    for rate in rates:
        rate = mx.array(rate.astype(np.float32))[:, None, None]
        matrix = mx.where(lag > 0, mx.exp(rate * mx.maximum(lag, 0)), 0.0)  # (C, N, N)
        matrix[:, 0, 0] = 1.0
        matrices.append(matrix)
        mx.eval(matrix)
    slope, decay = matrices
    return slope / slope.sum(axis=-1, keepdims=True), decay


def quadratic(mixer: MCSD, x: mx.array, matrices: Matrices) -> tuple[mx.array, list[mx.array]]:
    """Mix from the beginning of a text by the paper's matrices (Eqs. 3-20): y and the states.

    Args:
        mixer: whose weights; of both sections, added.
        x: (B, N, D).
        matrices: see :func:`make_matrices`.
    """
    B, N, D = x.shape
    U, V, E, F = (mixer._project(x)[name] for name in "uvef")  # (B, N, C, Dc)

    def mix(matrix, history):
        return (matrix @ history.swapaxes(1, 2)).swapaxes(1, 2)

    V_past, E_past = mix(matrices[0], V), mix(matrices[1], E)
    gain = mixer.decay_norm.weight.reshape(mixer.C, -1)  # (C, Dc)
    normed = mx.fast.rms_norm(E_past, None, mixer.decay_norm.eps) * gain
    theta = U * V_past * mx.sigmoid(V_past) + mx.sigmoid(F) * normed
    ago = N - np.arange(N)  # of each token, for the state behind the last
    powers = (np.exp(-np.outer(slopes(mixer.C), ago)), np.power.outer(decays(mixer.C), ago))
    states = [
        mx.einsum("cn,bncd->bcd", mx.array(p.astype(np.float32)), history)
        for p, history in zip(powers, (V, E), strict=True)
    ]
    return mixer._output(theta.reshape(B, N, D)), [*states, mx.full(B, N, mx.int32)]


def worst(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    """Return the largest of the distances between arrays."""
    return max(distance(a, b) for a, b in zip(got, want, strict=True))


def timed(step: Callable[[], list[mx.array]]) -> Callable[[], float]:
    """Return what runs a step and gives the seconds it took."""

    def run():
        start = time.perf_counter()
        mx.eval(step())
        return time.perf_counter() - start

    return run
