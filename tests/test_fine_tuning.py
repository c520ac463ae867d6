"""Fine-tuning with mlx-lm: what is adapted, what padding does, and what becomes of the result."""

import io
import json
import os
import re
import sys
import types
from importlib import import_module
from itertools import islice
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import yaml
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.datasets import CacheDataset, load_local_dataset
from mlx_lm.tuner.trainer import default_loss, iterate_batches

import oracle
import tiny
from mlx_mcsd import chat, generate
from mlx_mcsd.convert.__main__ import main as convert
from mlx_mcsd.loading import load, load_adapters, resolve
from models import mlx_model, random_tokens, torch_model
from oracle import random_checkpoint, relative_error
from test_sharding import run_ranks

SETTINGS = Path(__file__).resolve().parent.parent / "examples" / "lora.yaml"
WIDE = {"hidden_size": 64, "num_channels": 2, "intermediate_size": 64}
SIZED = {"projection": "dense", "fusion": "concat", "output_projection": True}  # as in the paper
QUANTIZED = ["-q", "--q-group-size", "32"]
PROMPT, COUNT = "a b", 8
TOKENS = mx.array(random_tokens(0, 2, 9))
PARTS = ("weight", "scales", "biases")  # of a quantized matrix
K = len(tiny.PIECES)


def run(monkeypatch, name, *flags):
    """Run a command of mlx-lm as it is typed."""
    words = [name, *flags, "--trust-remote-code"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    import_module(f"mlx_lm.{name}").main()


def write_rows(directory, rows, names=("train", "valid", "test")):
    """Data in mlx-lm's format."""
    directory.mkdir()
    lines = [json.dumps({"text": text}) for text in rows]
    for name in names:
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(
        tmp_path_factory.mktemp("texts") / "data", ["a b a", "b", "a a b b a b", "a b"]
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Makes converted models that write letters, once each, by their projection and packing."""
    made = {}

    def base(projection, quantized):
        if (projection, quantized) not in made:
            here = tmp_path_factory.mktemp(projection)
            shape = SIZED if projection == "dense" else {"projection": projection}
            config, tensors = tiny.write_model(here / "hf", **WIDE, **shape, vocab_size=K)
            letters = [piece.strip("▁") in ("a", "b", "") for piece in tiny.PIECES]
            tensors["lm_head.weight"][~np.array(letters)] = 0
            oracle.write_checkpoint(here / "hf", config, tensors)
            tiny.write_tokenizer(here / "hf", eos_token="</s>")
            flags = ["--hf-path", here / "hf", "--mlx-path", here / "mlx", "--no-verify"]
            convert([str(word) for word in [*flags, *(QUANTIZED if quantized else [])]])
            made[projection, quantized] = here / "mlx"
        return made[projection, quantized]

    return base


EVERY = {"mixer.uvef_proj", "mlp.gate_up_proj", "mlp.down_proj"}
KINDS = [
    pytest.param(*case, id="-".join(case[:2]) + ("-4bit" if case[2] else ""))
    for case in [
        ("lora", "dense", False, EVERY | {"mixer.o_proj"}),
        ("lora", "dense", True, EVERY | {"mixer.o_proj"}),
        ("lora", "channel", False, EVERY),
        ("lora", "channel", True, EVERY),
        ("dora", "dense", False, EVERY | {"mixer.o_proj"}),
        ("dora", "dense", True, EVERY | {"mixer.o_proj"}),
        ("dora", "channel", False, EVERY - {"mixer.uvef_proj"}),
        ("full", "dense", False, None),
        ("full", "channel", False, None),
    ]
]


def settings_for(kind, projection, tmp_path):
    """The example's settings; dora leaves out what it does not know, as the file says."""
    settings = yaml.safe_load(SETTINGS.read_text())
    if kind == "dora" and projection == "channel":
        settings["lora_parameters"]["keys"].remove("mixer.uvef_proj")
    file = tmp_path / "lora.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def text_after(capsys, model, *flags):
    """What our command says, greedily."""
    capsys.readouterr()
    words = ["--model", model, "--prompt", PROMPT, "--max-tokens", COUNT, "--temp", "0", *flags]
    generate.main([*map(str, words), "--verbose", "false"])
    return capsys.readouterr().out.removesuffix("\n")


def continuation(model, tokenizer):
    """What greedy decoding must say, the whole text anew for each token."""
    tokens = tokenizer.encode(PROMPT)
    for _ in range(COUNT):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
    return tokenizer.decode(tokens[-COUNT:], skip_special_tokens=True)


def tensors_of(directory):
    """What a directory holds, by the names it has at run time."""
    return dict(tree_flatten(load(directory)[0].parameters()))


@pytest.mark.parametrize("kind, projection, quantized, adapted_layers", KINDS)
def test_adapted_and_fused(
    bases, data, tmp_path, monkeypatch, capsys, kind, projection, quantized, adapted_layers
):
    """Trained by the example's settings, run, fused, taken to PyTorch: one model all along."""
    base, adapters, fused = bases(projection, quantized), tmp_path / "adapters", tmp_path / "fused"
    flags = ["--model", base, "--data", data, "--adapter-path", adapters, "--fine-tune-type", kind]
    flags += ["-c", settings_for(kind, projection, tmp_path), "--train", "--iters", 2]
    run(monkeypatch, "lora", *flags, "--learning-rate", 1e-2, "--batch-size", 2)

    plain, tokenizer = load(base)
    model, _ = load(base)
    load_adapters(model, adapters)
    logits = model(TOKENS)
    assert relative_error(logits, plain(TOKENS)) > 1e-2
    trained = [name.split(".", 3) for name in mx.load(str(adapters / "adapters.safetensors"))]
    assert {layer for _, _, layer, _ in trained} == {"0", "1"}
    if adapted_layers:
        assert {rest.rpartition(".")[0] for *_, rest in trained} == adapted_layers

    said = continuation(model, tokenizer)
    assert text_after(capsys, base, "--adapter-path", adapters) == said

    which = ["--model", base, "--adapter-path", adapters]
    wide = ["--dequantize"] if quantized else []
    run(monkeypatch, "fuse", *which, *wide, "--save-path", fused)
    assert relative_error(load(fused)[0](TOKENS), logits) <= 1e-5
    assert text_after(capsys, fused) == said
    convert(["--reverse", "--mlx-path", str(fused), "--hf-path", str(tmp_path / "hf")])
    import torch

    with torch.no_grad():
        theirs = torch_model(tmp_path / "hf")(torch.tensor(np.array(TOKENS))).logits.numpy()
    assert relative_error(theirs, logits) <= 1e-5

    if quantized:  # without --dequantize: every adapted matrix is rounded again, no other
        again = tmp_path / "again"
        run(monkeypatch, "fuse", *which, "--save-path", again)
        got, before, whole = map(tensors_of, (again, base, fused))
        for name, value in got.items():
            layer, _, kind = name.rpartition(".")
            if adapted := any(layer.endswith(key) for key in adapted_layers):
                parts = dict(zip(PARTS, mx.quantize(whole[f"{layer}.weight"], 32, 4), strict=True))
            assert mx.array_equal(value, parts[kind] if adapted else before[name]), name


def test_a_chat_with_adapters(bases, data, tmp_path, monkeypatch, capsys):
    """The other commands load them the same way."""
    base, adapters = bases("channel", False), tmp_path / "adapters"
    flags = ["-c", SETTINGS, "--model", base, "--data", data, "--adapter-path", adapters]
    run(monkeypatch, "lora", *flags, "--train", "--iters", 1, "--batch-size", 1)
    expected = text_after(capsys, base, "--adapter-path", adapters)
    assert expected != text_after(capsys, base)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n"))
    words = ["--model", base, "--adapter-path", adapters, "--max-tokens", COUNT, "--temp", 0]
    chat.main([str(word) for word in words])
    assert capsys.readouterr().out.strip() == expected.strip()


def test_padding_is_no_part_of_the_loss():
    """A padded batch: the mean over the tokens of its rows alone, and so is the gradient.

    mlx-lm wants one padding token predicted behind each row that is not cut: part of "alone" here.
    """
    model = mlx_model(*random_checkpoint(0))
    texts = [(list(random_tokens(i, length)), 0) for i, length in enumerate((3, 30, 9))]
    ((batch, lengths),) = iterate_batches(texts, batch_size=3, max_seq_length=64)
    assert batch.shape == (3, 33) and sorted(lengths[:, 1].tolist()) == [3, 9, 30]
    grad = nn.value_and_grad(model, default_loss)
    (loss, count), grads = grad(model, batch, lengths)

    total, summed = 0.0, None
    for row, (_, length) in zip(batch, lengths.tolist(), strict=True):
        alone = grad(model, row[None, : length + 1], mx.array([[0, length]]))
        (value, tokens), theirs = alone
        assert tokens.item() == length
        total += value * length
        theirs = tree_map(lambda g, n=length: g * n, theirs)
        summed = theirs if summed is None else tree_map(mx.add, summed, theirs)
    assert count.item() == 42
    assert relative_error(loss, total / 42) <= 1e-5
    want = dict(tree_flatten(summed))
    for name, value in tree_flatten(grads):
        assert relative_error(np.array(value), np.array(want[name] / 42)) <= 1e-5, name


def test_nothing_leaks_between_rows():
    """Other padding and other neighbours: the same numbers to the bit."""
    model = mlx_model(*random_checkpoint(0))
    batch = mx.array(random_tokens(0, 3, 33))
    lengths = mx.array([[0, 9], [0, 30], [0, 0]])
    behind = mx.arange(33) > lengths[:, 1:]  # the token at the length itself is a target
    other = mx.where(behind, 5, batch)
    first, second = (default_loss(model, b, lengths)[0] for b in (batch, other))
    assert first.item() == second.item()
    changed = mx.concatenate([batch[:1], (batch[1:] + 1) % 48])
    assert mx.array_equal(model(batch)[0], model(changed)[0])
    assert not mx.array_equal(model(batch)[1], model(changed)[1])


def test_two_processes_train_as_one(bases, tmp_path, monkeypatch, capsys):
    """Data parallel over the ring: the same adapters, where every row has as many tokens."""
    data = write_rows(tmp_path / "data", ["a b a b", "b a a b", "b b b a", "a a b b"])
    flags = ["-c", SETTINGS, "--model", bases("dense", False), "--data", data, "--train"]
    flags += ["--iters", 2, "--optimizer", "sgd", "--steps-per-report", 1, "--val-batches", 1]
    run(monkeypatch, "lora", *flags, "--adapter-path", tmp_path / "one")
    alone = capsys.readouterr().out
    words = ["lora", *flags, "--adapter-path", tmp_path / "two", "--trust-remote-code"]
    shared, silent = run_ranks(tmp_path, 2, "-m", "mlx_lm", *map(str, words))
    assert "val" not in silent, "the first process prints"
    one, two = (re.findall(r"^ +\d+ +(?:val)? *([\d.]+)", plain(t), re.M) for t in (alone, shared))
    assert one == two and len(one) == 4, "two validations and two steps"
    assert float(one[-1]) < float(one[0])
    one, two = (mx.load(str(tmp_path / n / "adapters.safetensors")) for n in ("one", "two"))
    for name, value in one.items():
        assert relative_error(np.array(two[name]), np.array(value)) <= 1e-5, name


def plain(text):
    """Printed text without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_the_bundled_model_learns(tmp_path, monkeypatch, capsys):
    """The page's example, shortened: rows of questions and SQL, of which it knew nothing."""
    data = tmp_path / "data"
    folder = Path(os.environ.get("MLX_MCSD_DATA") or SETTINGS.parents[2] / "shared" / "data")
    if (theirs := folder / "chat_data" / "lora_wikisql").is_dir():
        lines = (theirs / "train.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines[:80]]
        rows = [text.partition("\nQ: ")[2] for text in texts]
    else:
        rows = [f"How old is {name}?\nA: SELECT age WHERE name = '{name}'" for name in NAMES]
    write_rows(data, sorted(rows, key=len)[:12])
    words = ["--hf-path", resolve(), "--mlx-path", tmp_path / "base", "--dtype", "float32"]
    convert([*map(str, words), "--no-verify"])
    flags = ["-c", SETTINGS, "--model", tmp_path / "base", "--data", data, "--val-batches", 1]
    flags += ["--iters", 6, "--batch-size", 2, "--max-seq-length", 33, "--train"]
    run(monkeypatch, "lora", *flags, "--adapter-path", tmp_path / "adapters")
    said = plain(capsys.readouterr().out)
    before, after = (float(x) for x in re.findall(r"val +([\d.]+)", said))
    assert after < before - 0.5

    # What the adapters are worth is there in our own loading, too.
    model, tokenizer = load(tmp_path / "base")
    rows = load_local_dataset(data, tokenizer, types.SimpleNamespace())[1]
    batches = list(islice(iterate_batches(CacheDataset(rows), 2, 33), 2))

    def loss():
        return np.mean([default_loss(model, *batch)[0].item() for batch in batches])

    plainly = loss()
    load_adapters(model, tmp_path / "adapters")
    assert loss() < plainly - 0.5


NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jo", "Kim", "Leo"]
