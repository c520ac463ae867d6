"""Numbers at the edges of their types, executed, against float64."""

import mlx.core as mx
import numpy as np
import pytest

from metal_on_cpu import executed, needs_compiler, references
from mlx_mcsd import kernels
from mlx_mcsd.mixers.mcsd import decays, slopes
from oracle import relative_error

pytestmark = needs_compiler

LAM = decays(10)[-3:]
OPTIONS = dict(beta=slopes(2), eps=references.EPS)


def alternating(values, dtype=mx.float32):
    """Alternate the values along 2 channels of 4 features and 3 tokens."""
    return mx.array(np.resize(np.array(values, np.float32), (1, 3, 2, 4))).astype(dtype)


@pytest.mark.parametrize(
    "value, dtype",
    [
        (65504, mx.float16),  # its sums overflow float16
        (6e-8, mx.float16),  # subnormal there
        (3e33, mx.float32),  # its sums come near the end of float32
        (3e36, mx.bfloat16),
        (1e-36, mx.float32),
        (-0.0, mx.float32),
    ],
)
def test_scans(value, dtype, monkeypatch, N=70):
    monkeypatch.setattr(kernels, "segments", lambda B, N, D: 4)
    x = mx.full((1, N, 3, 2), value, dtype)
    state = np.zeros((1, 3, 2), np.float32)
    exact = np.array(x.astype(mx.float32))
    with executed():
        got = kernels.decay_scan(x, LAM), kernels.decay_scan_grad(x, LAM)
    want = references.loop(exact, LAM, state), references.adjoint(exact, LAM, state)
    for g, w in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert relative_error(np.array(g), w) <= 1e-6 if np.any(w) else not np.any(np.array(g))


def block(U, V, E, F, A, H, n, dtype=mx.float32, concat=True):
    """Theta and its gradients of numbers that alternate; n for every token. And float64's."""
    arrays = [alternating(a, dtype) for a in (U, V, E, F)] + [alternating(A), alternating(H)]
    count, gain = mx.full((1, 3), n, mx.int32), mx.ones(8)
    exact = [np.array(a.astype(mx.float32)) for a in arrays]

    def mix(*a):
        return kernels.mcsd_mix(*a, count, gain, concat=concat, **OPTIONS)

    with executed():
        (theta,), grads = mx.vjp(mix, arrays, [mx.ones((1, 3, 8 * (1 + concat)), dtype)])
        tokens = [a[:, :1] for a in arrays[:4]]
        states = [a[:, 0] for a in arrays[4:]]
        step = kernels.mcsd_step(
            *tokens, *states, count[:, 0], gain, alpha=decays(2), concat=concat, **OPTIONS
        )
        mx.eval(theta, grads, step)
    assert mx.array_equal(step[0][:, 0], theta[:, 0], equal_nan=True)
    want = references.mix(*exact, np.array(count), np.ones(8), concat)
    cotangent = np.ones(want.shape)
    with np.errstate(over="ignore"):
        want_grads = references.mix_grad(cotangent, *exact, np.array(count), np.ones(8), concat)
    return theta, grads, want, want_grads


def near(got, want, tolerance=1e-5):
    got = np.array(got.astype(mx.float32))
    assert np.isfinite(got).all()
    assert relative_error(got, want) <= tolerance if np.any(want) else not np.any(got)


@pytest.mark.parametrize("n", [0, 1, 10_000_000, 2**31 - 2])
def test_counts(n):
    """Ten million tokens later, and as many as a count can hold."""
    theta, grads, want, want_grads = block([1, -2], [3], [0.5, 2], [1], [0.25, 4], [7, -1], n)
    near(theta, want)
    for g, w in zip(grads, want_grads, strict=False):
        near(g, w)


def test_gates_that_are_shut_or_open():
    """exp overflows in both directions; the gates are 0 and 1, and no inf / inf is left."""
    theta, grads, want, want_grads = block(
        [1, -2, 3, 4],
        [0],
        [1, -2],
        [65504, -65504, 200, -200, 1.5],
        [300, -300, 9, -99],
        [1, 5, 7],
        4,
    )
    near(theta, want)
    for g, w in zip(grads[:-1], want_grads, strict=False):
        near(g, w)


def test_gates_that_are_nearly_open():
    """sigmoid'(F) = f (1 - f), where 1 - f in float32 has two digits left."""
    _, grads, _, want = block([1], [0], [1, -2], [11, 12, 13], [1], [1, 5, 7, 3], 4)
    near(grads[3], want[3])


def test_products_that_overflow():
    """U SiLU(V') is 0, whatever U, where V' is far below."""
    theta, _, want, _ = block([1e20, -1e20], [0], [1], [1], [-1e20, -1e19], [1, 2], 4)
    near(theta, want)


def test_norms_of_nothing_and_of_next_to_nothing():
    """E' = 0 and E' far below the root of eps: what passes back is divided by that root."""
    for H in ([0], [1e-20, -3e-20], [1e-4, 3e-3]):
        theta, grads, want, want_grads = block([1], [1], [1], [2, -1], [1], H, 5)
        near(theta, want)
        near(grads[5], want_grads[5])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_narrow_ends(dtype):
    """Where theta passes the end of its type it is infinite, as the plain form's is, never NaN."""
    theta, *_, want, _ = block([65504, 1], [0], [1], [-65504], [60000, -60000], [1, 2], 9, dtype)
    narrow = mx.array(want.astype(np.float32)).astype(dtype)
    assert mx.isinf(theta).any() == (dtype == mx.float16)
    finite = ~mx.isinf(narrow)
    assert mx.array_equal(mx.isinf(theta), ~finite) and not mx.isnan(theta).any()
    near(mx.where(finite, theta, 0), np.where(finite, want, 0), 2.0**-8)
