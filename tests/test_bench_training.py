"""The benchmark of a training step: forms agree, a wrong one gets no figure, memory is linear."""

import json

import mlx.core as mx
import numpy as np
import pytest

from metal_on_cpu import executed, needs_compiler
from mlx_mcsd.bench import training
from mlx_mcsd.bench.__main__ import main
from mlx_mcsd.config import ModelArgs
from mlx_mcsd.mixers.mcsd import MCSD
from oracle import decay_matrix, relative_error, slope_matrix

SIZES = ["--hidden-size", "24", "--num-channels", "3", "--repeats", "1"]


def bench(capsys, *flags):
    """The exit code and what was printed."""
    return main(["training", *SIZES, *flags]), capsys.readouterr().out


def test_matrices_are_the_papers():
    for got, want in zip(
        training.make_matrices(37, 3), (slope_matrix(37, 3), decay_matrix(37, 3)), strict=True
    ):
        assert relative_error(np.array(got), want) <= 1e-6


def test_every_length_has_its_figures(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    code, printed = bench(capsys, "--tokens", "65", "96", "--output-dir", str(tmp_path))
    assert code == 0 and " cores, " in printed
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    forms = ["chunked", "quadratic"] if not mx.metal.is_available() else list(training.FORMS)
    assert [(r["model"], r["tokens"]) for r in rows] == [(f, N) for N in (65, 96) for f in forms]
    for row in rows:
        assert row["ok"] and row["peak_bytes"] > 0 and row["seconds"]["median"] > 0
        assert 0 < row["error"] <= 1e-5 or row["model"] == "quadratic"
        speed = row["tokens"] / row["seconds"]["median"]
        assert row["tokens_per_second"] == pytest.approx(speed)
    assert rows[-1]["of_quadratic"] == 1
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_form_gets_no_figure(capsys, monkeypatch):
    right = training.make_matrices

    def wrong(N, C):
        slope, decay = right(N, C)
        return slope * 1.001, decay  # the decay's norm would hide it

    monkeypatch.setattr(training, "make_matrices", wrong)
    code, printed = bench(capsys, "--tokens", "65")
    assert code == 1 and "its speed means nothing" in printed
    (line,) = [line.split() for line in printed.splitlines() if line.startswith("chunked")]
    assert line[2:4] == ["FAILED", "-"]


def test_the_quadratic_form_stops_at_the_limit(capsys):
    # 4 arrays of 3 x 64 x 64 floats
    limit = str(4 * 4 * 3 * 64**2 / 2**30)
    code, printed = bench(capsys, "--tokens", "64", "65", "--memory-limit", limit)
    lines = [line.split() for line in printed.splitlines() if line.startswith("quadratic")]
    assert code == 0 and lines[0][5] == "1.0x" and lines[1][2] == "over"


def test_memory_is_linear(N=1024):
    """A step of four times the tokens takes four times the memory, not sixteen."""
    sizes = dict(vocab_size=1, num_hidden_layers=1, intermediate_size=1)
    sizes |= dict(hidden_size=32, num_channels=8)
    mixer = MCSD(ModelArgs(model_type="mcsd", **sizes))
    peaks = []
    for n in (N, 4 * N):
        x, dy = mx.random.normal((2, 1, n, 32))
        step = training.make_step(mixer, "chunked", x, dy)
        mx.eval(step(), x, dy)
        held = mx.get_active_memory()
        peaks.append(training.peak(lambda step=step: mx.eval(step())) - held)
    # The order in which MLX's threads free what they used moves a peak by a fifth.
    assert peaks[1] <= 6 * peaks[0]


@needs_compiler
def test_kernels_pass_the_gate(capsys):
    with executed() as calls:
        code, printed = bench(capsys, "--tokens", "65")
    assert code == 0
    ran = {call.launch.name.removeprefix("mlx_mcsd_") for call in calls}
    assert ran == {"decay_scan", "decay_scan_grad", "mcsd_mix", "mcsd_mix_grad"}
    names = [line.split()[0] for line in printed.splitlines() if " 65 " in line]
    assert names == list(training.FORMS)


def test_sizes_must_fit(capsys):
    with pytest.raises(SystemExit) as end:
        main(["training", "--hidden-size", "25", "--num-channels", "3"])
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("\n") == 1
    assert error.startswith("error: [bench training] --hidden-size must be divisible by")
