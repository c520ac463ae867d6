"""Bytes and 128-byte lines of every kernel against the least."""

import pytest

from metal_on_cpu import needs_compiler
from metal_on_cpu.traffic import counted
from mlx_mcsd import kernels

pytestmark = needs_compiler


@pytest.mark.parametrize("S", [1, *kernels.SEGMENTS])
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["decay_scan", "decay_scan_grad"])
def test_scans(name, dtype, S):
    """Splitting time reads the segments between the ends twice."""
    moved, least, lines = counted(name, dtype, S)
    assert moved <= (1.02 if S == 1 else 1.55) * least
    w, v = (dtype.size, 4) if name == "decay_scan" else (4, dtype.size)
    reads = 1 if S == 1 else 2 * S / (S + 2)
    assert moved == pytest.approx(reads * w + v, rel=0.03)
    assert lines <= 1.01


@pytest.mark.parametrize("concat", [False, True], ids=["add", "concat"])
@pytest.mark.parametrize("dtype", [kernels.DTYPES[0], kernels.DTYPES[1]], ids=str)
@pytest.mark.parametrize("name", ["mcsd_mix", "mcsd_mix_grad", "mcsd_step"])
def test_blocks(name, dtype, concat):
    moved, least, lines = counted(name, dtype, concat=concat)
    assert least <= 1.001 * moved <= 1.1 * least
    assert lines <= 1.1
