"""The model file for mlx-lm: written from our own, alike in every variant, and at home there."""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import models
import oracle
import tiny
from mlx_mcsd.convert.pipeline import convert

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "mlx_lm_model.py"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """What the script writes."""
    file = tmp_path_factory.mktemp("written") / "mcsd.py"
    subprocess.run([sys.executable, SCRIPT, file], check=True)
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def module(text, tmp_path_factory):
    """The file as a module of mlx-lm's models."""
    file = tmp_path_factory.mktemp("module") / "mcsd.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mlx_lm.models.mcsd_written", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_it_stands_alone(text):
    """It imports MLX, its neighbours in mlx-lm and the standard library, and says so again."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + node.module)
    standard = {"math", "dataclasses", "functools", "typing"}
    assert found == standard | {"mlx", ".base", ".cache", ".switch_layers"}
    assert "mlx_mcsd" not in text and "MCSDError" not in text and "check_scan" not in text
    printed = subprocess.run([sys.executable, SCRIPT], capture_output=True, check=True)
    assert printed.stdout.decode() == text


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_it_is_our_model(module, variant, tied):
    """Logits of every variant, at once, one by one, in pieces, and of unequal rows in a batch."""
    config, tensors = oracle.random_checkpoint(3, **variant, tie_word_embeddings=tied)
    ours = models.mlx_model(config, tensors)
    args = module.ModelArgs.from_dict(config)
    theirs = module.Model(args)
    weights = theirs.sanitize({name: mx.array(value) for name, value in tensors.items()})
    theirs.load_weights(list(weights.items()), strict=True)
    tokens = models.random_tokens(0, 2, 70)
    want = models.run(ours, tokens)
    for splits in (None, [(0, 1), (1, 3), (3, 68), (68, 69), (69, 70)]):
        assert oracle.relative_error(models.run(theirs, tokens, splits), want) <= 1e-5
    rows = []
    for model in (ours, theirs):
        cache = model.make_cache()
        for c in cache:
            c.prepare(lengths=[70, 9])
        model(mx.array(tokens), cache=cache)
        for c in cache:
            c.finalize()
        rows.append(np.array(model(mx.array([[1], [2]]), cache=cache)))
    assert oracle.relative_error(rows[1], rows[0]) <= 1e-5


@pytest.mark.parametrize("change", [{"hidden_size": 10, "num_channels": 3}, {"num_channels": 21}])
def test_it_refuses_what_it_cannot_be(module, change):
    config, _ = oracle.random_checkpoint(3)
    with pytest.raises(ValueError, match="must be"):
        module.ModelArgs.from_dict(config | {"hidden_size": 42} | change)


COMMANDS = """
import json, runpy, sys
from importlib import import_module
import mlx_lm
assert sys.argv[1] in mlx_lm.__file__, mlx_lm.__file__
for name, *argv in json.loads(sys.argv[2]):
    sys.argv = [name, *argv]
    print("#", name)
    import_module(f"mlx_lm.{name}").main()
assert "mlx_mcsd" not in sys.modules
"""


def test_at_home_in_mlx_lm(text, tmp_path):
    """A converted model in a copy of mlx-lm, no code trusted: every kind of command."""
    shutil.copytree(
        Path(mlx_lm.__file__).parent,
        tmp_path / "site" / "mlx_lm",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (tmp_path / "site" / "mlx_lm" / "models" / "mcsd.py").write_text(text, encoding="utf-8")
    widths = {"hidden_size": 64, "intermediate_size": 64, "num_channels": 2}
    source, small, data = (str(tmp_path / name) for name in ("converted", "small", "data"))
    tiny.write_model(tmp_path / "source", **widths)
    tiny.write_tokenizer(tmp_path / "source", eos_token="</s>")
    convert(tmp_path / "source", source, model_file=False, verification=False)
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        lines = "\n".join(json.dumps({"text": f"a b {x}"}) for x in ("a", "b", "ab"))
        (tmp_path / "data" / f"{name}.jsonl").write_text(lines)
    prompt = ["--prompt", "a b", "--max-tokens", "4"]
    adapters = ["--adapter-path", str(tmp_path / "adapters")]
    training = ["--train", "--iters", "1", "--batch-size", "1", "--val-batches", "1"]
    commands = [
        ["generate", "--model", source, *prompt],
        ["convert", "--model", source, "--mlx-path", small, "-q", "--q-group-size", "32"],
        ["lora", "--model", small, "--data", data, *adapters, "--num-layers", "2", *training],
        ["generate", "--model", small, *adapters, *prompt],
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(tmp_path), json.dumps(commands)],
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "", "MLX_DISABLE_COMPILE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = done.stdout.split("# generate\n")
    assert len(outputs) == 3 and outputs[1].count("==========") == 2
    # The first text is what our own model says.
    from mlx_mcsd.loading import load

    model, tokenizer = load(source)
    tokens = tokenizer.encode("a b")
    start = len(tokens)
    for _ in range(4):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
    said = outputs[1].split("==========\n")[1]
    assert said.strip() == tokenizer.decode(tokens[start:]).strip()
