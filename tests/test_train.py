"""``python -m mlx_mcsd.train`` as a user runs it: from texts to a model that loads."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

import tiny
from mlx_mcsd import load, train
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.training import checkpoint, corpus, report
from mlx_mcsd.training.config import TrainConfig
from mlx_mcsd.training.loop import Run
from mlx_mcsd.training.step import Stepper
from mlx_mcsd.training.streams import Streams
from models import Rank
from oracle import relative_error
from test_sharding import run_ranks

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
    found = mx.load(str(Path(run) / "model.safetensors"))
    return {k: np.array(v.astype(mx.float32)) for k, v in found.items()}


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


def test_killed_at_any_moment_and_resumed(words, tmp_path):
    """kill -9, again and again at random moments: to the bit what it would have been."""
    more = ["--iters", "30", "--save-every", "1", "--dropout", "0.1", "--keep", "3"]
    train.main(words("whole", *more))
    run = tmp_path / "run"
    command, rng = words("run", *more), np.random.default_rng()
    for _ in range(int(os.environ.get("MLX_MCSD_KILLS", 2))):
        process = subprocess.Popen(
            [sys.executable, "-m", "mlx_mcsd.train", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        before = newest(run)
        while process.poll() is None and newest(run) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        errors = process.communicate()[1]
        assert process.returncode in (-signal.SIGKILL, 0), errors
        load(run)  # what it left is a model
        command = ["--resume", str(run)]
    train.main(command)
    assert same(weights(run), weights(tmp_path / "whole"))
    assert log(run) == log(tmp_path / "whole")
    for step in (28, 29, 30):
        a, b = (
            checkpoint.load(tmp_path / name / "checkpoints" / f"{step:08d}.safetensors")
            for name in ("run", "whole")
        )
        assert same(dict(tree_flatten(a[0])), dict(tree_flatten(b[0]))) and a[1] == b[1]
    assert not list(run.rglob("*.partial*"))


def newest(run):
    return max((p.name for p in run.glob("checkpoints/*.safetensors")), default="")


def test_killed_before_the_first_checkpoint(words, tmp_path, monkeypatch):
    train.main(words("whole"))
    monkeypatch.setattr(corpus, "write_atomically", stop)
    with pytest.raises(Stopped):
        train.main(words())
    assert (tmp_path / "run" / "data" / "train.tokens").exists()
    monkeypatch.undo()
    train.main(["--resume", str(tmp_path / "run")])
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


class Stopped(Exception):
    pass


def stop(*_):
    raise Stopped


def test_ctrl_c_saves_and_says_how_to_go_on(words, tmp_path, monkeypatch, capsys):
    """In the middle of a report and of an epoch, whose sums and order go on too."""
    more = ["--dropout", "0.2", "--grad-accumulation-steps", "2", "--pack", "--dtype", "bfloat16"]
    train.main(words("whole", *more))
    segment = Streams.segment

    def interrupting(self, number):
        if self.seed is not None and number == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return segment(self, number)

    monkeypatch.setattr(Streams, "segment", interrupting)
    with pytest.raises(SystemExit) as exit:
        train.main(words("run", *more))
    monkeypatch.undo()
    run = tmp_path / "run"
    assert exit.value.code == 130
    error = capsys.readouterr().err
    assert f"Interrupted behind step 5: python -m mlx_mcsd.train --resume {run} goes on." in error
    assert newest(run) == "00000005.safetensors"
    # What another process logged behind its last checkpoint before it was killed.
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    train.main(["--resume", str(run)])
    assert same(weights(run), weights(tmp_path / "whole")) and log(run) == log(tmp_path / "whole")


def test_no_number_stops_the_run_and_names_the_batch(words, tmp_path, monkeypatch, capsys):
    """The last checkpoint stays good."""
    calls = []

    def poisoned(self, number, segment, asked):
        calls.append(number)
        if number == 4:
            norm = self.model.model.norm
            norm.weight = norm.weight * float("inf")
        return step(self, number, segment, asked)

    step = Stepper.__call__
    monkeypatch.setattr(Stepper, "__call__", poisoned)
    run = tmp_path / "run"
    error = error_of(words(), capsys)
    assert re.search(
        r"the loss and its gradient must be numbers but are nan and nan at step 5, which read "
        rf"document 1 of {tmp_path}/text.txt; {run}/checkpoints/00000003.safetensors is the last "
        r"checkpoint: lower learning_rate.$",
        error,
    )
    assert calls == [0, 1, 2, 3, 4] and newest(run) == "00000003.safetensors"
    assert all(np.isfinite(v).all() for v in weights(run).values())
    monkeypatch.undo()
    train.main(["--resume", str(run), "--learning-rate", "1e-4"])
    assert log(run)[-1]["step"] == 7
    assert "Resuming with learning_rate: 0.001, now 0.0001." in capsys.readouterr().out


def test_what_cannot_begin_or_go_on(words, tmp_path, capsys):
    run = tmp_path / "run"
    assert "nothing is named: --data" in error_of(["--output-dir", str(run)], capsys)
    assert "output_dir must name a folder" in error_of(["--data", "x"], capsys)
    assert "--resume must name the folder of a run" in error_of(["--resume", "nowhere"], capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "must be new or empty" in error_of(words("full"), capsys)
    assert not run.exists()
    train.main(words(*["run", "--iters", "1"]))
    assert f"holds a run: go on with it by --resume {run}" in error_of(words(), capsys)
    changed = ["--resume", str(run), "--batch-size", "4"]
    assert "batch_size must stay 2 when a run is resumed but got 4" in error_of(changed, capsys)
    changed = ["--resume", str(run), "--dtype", "bfloat16"]
    assert "dtype must stay 'float32' when a run is resumed" in error_of(changed, capsys)
    settings = (run / "training.yaml").read_text()
    with train.alone(run, 0):
        error = error_of(["--resume", str(run), "--learning-rate", "0.5"], capsys)
    assert f"{run} is being trained by another process." in error
    assert (run / "training.yaml").read_text() == settings
    newest_file = run / "checkpoints" / newest(run)
    newest_file.write_bytes(newest_file.read_bytes()[:-8])
    assert "must be a whole safetensors file" in error_of(["--resume", str(run)], capsys)


def test_a_mistake_is_mended_by_typing_it_again(words, tmp_path, monkeypatch, capsys):
    given = words()
    data = given.index("--data") + 1
    assert "cannot read" in error_of([*given[:data], "txet.txt", *given[data + 1 :]], capsys)
    assert "divisible by num_channels" in error_of([*given, "--num-channels", "7"], capsys)
    (tmp_path / "t.jinja").write_text("x")
    monkeypatch.setattr(corpus, "write_atomically", stop)
    with pytest.raises(Stopped):
        train.main([*given, "--chat-template", str(tmp_path / "t.jinja")])
    assert (tmp_path / "run" / "chat_template.jinja").exists()
    monkeypatch.undo()
    train.main(given)
    train.main(words("whole"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert not (tmp_path / "run" / "chat_template.jinja").exists()


@pytest.mark.parametrize("step", [3, 7])
def test_a_disk_full_between_weights_and_checkpoint(words, tmp_path, monkeypatch, capsys, step):
    """Whichever is written, the folder is a model, and resumed it is the whole run's."""
    train.main(words("whole"))
    save = checkpoint.save

    def full(folder, number, *more):
        if number == step:
            raise MCSDError("cannot write: no space left on device.")
        return save(folder, number, *more)

    monkeypatch.setattr(checkpoint, "save", full)
    assert "no space left" in error_of(words(), capsys)
    monkeypatch.undo()
    load(tmp_path / "run")
    train.main(["--resume", str(tmp_path / "run")])
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_full_disk_is_one_line(tmp_path):
    """MLX tells of it by a RuntimeError."""
    import resource

    from mlx_mcsd.training.export import write_safetensors

    path, soft_hard = tmp_path / "x.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_safetensors(path, {"a": mx.zeros(4)}, {})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, soft_hard[1]))
    try:
        with pytest.raises(MCSDError, match=f"cannot write {path}: "):
            write_safetensors(path, {"a": mx.zeros(40_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert mx.load(str(path))["a"].tolist() == [0] * 4


def test_other_tokens_than_the_checkpoint_learned(words, tmp_path, text, capsys):
    train.main(words("run", "--iters", "2"))
    run = tmp_path / "run"
    shutil.rmtree(run / "data")
    text.write_text(TEXT[::-1])
    error = error_of(["--resume", str(run), "--iters", "4"], capsys)
    assert f"{run}/data must hold the tokens of the first 2 steps but holds others" in error
    shutil.rmtree(run / "data")
    text.write_text(TEXT)
    train.main(["--resume", str(run), "--iters", "4"])


def test_a_part_to_hold_out_where_a_file_is_held_out(words, tmp_path, capsys):
    home = tmp_path / "texts"
    home.mkdir()
    for part in ("train", "valid"):
        (home / f"{part}.jsonl").write_text('{"text": "a b"}\n')
    error = error_of(words("run", "--data", str(home), "--val-fraction", "0.5"), capsys)
    assert f"val_fraction must not be set where data hold out a part: {home}/valid.jsonl" in error


def test_speed_is_of_the_steps_since_a_run_was_taken_up(tmp_path, monkeypatch):
    clock = [10.0]
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    told = report.Report(tmp_path, step=5, steps=20, characters=1.0, silent=False)
    for step, seconds, wanted in ((7, 4.0, 50.0), (10, 1.0, 300.0)):
        clock[0] += seconds
        told.trained(step, loss=1.0, tokens=100)
        entry = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
        assert (entry["step"], entry["tokens_per_second"]) == (step, wanted)


def test_no_batches_to_evaluate(words, tmp_path):
    train.main(words("run", "--val-batches", "0"))
    assert log(tmp_path / "run")[-1]["step"] == 7
    assert not any("val_loss" in entry for entry in log(tmp_path / "run"))


def test_a_yaml_file_and_flags_before_it(words, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"iters: 9\nlearning_rate: 1e-3\ndata: {tmp_path / 'text.txt'}\n")
    given = words()
    del given[given.index("--data") : given.index("--data") + 2]
    train.main(["-c", str(settings), *given, "--iters", "2"])
    assert log(tmp_path / "run")[-1]["step"] == 2
    kept = (tmp_path / "run" / "training.yaml").read_text()
    assert "iters: 2\n" in kept and "learning_rate: 0.001\n" in kept and "seed: 0\n" in kept


@pytest.fixture
def chats(tmp_path):
    """Two files of requests and replies."""
    for name, key in (("messages", 0), ("completions", 1)):
        lines = []
        for i in range(40):
            user, reply = "ab " * (1 + i % 5), "ba " * (1 + i % 3)
            turns = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
            lines.append(({"messages": turns}, {"prompt": user, "completion": reply})[key])
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def test_a_model_learns_to_chat(words, chats, capsys):
    """Messages put a template into the model; another run goes on from it, with mlx-lm's loader."""
    given = words("chat", "--data", str(chats / "messages.jsonl"), "--mask-prompt")
    train.main(given)
    out = capsys.readouterr().out
    assert "each message is put behind its <|role|>" in out
    _, tokenizer = load(chats / "chat")
    messages = [{"role": "user", "content": "ab"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<s><|user|>\nab</s>\n<|assistant|>\n"
    more = f"{FAST} --iters 4 --learning-rate 1e-9".split()
    data = ["--data", str(chats / "completions.jsonl"), "--output-dir", str(chats / "more")]
    train.main(["--init-from", str(chats / "chat"), *more, *data])
    for name, value in weights(chats / "more").items():
        assert np.abs(value - weights(chats / "chat")[name]).max() < 1e-6, name
    model, tokenizer = mlx_lm.load(str(chats / "more"), trust_remote_code=True)
    assert tokenizer.has_chat_template
    assert mlx_lm.generate(model, tokenizer, "ab", max_tokens=3)


def test_a_tokenizer_is_trained_where_none_is_given(text, tmp_path, capsys):
    text.write_text("".join(f"{i}, once upon a time there was number {i}.\n" for i in range(300)))
    given = f"{SHAPE} {FAST} --iters 2 --data {text} --output-dir {tmp_path / 'run'}".split()
    assert "vocab_size must be at least" in error_of([*given, "--vocab-size", "261"], capsys)
    train.main([*given, "--vocab-size", "300"])  # a mistake leaves no run
    model, tokenizer = load(tmp_path / "run")
    assert model.args.vocab_size == 300
    assert (model.args.bos_token_id, model.args.eos_token_id, model.args.pad_token_id) == (1, 2, 3)
    ids = tokenizer.encode("once upon a time")
    assert ids[0] == 1 and len(ids) < 12
    assert tokenizer.decode(ids[1:]) == "once upon a time"


def test_several_processes_are_one_with_the_whole_batch(words, tmp_path):
    """Losses, norms and weights; resumed by one process, and by two."""
    more = ["--batch-size", "4", "--grad-accumulation-steps", "2"]
    train.main(words("one", *more))
    run_ranks(tmp_path, 2, "-m", "mlx_mcsd.train", *words("two", *more))
    run = tmp_path / "two"
    (run / "checkpoints" / "00000007.safetensors").unlink()
    shutil.copytree(run, tmp_path / "again")
    for resumed in (run, tmp_path / "again"):
        if resumed == run:
            run_ranks(tmp_path, 2, "-m", "mlx_mcsd.train", "--resume", str(resumed))
        else:
            train.main(["--resume", str(resumed)])
        found, wanted = log(resumed), log(tmp_path / "one")
        assert [e.keys() for e in found] == [e.keys() for e in wanted]
        for a, b in zip(found, wanted, strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        for name, value in weights(tmp_path / "one").items():
            assert relative_error(weights(resumed)[name], value) < 1e-4, name


def test_batches_that_cannot_be_shared(tmp_path):
    with pytest.raises(MCSDError, match="must be a multiple of the 2 processes but is 3"):
        Run(TrainConfig(batch_size=3), tmp_path, Rank(1, 2))
