"""Every command of mlx-lm runs on a converted directory, typed as a user types it."""

import json
import math
import re
import sys
import urllib.request
from http.server import ThreadingHTTPServer
from importlib import import_module
from threading import Thread

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import oracle
import tiny
from converting import TOKENS, WIDE, convert
from mlx_mcsd.loading import load

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
PROMPT = "a b ab"
COUNT = 6


@pytest.fixture(scope="module", params=[[], ["-q", "--q-group-size", "32"]], ids=["float", "4-bit"])
def directory(request, tmp_path_factory):
    """A converted model, as it is and quantized."""
    here = tmp_path_factory.mktemp("commands")
    source = here / "source"
    # Ids beyond the tokenizer's have no text in mlx-lm; bytes would be hard to compare.
    config, tensors = tiny.write_model(source, **WIDE, vocab_size=len(tiny.PIECES))
    letters = [piece.strip("▁") in ("a", "b", "") for piece in tiny.PIECES]
    tensors["lm_head.weight"][~np.array(letters)] = 0
    oracle.write_checkpoint(source, config, tensors)
    tiny.write_tokenizer(source, eos_token="</s>", chat_template=TEMPLATE)
    convert(source, here / "model", *request.param)
    return here / "model"


@pytest.fixture(scope="module")
def loaded(directory):
    return load(directory)


@pytest.fixture
def command(directory, monkeypatch):
    """Run the `main` of a command on the model, with more arguments."""

    def run(name, *flags):
        argv = [name, "--model", directory, "--trust-remote-code", *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        import_module(f"mlx_lm.{name}").main()

    return run


@pytest.fixture
def texts(tmp_path):
    """Data to train on, in mlx-lm's format."""
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        lines = [json.dumps({"text": f"a b {word} a"}) for word in ("a", "b", "ab", "ba", "b b")]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path / "data"


def continuation(loaded, prompt=PROMPT, special=True):
    """What greedy decoding must answer, the whole text anew for each token."""
    model, tokenizer = loaded
    tokens = tokenizer.encode(prompt, add_special_tokens=special)
    start = len(tokens)
    for _ in range(COUNT):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
    text = tokenizer.decode(tokens[start:])
    assert len(set(text)) > 1 and text.isprintable()
    return text


def between_rules(text):
    """What `generate` prints between its two lines of equals signs."""
    return text.split("==========\n")[1].removesuffix("\n")


def test_generate(command, loaded, capsys):
    command("generate", "--prompt", PROMPT, "--max-tokens", COUNT)
    assert between_rules(capsys.readouterr().out) == continuation(loaded, special=False)


def test_chat(command, loaded, capsys, monkeypatch):
    """Two turns, the second after a reset, then out."""
    said = iter([PROMPT, "r", PROMPT, "q"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    command("chat", "--max-tokens", COUNT)
    shown = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", capsys.readouterr().out)
    assert shown.count(continuation(loaded, special=False)) == 2


@pytest.mark.filterwarnings("ignore:mlx_lm.server is not recommended")
def test_server(command, loaded, monkeypatch):
    """A completion over HTTP, asked from inside the loop that would wait for ever."""
    serve, answers = ThreadingHTTPServer.serve_forever, []

    def ask(httpd):
        thread = Thread(target=serve, args=(httpd,))
        thread.start()
        body = {"model": "default_model", "prompt": PROMPT, "max_tokens": COUNT, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{httpd.server_address[1]}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answers.append(json.load(response))
        finally:
            httpd.shutdown()
            httpd.server_close()
            thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", ask)
    command("server", "--port", 0)
    (answer,) = answers
    assert answer["choices"][0]["text"] == continuation(loaded)
    assert answer["usage"]["completion_tokens"] == COUNT


def test_convert_again(command, directory, loaded, tmp_path):
    """mlx-lm's own conversion of the result, dequantized where it was quantized: the same model."""
    again = tmp_path / "again"
    config = json.loads((directory / "config.json").read_text())
    flags = ["-d"] if "quantization" in config else []
    command("convert", "--mlx-path", again, "--dtype", "float32", *flags)
    # Dequantized weights are those that the products use, in another order of summing.
    assert oracle.relative_error(load(again)[0](TOKENS), loaded[0](TOKENS)) <= 1e-5


def test_benchmark(command, capsys):
    command("benchmark", "-p", 8, "-g", 4, "-n", 1)
    averages = capsys.readouterr().out.splitlines()[-1]
    numbers = dict(part.split("=") for part in averages.removeprefix("Averages: ").split(", "))
    assert all(float(numbers[key]) > 0 for key in ("prompt_tps", "generation_tps"))


def test_perplexity(command, loaded, texts, capsys, monkeypatch):
    """Of a local data set: e to the mean loss of the rows of ids that mlx-lm cuts."""
    pytest.importorskip("datasets")
    from mlx_lm.perplexity import load_data

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", texts.parent / "cache")
    flags = ["--data-path", texts, "--num-samples", 2, "--sequence-length", 8]
    command("perplexity", *flags, "--batch-size", 2)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("Perplexity: "))
    np.random.seed(123)
    rows = load_data(loaded[1], str(texts), 2, 8)
    losses = nn.losses.cross_entropy(loaded[0](rows[:, :-1]), rows[:, 1:])
    assert float(line.split()[1]) == pytest.approx(math.exp(losses.mean().item()), rel=1e-4)


def test_cache_prompt(command, loaded, tmp_path, capsys):
    """A prompt's state saved by one command, continued by another."""
    cache = tmp_path / "cache.safetensors"
    command("cache_prompt", "--prompt", "a b", "--prompt-cache-file", cache)
    flags = ["--prompt-cache-file", cache, "--max-tokens", COUNT]
    capsys.readouterr()
    command("generate", "--prompt", " ab", *flags)
    assert between_rules(capsys.readouterr().out) == continuation(loaded, special=False)
