"""The runner itself, on small kernels, most of them with a fault."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from metal_on_cpu import KernelFault, executed, needs_compiler

pytestmark = needs_compiler

N = 70  # two threadgroups of 64, the second one ragged
X = mx.arange(N, dtype=mx.float32) + 1.0
DOUBLE = "uint i = thread_position_in_grid.x; y[i] = x[i] + x[i];"
# Each threadgroup of 64 hands its values round by one lane.
ROTATE = """
threadgroup float shared[64];
uint i = thread_position_in_grid.x, t = thread_position_in_threadgroup.x;
shared[t] = x[i];
BARRIER
y[i] = shared[(t + 1) % threads_per_threadgroup.x];
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def line(n):
    """Where a traced fault is said to be; macOS has no addr2line."""
    return rf"sample\.metal:{n}: " if shutil.which("addr2line") else r"\?: "


def launch(body, x=X, y=None, *, strided=False, grid=None, **options):
    """Run a body that reads x and writes y, (shape, dtype); return y and the call."""
    shape, dtype = y or (x.shape, mx.float32)
    how = {k: options.pop(k) for k in ("mode", "order") if k in options}
    with executed(seed=5, **how) as calls:
        kernel = mx.fast.metal_kernel(
            name="sample",
            input_names=["x"],
            output_names=["y"],
            source=body,
            ensure_row_contiguous=not strided,
        )
        (result,) = kernel(
            inputs=[x],
            grid=grid or (x.size, 1, 1),
            threadgroup=options.pop("threads", (64, 1, 1)),
            output_shapes=[shape],
            output_dtypes=[dtype],
            **options,
        )
    return result, calls[0]


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_barriers_hold_in_every_order(order):
    y, _ = launch(ROTATE.replace("BARRIER", BARRIER), order=order)
    assert mx.array_equal(y, mx.concatenate([mx.roll(X[:64], -1), mx.roll(X[64:], -1)]))


def test_a_correct_kernel_passes_the_trace():
    y, _ = launch(ROTATE.replace("BARRIER", BARRIER), mode="traced")
    assert mx.array_equal(y[:64], mx.roll(X[:64], -1))


def test_a_missing_barrier_shows_in_descending_order():
    # Ascending order hides nothing here either: the next thread has not written yet.
    y, _ = launch(ROTATE.replace("BARRIER", ""), order="ascending")
    assert mx.isnan(y[:63]).all()
    backwards = ROTATE.replace("(t + 1)", "(t + 63)").replace("BARRIER", "")
    y, _ = launch(backwards, order="ascending")
    assert mx.array_equal(y[1:64], X[:63])  # right by luck
    y, _ = launch(backwards, order="descending")
    assert mx.isnan(y[1:64]).all()


@pytest.mark.parametrize(
    "barrier",
    ["", "threadgroup_barrier(mem_flags::mem_none);", "threadgroup_barrier(mem_flags::mem_device);",
     "simdgroup_barrier(mem_flags::mem_threadgroup);"],
)  # fmt: skip
def test_the_trace_sees_a_race(barrier):
    backwards = ROTATE.replace("(t + 1)", "(t + 63)").replace("BARRIER", barrier)
    with pytest.raises(
        KernelFault, match=r"sample\.metal:6: (race on shared|.*reads shared\[63\], which nothing)"
    ):
        launch(backwards, mode="traced")


def test_the_trace_sees_a_race_between_threadgroups():
    body = "y[threadgroup_position_in_grid.x * 0] = x[0];"
    with pytest.raises(KernelFault, match=r"race on y\[0\]: thread 0 of threadgroup 1 writes"):
        launch(body, y=((1,), mx.float32), threads=(1, 1, 1), mode="traced")


def test_simdgroup_functions():
    body = """
    uint i = thread_position_in_grid.x;
    float v = x[i];
    y[i] = simd_sum(v);
    y[64 + i] = simd_max(v);
    y[128 + i] = simd_prefix_inclusive_sum(v);
    y[192 + i] = simd_prefix_exclusive_product(v);
    y[256 + i] = simd_shuffle_up(v, ushort(3));
    y[320 + i] = simd_shuffle_down(v, ushort(3));
    y[384 + i] = simd_shuffle_xor(v, ushort(5));
    y[448 + i] = simd_broadcast(v, ushort(31));
    y[512 + i] = simd_all(v > 0.6f) ? 1.0f : 0.0f;
    y[576 + i] = simd_shuffle_and_fill_up(v, -v, ushort(2));
    """
    v = np.random.default_rng(0).permutation(np.linspace(0.5, 1.5, 64)).astype(np.float32)
    y, _ = launch(body, mx.array(v), y=((10, 64), mx.float32), order="random")
    w, lane = v.reshape(2, 32), np.arange(32)
    product = np.cumprod(w, axis=1)
    expected = [
        w.sum(1, keepdims=True) + 0 * w,
        w.max(1, keepdims=True) + 0 * w,
        np.cumsum(w, 1),
        np.concatenate([np.ones((2, 1)), product[:, :-1]], 1),
        w[:, np.where(lane < 3, lane, lane - 3)],
        w[:, np.where(lane > 28, lane, lane + 3)],
        w[:, lane ^ 5],
        w[:, [31] * 32],
        (w > 0.6).all(1, keepdims=True) + 0 * w,
        np.concatenate([-w[:, 30:], w[:, :30]], 1),
    ]
    np.testing.assert_allclose(np.array(y).reshape(10, 2, 32), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_rounds_as_mlx_does(dtype):
    body = """
    uint i = thread_position_in_grid.x;
    y[i] = static_cast<T>(static_cast<float>(x[i]) * x[1]) + T(COUNT);
    """
    x = mx.random.normal((N,), key=mx.random.key(0)).astype(dtype)
    y, call = launch(
        body, x, y=((N,), dtype), template=[("T", dtype), ("COUNT", -3), ("FLAG", True)]
    )
    product = (x.astype(mx.float32) * x[1].astype(mx.float32)).astype(dtype)
    assert mx.array_equal(y, product - mx.array(3, dtype))
    assert "int COUNT, bool FLAG" in call.launch.text  # MLX's own wrapper is what ran


def test_small_inputs_are_constant():
    y, call = launch(
        "y[thread_position_in_grid.x] = x[2];", X[:3], grid=(5, 1, 1), y=((5,), mx.float32)
    )
    assert mx.array_equal(y, mx.full((5,), 3.0))
    assert "const constant float* x" in call.launch.text


STRIDED = """
uint j = thread_position_in_grid.x, i = thread_position_in_grid.y;
y[i * x_shape[1] + j] = x[i * x_strides[0] + j * x_strides[1]];
"""


@pytest.mark.parametrize("mode", ["plain", "traced"])
def test_strides_are_mlx_s(mode):
    x = mx.random.normal((6, 22), key=mx.random.key(1)).T[20:1:-2, :5]
    y, call = launch(STRIDED, x, strided=True, grid=(5, 10, 1), mode=mode)
    assert mx.array_equal(y, x)
    assert call.copied == 0
    assert mode == "plain" or call.bytes() == 2 * x.nbytes


def test_a_copy_that_mlx_makes_is_counted():
    x = mx.random.normal((5, 10), key=mx.random.key(1)).T
    y, call = launch(STRIDED, x, grid=(5, 10, 1), mode="traced")
    assert mx.array_equal(y, x)
    assert (call.copied, call.bytes()) == (2 * x.nbytes, 4 * x.nbytes)


def test_what_lies_between_strided_elements_is_out_of_bounds():
    x = X.reshape(5, 14)[:, ::2]
    y, _ = launch("y[thread_position_in_grid.x] = x[1];", x, strided=True)
    assert mx.isnan(y).all()
    with pytest.raises(KernelFault, match="reads item 1 of x, between the elements"):
        launch("y[thread_position_in_grid.x] = x[1];", x, strided=True, mode="traced")


PAST = "uint i = thread_position_in_grid.x; y[i + 1] = x[i];"


def test_a_write_past_the_end_is_caught():
    with pytest.raises(KernelFault, match="writes outside the 70 items of y"):
        launch(PAST)
    with pytest.raises(KernelFault, match=rf"{line(1)}writes y\[70\], which has 70 items"):
        launch(PAST, mode="traced")
    with pytest.raises(KernelFault, match=r"AddressSanitizer: heap-buffer-overflow"):
        launch(PAST, mode="sanitized")


def test_a_read_before_the_start_is_caught():
    body = "int i = thread_position_in_grid.x; y[i] = x[i - 1];"
    assert mx.isnan(launch(body)[0][0])
    with pytest.raises(KernelFault, match=r"reads x\[-1\], which has 70 items"):
        launch(body, mode="traced")


def test_undefined_behaviour_is_caught():
    body = "float v[4]; int i = thread_position_in_grid.x; v[i % 5] = x[i]; y[i] = v[i % 5];"
    with pytest.raises(KernelFault, match=r"runtime error: index 4 out of bounds"):
        launch(body, mode="sanitized")


def test_a_wild_store_ends_the_kernel_alone():
    with pytest.raises(KernelFault, match="ended with signal"):
        launch("y[1l << 40] = x[0];")


def test_an_output_left_unwritten_is_caught():
    body = "uint i = thread_position_in_grid.x; if (i > 2) y[i] = x[i];"
    assert mx.isnan(launch(body)[0][:3]).all()
    assert mx.array_equal(launch(body, init_value=7.0)[0][:4], mx.array([7.0, 7.0, 7.0, 4.0]))
    with pytest.raises(KernelFault, match="3 of the 70 items of y were never written"):
        launch(body, mode="traced")


@pytest.mark.parametrize(
    "body, message",
    [
        pytest.param(
            f"if (thread_position_in_grid.x > 9) return; {BARRIER} y[0] = x[0];",
            "threadgroup_barrier waits for thread 10 of the threadgroup, which has returned",
            id="barrier",
        ),
        pytest.param(
            "uint i = thread_position_in_grid.x; if (i > 9) return; y[i] = simd_sum(x[i]);",
            "simd_sum waits for thread 10 of the threadgroup, which has returned",
            id="simdgroup",
        ),
        pytest.param(
            "uint i = thread_position_in_grid.x; y[i] = simd_shuffle(x[i], ushort(12));",
            r"reads a lane that does not take part; thread \(64, 0, 0\)",
            id="lane",
        ),
        pytest.param(
            "threadgroup float a[8000], b[193]; a[0] = b[0] = x[0]; y[0] = a[0];",
            "threadgroup memory over 32768 bytes: 32772 with b",
            id="memory",
        ),
        pytest.param("y[0] = x[0] nonsense;", "does not compile", id="syntax"),
        pytest.param("y[0] = expm1(x[0]);", "does not compile", id="not-in-metal"),
    ],
)
def test_what_metal_forbids(body, message):
    with pytest.raises(KernelFault, match=message):
        launch(body)


def test_too_many_threads():
    with pytest.raises(KernelFault, match="1024 is the most"):
        launch(DOUBLE, threads=(64, 17, 1))


def test_too_many_buffers():
    names = [f"x{i}" for i in range(16)]
    body = "y[0] = " + " + ".join(f"{x}[0] * {x}_strides[0]" for x in names) + ";"
    with executed():
        kernel = mx.fast.metal_kernel(
            name="sample", input_names=names, output_names=["y"], source=body
        )
        with pytest.raises(KernelFault, match="33 buffers; 31 is the most"):
            kernel(
                inputs=[X] * 16,
                grid=(1, 1, 1),
                threadgroup=(1, 1, 1),
                output_shapes=[(1,)],
                output_dtypes=[mx.float32],
            )


def test_traffic_counts_bytes_and_lines():
    row = "uint i = thread_position_in_grid.x; y[i] = x[i] + x[0];"
    x = mx.ones((64,))
    _, call = launch(row, x, mode="traced")
    # Every lane reads x[0] with its simdgroup: 4 bytes and a line for each of two simdgroups.
    assert (call.traffic["x"].read, call.traffic["x"].read_lines) == (256 + 8, 2 + 2)
    assert (call.traffic["y"].written, call.traffic["y"].written_lines) == (256, 2)
    column = "uint i = thread_position_in_grid.x; y[i] = x[i * 32];"
    _, call = launch(
        column, mx.ones((1024,)), grid=(32, 1, 1), y=((32,), mx.float32), mode="traced"
    )
    x = call.traffic["x"]
    assert (x.read, x.read_lines, x.read_least_lines) == (128, 32, 1)
