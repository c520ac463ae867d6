"""What every mixer of the registry must hold to, in every variant it has."""

from copy import deepcopy
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import oracle
from mlx_mcsd import mixers
from mlx_mcsd.config import ModelArgs
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.mixers import mcsd
from oracle import relative_error

B, D, C = 3, 60, 3

# Every set of sections, and every fusion and projection; `test_model.py` judges all combinations.
VARIANTS = {
    "mcsd": {
        "default": {},
        "slope": {"sections": ["slope"]},
        "decay": {"sections": ["decay"]},
        "slope+slope": {"sections": ["slope", "slope"]},
        "decay+decay": {"sections": ["decay", "decay"]},
        "dense": {"projection": "dense"},
        "dense-o_proj": {"projection": "dense", "output_projection": True},
        "concat": {"fusion": "concat", "output_projection": True},
        "dense-concat": {"projection": "dense", "fusion": "concat", "output_projection": True},
    },
}
CASES = [
    pytest.param({"mixer": name} | variant, id=f"{name}-{label}")
    for name, variants in VARIANTS.items()
    for label, variant in variants.items()
]


def test_every_mixer_has_cases():
    assert set(VARIANTS) == set(mixers.names())


def test_unknown_mixer():
    with pytest.raises(MCSDError) as error:
        mixers.get("mamba")
    assert str(error.value) == "[ModelArgs] mixer must be one of ['mcsd'] but got 'mamba'."


@pytest.fixture(scope="module", params=CASES)
def mixer(request):
    args = ModelArgs(
        vocab_size=7,
        hidden_size=D,
        num_channels=C,
        num_hidden_layers=1,
        intermediate_size=8,
        **request.param,
    )
    module = mixers.get(args.mixer)(args)
    rng = np.random.default_rng(0)

    def randomised(name, p):  # gains around 1, matrices that keep the scale
        shape = p.shape
        value = rng.uniform(0.6, 1.4, shape) if p.ndim == 1 else rng.standard_normal(shape)
        return mx.array(value * (1 if p.ndim == 1 else shape[-1] ** -0.5), mx.float32)

    weights = [(name, randomised(name, p)) for name, p in tree_flatten(module.parameters())]
    module.load_weights(weights, strict=True)
    return module


def inputs(N, seed=0):
    return mx.random.normal((B, N, D), key=mx.random.key(seed))


def check(got, want):
    """Outputs and states (y, state) agree, counts exactly."""
    assert relative_error(got[0], want[0]) <= 1e-5
    check_states(got[1], want[1])


def check_states(got, want):
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        if g.dtype == mx.int32:
            assert mx.array_equal(g, w)
        else:
            assert g.dtype == mx.float32
            assert relative_error(g, w) <= 1e-5


def in_pieces(mixer, x, edges, state=None, mask=None, reset=None):
    parts = []
    for a, b in pairwise(edges):
        m, r = (None if v is None else v[:, a:b] for v in (mask, reset))
        y, state = mixer(x[:, a:b], state, m, r)
        parts.append(y)
    return mx.concatenate(parts, axis=1), state


@pytest.mark.parametrize("n", [1, 40, 69])
def test_later_tokens_change_no_earlier_output(mixer, n, N=70):
    x = inputs(N)
    y, _ = mixer(x)
    changed, _ = mixer(mx.concatenate([x[:, :n], inputs(N, seed=1)[:, n:]], axis=1))
    assert relative_error(changed[:, :n], y[:, :n]) <= 1e-5
    assert relative_error(changed[:, n:], y[:, n:]) > 0.01
    # And the past matters, or the above would hold of a mixer that mixes nothing.
    changed, _ = mixer(mx.concatenate([inputs(n, seed=1), x[:, n:]], axis=1))
    assert relative_error(changed[:, n:], y[:, n:]) > 0.01


def test_one_by_one(mixer, N=70):
    x = inputs(N)
    check(in_pieces(mixer, x, range(N + 1)), mixer(x))


@pytest.mark.parametrize("edges", [(0, 1, 70), (0, 63, 64, 65, 70), (0, 69, 70)], ids=str)
def test_splits(mixer, edges):
    x = inputs(70)
    check(in_pieces(mixer, x, edges), mixer(x))


def test_init_state_is_no_state(mixer):
    x = inputs(5)
    got, want = mixer(x, mixer.init_state(B)), mixer(x)
    assert mx.array_equal(got[0], want[0])
    check_states(got[1], want[1])


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padded_rows_are_the_rows_alone(mixer, side, N=70):
    """Outputs, state, and what follows: rows of 70, 40 and no tokens in a batch."""
    lengths = [N, 40, 0]
    pos = np.arange(N)
    kept = {n: np.random.default_rng(n).permutation(N)[:n] for n in lengths}
    mask = {
        "left": np.stack([pos >= N - n for n in lengths]),
        "right": np.stack([pos < n for n in lengths]),
        "holes": np.stack([np.isin(pos, kept[n]) for n in lengths]),
    }[side]
    x, after = inputs(N), inputs(3, seed=1)
    y, state = mixer(mx.where(mx.array(mask)[..., None], x, 1e6), None, mx.array(mask))
    y_after, state_after = mixer(after, state)
    for row, n in enumerate(lengths):
        alone_state = None
        if n:
            alone, alone_state = mixer(x[row : row + 1, mx.array(np.flatnonzero(mask[row]))])
            assert relative_error(y[row, mx.array(np.flatnonzero(mask[row]))], alone[0]) <= 1e-5
            check_states([s[row : row + 1] for s in state], alone_state)
        want = mixer(after[row : row + 1], alone_state)
        check((y_after[row : row + 1], [s[row : row + 1] for s in state_after]), want)


def test_masked_tokens_are_a_no_op(mixer):
    """One by one, too, and bit for bit."""
    _, state = mixer(inputs(5))
    for N in (1, 3):
        for reset in (None, mx.ones((B, N), mx.bool_)):
            y, after = mixer(inputs(N, seed=1), state, mx.zeros((B, N), mx.bool_), reset)
            assert all(mx.array_equal(a, s) for a, s in zip(after, state, strict=True))
            assert np.isfinite(np.array(y)).all()


@pytest.mark.parametrize("starts", [(0, 30), (1,), (0, 63, 64, 65)], ids=str)
def test_packed_documents_are_the_documents_alone(mixer, starts, N=70):
    x, before = inputs(N), inputs(9, seed=1)
    reset = np.zeros((B, N), bool)
    reset[:, list(starts)] = True
    _, state = mixer(before)
    y, last = mixer(x, state, None, mx.array(reset))
    check(in_pieces(mixer, x, range(N + 1), state, None, mx.array(reset)), (y, last))
    edges = sorted({0, *starts, N})
    for a, b in pairwise(edges):
        alone, alone_last = mixer(x[:, a:b], None if a in starts else state)
        assert relative_error(y[:, a:b], alone) <= 1e-5
    check_states(last, alone_last)


@pytest.mark.parametrize("tokens", [1, 100])
def test_state_bytes(mixer, tokens):
    _, state = mixer(inputs(tokens))
    assert sum(s.nbytes for s in state) == B * mixer.state_bytes(tokens)
    assert [s.shape for s in state] == [s.shape for s in mixer.init_state(B)]
    assert [s.dtype for s in state] == [s.dtype for s in mixer.init_state(B)]


@pytest.mark.parametrize(
    "dtype, tolerance", [(mx.float16, 5e-3), (mx.bfloat16, 4e-2)], ids=["float16", "bfloat16"]
)
def test_narrow_weights(mixer, dtype, tolerance, N=5):
    """Outputs in x's dtype, off by its own rounding; the state float32."""
    want, _ = mixer(inputs(N))
    narrow = deepcopy(mixer)
    narrow.set_dtype(dtype)
    x = inputs(N).astype(dtype)
    for edges in ((0, N), range(N + 1)):
        y, state = in_pieces(narrow, x, edges)
        assert y.dtype == dtype
        assert relative_error(y.astype(mx.float32), want) <= tolerance
        assert [s.dtype for s in state] == [s.dtype for s in narrow.init_state(B)]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "padded-packed"])
def test_gradients(mixer, packed, N=9):
    """Through the form of many tokens = through that of one, state and weights included."""
    x, g = inputs(N), inputs(N, seed=1)
    mask = mx.arange(N) >= mx.array([[0], [4], [1]])
    reset = mx.broadcast_to(mx.arange(N) == 5, (B, N)) if packed else None
    _, start = mixer(inputs(2, seed=2))
    g = mx.where(mask[..., None], g, 0.0)

    def gradients(edges):
        def loss(params, x, *past):
            mixer.update(params)
            y, state = in_pieces(mixer, x, edges, [*past, start[-1]], mask, reset)
            return (g * y).sum() + sum(s.square().sum() for s in state[:-1])

        argnums = tuple(range(1 + len(start)))
        weights = mixer.trainable_parameters()
        grads = mx.grad(loss, argnums=argnums)(weights, x, *start[:-1])
        mixer.update(weights)
        return dict(tree_flatten(grads))

    got, want = gradients((0, N)), gradients(range(N + 1))
    assert got.keys() == want.keys() and len(got) >= 3
    for name in want:
        assert relative_error(got[name], want[name]) <= 1e-5, name


# --- MCSD's own parts --------------------------------------------------------------------------


def test_rates():
    """Eqs. 2 and 8, in float64."""
    assert mcsd.slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert mcsd.decays(3) == (0.96875, 0.984375, 0.9921875)
    assert len(mcsd.slopes(20)) == 20 and max(np.float32(mcsd.decays(20))) < 1


@pytest.mark.parametrize("n", [1, 2, 100, 10_000, 2**30])
def test_slope_divides_by_its_weights(n):
    """e^-beta Z_n, summed in float64, for n where the printed quotient has lost its digits."""
    beta = np.array(mcsd.slopes(10))
    # Beyond 20,000 terms e^(-n beta) is nothing even to float64.
    want = np.exp(-beta[:, None] * np.arange(1, min(n, 20_000) + 1)).sum(axis=1)
    one = mx.ones((1, 1, 10, 1))
    V_past = mcsd.slope(
        one, one, one, mx.full((1, 1, 1, 1), n, mx.int32), mx.array(mcsd.slopes(10))[:, None]
    )
    want = 1 / want
    want = want / (1 + np.exp(-want))
    got = np.array(V_past, np.float64).reshape(-1)
    assert np.max(np.abs(got / want - 1)) <= 1e-6


def test_first_token_reads_itself():
    """V'_1 = V_1 and E'_1 = E_1, and it leaves an ordinary state."""
    U, V = (mx.random.normal((1, 1, C, 4), key=mx.random.key(i)) for i in range(2))
    nothing, n = mx.zeros((1, 1, C, 4)), mx.zeros((1, 1, 1, 1), mx.int32)
    beta = mx.array(mcsd.slopes(C))[:, None]
    v, u = np.array(V, np.float64), np.array(U, np.float64)
    want = u * oracle.silu(v)
    assert relative_error(mcsd.slope(U, V, nothing, n, beta), want) <= 1e-6
    gain = mx.random.uniform(0.6, 1.4, (C * 4,), key=mx.random.key(2))
    want = oracle.sigmoid(u) * oracle.rms_norm(v, 1e-6) * np.array(gain).reshape(C, 4)
    assert relative_error(mcsd.decay(U, V, nothing, n, gain, 1e-6), want) <= 1e-6


def test_huge_decay_state_passes_float16():
    """Past 65,504 the state still norms to one: only theta is narrowed."""
    args = ModelArgs(
        vocab_size=7,
        hidden_size=20,
        num_channels=10,
        num_hidden_layers=1,
        intermediate_size=8,
        sections=["decay"],
        projection="dense",
    )
    mixer = mixers.get("mcsd")(args)
    mixer.set_dtype(mx.float16)
    state = [mx.full((1, 10, 2), 1e6), mx.array([20_000], mx.int32)]
    y, (last, count) = mixer(mx.zeros((1, 1, 20), mx.float16), state)
    assert y.dtype == mx.float16 and last.dtype == mx.float32
    assert relative_error(y, np.full((1, 1, 20), 0.5)) <= 1e-3  # float16 itself
    assert mx.all(last > 9e5).item() and count.tolist() == [20_001]
