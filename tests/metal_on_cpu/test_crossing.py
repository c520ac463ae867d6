"""Every kernel at random crossings of size, dtype, layout, flags and fusion, against float64.

A few a kernel here; `MLX_MCSD_CROSSING=300 pytest -s tests/metal_on_cpu/test_crossing.py` runs as
many, larger ones too, and prints the worst errors.
"""

import os

import mlx.core as mx
import numpy as np
import pytest

from metal_on_cpu import executed, needs_compiler, references
from metal_on_cpu.execute import ORDERS
from mlx_mcsd import kernels
from mlx_mcsd.mixers.mcsd import decays, slopes

pytestmark = needs_compiler

LONG = int(os.environ.get("MLX_MCSD_CROSSING", 0))
ELEMENTS = 3_000_000 if LONG else 60_000
SIZES = {
    "N": (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 1025),
    "C": (1, 3, 8, 10, 20),
    "Dc": (1, 20, 60, 64, 256),
    "B": (1, 3),
}
COUNTS = (0, 1, 2, 4095, 10_000_000)  # tokens read before
ULP = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}  # of what is rounded once
SUBNORMAL = {mx.float16: 2.0**-25}  # what rounding costs numbers below 6e-5


class Crossing:
    """One random call: what it is in words, its arrays in MLX, and the same numbers in NumPy."""

    def __init__(self, kernel, seed):
        self.rng = rng = np.random.default_rng([seed, *kernel.encode()])
        while True:
            B, N, C, Dc = (int(rng.choice(SIZES[k])) for k in ("B", "N", "C", "Dc"))
            if kernel == "mcsd_step":
                N = 1
            if B * N * C * Dc <= ELEMENTS:
                break
        self.shape = B, N, C, Dc
        self.dtype = kernels.DTYPES[rng.integers(3)]
        self.concat = bool(rng.integers(2))
        self.S = int(rng.choice([1, *kernels.SEGMENTS]))
        self.mode = str(rng.choice(["plain", "plain", "sanitized", "traced"]))
        if B * N * C * Dc > 60_000:
            self.mode = "plain"
        self.order = str(rng.choice(ORDERS))
        self.layout = str(rng.choice(["dense", "channel"]))
        self.mask, self.reset = self.flags()
        self.scale = float(rng.choice([1e-2, 1.0, 30.0]))
        self.tokens = self.projected(kernel in ("decay_scan", "mcsd_step"))
        self.words = (
            f"{kernel} {self.shape} {self.dtype} S={self.S} concat={self.concat} {self.layout} "
            f"{self.mask_kind} {self.reset_kind} {self.scale} {self.mode} {self.order} seed {seed}"
        )

    def flags(self):
        """A mask and a reset, (B, N) bool or None."""
        B, N = self.shape[:2]
        n, cut = np.arange(N), self.rng.integers(0, N + 1, (B, 1))
        masks = {
            "no mask": None,
            "random": self.rng.random((B, N)) < 0.7,
            "left": n >= cut,
            "right": n < cut,
            "all masked": np.zeros((B, N), bool),
        }
        resets = {
            "no reset": None,
            "some": self.rng.random((B, N)) < 0.1,
            "first": np.tile(n == 0, (B, 1)),
        }
        self.mask_kind = str(self.rng.choice(list(masks)))
        self.reset_kind = str(self.rng.choice(list(resets)))
        return masks[self.mask_kind], resets[self.reset_kind]

    def projected(self, poisoned):
        """U, V, E, F as slices of one projection's output, perhaps NaN where no token exists."""
        B, N, C, Dc = self.shape
        hole = np.zeros((B, N), np.float32)
        if poisoned and self.mask is not None:
            hole[~self.mask] = np.nan
        if self.layout == "dense":
            wide = self.narrow(self.numbers(B, N, 4 * C * Dc) + hole[..., None])
            return [p.reshape(self.shape) for p in mx.split(wide, 4, axis=-1)]
        wide = self.narrow(self.numbers(C, B, N, 4 * Dc) + hole[..., None])
        return mx.split(wide.transpose(1, 2, 0, 3), 4, axis=-1)

    def numbers(self, *shape):
        return (self.scale * self.rng.standard_normal(shape)).astype(np.float32)

    def narrow(self, numbers):
        return mx.array(numbers).astype(self.dtype)

    def options(self):
        """What the kernels of the block are given beside arrays."""
        return dict(beta=slopes(self.shape[2]), eps=references.EPS, concat=self.concat)

    def gain(self):
        return self.narrow(self.rng.uniform(0.5, 2, self.shape[2] * self.shape[3]))

    def decay(self):
        """The decays of one of the two sections."""
        C = self.shape[2]
        return (decays(C), tuple(np.exp(-np.array(slopes(C)))))[self.rng.integers(2)]


def exact(a):
    return np.array(a.astype(mx.float32))


def array(a):
    return None if a is None else mx.array(a)


def scan(x):
    B, _, C, Dc = x.shape
    h0 = None if x.rng.random() < 0.2 else x.numbers(B, C, Dc)
    v, lam = x.tokens[1], x.decay()
    got = kernels.decay_scan(v, lam, *map(array, (h0, x.mask, x.reset)))
    return got, references.loop(np.nan_to_num(exact(v)), lam, h0, x.mask, x.reset)


def scan_grad(x):
    B, _, C, Dc = x.shape
    dh, lam, dlast = x.tokens[2], x.decay(), x.numbers(B, C, Dc)
    got = kernels.decay_scan_grad(dh, lam, *map(array, (dlast, x.mask, x.reset)), dtype=x.dtype)
    return got, references.adjoint(exact(dh), lam, dlast, x.mask, x.reset)


def sequence(x):
    """What mcsd_mix reads: U to F, the states before each token, and the tokens read before."""
    B, N = x.shape[:2]
    m = np.ones((B, N), bool) if x.mask is None else x.mask
    r = m & x.reset if x.reset is not None else ~m & m
    n = np.empty((B, N), np.int32)
    seen = x.rng.choice(COUNTS, B)
    for t in range(N):
        seen = np.where(r[:, t], 0, seen)
        n[:, t] = seen
        seen = seen + m[:, t]
    return [*x.tokens, *(mx.array(x.numbers(*x.shape)) for _ in "AH")], mx.array(n), x.gain()


def mix(x):
    arrays, n, gain = sequence(x)
    got = kernels.mcsd_mix(*arrays, n, gain, **x.options())
    want = references.mix(*map(exact, arrays), np.array(n), exact(gain), x.concat)
    return [got], [want]


def mix_grad(x):
    B, N, C, Dc = x.shape
    arrays, n, gain = sequence(x)
    dtheta = x.narrow(x.numbers(B, N, C * Dc * (1 + x.concat)))

    def run(*a):
        return kernels.mcsd_mix(*a[:6], n, a[6], **x.options())

    got = mx.vjp(run, [*arrays, gain], [dtheta])[1]
    numbers = map(exact, (dtheta, *arrays))
    return got, references.mix_grad(*numbers, np.array(n), exact(gain), x.concat)


def step(x):
    B, _, C, Dc = x.shape
    states = [x.numbers(B, C, Dc) for _ in "AH"]
    count, gain = x.rng.choice(COUNTS, B).astype(np.int32), x.gain()
    got = kernels.mcsd_step(
        *x.tokens, *map(mx.array, (*states, count)), gain, alpha=decays(C), **x.options(),
        mask=array(x.mask), reset=array(x.reset),
    )  # fmt: skip
    tokens = [exact(t) for t in x.tokens]
    want = references.block(tokens, states, count, exact(gain), x.concat, x.mask, x.reset)
    return got, want


CALLS = {
    "decay_scan": scan,
    "decay_scan_grad": scan_grad,
    "mcsd_mix": mix,
    "mcsd_mix_grad": mix_grad,
    "mcsd_step": step,
}


@pytest.mark.parametrize("kernel", CALLS)
def test_crossings(kernel, monkeypatch):
    worst = {}
    for seed in range(LONG or 6):
        x = Crossing(kernel, seed)
        monkeypatch.setattr(kernels, "segments", lambda B, N, D, S=x.S: S)
        with executed(mode=x.mode, order=x.order, seed=seed):
            got, want = CALLS[kernel](x)
            mx.eval(got)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            exists = np.isfinite(w)  # what is made of a token that does not exist is void
            g_, w = exact(g)[exists], w[exists]
            error = max(0, np.abs(g_ - w).max(initial=0) - SUBNORMAL.get(g.dtype, 0))
            error /= np.abs(w).max(initial=0) or 1.0
            assert error <= 1e-5 + ULP.get(g.dtype, 0), f"output {i} of {x.words}"
            worst[g.dtype] = max(worst.get(g.dtype, (0, "")), (float(error), x.words))
    for dtype, (error, words) in worst.items() if LONG else ():
        print(f"\n{kernel}, {LONG} crossings, worst {dtype}: {error:.1e} at {words}")
