"""The converter: what it refuses takes one line and leaves nothing behind."""

import json

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converting import convert, edit_json, refused
from mlx_mcsd.convert import pipeline, quantization
from mlx_mcsd.convert.__main__ import setup_arg_parser
from mlx_mcsd.errors import MCSDError


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
    "config no JSON": (lambda s: (s / "config.json").write_text("{"), "must hold JSON"),
    "config no object": (lambda s: (s / "config.json").write_text("[]"), "JSON object"),
    "unknown key": (lambda s: edit_json(s / "config.json", hiden_act="x"), "hiden_act"),
    "key no number": (lambda s: edit_json(s / "config.json", hidden_size=True), "hidden_size"),
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
        "missing model.layers.1.mixer.e_proj.weight; unexpected y; ",
    ),
    "shape": (
        lambda s: change(s, **{U_PROJ: zeros(64, 32)}),
        "model.layers.0.mixer.u_proj.weight must have shape (2, 32, 32) or (64, 64) but has (64,",
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


def test_infinite_weights(source, target, capsys):
    """What is infinite in the source is refused by name; insisted on it stays, as no overflow."""
    change(source, model__norm__weight=np.full(64, np.inf, np.float32))
    flags = ["--dtype", "float16"]
    line = refused(capsys, "--hf-path", source, "--mlx-path", target, *flags)
    assert "model.norm.weight must be finite but 64 of its 64 numbers are NaN or infinite" in line
    assert not target.exists()
    convert(source, target, *flags, "--allow-nonfinite")
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
    assert choices["q_mode"] == list(quantization.USUAL)


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
