"""The rules of Metal that C++ has not, each broken by a line of text."""

from importlib.resources import files

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metal_on_cpu import executed, rules
from models import mlx_model
from oracle import random_checkpoint

KERNELS = sorted(p for p in files("mlx_mcsd.metal").iterdir() if p.suffix == ".metal")

BROKEN = {
    "double": ("double s = x[0]; y[0] = s;", "no double"),
    "literal": ("y[0] = 0.5 * x[0];", "no suffix"),
    "address space": ("const float* p = x; y[0] = p[0];", "without an address space"),
    "reference": ("thread float a = 1.0f; float& r = a; y[0] = r;", "without an address space"),
    "heap": ("y[0] = *new float(1.0f);", "no heap"),
    "exception": ("if (x[0] > 1.0f) throw 1;", "no exceptions"),
    "std": ("y[0] = std::exp(x[0]);", "no std::"),
    "function pointer": ("float (*f)(float) = metal::exp; y[0] = f(x[0]);", "no function pointers"),
    "recursion": ("struct S { static int f(int n) { return n ? f(n - 1) : 0; } };", "no recursion"),
}
SHARED = "threadgroup float a[2]; a[0] = x[0];"
FINE = """
// A comment may say double or 0.5, "x" or new.
constant float table[2] = {1.0f, 2e-3f};  /* and
a comment of two lines may say std::exp */
const device float* p = x + 1;
threadgroup float a[4];
thread float& r = *(thread float*)0;
int64_t n = 3 * x_strides[0] & 7;
y[0] = p[0] * table[1] + 0x1p-3f + 1e5f;
for (int i = 0; i < 3; ++i) { y[i] = metal::exp(x[i]); }
"""


@pytest.mark.parametrize("name", BROKEN)
def test_reading_finds(name):
    text, message = BROKEN[name]
    (found,) = rules.read(f"\n{text}\n")
    assert found.startswith("line 2: ") and message in found


def test_reading_accepts_metal():
    assert rules.read(FINE) == []


@rules.needs_clang
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(
    "text, message",
    [
        pytest.param("double s = x[0]; y[0] = s;", "double", id="double"),
        pytest.param("y[0] = 0.5 * x[0];", "double precision constant", id="literal"),
        pytest.param("const T* p = x; y[0] = p[0];", "cannot initialize", id="space"),
        pytest.param(f"{SHARED} device float* p = a; y[0] = *p;", "cannot initialize", id="spaces"),
        pytest.param("x[0] = T(1.0f); y[0] = x[0];", "not assignable", id="input written"),
        pytest.param("float (*f)(float) = metal::exp;", "pointers to functions", id="function"),
        pytest.param("int n = x_shape[0]; float v[n]; y[0] = v[0];", "array", id="length"),
        pytest.param(f"{SHARED} const device T* p = x + 1; y[0] = a[0] + p[0];", None, id="fine"),
    ],
)
def test_clang_finds(text, message, dtype):
    with executed(mode="captured") as calls:
        kernel = mx.fast.metal_kernel(
            name="sample", input_names=["x"], output_names=["y"], source=text
        )
        kernel(
            inputs=[mx.zeros(70, dtype)],
            template=[("T", dtype)],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(4,)],
            output_dtypes=[mx.float32],
        )
    said = rules.check(calls[0].launch)
    assert message in said if message else said == "", said


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_our_kernels_read_as_metal(path):
    assert rules.read(path.read_text()) == []


@rules.needs_clang
@pytest.mark.parametrize(
    "dtype, fusion",
    [(mx.float32, "add"), (mx.float32, "concat"), (mx.float16, "concat"), (mx.bfloat16, "add")],
    ids=str,
)
def test_our_kernels_pass_clang(dtype, fusion):
    """All that a model launches: prefill, gradients, a token; with and without flags."""
    config, tensors = random_checkpoint(
        np.random.default_rng(0), fusion=fusion, output_projection=fusion == "concat"
    )
    model = mlx_model(config, tensors)
    model.set_dtype(dtype)
    some = mx.arange(2 * 99).reshape(2, 99) % 5 > 0

    with executed(mode="captured") as calls:
        for mask, reset in ((None, None), (some, None), (None, some), (some, some)):
            tokens = mx.zeros((2, 99), mx.int32)
            loss = nn.value_and_grad(model, lambda model, *a: model(*a).sum())
            loss(model.train(), tokens, None, None, mask, reset)
            one = [None if v is None else v[:, :1] for v in (mask, reset)]
            model.eval()(tokens[:, :1], model.make_cache(), None, *one)
    launches = {c.launch.text: c.launch for c in calls}.values()
    names = {launch.name.removeprefix("mlx_mcsd_") for launch in launches}
    assert names == {p.stem for p in KERNELS}
    assert rules.check(*launches) == ""
