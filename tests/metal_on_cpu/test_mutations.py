"""The study of planted bugs: it is about the kernels as they are, and these pass its checks."""

from importlib.resources import files

import pytest

from metal_on_cpu import mutations, needs_compiler
from mlx_mcsd import kernels

BUGS = {(bug.kernel, bug.title): bug for bug in mutations.BUGS}


def test_every_bug_can_be_planted():
    assert len(BUGS) == len(mutations.BUGS)
    for bug in mutations.BUGS:
        body = files("mlx_mcsd.metal").joinpath(f"{bug.kernel}.metal").read_text()
        assert bug.plant(f"mlx_mcsd_{bug.kernel}", body) != body


@needs_compiler
@pytest.mark.parametrize("check", mutations.CHECKS)
@pytest.mark.parametrize("kernel", kernels.SIGNATURES)
def test_the_kernels_pass(kernel, check):
    """Three orders of threads, the sanitizers and the trace: what no planted bug passes."""
    assert mutations.run(None, kernel, **mutations.CHECKS[check]) == ""


@pytest.mark.parametrize("kernel", kernels.SIGNATURES)
def test_a_double_is_read(kernel):
    assert mutations.look(BUGS[kernel, "a double"]) == "read"


@needs_compiler
@pytest.mark.parametrize(
    "kernel, title, check, caught",
    [
        ("decay_scan", "no barrier between the passes", "descending", "NaN"),
        ("decay_scan", "no barrier between the passes", "traced", "race"),
        ("decay_scan_grad", "dh read before the start", "traced", "bounds"),
        ("mcsd_mix", "a fast exponential", "ascending", "values"),
        ("mcsd_step", "a reset keeps A", "ascending", "values"),
    ],
)
def test_caught(kernel, title, check, caught):
    bug = BUGS[kernel, title]
    assert mutations.run(bug, kernel, **mutations.CHECKS[check]) == caught
