"""decay_scan and decay_scan_grad, executed: values, states and gradients at odd sizes.

Kernel variants cost a compilation each, so segments are set here rather than left to the sizes.
"""

import mlx.core as mx
import numpy as np
import pytest

from metal_on_cpu import executed, needs_compiler
from metal_on_cpu.references import adjoint, loop
from mlx_mcsd import kernels, pieces
from mlx_mcsd.kernels import decay_scan, decay_scan_grad
from mlx_mcsd.recurrence import chunked
from oracle import relative_error
from test_recurrence import LAM, masks, resets

pytestmark = needs_compiler

FLAGS = {  # mask, reset
    "mask left": ("left", None),
    "mask right": ("right", None),
    "mask all": ("all", None),
    "reset": (None, "many"),
    "mask holes, reset edges": ("holes", "edges"),
    "mask left, reset many": ("left", "many"),
    "mask right, reset last": ("right", "last"),
}


@pytest.fixture(params=[1, 4], ids=["1 segment", "4 segments"])
def S(request, monkeypatch):
    """Time in one segment and in four, some of them empty where N < 4."""
    monkeypatch.setattr(kernels, "segments", lambda B, N, D: request.param)
    return request.param


def inputs(N, Dc=20, C=3, B=3):
    """Return x or dh, and a state or its cotangent."""
    rng = np.random.default_rng(N)
    x = rng.standard_normal((B, N, C, Dc)).astype(np.float32)
    return x, (30 * rng.standard_normal((B, C, Dc))).astype(np.float32)


def flags(name, N):
    """Return the mask and the reset of that name, each None or (3, N)."""
    mask, reset = FLAGS[name]
    return masks(N)[mask] if mask else None, resets(N)[reset] if reset else None


def arrays(*values):
    return [None if v is None else mx.array(v) for v in values]


def check(got, want, tolerance=1e-6):
    """Ten times stricter than the plain form is held to: the rounding is compensated."""
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        if np.any(w):
            assert relative_error(np.array(g), w) <= tolerance
        else:
            assert not np.any(np.array(g))


SIZES = [(1, 64), (2, 256), (31, 20), (63, 60), (64, 1), (65, 20), (600, 20), (1025, 11)]


@pytest.mark.parametrize("N, Dc", SIZES)
def test_values(S, N, Dc):
    x, h0 = inputs(N, Dc)
    with executed():
        check(decay_scan(*arrays(x), LAM, *arrays(h0)), loop(x, LAM, h0))
        check(decay_scan_grad(*arrays(x), LAM, *arrays(h0)), adjoint(x, LAM, h0))


@pytest.mark.parametrize("N", [1, 5])
def test_one_feature(N):
    """So small that MLX puts inputs into constant memory."""
    x, h0 = inputs(N, Dc=1, C=1, B=1)
    with executed():
        check(decay_scan(*arrays(x), LAM[2:], *arrays(h0)), loop(x, LAM[2:], h0))
        check(decay_scan_grad(*arrays(x), LAM[2:], *arrays(h0)), adjoint(x, LAM[2:], h0))


@pytest.mark.parametrize("name", FLAGS)
def test_masks_and_resets(S, name, N=67):
    """With NaN under the mask of x; the cotangents there are numbers, and count."""
    x, h0 = inputs(N)
    mask, reset = flags(name, N)
    dh = x.copy()
    if mask is not None:
        x[~mask] = np.nan
    with executed(order="random", seed=N):
        got = decay_scan(*arrays(x), LAM, *arrays(h0, mask, reset))
        check(got, loop(np.nan_to_num(x), LAM, h0, mask, reset))
        got = decay_scan_grad(*arrays(dh), LAM, *arrays(h0, mask, reset))
        check(got, adjoint(dh, LAM, h0, mask, reset))


def test_masked_tokens_leave_the_state_bit_for_bit(S, N=67):
    x, h0 = inputs(N)
    mask = masks(N)["all"]
    x[~mask] = np.nan
    with executed():
        h, last = decay_scan(*arrays(x), LAM, *arrays(h0, mask))
    assert np.array_equal(last[1:], h0[1:])
    assert np.array_equal(h[1:], np.broadcast_to(h0[1:, None], x[1:].shape))


def test_a_document_sees_nothing_before_it(S, N=67):
    """Not even infinity, nor backwards in time a gradient of it."""
    x, h0 = inputs(N)
    reset = np.zeros((3, N), bool)
    reset[:, 40] = True
    want, grads = loop(x, LAM, h0, None, reset), adjoint(x, LAM, h0, None, reset)
    loud, later = x.copy(), x.copy()
    loud[:, :40], later[:, 40:] = np.inf, np.inf
    with executed():
        h, last = decay_scan(*arrays(loud), LAM, *arrays(h0 * np.inf, None, reset))
        dx, dh0 = decay_scan_grad(*arrays(later), LAM, *arrays(h0 * np.inf, None, reset))
    check((h[:, 40:], last), (want[0][:, 40:], want[1]))
    check((dx[:, :40], dh0), (grads[0][:, :40], grads[1]))


def test_roundings_of_one_sign(S, N=1025):
    """A constant input, where uncompensated roundings would be 3e-5 of the sum."""
    x, h0 = inputs(N)
    x[:], h0[:] = 6, 0
    lam = (1 - 2.0**-14, 0.9999, 1 - 1e-6)  # the second is no float, nor is the third near one
    with executed():
        check(decay_scan(*arrays(x), lam, *arrays(h0)), loop(x, lam, h0), 2e-7)
        check(decay_scan_grad(*arrays(x), lam, *arrays(h0)), adjoint(x, lam, h0), 2e-7)


@pytest.mark.parametrize("flagged", [False, True], ids=["plain", "mask and reset"])
def test_gradients(S, flagged, N=130):
    """Through autodiff, against autodiff of the plain form."""
    x, h0 = inputs(N)
    mask, reset = arrays(*flags("mask holes, reset edges", N)) if flagged else (None, None)
    g, g_last = arrays(*(np.cos(a) for a in (x, h0)))

    def grads(form):
        def loss(x, h0):
            h, last = form(x, LAM, h0, mask, reset)
            return (g * h).sum() + (g_last * last * last).sum()

        return mx.grad(loss, argnums=(0, 1))(*arrays(x, h0))

    with executed() as calls:
        got = grads(decay_scan)
        mx.eval(got)
    assert [c.launch.name for c in calls] == ["mlx_mcsd_decay_scan", "mlx_mcsd_decay_scan_grad"]
    check(got, map(np.array, grads(chunked)), 1e-5)


@pytest.mark.parametrize("layout", ["dense", "channel"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_narrow_slices(monkeypatch, dtype, layout, N=65, C=3, Dc=20, B=2):
    """A slice of the fused projection is read as it lies, and its numbers exactly."""
    monkeypatch.setattr(kernels, "segments", lambda B, N, D: 1)
    wide = mx.random.normal((C, B * N, 4 * Dc), key=mx.random.key(0)).astype(dtype)
    if layout == "dense":
        x = mx.split(wide.reshape(B, N, 4 * C * Dc), 4, axis=-1)[1].reshape(B, N, C, Dc)
    else:
        x = mx.split(wide.reshape(C, B, N, 4 * Dc).transpose(1, 2, 0, 3), 4, axis=-1)[1]
    exact = np.array(x.astype(mx.float32))
    with executed() as calls:
        h, last = decay_scan(x, LAM)
        dx, dh0 = decay_scan_grad(x, LAM, last, dtype=dtype)
    assert [c.copied for c in calls] == [0, 0]
    check((h, last), loop(exact, LAM))
    want = adjoint(exact, LAM, np.array(last))
    assert dx.dtype == dtype
    check((dh0,), want[1:])
    # dx is rounded to 11 or 8 bits, once.
    ulp = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}[dtype]
    assert np.all(abs(np.array(dx.astype(mx.float32)) - want[0]) <= ulp * abs(want[0]) + 1e-5)


def test_strided_states_and_flags(monkeypatch, N=67):
    """Broadcast states and sliced flags are read in their strides too."""
    monkeypatch.setattr(kernels, "segments", lambda B, N, D: 4)
    x, h0 = inputs(N)
    h0[:] = h0[0, 0]
    mask, reset = flags("mask holes, reset edges", N)
    state = mx.broadcast_to(mx.array(h0[0, 0]), h0.shape)
    wide = [mx.array(np.repeat(v, 2, axis=1))[:, ::2] for v in (mask, reset)]
    with executed():
        check(decay_scan(*arrays(x), LAM, state, *wide), loop(x, LAM, h0, mask, reset))
        check(decay_scan_grad(*arrays(x), LAM, state, *wide), adjoint(x, LAM, h0, mask, reset))


def test_pieces(S, monkeypatch, N=67):
    """One dispatch or several: the same numbers, and gradients through all of them."""
    monkeypatch.setattr(pieces, "DISPATCH_TOKENS", 30)
    x, h0 = inputs(N)
    mask, reset = flags("mask holes, reset edges", N)
    with executed() as calls:
        check(decay_scan(*arrays(x), LAM, *arrays(h0, mask, reset)), loop(x, LAM, h0, mask, reset))
        got = decay_scan_grad(*arrays(x), LAM, *arrays(h0, mask, reset))
        check(got, adjoint(x, LAM, h0, mask, reset))
    assert len(calls) == 6
