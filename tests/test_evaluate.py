"""Scores of texts: those of the quadratic oracle in float64, however the text comes in pieces."""

import json
import math
import os
import sys
import threading
import tracemalloc
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import oracle
import tiny
from mlx_mcsd import evaluate, load, tokens
from mlx_mcsd.convert.pipeline import convert
from mlx_mcsd.documents import documents, split, strip
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.scoring import Score, score

EOS = tiny.PIECES.index("</s>")
STORIES = ["a b ab\nb", "漢字, é a b a b\n\n a", "b", "ab" * 40]


def bits(checkpoint, *ids):
    """Bits of every token but the first, by the oracle, in float64."""
    log_p = oracle.log_softmax(oracle.logits(*checkpoint[1:], [ids])[0])  # (N, K)
    return -log_p[np.arange(len(ids) - 1), ids[1:]] / math.log(2)


def expected(checkpoint, tokenizer, texts, end):
    """The score of each text alone, token by token."""
    costs = [bits(checkpoint, *tokenizer.encode(t), *([EOS] if end else [])) for t in texts]
    text = "".join(texts)
    count = sum(map(len, costs))
    return Score(len(texts), len(text), len(text.encode()), count, sum(map(sum, costs)))


def pieces(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)]


def same(got, want, rel=1e-6):
    assert (got.documents, got.characters, got.bytes, got.tokens) == (
        *(want.documents, want.characters, want.bytes, want.tokens),
    )
    assert got.bits == pytest.approx(want.bits, rel=rel)


@pytest.mark.parametrize("step", [1, 2, 7, 64, 512])
@pytest.mark.parametrize("end", [True, False], ids=["whole", "cut"])
def test_packed_documents_cost_what_each_costs_alone(checkpoint, loaded, step, end):
    texts = [pieces(story, 3) for story in STORIES]
    got = score(*loaded, [[], *texts, ["", ""]], end=end, step_size=step)
    same(got, expected(checkpoint, loaded[1], STORIES, end))
    assert got.tokens == sum(len(loaded[1].encode(s)) - 1 + end for s in STORIES)


def test_figures_of_a_score():
    got = Score(1, 10, 20, 5, 30.0) + Score(2, 30, 40, 5, 50.0)
    assert got.as_dict() == {
        **{"documents": 3, "characters": 40, "bytes": 60, "tokens": 10, "bits": 80.0},
        **{"bits_per_character": 2.0, "bits_per_byte": 80 / 60, "perplexity": 256.0},
    }
    assert Score(1, 1, 1, 1, 5000.0).perplexity == math.inf


def test_a_first_token_that_nothing_predicts_costs_a_guess(checkpoint, tmp_path):
    _, config, tensors = checkpoint
    oracle.write_checkpoint(tmp_path, config, tensors)
    tiny.write_tokenizer(tmp_path, "$A")
    model, tokenizer = load(tmp_path)
    assert tokenizer.encode("b")[0] not in tokenizer.all_special_ids
    got = score(model, tokenizer, [[story] for story in STORIES])
    costs = [bits(checkpoint, *tokenizer.encode(story)) for story in STORIES]
    assert got.tokens == sum(map(len, costs)) + len(STORIES)
    guesses = len(STORIES) * math.log2(tiny.VOCAB_SIZE)
    assert got.bits == pytest.approx(sum(map(sum, costs)) + guesses, rel=1e-6)
    # One token, in a tokenizer that knows no end: no prediction at all.
    assert score(model, tokenizer, [["b"]]).as_dict()["bits"] == math.log2(tiny.VOCAB_SIZE)


def test_a_prediction_that_is_no_number_is_told(checkpoint):
    model, tokenizer = load(checkpoint[0])
    model.model.norm.weight[0] = math.nan
    with pytest.raises(MCSDError, match="must be finite"):
        score(model, tokenizer, [["a b"]])


def test_memory_does_not_grow_with_the_text(loaded, monkeypatch):
    monkeypatch.setattr(tokens, "WINDOW", 2**12)  # so that a short text has many

    def peak(count):
        mx.reset_peak_memory()
        tracemalloc.start()
        got = score(*loaded, [("a b ab, ba\n" * 100 for _ in range(count))], end=False)
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return got.tokens, mx.get_peak_memory(), python

    (few, metal, python), (many, *more) = peak(20), peak(60)
    assert many > 2.9 * few
    assert more[0] <= 1.02 * metal and more[1] <= 1.1 * python


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("separator", ["\n", "<|>", "aab", "  "])
def test_split_and_strip_are_those_of_whole_strings(separator, size):
    text = f"\n\r\n \n a aaab{separator}  \n{separator}{separator}é<|<|b |> aa a"
    text += f"{separator[:-1]} b \r\n\n"
    for cut in (text, text + separator, ""):
        assert ["".join(p) for p in split(pieces(cut, size), separator)] == cut.split(separator)
        assert "".join(strip(pieces(cut, size))) == cut.strip("\r\n")


@pytest.fixture
def run(command, checkpoint, tmp_path, monkeypatch):
    """The command on the random model, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return partial(command, evaluate.main, "--model", checkpoint[0])


def write_files(folder):
    """Two stories in each of three layouts, and how each file is to be scored."""
    one, two = STORIES[:2]
    (folder / "whole.txt").write_text(f" {one}\n")
    (folder / "parted.txt").write_text(f"{one}\n<|end|>\n{two}\n<|end|>\n\n")
    (folder / "lines.jsonl").write_text(
        "".join(json.dumps({"text": t, "other": 1}) + "\n\n" for t in (one, two, ""))
    )
    return [f" {one}\n"], [one, two]


def test_files_and_their_total(run, checkpoint, loaded, tmp_path):
    whole, parted = write_files(tmp_path)
    code, out, err = run("whole.txt", "lines.jsonl", "--json", "--prefill-step-size", "5")
    assert (code, err) == (0, "")
    report = json.loads(out)
    wanted = [
        expected(checkpoint, loaded[1], whole, end=False),
        expected(checkpoint, loaded[1], parted, end=True),
    ]
    assert report["model"] == str(checkpoint[0])
    assert [entry.pop("file") for entry in report["files"]] == ["whole.txt", "lines.jsonl"]
    for got, want in zip(
        [*report["files"], report["total"]], [*wanted, sum(wanted, Score())], strict=True
    ):
        assert got == pytest.approx(want.as_dict(), rel=1e-6)
    # Parted by a separator, the same documents are the same.
    alone = json.loads(run("parted.txt", "--separator", "<|end|>", "--json")[1])
    assert alone["total"] == pytest.approx(wanted[1].as_dict(), rel=1e-6)


def test_the_table(run, tmp_path):
    write_files(tmp_path)
    figures = json.loads(run("whole.txt", "lines.jsonl", "--json")[1])
    code, out, _ = run("whole.txt", "lines.jsonl")
    head, *rows, last = [line.split() for line in out.splitlines()]
    assert code == 0
    assert " ".join(head) == "documents chars bytes tokens bits/char bits/byte perplexity"
    named = [*figures["files"], figures["total"] | {"file": "total"}]
    for row, got in zip(rows, named, strict=True):
        assert row == [
            *(got["file"], str(got["documents"]), str(got["characters"]), str(got["bytes"])),
            *(str(got["tokens"]), f"{got['bits_per_character']:.4f}"),
            *(f"{got['bits_per_byte']:.4f}", f"{got['perplexity']:.2f}"),
        ]
    assert last[:2] == [str(figures["total"]["tokens"]), "tokens"]
    assert len({len(line) for line in out.splitlines()[:-1]}) == 1  # columns are aligned
    assert "total" not in run("whole.txt")[1]


def test_the_bar_reaches_the_end(run, tmp_path, bars):
    (tmp_path / "long.txt").write_text("ab a\n" * 7001)
    assert run("long.txt")[0] == 0
    ((bar, figures),) = bars
    steps = [n for n, _ in figures]
    assert steps == sorted(steps) and steps[0] < 20_000
    assert bar.n == bar.total == 35005


def test_standard_input(run, tmp_path, monkeypatch):
    write_files(tmp_path)
    by_name = run("whole.txt", "--json")[1]
    with open("whole.txt") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        code, out, _ = run("-", "--json")
    assert code == 0 and out == by_name.replace("whole.txt", "-")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_opened_once(run, tmp_path):
    write_files(tmp_path)
    by_name = run("whole.txt", "--json")[1]
    os.mkfifo("pipe")
    data = (tmp_path / "whole.txt").read_bytes()
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,), daemon=True)
    writer.start()
    code, out, _ = run("pipe", "--json")
    assert code == 0 and out == by_name.replace("whole.txt", "pipe")


def test_quantized_models_are_scored(tmp_path, run):
    tiny.write_model(tmp_path / "wide", hidden_size=64, intermediate_size=64)
    (tmp_path / "story.txt").write_text(STORIES[0])
    figures = []
    for name, settings in (("float", {}), ("4bit", {"quantize": True, "q_bits": 4})):
        convert(tmp_path / "wide", tmp_path / name, verification=False, **settings)
        model, tokenizer = load(tmp_path / name)
        ids = mx.array(tokenizer.encode(STORIES[0]))
        loss = nn.losses.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="sum")
        code, out, err = run("story.txt", "--json", "--model", str(tmp_path / name))
        assert (code, err) == (0, "")
        figures.append(json.loads(out)["total"]["bits"])
        assert figures[-1] == pytest.approx(loss.item() / math.log(2), rel=1e-5)
    assert figures[0] != pytest.approx(figures[1], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "data", "argv", "wanted"),
    [
        ("a.txt", b"", [], "a.txt must hold text but is empty."),
        ("a.txt", b"\n<>\r\n<>", ["--separator", "<>"], "a.txt must hold text but is empty."),
        ("a.jsonl", b"\n\n", [], "a.jsonl must hold text but is empty."),
        ("a.txt", b"ab\xff", [], "a.txt must be UTF-8 text but is not at byte 2."),
        ("a.txt", b"a", ["--separator", ""], "--separator must not be empty."),
        ("a.txt", b"a", ["none.txt"], "cannot read none.txt: No such file or directory."),
        ("a.txt", b"a", ["."], "cannot read .: Is a directory."),
        ("a.txt", b"a", ["--adapter-path", "no"], "adapter_config.json is missing in no."),
        ("a.txt", b"a", ["--model", "none"], "[load] no directory none"),
        ("a.jsonl", b'{"text": "a"}\n{"a": 1}', [], 'a JSON object with a "text" on every line'),
        ("a.jsonl", b"[1]", [], "every line but line 1 holds none."),
        ("a.jsonl", b'\n{"text": "\\ud800"}', [], "every line but line 2 holds none."),
        ("a.jsonl", b'{"text": 3}', [], "every line but line 1 holds none."),
        ("a.jsonl", b"{" * 99999, [], "every line but line 1 holds none."),
        ("a.jsonl", b'{"text": "a"}', ["--separator", "b"], "has a document a line."),
    ],
)
def test_mistake_is_one_line(run, tmp_path, name, data, argv, wanted):
    (tmp_path / name).write_bytes(data)
    code, out, err = run(name, *argv)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and wanted in err and err.count("\n") == 1


def test_the_bundled_model_by_whole_documents():
    model, tokenizer = load()
    texts = ["Once upon a time there was a dog.\n\nHe slept.", "Tom ran. “Yes!” said Mom."]
    nats = 0.0
    for text in texts:
        ids = mx.array([*tokenizer.encode(text), tokenizer.eos_token_id])
        nats += nn.losses.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="sum").item()
    got = score(model, tokenizer, documents(iter(["<|>".join(texts)]), "a.txt", "<|>"))
    assert got.bits_per_character == pytest.approx(
        nats / math.log(2) / sum(map(len, texts)), rel=1e-5
    )
