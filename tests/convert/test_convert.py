"""The converter: what it writes is exactly the source."""

import json
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import sentencepiece
from safetensors import safe_open
from safetensors.numpy import load_file

import oracle
import tiny
from converting import TOKENS, WIDE, convert, edit_json, parameters, same
from mlx_mcsd.convert import mapping
from mlx_mcsd.loading import load, load_model
from mlx_mcsd.tokenizer import train_sentencepiece
from models import mlx_model

# --- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_round_trip(tmp_path, target, variant, capsys):
    """Every variant: logits of the converted model are those of the source, to the bit."""
    source = oracle.write_checkpoint(tmp_path / "source", *oracle.random_checkpoint(1, **variant))
    convert(source, target)
    assert same(load_model(source)(TOKENS), load_model(target)(TOKENS))
    # No tokenizer: one warning, and nothing else on stderr.
    assert capsys.readouterr().err == (
        f"warning: converting without a tokenizer: no tokenizer.json in {source}.\n"
    )


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_table_of_names(variant, tied):
    """Every tensor is in one row; it goes where `sanitize` takes it; every parameter is filled."""
    config, tensors = oracle.random_checkpoint(1, **variant, tie_word_embeddings=tied)
    model = mlx_model(config, tensors)
    wanted = parameters(model)
    filled = {}
    for name in tensors:
        assert sum(bool(re.fullmatch(pattern, name)) for pattern in mapping.TABLE) == 1
        filled.setdefault(mapping.destination(name, wanted), []).append(name)
    assert filled.keys() == wanted.keys()
    for place, names in filled.items():
        assert model.sanitize({name: mx.array(tensors[name]) for name in names}).keys() == {place}
    assert {name: mapping.destination(name, wanted) for name in wanted} == {n: n for n in wanted}
    assert mapping.destination("lm_head.weight", wanted) == (
        "model.embed_tokens.weight" if tied else "lm_head.weight"
    )


@pytest.mark.parametrize(
    "name",
    [
        "xmodel.norm.weight",
        "model.norm.weight.old",
        "model.norm.weight\n",
        "modelXnorm.weight",
        "model.layers.0.mixer.x_proj.weight",
        "model.layers.0.mixer.u_proj.bias",
        "model.layers.9.mixer.u_proj.weight",
        "model.layers.-1.mixer.u_proj.weight",
    ],
    ids=repr,
)
def test_table_is_anchored(name):
    """A name that only contains, or only resembles, one of the table has no place."""
    wanted = parameters(mlx_model(*oracle.random_checkpoint(1)))
    assert mapping.destination(name, wanted) is None


def test_names(source, target):
    """Matrices that read the same input are rows of one: U, V, E, F and gate, up."""
    convert(source, target)
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    layer = "model.layers.1"
    uvef = [before[f"{layer}.mixer.{p}_proj.weight"] for p in "uvef"]
    gate_up = [before[f"{layer}.mlp.{p}_proj.weight"] for p in ("gate", "up")]
    # (C, Dc, Dc) side by side in every channel; (F, D) one below the other.
    assert np.array_equal(after[f"{layer}.mixer.uvef_proj.weight"], np.concatenate(uvef, 1))
    assert np.array_equal(after[f"{layer}.mlp.gate_up_proj.weight"], np.concatenate(gate_up, 0))
    kept = before.keys() & after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in kept)
    assert len(kept) == len(before) - 2 * 6 == len(after) - 2 * 2


def test_files(source, target):
    """The files beside the weights: shim, index, config, card; the tokenizer byte for byte."""
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "LICENSE").write_text("yours")
    edit_json(source / "config.json", auto_map={"AutoConfig": "c.C"}, torch_dtype=None)
    convert(source, target, "--dtype", "float16")
    copied = {"chat_template.jinja", "generation_config.json", "LICENSE"}
    copied |= {"tokenizer.json", "tokenizer_config.json"}
    written = {"config.json", "model.safetensors", "model.safetensors.index.json"}
    assert {f.name for f in target.iterdir()} == copied | written | {"README.md", "mcsd.py"}
    assert all((source / f).read_bytes() == (target / f).read_bytes() for f in copied)

    shim = (target / "mcsd.py").read_text()
    assert shim.startswith("from mlx_mcsd.model import Model, ModelArgs")
    assert len(shim.splitlines()) == 1
    config = json.loads((target / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert config["model_file"] == "mcsd.py"
    assert "auto_map" not in config
    with safe_open(target / "model.safetensors", "numpy") as weights:
        assert weights.metadata() == {"format": "mlx"}
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == dict.fromkeys(weights.keys(), "model.safetensors")
    card = (target / "README.md").read_text()
    assert "--hf-path source --mlx-path target --dtype float16" in card
    assert str(source.parent) not in card


TEXT = "a dog ran.\n\n  Then it slept."


def only_sentencepiece(source, proto):
    """Replace the `tokenizer.json` of a source by a `tokenizer.model`."""
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(proto)


def test_tokenizer_from_sentencepiece(tmp_path, target, capsys):
    """A lossless tokenizer.model alone becomes a tokenizer that loads, with the same ids."""
    source = tmp_path / "source"
    tiny.write_model(source, vocab_size=300)
    proto = train_sentencepiece([TEXT] * 3, 280)
    only_sentencepiece(source, proto)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    convert(source, target)
    assert capsys.readouterr().err == ""
    _, tokenizer = load(target)
    ids = sentencepiece.SentencePieceProcessor(model_proto=proto).encode(TEXT)
    assert tokenizer.encode(TEXT, add_special_tokens=False) == ids
    assert (target / "tokenizer.model").read_bytes() == proto
    chat = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "a!"


@pytest.mark.parametrize(
    "proto, reason",
    [
        (lambda: b"junk", "must be a SentencePiece model"),
        (lambda: b"", "must be a SentencePiece model"),
        (
            lambda: train_sentencepiece([TEXT] * 3, 280),
            "vocabulary is smaller than the tokenizer's",
        ),
        (None, "no tokenizer.json in"),
    ],
    ids=["junk", "lossy", "large", "only its config"],
)
def test_tokenizer_that_does_not_do(source, target, proto, reason, capsys):
    """No tokenizer file is taken over, one line says why, and the result loads without."""
    if proto is None:
        (source / "tokenizer.json").unlink()
    else:
        only_sentencepiece(source, proto())
    convert(source, target)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: converting without a tokenizer: ")
    assert reason in line and str(source) in line
    assert not list(target.glob("*token*"))
    model, tokenizer = load(target)
    assert tokenizer is None
    assert same(model(TOKENS), load_model(source)(TOKENS))


def test_converting_again_changes_nothing(source, target):
    """A source in run-time names converts to the same bytes."""
    convert(source, target)
    again = target.with_name("again")
    convert(target, again)
    assert (again / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(source, target, dtype):
    """Every weight is the source's, rounded once."""
    convert(source, target, "--dtype", dtype)
    want = parameters(load_model(source, dtype=getattr(mx, dtype)))
    got = mx.load(str(target / "model.safetensors"))
    assert got.keys() == want.keys()
    assert all(same(got[name], want[name]) for name in want)


def test_dtype_of_the_source_is_kept(source, target):
    """bfloat16 stays bfloat16, whatever the config calls it."""
    file = str(source / "model.safetensors")
    mx.save_safetensors(file, {k: v.astype(mx.bfloat16) for k, v in mx.load(file).items()})
    convert(source, target)
    got = mx.load(str(target / "model.safetensors"))
    assert {v.dtype for v in got.values()} == {mx.bfloat16}
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"


def test_float64_beside_bfloat16(source, target):
    """Types that MLX or NumPy cannot read arrive as the nearest MLX has, to the bit."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    numbers = load_file(source / "model.safetensors")
    types = {"model.norm.weight": torch.bfloat16, "lm_head.weight": torch.float16}
    tensors = {
        k: torch.tensor(v, dtype=torch.float64).to(types.get(k, torch.float64))
        for k, v in numbers.items()
    }
    save_torch(tensors, source / "model.safetensors")
    convert(source, target)
    got = mx.load(str(target / "model.safetensors"))
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp_norm.weight", *types):
        want = mx.array(tensors[name].float().numpy())
        assert same(got[name].astype(mx.float32), want), name
    assert got["model.embed_tokens.weight"].dtype == mx.float32
    assert got["model.norm.weight"].dtype == mx.bfloat16
    assert got["lm_head.weight"].dtype == mx.float16


def test_from_transformers(source, target):
    """What `save_pretrained` writes of the PyTorch reference, in shards, gives its logits."""
    torch = pytest.importorskip("torch")
    from mlx_mcsd.convert.reference.modeling_mcsd import MCSDForCausalLM

    reference = MCSDForCausalLM.from_pretrained(source).eval()
    saved = source.with_name("saved")
    reference.save_pretrained(saved, max_shard_size="40KB")
    tiny.write_tokenizer(saved)
    assert len(list(saved.glob("model-*.safetensors"))) > 2
    convert(saved, target)
    with torch.no_grad():
        want = reference(torch.tensor(np.array(TOKENS))).logits.numpy()
    model, tokenizer = load(target)
    assert oracle.relative_error(model(TOKENS), want) < 1e-5
    assert tokenizer.encode("a b") == load(source)[1].encode("a b")
    assert "auto_map" not in json.loads((target / "config.json").read_text())


def test_tied_head_may_be_stored(tmp_path, target):
    """A head that repeats the embedding it is tied to is left out."""
    source = tmp_path / "source"
    config, tensors = tiny.write_model(source, tie_word_embeddings=True)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    oracle.write_checkpoint(source, config, tensors | head)
    convert(source, target)
    assert "lm_head.weight" not in load_file(target / "model.safetensors")
    want = oracle.logits(config, tensors, np.array(TOKENS))
    assert oracle.relative_error(load_model(target)(TOKENS), want) < 1e-5


# --- quantization ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, settings",
    [
        pytest.param(["--q-group-size", "32"], {"bits": 4, "group_size": 32, "mode": "affine"}),
        pytest.param(["--q-bits", "8"], {"bits": 8, "group_size": 64, "mode": "affine"}),
        pytest.param(["--q-mode", "mxfp4"], {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
        pytest.param(["--q-mode", "nvfp4"], {"bits": 4, "group_size": 16, "mode": "nvfp4"}),
        pytest.param(["--q-mode", "mxfp8"], {"bits": 8, "group_size": 32, "mode": "mxfp8"}),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else None,
)
def test_quantize(source, target, flags, settings):
    """The directory holds what quantizing the source's model in memory gives, and loads."""
    convert(source, target, "-q", *flags)
    want = load_model(source)

    def divides(_, module):
        width = module.weight.shape[-1] if hasattr(module, "to_quantized") else 1
        return width % settings["group_size"] == 0

    nn.quantize(want, **settings, class_predicate=divides)
    want = parameters(want)
    assert any(name.endswith("uvef_proj.scales") for name in want) is (settings["group_size"] < 64)
    got = mx.load(str(target / "model.safetensors"))
    assert got.keys() == want.keys()
    assert all(same(got[name], want[name]) for name in want)
    config = json.loads((target / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == settings

    ours, _ = load(target)
    theirs, _ = mlx_lm.load(str(target), trust_remote_code=True)
    assert same(ours(TOKENS), theirs(TOKENS))


def test_unquantized_matrices_are_reported(tmp_path, target, capsys):
    """One line counts and names the matrices whose width is no multiple of the group."""
    source = tmp_path / "source"
    tiny.write_model(source, **WIDE, num_hidden_layers=1)
    convert(source, target, "-q", "--dtype", "float16")
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "stay float" in x)
    text, names = line.rsplit(": ", 1)
    assert text == "[INFO] 2 of 5 matrices stay float, their width being no multiple of 64"
    # Widths Dc = 32 and F = 96.
    odd = {"model.layers.0.mixer.uvef_proj", "model.layers.0.mlp.down_proj"}
    assert set(names.removesuffix(".").split(", ")) == odd
    weights = mx.load(str(target / "model.safetensors"))
    assert all(weights[f"{name}.weight"].dtype == mx.float16 for name in odd)
    assert weights["model.layers.0.mlp.gate_up_proj.weight"].dtype == mx.uint32
    assert weights["model.layers.0.mlp.gate_up_proj.scales"].dtype == mx.float16


def test_mlx_lm_loads_it(source, target):
    """mlx-lm runs the converted directory through the shim, tokenizer included."""
    convert(source, target)
    model, tokenizer = mlx_lm.load(str(target), trust_remote_code=True)
    assert same(model(TOKENS), load_model(source)(TOKENS))
    assert isinstance(mlx_lm.generate(model, tokenizer, "a b", max_tokens=3), str)


def test_nothing_of_the_source_is_executed(source, target):
    """Python files of a checkpoint are neither run nor carried on, whatever its config says."""
    marker = source / "executed"
    (source / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nModel = ModelArgs = C = T = None")
    edit_json(
        source / "config.json", model_file="evil.py", auto_map={"AutoModelForCausalLM": "evil.C"}
    )
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    convert(source, target)
    assert not marker.exists()
    assert [file.name for file in target.glob("*.py")] == ["mcsd.py"]


def test_command(root, source, target):
    """`python -m mlx_mcsd.convert` from the checkout, with warnings as errors."""
    command = [sys.executable, "-W", "error", "-m", "mlx_mcsd.convert"]
    command += ["--hf-path", source, "--mlx-path", target]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"Wrote {target}\n"
    assert same(load_model(source)(TOKENS), load_model(Path(target))(TOKENS))
