"""mcsd_step, executed: against the block in float64, and a mixer that decodes through it."""

import mlx.core as mx
import numpy as np
import pytest

from metal_on_cpu import executed, needs_compiler
from metal_on_cpu.references import EPS, block
from mlx_mcsd import kernels
from mlx_mcsd.config import ModelArgs
from mlx_mcsd.mixers.mcsd import MCSD, decays, slopes
from oracle import relative_error

pytestmark = needs_compiler

COUNTS = np.array([0, 1, 5000], np.int32)  # the first token, the second, and far on


def inputs(C, Dc, B=3):
    """Return U, V, E, F, then A, H, count, gain: a state that begins where count is 0."""
    rng = np.random.default_rng(Dc)
    tokens = [rng.standard_normal((B, 1, C, Dc)).astype(np.float32) for _ in "UVEF"]
    count = np.resize(COUNTS, B)
    begun = (count > 0)[:, None, None]
    states = [begun * rng.standard_normal((B, C, Dc)).astype(np.float32) for _ in "AH"]
    return tokens, states, count, rng.uniform(0.5, 2, C * Dc).astype(np.float32)


def step(tokens, states, count, gain, concat=False, mask=None, reset=None):
    C = tokens[0].shape[2]
    return kernels.mcsd_step(
        *map(mx.array, (*tokens, *states, count, gain)),
        beta=slopes(C), alpha=decays(C), eps=EPS, concat=concat,
        mask=None if mask is None else mx.array(mask),
        reset=None if reset is None else mx.array(reset),
    )  # fmt: skip


def check(got, want, rows=slice(None), tolerance=2e-6):
    """States of every row; theta of those whose token exists."""
    assert relative_error(np.array(got[0])[rows], want[0][rows]) <= tolerance
    for g, w in zip(got[1:3], want[1:3], strict=True):
        assert g.dtype == mx.float32
        assert relative_error(np.array(g), w) <= tolerance
    assert got[3].dtype == mx.int32
    assert np.array_equal(got[3], want[3])


@pytest.mark.parametrize("concat", [False, True], ids=["add", "concat"])
@pytest.mark.parametrize("C, Dc", [(1, 1), (3, 20), (3, 60), (10, 64), (2, 600)])
def test_values(C, Dc, concat):
    args = inputs(C, Dc)
    with executed(order="random", seed=Dc):
        check(step(*args, concat), block(*args, concat))


def test_decays_are_not_rounded(C=10, Dc=20):
    """States are what e^-beta makes of them, rounded once: e^-beta is no float."""
    tokens, states, *rest = inputs(C, Dc)
    for t in tokens:
        t[:] = 0
    want = block(tokens, states, *rest)
    with executed():
        got = step(tokens, states, *rest)
    for g, w in zip(got[1:3], want[1:3], strict=True):
        assert np.all(np.abs(np.array(g) - w) <= 0.501 * np.spacing(np.float32(np.abs(w))))


@pytest.mark.parametrize("flags", ["mask", "reset", "both"])
def test_masks_and_resets(flags):
    """With NaN in the token that does not exist, whose reset is void."""
    tokens, *rest = inputs(3, 60, B=6)
    mask = np.array([[True], [True], [True], [False], [False], [True]])
    reset = np.array([[False], [True], [True], [False], [True], [False]])
    mask, reset = (mask if flags != "reset" else None), (reset if flags != "mask" else None)
    want = block(tokens, *rest, mask=mask, reset=reset)
    rows = slice(None)
    if mask is not None:
        rows = mask[:, 0]
        for t in tokens:
            t[~rows] = np.nan
    with executed():
        got = step(tokens, *rest, mask=mask, reset=reset)
    check(got, want, rows)
    if mask is not None:
        for g, before in zip(got[1:3], rest[0], strict=True):
            assert np.array_equal(np.array(g)[~rows], before[~rows])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_narrow_inputs(dtype):
    """Only theta is narrowed, once; the states are as exact as in float32."""
    tokens, *rest = inputs(3, 60)
    tokens = [np.array(mx.array(t).astype(dtype).astype(mx.float32)) for t in tokens]
    want = block(tokens, *rest)
    with executed():
        theta, *state = step([mx.array(t).astype(dtype) for t in tokens], *rest)
    assert theta.dtype == dtype
    ulp = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}[dtype]
    assert relative_error(np.array(theta.astype(mx.float32)), want[0]) <= ulp
    for g, w in zip(state[:2], want[1:3], strict=True):
        assert relative_error(np.array(g), w) <= 2e-7


@pytest.mark.parametrize("projection", ["dense", "channel"])
@pytest.mark.parametrize("fusion", ["add", "concat"])
def test_a_mixer_decodes(projection, fusion, N=5, C=3, D=60):
    """Token by token through the kernel; nothing but the two products beside it, no copies."""
    mx.random.seed(0)
    args = ModelArgs(
        model_type="mcsd", vocab_size=16, hidden_size=D, num_channels=C, num_hidden_layers=1,
        intermediate_size=8, projection=projection, fusion=fusion,
        output_projection=fusion == "concat",
    )  # fmt: skip
    mixer = MCSD(args)
    mixer.eval()
    x = mx.random.normal((2, N, D))
    want, last = mixer(x)
    state, outputs = None, []
    with executed() as calls:
        for n in range(N):
            y, state = mixer(x[:, n : n + 1], state)
            outputs.append(y)
    assert [c.launch.name for c in calls] == ["mlx_mcsd_mcsd_step"] * N
    assert sum(t.copied for c in calls for t in c.traffic.values()) == 0
    assert relative_error(np.array(mx.concatenate(outputs, axis=1)), np.array(want)) <= 1e-5
    for g, w in zip(state, last, strict=True):
        assert relative_error(np.array(g), np.array(w)) <= 1e-5


def test_training_stays_differentiable():
    """The step has no gradient, so a mixer being trained reads one token as it reads many."""
    args = ModelArgs(
        model_type="mcsd", vocab_size=16, hidden_size=60, num_channels=3, num_hidden_layers=1,
        intermediate_size=8,
    )  # fmt: skip
    mixer = MCSD(args)
    with executed() as calls:
        grad = mx.grad(lambda x: mixer(x)[0].sum())(mx.ones((2, 1, 60)))
    names = [c.launch.name.removeprefix("mlx_mcsd_") for c in calls]
    assert names == ["mcsd_mix", "mcsd_mix_grad"]
    assert np.any(np.array(grad))


def test_a_mixer_decodes_with_flags(D=12):
    """A row without a token keeps its state; one that begins a document forgets it; eps counts."""
    mx.random.seed(0)
    args = ModelArgs(
        model_type="mcsd", vocab_size=16, hidden_size=D, num_channels=3, num_hidden_layers=1,
        intermediate_size=8, rms_norm_eps=1e-2,
    )  # fmt: skip
    mixer = MCSD(args)
    mixer.eval()
    x = mx.random.normal((3, 2, D))
    _, state = mixer(x[:, :1])
    mask, reset = mx.array([[True], [False], [True]]), mx.array([[False], [False], [True]])
    want, last = mixer(x[:, 1:], state, mask, reset)
    with executed():
        got, after = mixer(x[:, 1:], state, mask, reset)
    rows = [0, 2]
    assert relative_error(np.array(got)[rows], np.array(want)[rows]) <= 1e-5
    for g, w in zip(after, last, strict=True):
        assert relative_error(np.array(g), np.array(w)) <= 1e-5
    for g, before in zip(after, state, strict=True):
        assert np.array_equal(g[1], before[1])
