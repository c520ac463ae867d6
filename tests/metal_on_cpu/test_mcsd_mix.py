"""mcsd_mix, executed: against the block in float64, its gradient against autodiff."""

import mlx.core as mx
import numpy as np
import pytest

from metal_on_cpu import executed, needs_compiler
from metal_on_cpu.test_mcsd_step import EPS, block
from mlx_mcsd import kernels
from mlx_mcsd.config import ModelArgs
from mlx_mcsd.mixers.mcsd import MCSD, decay, slope, slopes
from oracle import relative_error

pytestmark = needs_compiler

NAMES = ("U", "V", "E", "F", "A", "H", "gain")
SIZES = [(1, 3, 20, 3), (17, 3, 60, 2), (65, 1, 2, 1), (33, 2, 256, 1)]  # N, C, Dc, B


def inputs(N, C, Dc, B):
    """U, V, E, F, A, H, n, gain; every row begins at its first token, and one begins again."""
    rng = np.random.default_rng(N)
    arrays = [rng.standard_normal((B, N, C, Dc)).astype(np.float32) for _ in "UVEFAH"]
    n = np.tile(np.arange(N, dtype=np.int32), (B, 1))
    n[-1, N // 2 :] -= N // 2
    return [*arrays, n, rng.uniform(0.5, 2, C * Dc).astype(np.float32)]


def mix(*arrays, concat=False):
    return kernels.mcsd_mix(*arrays, beta=slopes(arrays[0].shape[2]), eps=EPS, concat=concat)


def plain(U, V, E, F, A, H, n, gain, concat=False):
    """The operations that run without a GPU."""
    n = n[..., None, None]
    outputs = [
        slope(U, V, A, n, mx.array(slopes(U.shape[2]))[:, None]),
        decay(F, E, H, n, gain, EPS),
    ]
    theta = mx.concatenate(outputs, axis=-1) if concat else sum(outputs)
    return theta.reshape(*U.shape[:2], -1)


@pytest.mark.parametrize("concat", [False, True], ids=["add", "concat"])
@pytest.mark.parametrize("N, C, Dc, B", [*SIZES, (5, 1, 1, 1)])
def test_values(N, C, Dc, B, concat):
    """Every token is a step's: the same block in float64, a token a row."""
    U, V, E, F, A, H, n, gain = inputs(N, C, Dc, B)
    rows = [a.reshape(B * N, 1, C, Dc) for a in (U, V, E, F)]
    states = [a.reshape(B * N, C, Dc) for a in (A, H)]
    want = block(rows, states, n.reshape(-1), gain, concat)[0]
    with executed(order="random", seed=N):
        got = mix(*map(mx.array, (U, V, E, F, A, H, n, gain)), concat=concat)
    assert relative_error(np.array(got), want.reshape(B, N, -1)) <= 2e-6


@pytest.mark.parametrize("concat", [False, True], ids=["add", "concat"])
@pytest.mark.parametrize("N, C, Dc, B", SIZES)
def test_gradients(N, C, Dc, B, concat):
    arrays = list(map(mx.array, inputs(N, C, Dc, B)))
    g = mx.random.normal((B, N, C * Dc * (1 + concat)), key=mx.random.key(1))

    def grads(form):
        def loss(*arrays):
            return (g * form(*arrays, concat=concat)).sum()

        return mx.grad(loss, argnums=[0, 1, 2, 3, 4, 5, 7])(*arrays)

    with executed(order="random", seed=N) as calls:
        got = grads(mix)
        mx.eval(got)
    assert [c.launch.name for c in calls] == ["mlx_mcsd_mcsd_mix", "mlx_mcsd_mcsd_mix_grad"]
    for name, a, b in zip(NAMES, got, grads(plain), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if N == 1 and name in "AH":  # not read yet
            assert not np.any(np.array(a)) and not np.any(np.array(b))
        else:
            assert relative_error(np.array(a), np.array(b)) <= 1e-5, name


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


@pytest.mark.parametrize("mode", ["sanitized", "traced"])
def test_memory(mode):
    """Nothing outside the arrays, nothing unwritten, no race; the same bits in any order."""
    arrays = list(map(mx.array, inputs(17, 3, 20, 2)))
    results = []
    for options in ({}, dict(mode=mode, order="random", seed=1)):
        with executed(**options):
            grads = mx.grad(lambda *a: mix(*a).sum(), argnums=[0, 1, 2, 3, 4, 5, 7])(*arrays)
            results.append([mix(*arrays), *grads])
            mx.eval(results)
    assert all(map(mx.array_equal, *results))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
@pytest.mark.parametrize("concat", [False, True], ids=["add", "concat"])
def test_traffic(concat, dtype, N=48, Dc=128):
    """Bytes and 128-byte lines against the least: U, F, A, H read once, theta written once."""
    arrays = list(map(mx.array, inputs(N, 1, Dc, 1)))
    arrays[:4] = [a.astype(dtype) for a in arrays[:4]]
    arrays[6] = mx.arange(1, N + 1)[None]  # past the first token V and E stay unread
    with executed(mode="traced") as calls:
        mix(*arrays, concat=concat)
    (call,) = calls
    assert call.traffic["V"].read == call.traffic["E"].read == 0
    least = (dtype.size * (3 + concat) + 8) * N * Dc
    lines = sum(t.read_lines + t.written_lines for t in call.traffic.values())
    fewest = sum(t.read_least_lines + t.written_least_lines for t in call.traffic.values())
    assert call.bytes() <= 1.1 * least
    assert lines <= 1.1 * fewest


@pytest.mark.parametrize("fusion", ["add", "concat"])
def test_a_mixer_trains(fusion, N=35, D=60):
    """A block's values, states and gradients are those of the plain forms, flags included."""
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
    assert {c.launch.name.removeprefix("mlx_mcsd_") for c in calls} == {
        "decay_scan", "decay_scan_grad", "mcsd_mix", "mcsd_mix_grad"
    }  # fmt: skip
    for a, b in zip(got, run(), strict=True):
        assert a.dtype == b.dtype
        assert relative_error(np.array(a), np.array(b)) <= 1e-5
