"""The way back: the same bits, and a directory that transformers loads."""

import json

import mlx.core as mx
import numpy as np
import pytest

import oracle
from converting import TOKENS, convert, main, same
from mlx_mcsd.loading import load, load_model


def back(source, target, *flags):
    """Run the command in this process."""
    main(["--reverse", "--mlx-path", str(source), "--hf-path", str(target), *map(str, flags)])


def tensors_of(directory):
    """Everything stored, by name."""
    files = sorted(directory.glob("model*.safetensors"))
    return {name: array for file in files for name, array in mx.load(str(file)).items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not same(a[name], b[name])] == []


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("variant", oracle.VARIANTS[::2])
def test_there_and_back(tmp_path, variant, tied):
    """Every tensor of the source is there again, to the bit, under its name; and on to MLX anew."""
    config, tensors = oracle.random_checkpoint(1, **variant, tie_word_embeddings=tied)
    source = oracle.write_checkpoint(tmp_path / "source", config, tensors)
    convert(source, tmp_path / "mlx")
    back(tmp_path / "mlx", tmp_path / "hf")
    assert_same(tensors_of(source), tensors_of(tmp_path / "hf"))
    convert(tmp_path / "hf", tmp_path / "again")
    assert_same(tensors_of(tmp_path / "mlx"), tensors_of(tmp_path / "again"))
    files = [tmp_path / name / "config.json" for name in ("mlx", "again")]
    old, new = (json.loads(file.read_text()) for file in files)
    assert new.pop("architectures") == ["MCSDForCausalLM"]
    assert new == {key: value for key, value in old.items() if key != "architectures"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_types(source, tmp_path, dtype):
    """A type is kept, or changed where one is asked for."""
    convert(source, tmp_path / "mlx", "--dtype", dtype)
    back(tmp_path / "mlx", tmp_path / "hf")
    back(tmp_path / "mlx", tmp_path / "wide", "--dtype", "float32")
    kept, wide = (tensors_of(tmp_path / name) for name in ("hf", "wide"))
    want = {k: v.astype(getattr(mx, dtype)) for k, v in tensors_of(source).items()}
    assert_same(kept, want)
    assert_same(wide, {k: v.astype(mx.float32) for k, v in want.items()})
    for name, written in (("hf", dtype), ("wide", "float32")):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == written


def test_transformers_load_it(source, tmp_path, monkeypatch):
    """With the code beside the weights, and no package of ours: the logits are the source's."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (source / "generation_config.json").write_text('{"eos_token_id": 2, "max_new_tokens": 3}')
    convert(source, tmp_path / "mlx")
    back(tmp_path / "mlx", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        logits = model(torch.tensor(np.array(TOKENS))).logits.numpy()
    mlx_model, tokenizer = load(source)
    assert oracle.relative_error(logits, mlx_model(TOKENS)) < 1e-5
    again = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert again.encode("a b ab") == tokenizer.encode("a b ab")
    assert model.generate(torch.tensor([[5, 6]]), do_sample=False).shape[1] <= 5
    names = {file.name for file in (tmp_path / "hf").iterdir()}
    assert {"configuration_mcsd.py", "modeling_mcsd.py", "generation_config.json"} <= names
    assert "mcsd.py" not in names, "the file that mlx-lm runs stays behind"
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "--reverse --mlx-path mlx --hf-path hf" in card


@pytest.mark.parametrize("q_mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_quantized(source, tmp_path, q_mode, capsys):
    """Refused with advice, or unpacked: the numbers the quantized model computes with."""
    group = "16" if q_mode == "nvfp4" else "32"
    convert(source, tmp_path / "mlx", "-q", "--q-mode", q_mode, "--q-group-size", group)
    with pytest.raises(SystemExit):
        back(tmp_path / "mlx", tmp_path / "hf")
    assert "--dequantize" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    back(tmp_path / "mlx", tmp_path / "hf", "--dequantize")
    assert "quantization" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    want = load_model(tmp_path / "mlx")(TOKENS)
    assert oracle.relative_error(load_model(tmp_path / "hf")(TOKENS), want) < 1e-5
    assert {array.dtype for array in tensors_of(tmp_path / "hf").values()} == {mx.float32}


def test_unconverted_source(source, tmp_path):
    """A directory whose projections are apart already stays as it is."""
    back(source, tmp_path / "hf")
    assert_same(tensors_of(source), tensors_of(tmp_path / "hf"))


def test_shards(source, tmp_path, monkeypatch):
    """Of more than one file, in and out."""
    from mlx_mcsd.convert import weights

    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    convert(source, tmp_path / "mlx")
    back(tmp_path / "mlx", tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    assert_same(tensors_of(source), tensors_of(tmp_path / "hf"))


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["-q"], "must go without --quantize"),
        (["--dry-run"], "must go without --dry-run"),
        (["--no-verify"], "must go without --no-verify"),
        (["--name-map", "x"], "must go without --name-map"),
    ],
    ids=" ".join,
)
def test_refused_flags(source, tmp_path, flags, complaint, capsys):
    with pytest.raises(SystemExit):
        back(source, tmp_path / "hf", *flags)
    assert complaint in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert(source, tmp_path / "mlx", "--dequantize")
    assert "--dequantize needs --reverse" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_refused_paths(source, tmp_path, capsys):
    """No source, a target that is there, and a weight that its new type cannot hold."""
    (tmp_path / "there").mkdir()
    file = str(source / "model.safetensors")
    arrays = dict(mx.load(file))
    arrays["model.norm.weight"] = mx.full(64, 1e30)
    mx.eval(arrays)
    mx.save_safetensors(file, arrays)
    for mlx_path, hf_path, flags, complaint in (
        (tmp_path / "nowhere", tmp_path / "hf", (), "no directory"),
        (source, tmp_path / "there", (), "another --hf-path"),
        (source, tmp_path / "hf", ("--dtype", "float16"), "model.norm.weight must lie within"),
    ):
        with pytest.raises(SystemExit):
            back(mlx_path, hf_path, *flags)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and complaint in line
    assert {path.name for path in tmp_path.iterdir()} == {"source", "there"}
