"""The converter: what it writes is exactly the source."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import sentencepiece
from safetensors import safe_open
from safetensors.numpy import load_file

import oracle
import tiny
from converting import TOKENS, convert, edit_json, main, parameters, same
from mlx_mcsd.loading import load, load_model
from mlx_mcsd.tokenizer import train_sentencepiece

# --- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_round_trip(tmp_path, target, variant, capsys):
    """Every variant: logits of the converted model are those of the source, to the bit."""
    source = oracle.write_checkpoint(tmp_path / "source", *oracle.random_checkpoint(1, **variant))
    convert(source, target)
    assert same(load_model(source)(TOKENS), load_model(target)(TOKENS))
    # No tokenizer: one warning, and nothing else on stderr.
    assert capsys.readouterr().err == (
        f"warning: converting without a tokenizer: no tokenizer.json and no tokenizer.model in "
        f"{source}.\n"
    )


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


def test_without_a_model_file(source, target):
    """For an mlx-lm that has the model: nothing to import from, and the card says so."""
    edit_json(source / "config.json", model_file="evil.py")
    convert(source, target, "--no-model-file")
    assert not list(target.glob("*.py"))
    assert "model_file" not in json.loads((target / "config.json").read_text())
    card = (target / "README.md").read_text()
    assert "--no-model-file" in card and "trust-remote-code" not in card
    load(target)


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


def test_tokenizer_from_default_sentencepiece(source, target):
    """So does one with SentencePiece's own settings, and what its tokenizer_config.json says."""
    proto = tiny.train_spm(vocab_size=80, user_defined_symbols=["<|user|>"])
    only_sentencepiece(source, proto)
    edit_json(source / "tokenizer_config.json", eos_token="<|user|>", add_bos_token=False)
    convert(source, target)
    _, tokenizer = load(target)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert tokenizer.encode(TEXT) == processor.encode(TEXT)
    assert tokenizer.eos_token_ids == {processor.piece_to_id("<|user|>")}


@pytest.mark.parametrize(
    "proto, reason",
    [
        (lambda: b"junk", "must be a SentencePiece model"),
        (lambda: b"", "must be a SentencePiece model"),
        (lambda: tiny.train_spm(vocab_size=80, user_defined_symbols=["  "]), "disagree on"),
        (
            lambda: train_sentencepiece([TEXT] * 3, 280),
            "vocabulary is smaller than the tokenizer's",
        ),
    ],
    ids=["junk", "empty", "other ids", "large"],
)
def test_tokenizer_that_does_not_do(source, target, proto, reason, capsys):
    """A tokenizer that cannot be had as it is, is refused, and nothing is written."""
    only_sentencepiece(source, proto())
    with pytest.raises(SystemExit):
        convert(source, target)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line
    assert not target.exists()


def test_tokenizer_with_a_mind_of_its_own(source, target, capsys):
    """A class of transformers that makes other ids of a tokenizer.json is pointed out."""
    edit_json(source / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", unk_token="<unk>")
    convert(source, target, "--verify")
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: "))
    assert "as transformers loads it differs from its tokenizer.json on 'Once upon" in line
    assert "at token 0 it gives [" in line and "set tokenizer_class to TokenizersBackend" in line
    assert load(target)[1].encode("a b") == load(source)[1].encode("a b")


def test_no_tokenizer(source, target, capsys):
    """Without tokenizer.json and tokenizer.model a warning says so; the rest is not taken over."""
    (source / "tokenizer.json").unlink()
    convert(source, target)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: converting without a tokenizer: ") and str(source) in line
    assert not list(target.glob("*token*"))
    model, tokenizer = load(target)
    assert tokenizer is None
    assert same(model(TOKENS), load_model(source)(TOKENS))


def test_verified(source, target, capsys):
    """The comparison is printed, and on the card."""
    convert(source, target, "--verify", "-q", "--q-group-size", "32")
    sentence = capsys.readouterr().out.splitlines()[-1]
    assert sentence.startswith("Verified: over 144 tokens the logits differ from those of the")
    assert sentence in (target / "README.md").read_text()


def test_not_verified(source, target, monkeypatch, capsys):
    """Nothing is written where the comparison fails; without PyTorch a line says so, or refuses."""
    from mlx_mcsd.convert import verify

    monkeypatch.setattr(verify, "TOLERANCE", 1e-9)
    with pytest.raises(SystemExit):
        convert(source, target, "--verify")
    assert "[verify] the logits of the result must be the source's" in capsys.readouterr().err
    assert [path.name for path in target.parent.iterdir()] == ["source"]
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        convert(source, target, "--verify")
    assert "PyTorch and transformers are not installed" in capsys.readouterr().err
    main(["--hf-path", str(source), "--mlx-path", str(target)])
    assert "[INFO] Not verified: PyTorch and transformers are" in capsys.readouterr().out
    assert "Verified" not in (target / "README.md").read_text()


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
    assert done.stdout.startswith(f"Wrote {target}: 23 tensors fill 15 parameters, 88,512 numbers")
    assert len(done.stdout.splitlines()) == 2
    assert done.stdout.splitlines()[1].startswith("Verified: ")
    assert same(load_model(source)(TOKENS), load_model(Path(target))(TOKENS))
