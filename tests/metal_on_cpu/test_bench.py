"""`bench kernels` on executed kernels: what it checks, what it prints, what it refuses to print."""

import argparse
import itertools

import mlx.core as mx
import pytest

from metal_on_cpu import executed, needs_compiler
from mlx_mcsd import kernels
from mlx_mcsd.bench import kernels as bench
from mlx_mcsd.bench.__main__ import main
from mlx_mcsd.bench.flags import add_kernel_arguments
from mlx_mcsd.errors import MCSDError


def arguments(*flags):
    parser = argparse.ArgumentParser()
    add_kernel_arguments(parser)
    return parser.parse_args(flags)


SMALL = ["--hidden-size", "60", "--num-channels", "3", "--tokens", "8", "--repeats", "3"]


@pytest.fixture
def small(monkeypatch):
    """One shape, one dtype, two kernels, and a clock that ticks 2 ms."""
    monkeypatch.setattr(bench, "SHAPES", [(2, 33, 3, 20)])
    monkeypatch.setattr(kernels, "DTYPES", (mx.float32,))
    names = ("decay_scan_grad", "mcsd_step")
    monkeypatch.setattr(bench, "NAMES", names)
    ticks = itertools.count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: 0.002 * next(ticks))
    monkeypatch.setattr(bench, "copy_bandwidth", lambda repeats: 100.0)


def test_without_metal(capsys):
    if mx.metal.is_available():
        pytest.skip("there is Metal here")
    with pytest.raises(SystemExit) as end:
        main(["kernels"])
    said = capsys.readouterr()
    assert end.value.code == 1 and said.out == ""
    assert said.err.startswith("error: [bench kernels] kernels run on a GPU with Metal")
    assert said.err.count("\n") == 1


def test_sizes_that_do_not_fit():
    with pytest.raises(MCSDError, match="divisible by --num-channels but got 60 and 7"):
        bench.run(arguments("--hidden-size", "60", "--num-channels", "7"))


@needs_compiler
def test_right_kernels_are_timed(small, capsys):
    with executed():
        result = bench.run(arguments(*SMALL))
    assert result["ok"]
    scan, step = result["rows"]
    assert (scan["kernel"], scan["shape"], scan["dtype"]) == (
        "decay_scan_grad", [1, 8, 3, 20], "float32"
    )  # fmt: skip
    assert step["shape"] == [1, 1, 3, 20]
    assert scan["bytes"] == 8 * 8 * 60
    assert step["bytes"] == (4 * 4 + 2 * 4 + 16 + 4) * 60
    for row in (scan, step):
        assert 0 < row["max_rel_error"] <= row["tolerance"] == 1e-5
        # A launch takes a tick of 2 ms, so five are timed together, and take one too.
        assert row["microseconds"] == pytest.approx(2000 / 5)
        assert row["gbps"] == pytest.approx(row["bytes"] / 400e-6 / 1e9)
        assert row["fraction"] == pytest.approx(row["gbps"] / 100)
        assert row["spread"] == pytest.approx(0, abs=1e-9)
    said = capsys.readouterr().out
    assert "a copy moves 100.0 GB/s" in said and "400.0" in said and "FAILED" not in said


@needs_compiler
def test_a_wrong_kernel_has_no_speed(small, capsys):
    def edit(name, body):
        return body.replace("n + (exists ? 1 : 0)", "n + 1")  # of a masked token

    with executed(edit=edit):
        result = bench.run(arguments(*SMALL))
    assert not result["ok"]
    scan, step = result["rows"]
    assert scan["ok"] and not step["ok"]
    assert scan["gbps"] and step["gbps"] is None
    said = capsys.readouterr().out
    (line,) = [x for x in said.splitlines() if x.startswith("mcsd_step")]
    assert line.split()[-4:] == ["FAILED", "-", "-", "-"]
    assert "its speed means nothing" in said


@pytest.mark.parametrize("ok", [True, False])
def test_the_checks_are_the_exit_code(monkeypatch, ok):
    monkeypatch.setattr(bench, "run", lambda args: {"ok": ok})
    assert main(["kernels"]) == (0 if ok else 1)


@needs_compiler
def test_every_kernel_and_dtype_is_checked(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", [(2, 33, 3, 20)])
    for name, dtype in (("decay_scan", mx.bfloat16), ("mcsd_mix", mx.float16)):
        with executed() as calls:
            row = bench.check(name, dtype)
        assert row["ok"] and row["checks"] == len(calls) == (4 if name == "mcsd_mix" else 2)
        assert row["tolerance"] == bench.TOLERANCE[mx.float16 if name == "mcsd_mix" else mx.float32]


def test_what_is_not_finite_is_far():
    assert bench._distance(mx.array([1.0, mx.nan]), mx.ones(2)) == mx.inf
    assert bench._distance(mx.ones(2), mx.array([1.0, mx.nan])) == mx.inf
    assert bench._distance(mx.array([1.0, 3.0]), mx.array([1.0, 4.0])) == 0.25


def test_a_copy_is_counted_twice(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: 0.02 * next(ticks))
    assert bench.copy_bandwidth(3, size=1000) == pytest.approx(8000 / 0.02 / 1e9)
