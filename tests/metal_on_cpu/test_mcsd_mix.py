"""mcsd_mix, executed: against the block in float64, its gradient against autodiff of it."""

import mlx.core as mx
import numpy as np
import pytest

from metal_on_cpu import executed, needs_compiler, references
from metal_on_cpu.references import EPS
from mlx_mcsd import kernels, pieces
from mlx_mcsd.bench.kernels import plain_mix
from mlx_mcsd.config import ModelArgs
from mlx_mcsd.mixers.mcsd import MCSD, slopes
from oracle import relative_error

pytestmark = needs_compiler

NAMES = ("U", "V", "E", "F", "A", "H", "gain")
SIZES = [(1, 3, 20, 3), (17, 3, 60, 2), (65, 1, 2, 1), (33, 2, 256, 1), (5, 1, 1, 1)]  # N, C, Dc, B


def inputs(N, C, Dc, B):
    """U, V, E, F, A, H, n, gain; every row begins at its first token, and one begins again."""
    rng = np.random.default_rng(N)
    arrays = [rng.standard_normal((B, N, C, Dc)).astype(np.float32) for _ in "UVEFAH"]
    n = np.tile(np.arange(N, dtype=np.int32), (B, 1))
    n[-1, N // 2 :] -= N // 2
    return [*arrays, n, rng.uniform(0.5, 2, C * Dc).astype(np.float32)]


def mix(*arrays, concat=False):
    return kernels.mcsd_mix(*arrays, beta=slopes(arrays[0].shape[2]), eps=EPS, concat=concat)


def plain(*arrays):
    return plain_mix(*arrays, beta=slopes(arrays[0].shape[2]), eps=EPS)


@pytest.mark.parametrize("concat", [False, True], ids=["add", "concat"])
@pytest.mark.parametrize("N, C, Dc, B", SIZES)
def test_values(N, C, Dc, B, concat):
    """Every token is a step's: the same block in float64, a token a row."""
    arrays = inputs(N, C, Dc, B)
    with executed(order="random", seed=N):
        got = mix(*map(mx.array, arrays), concat=concat)
    assert relative_error(np.array(got), references.mix(*arrays, concat)) <= 2e-6


@pytest.mark.parametrize("concat", [False, True], ids=["add", "concat"])
@pytest.mark.parametrize("N, C, Dc, B", SIZES)
def test_gradients(N, C, Dc, B, concat):
    arrays = inputs(N, C, Dc, B)
    g = np.random.default_rng(1).standard_normal((B, N, C * Dc * (1 + concat))).astype(np.float32)

    def loss(*arrays):
        return (mx.array(g) * mix(*arrays, concat=concat)).sum()

    with executed(order="random", seed=N) as calls:
        got = mx.grad(loss, argnums=[0, 1, 2, 3, 4, 5, 7])(*map(mx.array, arrays))
        mx.eval(got)
    assert [c.launch.name for c in calls] == ["mlx_mcsd_mcsd_mix", "mlx_mcsd_mcsd_mix_grad"]
    for name, a, b in zip(NAMES, got, references.mix_grad(g, *arrays, concat), strict=True):
        assert a.dtype == mx.float32 and a.shape == b.shape
        if np.any(b):
            assert relative_error(np.array(a), b) <= 2e-6, name
        else:  # states before the first token
            assert not np.any(np.array(a)), name


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_narrow_inputs(dtype):
    """U to F narrow and lying in one projection; theta and their gradients are rounded once."""
    *tokens, A, H, n, gain = map(mx.array, inputs(17, 3, 60, 2))
    wide = mx.concatenate([t.reshape(2, 17, -1) for t in tokens], axis=-1).astype(dtype)
    ulp = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}[dtype]

    def run(form, wide):
        def loss(wide):
            tokens = [t.reshape(2, 17, 3, 60) for t in mx.split(wide, 4, axis=-1)]
            theta = form(*tokens, A, H, n, gain).astype(mx.float32)
            return (theta * theta).sum(), theta

        (_, theta), grad = mx.value_and_grad(loss)(wide)
        return theta, grad

    with executed() as calls:
        theta, grad = run(mix, wide)
        mx.eval(theta, grad)
    assert sum(t.copied for c in calls for t in c.traffic.values()) == 0
    assert grad.dtype == dtype
    want_theta, want_grad = run(plain, wide.astype(mx.float32))
    assert relative_error(np.array(theta), np.array(want_theta)) <= ulp
    # The cotangent is rounded as well, and theta in it.
    assert relative_error(np.array(grad.astype(mx.float32)), np.array(want_grad)) <= 4 * ulp


@pytest.mark.parametrize("fusion, tokens", [("add", 99), ("concat", 99), ("concat", 16)])
def test_a_mixer_trains(fusion, tokens, monkeypatch, N=35, D=60):
    """A block's values, states and gradients are those of the plain forms, flags included."""
    monkeypatch.setattr(pieces, "DISPATCH_TOKENS", tokens)
    mx.random.seed(0)
    mixer = MCSD(ModelArgs(
        model_type="mcsd", vocab_size=16, hidden_size=D, num_channels=3, num_hidden_layers=1,
        intermediate_size=8, projection="dense", fusion=fusion,
        output_projection=fusion == "concat",
    ))  # fmt: skip
    x, g = mx.random.normal((2, 2, N, D))
    mask = mx.arange(N) >= mx.array([[0], [4]])
    reset = mx.arange(N) == mx.array([[9], [20]])

    def run():
        def loss(parameters, x):
            mixer.update(parameters)
            y, state = mixer(x, mask=mask, reset=reset)
            return (mx.where(mask[..., None], g * y, 0)).sum() + state[0].sum() + state[1].sum()

        parameters = mixer.trainable_parameters()
        dp, dx = mx.grad(loss, argnums=(0, 1))(parameters, x)
        mixer.update(parameters)
        y, state = mixer(x, mask=mask, reset=reset)
        results = [y, dx, *state, dp["uvef_proj"]["weight"], dp["decay_norm"]["weight"]]
        mx.eval(results)
        return results

    with executed() as calls:
        got = run()
    assert max(c.launch.grid[2] for c in calls) == 2 * -(-min(tokens, N) // kernels.MIX_TOKENS)
    assert {c.launch.name.removeprefix("mlx_mcsd_") for c in calls} == {
        "decay_scan", "decay_scan_grad", "mcsd_mix", "mcsd_mix_grad"
    }  # fmt: skip
    for a, b in zip(got, run(), strict=True):
        assert a.dtype == b.dtype
        assert relative_error(np.array(a), np.array(b)) <= 1e-5


def test_gradients_have_the_dtypes_of_their_arrays():
    arrays = [mx.array(a) for a in inputs(5, 1, 1, 1)]
    dtypes = [*[mx.float16] * 4, mx.float32, mx.float32, mx.int32, mx.bfloat16]
    arrays = [a.astype(d) for a, d in zip(arrays, dtypes, strict=True)]
    with executed(mode="captured"):
        grads = mx.grad(lambda *a: mix(*a).sum(), argnums=[0, 1, 2, 3, 4, 5, 7])(*arrays)
    assert [g.dtype for g in grads] == [d for d in dtypes if d != mx.int32]


def test_another_eps(eps=1e-2):
    """The norm's own, not the usual one: in the sequence, its gradient and the step."""
    *arrays, n, gain = inputs(3, 2, 20, 1)
    options = dict(beta=slopes(2), eps=eps)
    later = [mx.array(a) for a in (*arrays, n + 1, gain)]
    tokens, states = [a[:, :1] for a in later[:4]], [a[:, 0] for a in later[4:6]]

    def loss(H):
        return kernels.mcsd_mix(*later[:5], H, *later[6:], **options)

    with executed():
        (theta,), (dH,) = mx.vjp(loss, [later[5]], [mx.ones((1, 3, 40))])
        step = kernels.mcsd_step(
            *tokens, *states, later[6][:, 0], later[7], alpha=(0.9, 0.99), **options
        )
    numbers = (*arrays, n + 1, gain)
    assert relative_error(np.array(theta), references.mix(*numbers, eps=eps)) <= 2e-6
    assert np.array_equal(step[0][:, 0], theta[:, 0])
    want = references.mix_grad(np.ones((1, 3, 40)), *numbers, eps=eps)[5]
    assert relative_error(np.array(dH), want) <= 2e-6


@pytest.mark.parametrize("N, launched", [(1, []), (3, ["mlx_mcsd_decay_scan"] * 2)])
@pytest.mark.parametrize("section", ["slope", "decay"])
def test_other_sections_run_only_the_scan(section, N, launched):
    """The block's own kernels know a slope beside a decay, and nothing else."""
    mixer = MCSD(ModelArgs(
        model_type="mcsd", vocab_size=16, hidden_size=12, num_channels=3, num_hidden_layers=1,
        intermediate_size=8, sections=[section] * 2,
    ))  # fmt: skip
    mixer.eval()
    with executed(mode="captured") as calls:
        mx.eval(mixer(mx.ones((1, N, 12))))
    assert [c.launch.name for c in calls] == launched
