"""The converter: what it writes is exactly the source; what it refuses leaves nothing behind."""

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
from mlx.utils import tree_flatten
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import oracle
import tiny
from mlx_mcsd.convert import mapping, pipeline, writing
from mlx_mcsd.convert.__main__ import main, setup_arg_parser
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import load, load_model
from mlx_mcsd.mixers import base, mcsd
from mlx_mcsd.tokenizer import train_sentencepiece
from models import mlx_model

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_channels": 2}
"""Widths 64 and 32 take part in quantization by groups of 32."""

TOKENS = mx.array(np.random.default_rng(0).integers(0, 48, (2, 9)))


def convert(source, target, *flags):
    """Run the command in this process."""
    main(["--hf-path", str(source), "--mlx-path", str(target), *flags])


def edit_json(file, **changes):
    """Set keys of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def parameters(model):
    """Name -> array of everything that is saved."""
    return dict(tree_flatten(model.parameters()))


def same(a, b):
    """Equal in shape, type and every bit that counts."""
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b).item()


@pytest.fixture
def source(tmp_path):
    """A checkpoint with a tokenizer, two layers, widths that can be quantized."""
    tiny.write_model(tmp_path / "source", **WIDE)
    return tmp_path / "source"


@pytest.fixture
def target(tmp_path):
    """Where to convert to; nothing is there yet."""
    return tmp_path / "target"


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


def test_mixer_without_a_row(source, target, capsys, monkeypatch):
    """A mixer the table does not know is refused by name, although the model has a place for it."""

    class Biased(mcsd.MCSD):
        def __init__(self, args):
            super().__init__(args)
            self.gain = mx.zeros(1)

    monkeypatch.setitem(base._REGISTRY, "biased", Biased)
    edit_json(source / "config.json", mixer="biased")
    change(source, **{f"model__layers__{i}__mixer__gain": zeros(1) for i in range(2)})
    line = refused(capsys, "--hf-path", source, "--mlx-path", target)
    assert "table of names must have model.layers.0.mixer.gain" in line
    assert not target.exists()


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
        (lambda: b"junk", "Error parsing message"),
        (lambda: b"", "expected a SentencePiece BPE model"),
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


# --- what is refused ---------------------------------------------------------------------------


def weights_file(source):
    return source / "model.safetensors"


def cut(source):
    weights_file(source).write_bytes(weights_file(source).read_bytes()[:-5])


def shard(source, *, lose=()):
    """Split the weights over three files with an index, then lose some."""
    tensors = load_file(weights_file(source))
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, source / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    weights_file(source).unlink()
    for file in lose:
        (source / file).unlink()


def change(source, **tensors):
    """Set tensors by name, `__` for a dot; None removes one."""
    content = load_file(weights_file(source))
    content |= {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({k: v for k, v in content.items() if v is not None}, weights_file(source))


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


E_PROJ, U_PROJ = (
    "model__layers__1__mixer__e_proj__weight",
    "model__layers__0__mixer__u_proj__weight",
)

REFUSED = {
    "no config": (lambda s: (s / "config.json").unlink(), "config.json is missing"),
    "config no JSON": (lambda s: (s / "config.json").write_text("{"), "must hold JSON"),
    "config no object": (lambda s: (s / "config.json").write_text("[]"), "JSON object"),
    "unknown key": (lambda s: edit_json(s / "config.json", hiden_act="x"), "hiden_act"),
    "key missing": (lambda s: edit_json(s / "config.json", num_channels=None), "num_channels"),
    "other model": (lambda s: edit_json(s / "config.json", model_type="llama"), "llama"),
    "no weights": (lambda s: weights_file(s).unlink(), "no weights"),
    "empty weights": (lambda s: weights_file(s).write_bytes(b""), "whole safetensors"),
    "junk weights": (lambda s: weights_file(s).write_bytes(b"x" * 999), "whole safetensors"),
    "cut weights": (cut, "whole safetensors"),
    "shard lost": (
        lambda s: shard(s, lose=["model-00002-of-00003.safetensors"]),
        "model-00002-of-00003.safetensors",
    ),
    "index no JSON": (
        lambda s: (shard(s), (s / "model.safetensors.index.json").write_text("?")),
        "must hold JSON",
    ),
    "index elsewhere": (
        lambda s: (
            shard(s),
            (s / "model.safetensors.index.json").write_text(
                '{"weight_map": {"x": "../model-00001-of-00003.safetensors"}}'
            ),
        ),
        "../model-00001-of-00003.safetensors",
    ),
    "tensor missing": (
        lambda s: change(s, **{E_PROJ: None}),
        "missing model.layers.1.mixer.e_proj.weight",
    ),
    "tensor unexpected": (lambda s: change(s, x__weight=zeros(3)), "unexpected x.weight"),
    "both": (
        lambda s: change(s, **{E_PROJ: None, "y": zeros(3)}),
        "missing model.layers.1.mixer.e_proj.weight; unexpected y.",
    ),
    "shape": (
        lambda s: change(s, **{U_PROJ: zeros(64, 64)}),
        "model.layers.0.mixer.u_proj.weight must have shape (2, 32, 32) but has (64, 64)",
    ),
    "type": (lambda s: change(s, **{U_PROJ: zeros(2, 32, 32, dtype=np.int32)}), "I32"),
    "beyond float32": (
        lambda s: change(s, model__norm__weight=np.full(64, 1e300)),
        "model.norm.weight must fit float32",
    ),
    "head differs": (
        lambda s: edit_json(s / "config.json", tie_word_embeddings=True),
        "lm_head.weight must equal model.embed_tokens.weight",
    ),
    "quantized": (
        lambda s: edit_json(s / "config.json", quantization={"bits": 4, "group_size": 32}),
        "is quantized",
    ),
    "large tokenizer": (
        lambda s: (
            change(s, lm_head__weight=zeros(200, 64), model__embed_tokens__weight=zeros(200, 64)),
            edit_json(s / "config.json", vocab_size=200),
        ),
        "vocabulary is smaller than the tokenizer's",
    ),
    "tokenizer no JSON": (lambda s: (s / "tokenizer.json").write_text("?"), "tokenizer.json"),
}


def refused(capsys, *argv):
    """Run a command that must end with one line on stderr and status 1; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(arg) for arg in argv])
    assert exit.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("spoil, complaint", REFUSED.values(), ids=REFUSED)
def test_refused_source(source, target, spoil, complaint, capsys):
    """One line that names what is wrong, status 1, and nothing new on the disk."""
    spoil(source)
    assert complaint in refused(capsys, "--hf-path", source, "--mlx-path", target)
    assert [path.name for path in target.parent.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--dtype", "int8"], "--dtype"),
        (["-q", "--q-bits", "7"], "bits 7"),
        (["-q", "--q-bits", "0"], "--q-bits"),
        (["-q", "--q-group-size", "48"], "group size 48"),
        (["-q", "--q-group-size", "128"], "128 divides none"),
        (["-q", "--q-group-size", "67108864"], "--q-group-size"),
        (["-q", "--q-group-size", "9" * 30], "--q-group-size"),
        (["-q", "--q-mode", "mxfp4", "--q-bits", "8"], "mxfp4"),
        (["--q-bits", "4"], "need -q"),
        (["--bits", "4"], "--bits"),
    ],
    ids=" ".join,
)
def test_refused_flags(source, target, flags, complaint, capsys):
    """Flags that make no sense, alone or together."""
    assert complaint in refused(capsys, "--hf-path", source, "--mlx-path", target, *flags)
    assert [path.name for path in target.parent.iterdir()] == ["source"]


@pytest.mark.parametrize("path", ["nowhere", "nobody/nothing"])
def test_refused_path(target, path, capsys):
    """No such directory, and a hub that cannot be reached."""
    assert path in refused(capsys, "--hf-path", path, "--mlx-path", target)
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize(
    "path, complaint",
    [
        ("", "but is empty"),
        ("a" * 5000, "File name too long"),
        ("a\0b", "null byte"),
        ("file/target", "Not a directory"),
    ],
    ids=["empty", "long", "NUL", "below a file"],
)
def test_refused_target_path(tmp_path, path, complaint, capsys, monkeypatch):
    """A path that no directory can have is refused before the source is even looked at."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    line = refused(capsys, "--hf-path", "nowhere", "--mlx-path", path)
    assert "--mlx-path must name a directory" in line and complaint in line
    assert len(line) < 200
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("dtype, value", [("float16", 65536), ("bfloat16", 3.4e38)])
def test_overflowing_weight(source, target, dtype, value, capsys):
    """A weight that would become infinite is named, and nothing is written."""
    change(source, **{U_PROJ: np.full((2, 32, 32), value, np.float32)})
    line = refused(capsys, "--hf-path", source, "--mlx-path", target, "--dtype", dtype)
    assert "model.layers.0.mixer.u_proj.weight must lie within" in line
    assert not target.exists()


def test_infinite_weights_stay(source, target):
    """What is infinite in the source is no overflow."""
    change(source, model__norm__weight=np.full(64, np.inf, np.float32))
    convert(source, target, "--dtype", "float16")
    assert mx.isinf(mx.load(str(target / "model.safetensors"))["model.norm.weight"]).all()


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"dtype": "int8"}, "--dtype must be one of"),
        ({"q_mode": "zz"}, "--q-mode must be one of affine"),
        ({"quantize": True, "q_group_size": 2**40}, "--q-group-size"),
        ({"quantize": True, "q_bits": 2**40}, "--q-bits"),
    ],
    ids=str,
)
def test_refused_options(source, target, options, complaint):
    """The function checks what the command's parser does."""
    with pytest.raises(MCSDError, match=complaint):
        pipeline.convert(source, target, **options)
    assert not target.exists()


def test_choices_of_the_command():
    """The parser offers what the function takes, without importing it."""
    choices = {action.dest: action.choices for action in setup_arg_parser()._actions}
    assert choices["dtype"] == list(pipeline.DTYPES)
    assert choices["q_mode"] == list(pipeline.QUANTIZATION)


def test_source_is_required(capsys):
    """Without a source there is nothing to do."""
    assert "--hf-path" in refused(capsys, "--mlx-path", "target")


def test_refused_target(source, target, capsys):
    """An existing target is refused before the source is even looked at."""
    target.mkdir()
    (target / "mine").touch()
    assert "must not exist" in refused(capsys, "--hf-path", "nowhere", "--mlx-path", target)
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_target_in_new_directories(source, target):
    """Parents of the target are made."""
    convert(source, target / "a" / "b")
    assert (target / "a" / "b" / "config.json").exists()


def test_failing_in_new_directories(source, target, monkeypatch, capsys):
    """Parents that were made go again; those that were there, or hold something else, stay."""
    (target / "mine").mkdir(parents=True)

    def stop(*_):
        (target / "mine" / "new" / "other").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_config", stop)
    path = target / "mine" / "new" / "a" / "b"
    assert "No space" in refused(capsys, "--hf-path", source, "--mlx-path", path)
    assert {p.name for p in target.rglob("*")} == {"mine", "new", "other"}
    (target / "mine" / "new" / "other").unlink()
    monkeypatch.setattr(writing, "save_config", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(source, path / "c")
    assert {p.name for p in target.rglob("*")} == {"mine", "new"}


@pytest.mark.parametrize(
    "error, status",
    [
        pytest.param(OSError(28, "No space left on device"), 1, id="disk full"),
        pytest.param(RuntimeError("[write] Unable to write 9 bytes to file."), 1, id="mlx"),
        pytest.param(KeyboardInterrupt(), 130, id="Ctrl-C"),
    ],
)
def test_stopped_while_writing(source, target, monkeypatch, error, status, capsys):
    """However the writing ends early, no trace of it stays."""

    def stop(*_, **__):
        (partial,) = (p for p in target.parent.iterdir() if p != source)
        assert (partial / "model.safetensors").exists(), "too early to prove anything"
        raise error

    monkeypatch.setattr(writing, "save_config", stop)
    with pytest.raises(SystemExit) as exit:
        convert(source, target)
    assert exit.value.code == status
    assert [path.name for path in target.parent.iterdir()] == ["source"]
    if status == 1:
        assert "could not be written" in capsys.readouterr().err


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
