"""The error function against float64, and the gate in the reference's words."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_mcsd.activations import ACTIVATIONS, erf, gated

X = np.concatenate([np.linspace(-15, 15, 20_001), [0.0, -0.0, 3.95, 5.5, 1e30, -1e30, 1e-30]])
EXACT = np.array([math.erf(x) for x in X.astype(np.float32).astype(np.float64)])


def test_erf_is_that_of_float64():
    got = np.array(erf(mx.array(X, mx.float32)), np.float64)
    assert np.abs(got - EXACT).max() < 4e-7  # a few roundings of numbers up to 1
    small = np.abs(X) < 0.1
    assert np.abs(got - EXACT)[small].max() < 1e-7
    assert got[-1] == pytest.approx(EXACT[-1], rel=1e-6)  # nothing is lost near 0


def test_erf_passes_nan_on():
    assert math.isnan(erf(mx.array(math.nan)).item())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_erf_of_narrow_types_is_rounded_once(dtype):
    x = mx.array(np.linspace(-4, 4, 999), mx.float32).astype(dtype)
    wide = np.array(erf(x.astype(mx.float32)).astype(dtype).astype(mx.float32))
    assert erf(x).dtype == dtype
    np.testing.assert_array_equal(np.array(erf(x).astype(mx.float32)), wide)


def test_the_gradient_of_erf_is_the_bell():
    x = mx.array(X[np.abs(X) < 3.9], mx.float32)
    got = np.array(mx.grad(lambda x: erf(x).sum())(x))
    bell = 2 / math.sqrt(math.pi) * np.exp(-(np.array(x, np.float64) ** 2))
    assert np.abs(got - bell).max() < 1e-5 * bell.max()  # the fit is of the function


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gate_is_its_activation_times_up(name):
    gate, up = mx.random.normal((2, 3, 65), key=mx.random.key(0))
    got = gated(name)(gate, up)
    assert mx.array_equal(got, ACTIVATIONS[name](gate) * up)
    assert not mx.allclose(got, gated(name)(up, gate))
