"""The benchmarks that compare models: their gate, their limits, what they print and save."""

import json
from xml.etree import ElementTree

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_mcsd.bench import flags, measure, peers, tasks
from mlx_mcsd.bench.__main__ import main
from mlx_mcsd.bench.report import table

SMALL = ["--size", "tiny", "--contexts", "32", "64", "--batches", "1", "2", "--repeats", "1"]


@pytest.fixture(scope="module")
def models():
    return {name: peers.build(name, "tiny") for name in peers.NAMES}


def bench(capsys, *arguments):
    """The exit code and what was printed, progress bars apart."""
    code = main([*arguments])
    return code, capsys.readouterr().out


def test_flags_name_every_model():
    assert flags.MODELS == peers.NAMES


@pytest.mark.parametrize("size", peers.SIZES)
def test_peers_are_of_one_size(size, models, monkeypatch):
    monkeypatch.setattr(mx, "eval", lambda *_: None)  # counted by shape: nothing need be drawn
    counts = {name: peers.count(peers.build(name, size)) for name in peers.NAMES}
    assert max(counts.values()) <= 1.02 * counts["mcsd"]
    assert min(counts.values()) >= 0.98 * counts["mcsd"]


@pytest.mark.parametrize("name", peers.NAMES)
def test_peers_decode_as_they_read(name, models):
    """And no part of them is idle: every parameter moves the logits."""
    model = models[name]
    assert measure.gate(model, 160) < measure.TOLERANCE
    assert measure.gate(model, 160, batch=3) < measure.TOLERANCE
    tokens = mx.random.randint(0, 160, (1, 12), key=mx.random.key(3))

    def loss(parameters):
        model.update(parameters)
        return mx.square(model(tokens, cache=make_prompt_cache(model))).sum()

    before = model.parameters()
    gradients = mx.grad(loss)(before)
    model.update(before)
    idle = [k for k, g in tree_flatten(gradients) if not mx.any(g)]
    # rwkv7's first layer makes the values that later ones mix with theirs.
    assert [k for k in idle if not (name == "rwkv7" and "layers.0.attn.v_lora" in k)] == []


@pytest.mark.parametrize("name", peers.NAMES)
def test_a_made_up_state_has_the_size_of_a_real_one(name, models):
    model = models[name]
    real = make_prompt_cache(model)
    for _ in range(0, 100, 20):  # in pieces: at once a window would keep the whole prompt
        model(mx.zeros((2, 20), mx.int32), cache=real)
    made = peers.cache_after(model, 100, batch=2)
    for c in (real, made):
        model(mx.zeros((2, 1), mx.int32), cache=c)
    if name == "mcsd":
        assert [c.cache[-1].tolist() for c in made] == [c.cache[-1].tolist() for c in real]
    assert [c.nbytes for c in made] == [c.nbytes for c in real]


def test_gate_sees_a_wrong_decode(models):
    model = models["mcsd"]

    class Forgetful:
        make_cache = model.make_cache

        def __call__(self, tokens, cache):
            return model(tokens, cache=model.make_cache() if tokens.shape[1] == 1 else cache)

    assert measure.gate(Forgetful(), 160) > 100 * measure.TOLERANCE
    assert measure.distance(mx.array([1.0, mx.nan]), mx.ones(2)) == mx.inf


def test_all(capsys, tmp_path):
    code, printed = bench(capsys, "all", *SMALL, "--output-dir", str(tmp_path / "new"))
    assert code == 0
    result = json.loads((tmp_path / "new" / "all.json").read_text())
    rows = result["rows"]
    assert result["ok"] and all(row["error"] < 1e-5 for row in rows)
    for task, figure in (
        ("decode", "tokens_per_second"),
        ("prefill", "peak_bytes"),
        ("memory", "state_bytes"),
        ("batch", "seconds"),
    ):
        found = [(r["model"], r["tokens"], r["batch"]) for r in rows if r["bench"] == task]
        sizes = [(32, 1), (32, 2)] if task == "batch" else [(32, 1), (64, 1)]
        assert sorted(found) == sorted((n, *size) for n in peers.NAMES for size in sizes)
        assert all(row[figure] for row in rows if row["bench"] == task)
    ours = [r["state_bytes"] for r in rows if r["bench"] == "memory" and r["model"] == "mcsd"]
    assert ours == [2 * 4 * (2 * 32 + 1)] * 2  # L layers of 2 D numbers and a count
    parts = [r["part"] for r in rows if r["bench"] == "profile"]
    assert {"step", "products", "mixers, projections included", "head"} <= set(parts)
    assert f"{result['machine']['processor']}, " in printed
    assert (tmp_path / "new" / "all.png").read_bytes().startswith(b"\x89PNG")
    svg = ElementTree.parse(tmp_path / "new" / "all.svg").getroot()
    assert svg.tag.endswith("svg")


def test_a_wrong_model_gets_no_figure(capsys, monkeypatch):
    monkeypatch.setattr(tasks, "gate", lambda model, *_: 1e-3 if model.model_type == "llama" else 0)
    code, printed = bench(capsys, "decode", *SMALL, "--models", "mcsd", "llama")
    assert code == 1
    (first, second) = [line.split() for line in printed.splitlines() if line.startswith("llama")]
    assert first[1:] == ["32", "FAILED", "-", "-", "1.0e-03"] and second[1] == "64"
    assert "its speed means nothing" in printed


def test_a_model_stops_at_the_limits(capsys):
    limit = str(3e5 / 2**30)
    args = ["--size", "tiny", "--contexts", "512", "65536", "--repeats", "1", "--models"]
    code, printed = bench(capsys, "memory", *args, "mcsd", "llama", "--memory-limit", limit)
    assert code == 0
    lines = [line.split() for line in printed.splitlines()]
    assert ["llama", "65,536", "over", "0.000279397", "GiB", "-"] in [x[:-1] for x in lines]
    assert all("over" not in x for x in lines if x and x[0] == "mcsd")
    settings = tasks.Settings((), (), memory_limit=100, time_limit=10)
    assert tasks._too_long(settings, [], 4096) is None
    assert tasks._too_long(settings, [(1024, 1.0, 10), (2048, 4.0, 20)], 4096) == "over 10 s"
    assert tasks._too_long(settings, [(1024, 1.0, 10), (2048, 2.0, 20)], 4096) is None
    assert tasks._too_long(settings, [(1024, 1.0, 30), (2048, 2.0, 60)], 4096).endswith("GiB")


def test_timings_are_taken_in_turn():
    calls = []
    runs = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    times = measure.interleaved(runs, 3, "")
    assert calls == list("abababab")
    assert times["a"] == measure.Timing(*np.quantile([3, 5, 7], (0.5, 0.25, 0.75)))


def test_table_shows_the_quartiles_in_ms():
    row = dict(bench="batch", model="mcsd", batch=4, tokens=32, error=0.0, ok=True)
    row |= dict(seconds=dict(median=0.002, low=0.001, high=0.003), tokens_per_second=2000.0)
    assert table([row]).splitlines()[-1].split() == [
        "mcsd",
        "4",
        "2.00",
        "1.00-3.00",
        "2,000.0",
        "0.0e+00",
    ]


def test_mistakes_end_in_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (["decode", "--models", "gpt"], "invalid choice: 'gpt'"),
        (["speed"], "invalid choice: 'speed'"),
        (["decode", "--contexts", "0"], "must be an integer of at least 1"),
        (["decode", *SMALL, "--output-dir", str(tmp_path / "file")], "--output-dir"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        error = capsys.readouterr().err
        assert end.value.code == 1 and said in error
        assert error.startswith("error: ") and error.count("\n") == 1
