"""The read command: the state of the whole text, in constant memory, through interruptions."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

import tiny
from mlx_mcsd import generation, load, read
from mlx_mcsd.loading import resolve
from mlx_mcsd.state import State

BOOK = "".join(f"Chapter {n}. a b ab 漢字, a\n\n" for n in range(400))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random model; nothing in the tests writes here."""
    directory = tmp_path_factory.mktemp("read") / "model"
    tiny.write_model(directory)
    return directory


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8")
    return tmp_path / "book.txt"


@pytest.fixture
def run(command, directory, tmp_path):
    """The command on the random model; its folder is a dot in what it prints."""

    def run(*argv):
        words = "--model", directory, "--prefill-step-size", 500, *argv
        code, *printed = command(read.main, *words)
        return code, *(text.replace(str(tmp_path), ".") for text in printed)

    return run


def saved(file, directory):
    """All a saved state holds, but the command."""
    state = State.load(file, load(directory)[0])
    arrays = [np.array(a).tobytes() for c in state.cache for a in c.cache]
    return arrays, state.tokens_seen, state.hash, state.pending


def test_the_state_is_that_of_the_whole_text(run, book, directory, tmp_path):
    model, tokenizer = load(directory)
    ids = tokenizer.encode(BOOK)
    code, out, err = run(book, "--save", tmp_path / "a.state")
    assert (code, err) == (0, "")
    assert re.fullmatch(
        rf"Read: {len(ids)} tokens \({len(BOOK.encode()) / 1024:.1f} KiB of text\) in \d+\.\d s, "
        rf"\d+ tokens-per-sec\nState: 0\.4 KiB in \./a\.state, {len(ids)} tokens\n",
        out,
    )
    state = State(model)
    state.read(ids, 500)
    arrays = [np.array(a).tobytes() for c in state.cache for a in c.cache]
    want = arrays, len(ids) - 1, state.hash, (ids[-1],)
    assert saved(tmp_path / "a.state", directory) == want
    assert State.load(tmp_path / "a.state", model).command.startswith("mlx_mcsd.read --model ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.state", "book.txt"]


def test_the_bar_counts_tokens_to_the_end(run, tmp_path, bars):
    (tmp_path / "ascii.txt").write_text("ab a\n" * 7001)
    code, out, _ = run(tmp_path / "ascii.txt", "--save", tmp_path / "a.state")
    (bar, figures), count = bars[0], int(re.match(r"Read: (\d+) tokens", out)[1])
    assert code == 0 and count > 21_000
    assert (bar.n, bar.total) == (count - 1, count - 1)  # one is pending
    guesses = [total for _, total in figures if total]
    # A guess is low by what was encoded but not read, two windows at most.
    assert all(total <= 1.01 * count for total in guesses)
    assert len(guesses) > 30


def test_files_and_standard_input_are_one_text(run, book, directory, tmp_path, monkeypatch):
    data = BOOK.encode()
    for i, (a, b) in enumerate(pairwise([0, 4000, 4000, 9001, len(data)])):
        (tmp_path / f"{i}.txt").write_bytes(data[a:b])
    run(book, "--save", tmp_path / "whole.state")
    names = [tmp_path / "0.txt", tmp_path / "1.txt", "-", tmp_path / "3.txt"]
    with open(tmp_path / "2.txt") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run(*names, "--save", tmp_path / "parts.state")[::2] == (0, "")
    whole, parts = (saved(tmp_path / f"{n}.state", directory) for n in ("whole", "parts"))
    assert whole == parts


def test_reading_goes_on_from_a_state(run, directory, tmp_path):
    model, tokenizer = load(directory)
    for name, text in (("one", "a b ab\n"), ("two", "b a\n")):
        (tmp_path / name).write_text(text)
    run(tmp_path / "one", "--save", tmp_path / "one.state")
    code, out, _ = run(
        tmp_path / "two", "--save", tmp_path / "two.state", "--state", tmp_path / "one.state"
    )
    ids = tokenizer.encode("a b ab\n") + tokenizer.encode("b a\n", add_special_tokens=False)
    state = State(model)
    state.read(ids)
    assert saved(tmp_path / "two.state", directory)[1:] == (
        *(state.tokens_seen, state.hash, state.pending),
    )
    assert code == 0 and out.endswith(f"two.state, {len(ids)} tokens\n")


@pytest.mark.parametrize("base", [False, True], ids=["", "state"])
def test_an_interrupted_reading_goes_on_to_the_same_state(
    run, book, directory, tmp_path, monkeypatch, base
):
    (tmp_path / "base.txt").write_text("ab ab\n")
    assert run(tmp_path / "base.txt", "--save", tmp_path / "base.state")[0] == 0
    flags = ("--state", tmp_path / "base.state") if base else ()
    run(book, "--save", tmp_path / "whole.state", *flags)
    argv = (book, "--save", tmp_path / "a.state", *flags)
    original, steps = generation.read, []

    def stopping(*args):
        steps.append(1)
        if len(steps) in (3, 8):
            os.kill(os.getpid(), signal.SIGINT)
        original(*args)

    monkeypatch.setattr(generation, "read", stopping)
    for _ in range(2):
        code, _, err = run(*argv)
        assert code == 130
        assert err == "Interrupted: the same command goes on from ./a.state.part.\n"
        assert not (tmp_path / "a.state").exists()
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    # The state given has read all of its tokens but one, which is the first of the first step.
    before = State.load(tmp_path / "base.state", load(directory)[0]).tokens_seen if base else 0
    expected = f"Going on from ./a.state.part, behind {8 * 500 + 1 + before} tokens."
    assert out.splitlines()[0] == expected
    assert saved(tmp_path / "a.state", directory) == saved(tmp_path / "whole.state", directory)
    assert not (tmp_path / "a.state.part").exists()
    assert len(steps) == -(-saved(tmp_path / "a.state", directory)[1] // 500)  # none twice


def test_a_reading_is_saved_on_the_way(run, book, tmp_path, directory, monkeypatch):
    counts = []
    save = State.save

    def noting(self, path, command):
        counts.append((os.path.basename(path), self.tokens_seen))
        save(self, path, command)

    monkeypatch.setattr(State, "save", noting)
    run(book, "--save", tmp_path / "a.state", "--every", 1200)
    *parts, (name, _) = counts
    assert name == "a.state"
    assert [n for n, _ in parts] == ["a.state.part"] * len(parts)
    steps = [n for _, n in parts]
    assert steps == list(range(1500, steps[-1] + 1, 1500)) and len(steps) > 3


def test_another_text_is_not_gone_on_with(run, book, tmp_path, directory):
    other = BOOK.replace("Chapter 3.", "Chapter 4.")
    part = tmp_path / "a.state.part"
    model, tokenizer = load(directory)
    for text, tokens in ((other, 2001), (BOOK + "a", len(tokenizer.encode(BOOK)) + 1)):
        state = State(model)
        state.read(tokenizer.encode(text)[:tokens])
        state.save(part)
        code, out, err = run(book, "--save", tmp_path / "a.state")
        assert (code, out) == (1, "")
        assert err == (
            "error: ./a.state.part was read from another text; remove it to begin anew.\n"
        )
    part.write_bytes(b"x")
    code, _, err = run(book, "--save", tmp_path / "a.state")
    assert code == 1 and "must be a whole state file" in err


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a" * 70000 + b"\xff" + b"a" * 9, "bad.txt must be UTF-8 text but is not at byte 70000."),
        ("é".encode() * 40000 + b"\xc3", "bad.txt must be UTF-8 text but is not at byte 80000."),
        (b"a" + "漢".encode() * 30000 + b"\xe6a", "is not at byte 90001."),
        (b"\xef\xbb", "is not at byte 0."),
    ],
    ids=["invalid", "cut short", "across pieces", "only a part"],
)
def test_what_is_not_utf8_is_told_by_its_byte(run, book, tmp_path, data, expected):
    (tmp_path / "bad.txt").write_bytes(data)
    code, out, err = run(book, tmp_path / "bad.txt", "--save", tmp_path / "a.state")
    assert (code, out) == (1, "")
    assert err.startswith("error: ./bad.txt must be UTF-8 text but is not at byte ")
    assert err.endswith(f"{expected}\n") and err.count("\n") == 1
    assert not (tmp_path / "a.state").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["none.txt", "--save", "a.state"], "cannot read none.txt: No such file or directory."),
        ([".", "--save", "a.state"], "cannot read .: Is a directory."),
        (["book.txt", "--save", "none/a.state"], "in a directory to write to, not none/a.state."),
        (["book.txt", "--save", "."], "--save must name a file but . is a directory."),
        (["book.txt"], "the following arguments are required: --save"),
        (["--save", "a.state"], "the following arguments are required: FILE"),
        (["book.txt", "--save", "a.state", "--every", "0"], "--every: must be an integer"),
        (["book.txt", "--save", "a.state", "--state", "b"], "cannot read b: No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_is_one_line(run, book, tmp_path, monkeypatch, argv, expected):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*argv)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and expected in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["book.txt"]


def test_no_text_is_one_line(tmp_path, capsys, run, monkeypatch):
    tiny.write_model(tmp_path / "plain")
    spec = tmp_path / "plain" / "tokenizer.json"
    spec.write_text(json.dumps(json.loads(spec.read_text()) | {"post_processor": None}))
    (tmp_path / "empty").write_text("")
    code, _, err = run(tmp_path / "empty", "--save", tmp_path / "a", "--model", tmp_path / "plain")
    assert (code, err) == (1, "error: the text must not be empty but holds no tokens.\n")
    code, _, err = run(tmp_path / "empty", "--save", tmp_path / "a")  # <s> is no text
    assert (code, err) == (1, "error: the text must not be empty but holds no tokens.\n")
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = run("-", "--save", tmp_path / "a")
    assert (code, err) == (1, "error: - needs standard input but it is closed.\n")


PEAK = """
import re, resource, sys
from mlx_mcsd import read
read.main(sys.argv[1:])
try:  # on Linux the other figure is the parent's, where that is larger
    print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
except FileNotFoundError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_depend_on_the_length(book, tmp_path, root):
    """Ten times the text, within 2 %: `MLX_MCSD_LONG=1` makes it 1 MB and 10 MB."""
    length = 1_000_000 if os.environ.get("MLX_MCSD_LONG") else 100_000
    peaks, directory = [], tmp_path / "model"
    K = json.loads((resolve() / "config.json").read_text())["vocab_size"]
    tiny.write_model(directory, vocab_size=K, hidden_size=8, num_hidden_layers=1)
    for file in resolve().glob("tokenizer*"):  # with fewer tokens to a text than one made up
        shutil.copy(file, directory)
    for times in (1, 10):
        text = (BOOK * (length * times // len(BOOK.encode()) + 1)).encode()[: length * times]
        book.write_bytes(text.decode(errors="ignore").encode())
        argv = [book, "--save", tmp_path / "a.state", "--model", directory]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, argv)],
            capture_output=True,
            cwd=root,
            check=True,
        )
        assert done.stderr == b""
        peaks.append(int(done.stdout.splitlines()[-1]))
    print("peak memory in KB:", peaks)
    assert peaks[1] <= 1.02 * peaks[0]
