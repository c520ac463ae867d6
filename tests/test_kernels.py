"""The choice between kernels and plain forms, and the graphs that kernels make.

What the kernels compute is tested in metal_on_cpu/, by executing their text, and here on a Mac.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlx_mcsd import kernels, recurrence
from mlx_mcsd.config import ModelArgs
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.mixers.mcsd import MCSD
from oracle import relative_error

LAM = (0.5, 0.9, 1 - 2.0**-14)
GPU = mx.Device(mx.gpu)


@pytest.fixture
def mac(monkeypatch):
    """What a Mac answers when it is asked for its GPU."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: GPU)


@pytest.fixture
def elsewhere(monkeypatch):
    """What a machine without Metal answers: kernels do not run there, but can be exported."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def unasked(monkeypatch):
    """No setting is inherited, and none has been answered yet."""
    monkeypatch.delenv("MLX_MCSD_KERNELS", raising=False)
    kernels._wanted.cache_clear()


def launches(fn, *args):
    """The kernels in fn's graph: name, grid, threadgroup and the shape of the first input."""
    found = []

    def note(node):
        if node.get("name") == "CustomKernel":
            name, _, *sizes = node["arguments"][:8]
            found.append((name, tuple(sizes[:3]), tuple(sizes[3:]), node["inputs"][0][1]))

    mx.export_function(note, fn, *args)
    return found


# --- the choice --------------------------------------------------------------------------------


def test_a_mac_runs_kernels(mac):
    assert all(map(kernels.available, (mx.float32, mx.float16, mx.bfloat16)))


def test_what_rules_kernels_out(mac, monkeypatch):
    assert not kernels.available(mx.float64)
    with monkeypatch.context() as m:
        m.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
        assert not kernels.available(mx.float32)
    with monkeypatch.context() as m:
        m.setattr(mx.metal, "is_available", lambda: False)
        assert not kernels.available(mx.float32)
    monkeypatch.setenv("MLX_MCSD_KERNELS", "off")
    assert not kernels.available(mx.float32)


def test_off_is_answered_once(monkeypatch, capsys):
    monkeypatch.setenv("MLX_MCSD_KERNELS", "off")
    for _ in range(3):
        recurrence.scan(mx.zeros((1, 2, 3, 1)), LAM)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "MLX_MCSD_KERNELS=off: running the plain forms, no Metal kernel.\n"


def test_on_is_not_answered(monkeypatch, capsys):
    monkeypatch.setenv("MLX_MCSD_KERNELS", "on")
    recurrence.scan(mx.zeros((1, 2, 3, 1)), LAM)
    assert capsys.readouterr().err == ""


def test_other_settings_are_refused(monkeypatch):
    monkeypatch.setenv("MLX_MCSD_KERNELS", "no")
    with pytest.raises(MCSDError, match="must be on or off but got 'no'"):
        recurrence.scan(mx.zeros((1, 2, 3, 1)), LAM)


@pytest.mark.parametrize("N, want", [(1, []), (2, ["decay_scan"])])
def test_scan_dispatches(mac, monkeypatch, N, want):
    """One token is elementwise work, which MLX fuses by itself."""
    ran = []

    def kernel(name):
        ran.append(name)
        return lambda output_shapes, **_: map(mx.zeros, output_shapes)

    monkeypatch.setattr(kernels, "kernel", kernel)
    recurrence.scan(mx.zeros((2, N, 3, 5)), LAM)
    assert ran == want


def test_scan_without_a_gpu_is_plain(elsewhere):
    assert not launches(lambda x: recurrence.scan(x, LAM), mx.zeros((2, 9, 3, 5)))


# --- the graph ---------------------------------------------------------------------------------


def test_gradients_are_kernels(elsewhere):
    x = mx.zeros((2, 9, 3, 20), mx.float16)
    found = launches(mx.grad(lambda x: kernels.decay_scan(x, LAM)[1].sum()), x)
    # The gradient of x has x's dtype, though that of h is float32.
    assert any("decay_scan_grad" in name and "float16" in name for name, *_ in found)
    assert {(grid, threads) for _, grid, threads, _ in found} == {((64, 1, 2), (32, 1, 1))}


def test_a_slice_is_read_as_it_lies(elsewhere):
    """Between the projection and the kernel no node copies x."""
    nodes = []

    def history(y):
        x = mx.split(y, 4, axis=-1)[1].reshape(2, 9, 3, 20)
        return kernels.decay_scan(x, LAM)

    mx.export_function(nodes.append, history, mx.zeros((2, 9, 240)))
    made_by = {out[0]: n for n in nodes if n["type"] == "primitive" for out in n["outputs"]}
    scan = next(n for n in nodes if n.get("name") == "CustomKernel")
    node, path = made_by[scan["inputs"][0][0]], []
    while node:
        path.append(node["name"])
        node = made_by.get(node["inputs"][0][0])
    assert set(path) <= {"Reshape", "Unflatten", "Split"}


@pytest.mark.parametrize(
    "B, N, D, S",
    [
        (1, 4096, 2560, 8),  # the 1.6B size, one row: 2,560 threads would starve
        (8, 4096, 2560, 1),
        (1, 4096, 64, 16),
        (4, 4096, 2560, 4),
        (1, 576, 64, 16),
        (1, 575, 64, 8),
        (1, 192, 64, 4),
        (1, 191, 64, 1),
        (3, 1, 60, 1),
    ],
)
def test_segments(B, N, D, S):
    assert kernels.segments(B, N, D) == S


def test_kernels_are_built_once():
    assert kernels.kernel("decay_scan") is kernels.kernel("decay_scan")
    assert kernels.kernel("decay_scan") is not kernels.kernel("decay_scan_grad")


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_no_tokens(dtype):
    h0 = mx.ones((2, 3, 5))
    h, last = kernels.decay_scan(mx.zeros((2, 0, 3, 5), dtype), LAM, h0)
    assert h.shape == (2, 0, 3, 5) and h.dtype == mx.float32 and mx.array_equal(last, h0)
    dx, dh0 = kernels.decay_scan_grad(mx.zeros((2, 0, 3, 5)), LAM, h0, dtype=dtype)
    assert dx.shape == (2, 0, 3, 5) and dx.dtype == dtype and mx.array_equal(dh0, h0)


def test_complaints():
    x = mx.zeros((2, 4, 3, 5))
    with pytest.raises(MCSDError, match="a state is never cast"):
        kernels.decay_scan(x, LAM, mx.zeros((2, 3, 5), mx.float16))
    wide = mx.zeros((2, 4, 3, 5), mx.float64, stream=mx.cpu)  # a GPU has none
    with pytest.raises(MCSDError, match=r"kernels read .*float32.* but got .*float64"):
        kernels.decay_scan(wide, LAM)


@pytest.mark.parametrize("N, dtype", [(2, mx.float32), (1, mx.float16)])
def test_step_complaints(N, dtype):
    """One token, and a float32 state."""
    x, state = mx.zeros((2, N, 3, 5)), mx.zeros((2, 3, 5), dtype)
    count, gain = mx.zeros(2, mx.int32), mx.ones(15)
    with pytest.raises(MCSDError, match="one token" if N > 1 else "a state is never cast"):
        kernels.mcsd_step(*[x] * 4, state, state, count, gain, beta=(1.0,) * 3, alpha=LAM, eps=1e-6)


def block(B=2, N=1, C=3, Dc=5, **other):
    """Arguments of mcsd_step, or of mcsd_mix where N > 1, but for those given."""
    state = (B, C, Dc) if N == 1 else (B, N, C, Dc)
    shapes = dict.fromkeys("UVEF", (B, N, C, Dc)) | dict.fromkeys("AH", state)
    made = {name: mx.zeros(shape) for name, shape in shapes.items()}
    made |= dict(n=mx.zeros(state[:-2], mx.int32), gain=mx.ones(C * Dc), beta=(1.0,) * C)
    made |= other
    step = dict(alpha=LAM) if N == 1 else {}
    form = kernels.mcsd_step if N == 1 else kernels.mcsd_mix
    return form(*list(made.values())[:8], beta=made["beta"], eps=1e-6, **step)


@pytest.mark.parametrize("N", [1, 2], ids=["mcsd_step", "mcsd_mix"])
@pytest.mark.parametrize(
    "name, wrong",
    [
        ("U", mx.zeros((2, 3, 5))),
        ("V", mx.zeros((2, 7, 3, 5))),
        ("E", mx.zeros((1, 1, 3, 5))),
        ("F", mx.zeros((2, 1, 3, 5), mx.int32)),
        ("A", mx.zeros((2, 3, 5), mx.float16)),
        ("H", mx.zeros((2, 3, 4))),
        ("n", mx.zeros(2)),
        ("n", mx.zeros(3, mx.int32)),
        ("gain", mx.ones(5)),
        ("beta", (1.0, 1.0)),
    ],
)
def test_a_block_is_checked(name, wrong, N):
    """A kernel would read past the end of what is too small, and take one type for another."""
    with pytest.raises(MCSDError, match="must"):
        block(N=N, **{name: wrong})


def test_a_block_that_fits_is_not_refused(elsewhere):
    for N in (1, 2):
        mx.export_function([].append, lambda U, N=N: block(N=N, U=U), mx.zeros((2, N, 3, 5)))


@pytest.mark.parametrize("Dc, threads", [(1, 32), (256, 64), (5000, 512)])
def test_threads_of_a_step(elsewhere, Dc, threads):
    """However wide a channel, its threadgroup is one that every GPU has registers for."""
    (found,) = launches(lambda U: block(Dc=Dc, U=U)[0], mx.zeros((2, 1, 3, Dc)))
    assert found[1:3] == ((threads, 3, 2), (threads, 1, 1))


def test_a_block_of_no_rows():
    for N in (1, 2):
        theta = block(B=0, N=N)[0] if N == 1 else block(B=0, N=N)
        assert theta.shape == (0, N, 15)


def test_small_flags_are_not_in_constant_memory(elsewhere):
    """It begins at multiples of 4 bytes; the flags of one token of few rows begin anywhere."""
    texts = []

    def note(node):
        if node.get("name") == "CustomKernel":
            texts.append(node["arguments"][1])

    def one_token(x, mask, reset):
        return kernels.decay_scan(x, LAM, None, mask[:, 1:2], reset[:, 1:2])

    flags = mx.ones((1, 3), mx.bool_)
    mx.export_function(note, one_token, mx.zeros((1, 1, 3, 5)), flags, flags)
    assert "const device bool* mask " in texts[0] and "const device bool* reset " in texts[0]


# --- on a Mac ----------------------------------------------------------------------------------


@pytest.mark.metal
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "mask and reset"])
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("N, Dc", [(1, 20), (2, 60), (63, 20), (65, 60), (600, 20)])
def test_on_the_gpu(N, Dc, dtype, flags):
    """The real GPU against the plain form, gradients included."""
    rng = np.random.default_rng(N)
    x, g = (mx.array(rng.standard_normal((3, N, 3, Dc)), mx.float32).astype(dtype) for _ in "xg")
    h0 = mx.array(rng.standard_normal((3, 3, Dc)), mx.float32)
    mask, reset = (mx.array(rng.random((3, N)) < p) if flags else None for p in (0.8, 0.1))

    def run(form):
        def loss(x, h0):
            h, last = form(x, LAM, h0, mask, reset)
            return (g * h).sum() + last.sum()

        return *form(x, LAM, h0, mask, reset), *mx.grad(loss, argnums=(0, 1))(x, h0)

    # A gradient of x is rounded to x's dtype by both forms, perhaps to neighbouring numbers.
    narrow = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    got, want = run(kernels.decay_scan), run(recurrence.chunked)
    for a, b, tolerance in zip(got, want, (1e-5, 1e-5, narrow, 1e-5), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.array(v.astype(mx.float32), np.float64) for v in (a, b))
        assert relative_error(a, b) <= tolerance if b.any() else not a.any()


@pytest.mark.metal
@pytest.mark.parametrize("fusion", ["add", "concat"])
@pytest.mark.parametrize("projection", ["dense", "channel"])
def test_a_block_on_the_gpu(monkeypatch, projection, fusion, N=65, D=180):
    """A block with and without kernels: prefill, gradients, and decoding after it."""
    mx.random.seed(0)
    args = dict(vocab_size=16, num_hidden_layers=1, intermediate_size=8, fusion=fusion)
    args |= dict(hidden_size=D, num_channels=3, projection=projection)
    mixer = MCSD(ModelArgs(model_type="mcsd", output_projection=fusion == "concat", **args))
    x = mx.random.normal((2, N, D))
    mask, reset = mx.arange(N) >= mx.array([[0], [4]]), mx.arange(N) == mx.array([[9], [20]])

    def run(setting):
        monkeypatch.setenv("MLX_MCSD_KERNELS", setting)
        mixer.train()
        dx = mx.grad(lambda x: (mixer(x, None, mask, reset)[0] ** 2).sum())(x)
        mixer.eval()
        y, state = mixer(x, None, mask, reset)
        token, state = mixer(x[:, :1], state)
        return [np.array(a, np.float64) for a in (dx, y, token, *state)]

    for got, want in zip(run("on"), run("off"), strict=True):
        assert relative_error(got, want) <= 2e-5  # the GPU sums its products in another order
