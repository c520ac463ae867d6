"""The study of planted bugs: that it is about the kernels as they are, and a sample of it."""

from importlib.resources import files

import pytest

from metal_on_cpu import mutations, needs_compiler

BUGS = {(bug.kernel, bug.title): bug for bug in mutations.BUGS}


def test_every_bug_can_be_planted():
    for bug in mutations.BUGS:
        body = files("mlx_mcsd.metal").joinpath(f"{bug.kernel}.metal").read_text()
        assert bug.plant(f"mlx_mcsd_{bug.kernel}", body) != body


def test_a_double_is_read():
    assert mutations.look(BUGS["decay_scan", "a double"]) == "read"


@needs_compiler
@pytest.mark.parametrize(
    "kernel, title, check, caught",
    [
        ("decay_scan", "no barrier between the passes", "descending", "NaN"),
        ("decay_scan", "no barrier between the passes", "traced", "race"),
        ("decay_scan_grad", "dh read before the start", "traced", "bounds"),
        ("decay_scan_grad", "lambda^(T+1)", "ascending", "values"),
    ],
)
def test_caught(kernel, title, check, caught):
    bug = BUGS[kernel, title]
    assert mutations.run(bug, kernel, **mutations.CHECKS[check]) == caught
