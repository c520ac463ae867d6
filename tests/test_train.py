"""``python -m mlx_mcsd.train`` as a user runs it: from texts to a model that loads."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import tiny
from mlx_mcsd import load, train
from mlx_mcsd.training import checkpoint

SHAPE = "--hidden-size 20 --num-channels 5 --num-hidden-layers 2 --intermediate-size 24"
FAST = "--batch-size 2 --max-seq-length 16 --steps-per-report 2 --steps-per-eval 4 --save-every 3"
TEXT = "a bab ab\nbaa abba, ab\nba " * 60


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def words(tmp_path, text):
    """A command line that trains a tiny model; its folder is RUN."""
    home = tmp_path / "tokenizer"
    home.mkdir()
    tiny.write_tokenizer(home, eos_token="</s>")

    def make(run="run", *more):
        flags = f"{SHAPE} {FAST} --iters 7 --tokenizer {home} --data {text}".split()
        return [*flags, "--output-dir", str(tmp_path / run), *more]

    return make


def error_of(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(argv)
    assert exit.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def weights(run):
    return {k: np.array(v) for k, v in mx.load(str(Path(run) / "model.safetensors")).items()}


def log(run):
    """The log, without what depends on the clock."""
    lines = (Path(run) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_second"} for x in lines]


def same(a, b):
    assert a.keys() == b.keys()
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_a_run_from_text_to_model(words, tmp_path, capsys):
    train.main(words())
    run = tmp_path / "run"
    entries = log(run)
    assert [e["step"] for e in entries if "loss" in e] == [2, 4, 6, 7]
    assert [e["step"] for e in entries if "val_loss" in e] == [4, 7]
    assert entries[0]["loss"] == pytest.approx(np.log(272), rel=0.02)  # it knows nothing yet
    assert entries[-1]["val_loss"] < entries[2]["val_loss"]
    for entry in entries:
        for loss, bits in (("loss", "bits_per_character"), ("val_loss", "val_bits_per_character")):
            if loss in entry:  # a token is 1 to 2 characters here
                assert 0.5 < entry[bits] / (entry[loss] / np.log(2)) <= 1.01
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "00000006.safetensors",
        "00000007.safetensors",
    ]
    model, tokenizer = load(run)
    assert tokenizer.decode(tokenizer.encode("ab ba", add_special_tokens=False)) == "ab ba"
    tree, facts = checkpoint.load(run / "checkpoints" / "00000007.safetensors")
    assert facts["step"] == 7
    want = dict(tree_flatten(tree["model"]))
    got = dict(tree_flatten(model.parameters()))
    assert same(got, want)
    out = capsys.readouterr().out
    assert "Step 7/7: loss" in out and "Step 7: held out" in out and f"--model {run}" in out


def test_resume_is_exact(words, tmp_path):
    """Stopped at a random moment, resumed: weights, optimiser, states and log as if never."""
    more = ["--dropout", "0.2", "--grad-accumulation-steps", "2"]
    train.main(words("whole", *more))
    folder = tmp_path / "parts"
    train.main(words("parts", *more))
    for name in ("00000007.safetensors", "00000006.safetensors"):
        (folder / "checkpoints" / name).rename(folder / name)
    (folder / "00000006.safetensors").rename(folder / "checkpoints" / "00000006.safetensors")
    train.main(["--resume", str(folder)])
    assert same(weights(folder), weights(tmp_path / "whole"))
    assert log(folder) == log(tmp_path / "whole")
    a, b = (
        checkpoint.load(tmp_path / run / "checkpoints" / "00000007.safetensors")
        for run in ("whole", "parts")
    )
    assert same(dict(tree_flatten(a[0])), dict(tree_flatten(b[0]))) and a[1] == b[1]
