import math
import resource
import sys
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.mixers.mcsd import decays, slopes
from mlx_mcsd.recurrence import chunked, count_tokens, scan, step
from oracle import relative_error

# Fast and slow channels together: e^-0.57 (the slope section's first) to 1 - 2^-14.
LAM = (math.exp(-slopes(10)[0]), 0.9, 1 - 2.0**-14)
C, Dc = len(LAM), 2
LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 600]
DEEP = [64 * 64 + 1, 64 * 64 + 200]  # a third level of chunks of chunks
FORMS = [pytest.param(chunked, id="chunked"), pytest.param(step, id="step")]


def loop(x, lam, h0=None, mask=None, reset=None):
    """The recurrence in NumPy float64, a token at a time: (h, h_last)."""
    B, N = x.shape[:2]
    state = np.zeros((B, *x.shape[2:])) if h0 is None else np.array(h0, np.float64)
    lam = np.array(lam)[:, None]
    h = np.empty(x.shape)
    for n in range(N):
        m = np.ones((B, 1, 1), bool) if mask is None else mask[:, n, None, None]
        if reset is not None:
            state = np.where(m & reset[:, n, None, None], 0, state)
        h[:, n] = state
        state = np.where(m, lam * (state + x[:, n]), state)
    return h, state


def plain(x, lam, h0, mask=None, reset=None):
    """The same in MLX operations: what autodiff is judged by."""
    lam = mx.array(lam)[:, None]
    state, h = h0, []
    for n in range(x.shape[1]):
        m = mx.ones((x.shape[0], 1, 1), mx.bool_) if mask is None else mask[:, n, None, None]
        if reset is not None:
            state = mx.where(m & reset[:, n, None, None], 0.0, state)
        h.append(state)
        state = mx.where(m, lam * (state + x[:, n]), state)
    return mx.stack(h, axis=1), state


def by_steps(x, lam, h0=None, mask=None, reset=None):
    """`step` over all N tokens."""
    out = []
    for n in range(x.shape[1]):
        m, r = (None if a is None else a[:, n : n + 1] for a in (mask, reset))
        h, h0 = step(x[:, n : n + 1], lam, h0, m, r)
        out.append(h)
    return mx.concatenate(out, axis=1), h0


def inputs(N, seed=0, B=3):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, N, C, Dc)).astype(np.float32)
    h0 = (30 * rng.standard_normal((B, C, Dc))).astype(np.float32)
    return x, h0


def masks(N):
    """Masks of three rows, by the pattern's name."""
    pos, rng = np.arange(N), np.random.default_rng(N)
    return {
        "left": pos >= np.array([[0], [N // 3], [N - 1]]),
        "right": pos < np.array([[N], [N - N // 3], [1]]),
        "holes": rng.random((3, N)) < [[0.8], [0.5], [0.1]],
        "all": np.stack([pos >= 0, pos < 0, pos < 0]),
    }


def resets(N):
    """Restarts of three rows, by the pattern's name."""
    pos, rng = np.arange(N), np.random.default_rng(N)
    return {
        "first": np.stack([pos == 0, pos < 0, pos == 0]),
        "last": np.stack([pos == N - 1, pos < 0, pos >= N - 2]),
        "many": rng.random((3, N)) < [[0.0], [0.02], [0.3]],
        "edges": np.stack([pos % 64 == 0, pos % 64 == 63, pos % 64 == 1]),
    }


def check(got, want, tolerance=1e-5):
    for g, w in zip(got, want, strict=True):
        assert g.dtype == mx.float32
        if np.any(w):
            assert relative_error(np.array(g), w) <= tolerance
        else:
            assert not np.any(np.array(g))


def arrays(*values):
    return [None if v is None else mx.array(v) for v in values]


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", LENGTHS + DEEP)
@pytest.mark.parametrize("start", ["zero", "given"])
def test_chunked(N, start):
    x, h0 = inputs(N)
    h0 = h0 if start == "given" else None
    check(chunked(mx.array(x), LAM, *arrays(h0)), loop(x, LAM, h0))


@pytest.mark.parametrize("N", [1, 2, 65])
def test_step(N):
    x, h0 = inputs(N)
    check(by_steps(mx.array(x), LAM, mx.array(h0)), loop(x, LAM, h0))


@pytest.mark.parametrize("pattern", ["left", "right", "holes", "all"])
@pytest.mark.parametrize("N", [1, 2, 63, 64, 65, 200, 600])
def test_mask(N, pattern):
    """Against the loop, with NaN under the mask: padding may hold anything."""
    x, h0 = inputs(N)
    mask = masks(N)[pattern]
    want = loop(x, LAM, h0, mask)
    x[~mask] = np.nan
    check(chunked(*arrays(x), LAM, *arrays(h0, mask)), want)
    if N <= 65:
        check(by_steps(*arrays(x), LAM, *arrays(h0, mask)), want)


@pytest.mark.parametrize("pattern", ["first", "last", "many", "edges"])
@pytest.mark.parametrize("N", [1, 2, 63, 64, 65, 200, *DEEP])
def test_reset(N, pattern):
    x, h0 = inputs(N)
    reset = resets(N)[pattern]
    want = loop(x, LAM, h0, None, reset)
    check(chunked(*arrays(x), LAM, *arrays(h0, None, reset)), want)
    if N <= 65:
        check(by_steps(*arrays(x), LAM, *arrays(h0, None, reset)), want)


@pytest.mark.parametrize("reset", ["last", "many", "edges"])
@pytest.mark.parametrize("mask", ["left", "right", "holes", "all"])
def test_mask_and_reset(mask, reset, N=200):
    """A restart under the mask is void: the token it would precede does not exist."""
    x, h0 = inputs(N)
    mask, reset = masks(N)[mask], resets(N)[reset]
    assert (reset & ~mask).any()
    want = loop(x, LAM, h0, mask, reset)
    x[~mask] = np.nan
    check(chunked(*arrays(x), LAM, *arrays(h0, mask, reset)), want)
    check(by_steps(*arrays(x), LAM, *arrays(h0, mask, reset)), want)


@pytest.mark.parametrize("mask", ["left", "right", "holes", "all"])
def test_mask_needs_no_stable_sort(mask, monkeypatch, N=200):
    x, h0 = inputs(N)
    x, h0, mask = arrays(x, h0, masks(N)[mask])
    want = chunked(x, LAM, h0, mask)
    sort = mx.argsort

    def last_of_equals_first(keys, axis):
        return N - 1 - sort(keys[:, ::-1], axis=axis)

    monkeypatch.setattr(mx, "argsort", last_of_equals_first)
    for got, wanted in zip(chunked(x, LAM, h0, mask), want, strict=True):
        assert mx.array_equal(got, wanted)


def test_a_document_sees_nothing_before_it():
    """Not even by cancellation: a past of 1e30 leaves no trace."""
    x, h0 = inputs(150)
    reset = np.zeros((3, 150), bool)
    reset[:, 70] = True
    loud = x.copy()
    loud[:, :70] = 1e30
    quiet = chunked(*arrays(x), LAM, *arrays(h0, None, reset))
    shouted = chunked(*arrays(loud), LAM, *arrays(h0 * 1e30, None, reset))
    assert mx.array_equal(quiet[0][:, 70:], shouted[0][:, 70:])
    assert mx.array_equal(quiet[1], shouted[1])


@pytest.mark.parametrize("form", FORMS)
def test_masked_tokens_leave_the_state_bit_for_bit(form):
    x, h0 = inputs(1)
    mask, reset = np.array([[False], [True], [False]]), np.ones((3, 1), bool)
    h, last = form(*arrays(x), LAM, *arrays(h0, mask, reset))
    assert np.array_equal(last[::2], h0[::2])
    assert np.array_equal(h[::2, 0], h0[::2])
    assert not np.any(np.array(h[1]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_row_is_the_row_alone_bit_for_bit(side, N=100, padded=170):
    """In the recurrence itself padding costs not even rounding."""
    x, h0 = inputs(N, B=1)
    h, last = chunked(*arrays(x), LAM, *arrays(h0))
    pad = padded - N
    before, after = (pad, 0) if side == "left" else (0, pad)
    wide = np.pad(x, [(0, 0), (before, after), (0, 0), (0, 0)], constant_values=np.nan)
    mask = np.pad(np.ones((1, N), bool), [(0, 0), (before, after)])
    h_wide, last_wide = chunked(*arrays(wide), LAM, *arrays(h0, mask))
    assert mx.array_equal(h_wide[:, before : before + N], h)
    assert mx.array_equal(last_wide, last)


@pytest.mark.parametrize("cuts", [(1,), (64,), (63, 65), (1, 2, 3, 130), (100, 100)], ids=str)
def test_splits(cuts, N=200):
    x, h0 = inputs(N)
    mask, reset = masks(N)["holes"], resets(N)["many"]
    want = loop(x, LAM, h0, mask, reset)
    x, state, mask, reset = arrays(x, h0, mask, reset)
    parts = []
    for a, b in pairwise([0, *cuts, N]):
        h, state = scan(x[:, a:b], LAM, state, mask[:, a:b], reset[:, a:b])
        parts.append(h)
    check((mx.concatenate(parts, axis=1), state), want)


def test_no_tokens():
    x, h0 = inputs(0)
    h, last = scan(*arrays(x), LAM, *arrays(h0))
    assert h.shape == (3, 0, C, Dc) and h.dtype == mx.float32
    assert np.array_equal(last, h0)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("N", [1, 200])
def test_narrow_inputs_are_read_exactly(dtype, N):
    """Everything after the reading of x is float32, so the tolerance does not widen."""
    x, h0 = inputs(N)
    x = mx.array(x).astype(dtype)
    want = loop(np.array(x.astype(mx.float32)), LAM, h0)
    check(scan(x, LAM, mx.array(h0)), want)
    check(chunked(x, LAM, mx.array(h0)), want)


@pytest.mark.parametrize("kind", [list, np.array, mx.array], ids=["list", "numpy", "mlx"])
def test_kinds_of_decays(kind):
    x, h0 = inputs(70)
    lam = (0.5, 0.75, 0.9375)  # exact in float32, or an mlx array would differ
    want, got = (chunked(*arrays(x), v, *arrays(h0)) for v in (lam, kind(lam)))
    assert mx.array_equal(got[0], want[0]) and mx.array_equal(got[1], want[1])


# --- gradients and transformations -------------------------------------------------------------


@pytest.mark.parametrize(
    "N, mask, reset",
    [
        (1, None, None),
        (2, None, None),
        (65, None, None),
        (130, None, None),
        (70, "left", None),
        (70, "holes", None),
        (70, None, "many"),
        (130, "right", "edges"),
    ],
)
def test_gradients(N, mask, reset):
    """Against autodiff of the plain form; with NaN under the mask, where gradients are zero."""
    x, h0 = inputs(N)
    mask = None if mask is None else masks(N)[mask]
    reset = None if reset is None else resets(N)[reset]
    rng = np.random.default_rng(1)
    g, g_last = arrays(*(rng.standard_normal(a.shape).astype(np.float32) for a in (x, h0)))
    poisoned = x if mask is None else np.where(mask[..., None, None], x, np.nan)
    m, r = arrays(mask, reset)
    if m is not None:
        g = mx.where(m[..., None, None], g, 0.0)

    def loss(form):
        def run(x, h0):
            h, last = form(x, LAM, h0, m, r)
            return (g * h).sum() + (g_last * last).sum()

        return mx.grad(run, argnums=(0, 1))

    want = loss(plain)(*arrays(x, h0))
    check(loss(chunked)(*arrays(poisoned, h0)), map(np.array, want))
    if N == 1:
        check(loss(step)(*arrays(poisoned, h0)), map(np.array, want))


def test_gradient_of_the_loop():
    """The adjoint, written down: dL/dx_j = sum_{i>j} lambda^(i-j) g_i."""
    N = 150
    x, _ = inputs(N, B=1)
    g = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    ago = np.arange(N)[:, None] - np.arange(N)  # i - j
    weight = np.where(ago > 0, np.array(LAM)[:, None, None] ** np.maximum(ago, 0), 0)  # (C, N, N)
    want = np.einsum("cij,bicd->bjcd", weight, g.astype(np.float64))
    got = mx.grad(lambda x: (mx.array(g) * chunked(x, LAM)[0]).sum())(*arrays(x))
    check([got], [want])


@pytest.mark.parametrize("N", [1, 130])
def test_export(N, tmp_path, monkeypatch):
    """The graph holds no evaluation: it can be exported, masks included, and run elsewhere."""
    monkeypatch.setenv("MLX_MCSD_KERNELS", "off")  # elsewhere there may be no Metal
    x, h0 = inputs(N)
    mask, reset = masks(N)["left"], resets(N)["many"]
    path = str(tmp_path / "scan.mlxfn")
    args = arrays(x, h0, mask, reset)
    mx.export_function(path, lambda x, h0, m, r: scan(x, LAM, h0, m, r), *args)
    check(mx.import_function(path)(*args), loop(x, LAM, h0, mask, reset))


# --- long runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_200000_tokens(form, N=200_000):
    """The state after a long run, and that the run itself keeps nothing but the state."""
    # Row 0 has zero mean; row 1 is constant, so that its rounding errors are all of one sign and
    # add up over the slowest channel's window of 16,384 tokens, at one rounding per step.
    tolerances = (1e-4, 2e-3 if form is step else 1e-4)
    lam = decays(10)
    x = np.random.default_rng(0).standard_normal((2, N, 10)).astype(np.float32)
    x[1] = 6
    state = np.zeros((2, 10))
    for n in range(N):
        state = np.array(lam) * (state + x[:, n])

    xs = mx.array(x)[..., None]
    mx.eval(xs)
    piece = 1000 if form is step else 8192
    h, used, resident = None, [], []
    for a in range(0, N, piece):
        part = xs[:, a : a + piece]
        if form is step:
            for token in mx.split(part, part.shape[1], axis=1):
                _, h = step(token, lam, h)
        else:
            _, h = chunked(part, lam, h)
        mx.eval(h)
        used.append(mx.get_active_memory())
        resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    for row, tolerance in enumerate(tolerances):
        assert relative_error(np.array(h)[row, :, 0], state[row]) <= tolerance
    assert used[-1] <= used[len(used) // 4] + 4096
    grown = resident[-1] - resident[len(resident) // 4]
    assert grown < 16 * 2 ** (20 if sys.platform == "darwin" else 10)  # bytes there, KiB elsewhere


def test_last_state_does_not_hold_the_others():
    x = mx.zeros((1, 4096, C, 16))
    mx.eval(x)
    before = mx.get_active_memory()
    h, last = chunked(x, LAM)
    mx.eval(h, last)
    del h
    # The tables of powers stay as well: three levels of (C, 64, 64) and (64, C).
    assert mx.get_active_memory() - before < 3 * 4 * (64 * 64 * C + 64 * C) + 65536
    assert last.shape == (1, C, 16)


# --- counting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [None, "first", "many"])
@pytest.mark.parametrize("mask", [None, "left", "holes", "all"])
@pytest.mark.parametrize("N", [0, 1, 2, 70])
def test_count_tokens(N, mask, reset):
    mask = None if mask is None else masks(N)[mask] if N else np.zeros((3, 0), bool)
    reset = None if reset is None else resets(N)[reset] if N else np.zeros((3, 0), bool)
    count0 = np.array([0, 7, 100], np.int32)
    want, count = np.empty((3, N), np.int32), count0.copy()
    for n in range(N):
        m = np.ones(3, bool) if mask is None else mask[:, n]
        if reset is not None:
            count = np.where(m & reset[:, n], 0, count)
        want[:, n] = count
        count = count + m
    got, last = count_tokens(mx.array(count0), N, *arrays(mask, reset))
    assert got.dtype == last.dtype == mx.int32
    assert np.array_equal(got, want)
    assert np.array_equal(last, count)


# --- complaints --------------------------------------------------------------------------------

X, H0 = (mx.array(a) for a in inputs(2))
COMPLAINTS = {
    "x not 4-d": (dict(x=X[0]), "x must be float (B, N, C, Dc)"),
    "x of integers": (dict(x=X.astype(mx.int32)), "x must be float (B, N, C, Dc) but got"),
    "decays short": (dict(lam=LAM[:2]), "lam must hold one decay per channel, 3, but got 2."),
    "decay of 1": (dict(lam=(0.5, 0.5, 1.0)), "strictly between 0 and 1 but got 1.0."),
    "decay NaN": (dict(lam=[0.5, math.nan, 0.5]), "strictly between 0 and 1 but got nan."),
    "state narrow": (dict(h0=H0.astype(mx.bfloat16)), "a state is never cast"),
    "state shape": (dict(h0=H0[:1]), "h0 must be float32 (3, 3, 2) but got"),
    "mask of floats": (dict(mask=mx.ones((3, 2))), "mask must be bool (3, 2) but got"),
    "reset shape": (dict(reset=mx.ones((1, 2), mx.bool_)), "reset must be bool (3, 2) but got"),
}


@pytest.mark.parametrize("change, complaint", COMPLAINTS.values(), ids=COMPLAINTS)
def test_complaints(change, complaint):
    for form in (scan, chunked, step):
        with pytest.raises(MCSDError) as error:
            form(**{"x": X, "lam": LAM, "h0": H0} | change)
        assert complaint in str(error.value)


def test_step_takes_one_token():
    with pytest.raises(MCSDError, match="one token"):
        step(X, LAM, H0)


def test_count_must_be_int32():
    with pytest.raises(MCSDError, match="count0 must be int32"):
        count_tokens(mx.zeros(3), 2)
