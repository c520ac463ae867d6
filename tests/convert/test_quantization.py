"""Quantization: what is stored is what mlx-lm makes of the model in memory, to the bit."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.utils import dequantize_model, quantize_model

import tiny
from converting import TOKENS, convert, parameters, refused, same
from mlx_mcsd.convert import quantization, streaming
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import load, load_model

# Widths: D = 192, Dc = 96, F = 160, of which only D is a multiple of 64.
SHAPE = {"hidden_size": 192, "intermediate_size": 160, "num_channels": 2, "num_hidden_layers": 1}
MIXER, DOWN = "model.layers.0.mixer.uvef_proj", "model.layers.0.mlp.down_proj"
GATE_UP, HEAD = "model.layers.0.mlp.gate_up_proj", "lm_head"
MODES = {
    **{f"affine {bits}": {"bits": bits, "group_size": 64} for bits in (2, 3, 4, 5, 6, 8)},
    "affine 32": {"bits": 4, "group_size": 32},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "mxfp8": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
}


@pytest.fixture
def source(tmp_path):
    """A checkpoint whose matrices differ in what divides their width."""
    tiny.write_model(tmp_path / "source", **SHAPE)
    return tmp_path / "source"


def check_stored(source, target, default, exceptions, dtype=mx.float32):
    """Compare a converted directory with `quantize_model` in memory, and run it in both packages.

    Args:
        default: settings.
        exceptions: path -> settings, or False for what stays float.
    """
    default = {"mode": "affine"} | default
    model = load_model(source, dtype=dtype)
    if exceptions:  # mlx-lm asks nobody about a width that the default group does not divide

        def choice(path, module):
            return hasattr(module, "to_quantized") and exceptions.get(path, True)

        nn.quantize(model, **default, class_predicate=choice)
        entry = default | {path: settings for path, settings in exceptions.items() if settings}
    else:
        model, config = quantize_model(model, {}, **default)
        entry = config["quantization"]
    want_parameters = parameters(model)
    got = mx.load(str(target / "model.safetensors"))
    assert got.keys() == want_parameters.keys()
    assert all(same(got[name], want_parameters[name]) for name in got)
    config = json.loads((target / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == entry

    ours, tokenizer = load(target, dtype=dtype)
    theirs, _ = mlx_lm.load(str(target), trust_remote_code=True)
    assert same(ours(TOKENS), theirs(TOKENS))
    assert isinstance(mlx_lm.generate(ours, tokenizer, "a b", max_tokens=2), str)
    floats = load_model(source, dtype=dtype)
    assert not same(ours(TOKENS), floats(TOKENS))


@pytest.mark.parametrize("settings", MODES.values(), ids=MODES)
def test_quantize(source, target, settings, capsys, monkeypatch):
    """Every mode; where 64 does not divide a width 32 does, and a line says so."""
    monkeypatch.setattr(streaming, "CHUNK", 4096)  # several runs of rows to a matrix
    names = {"bits": "--q-bits", "group_size": "--q-group-size", "mode": "--q-mode"}
    convert(source, target, "-q", *(str(w) for k, v in settings.items() for w in (names[k], v)))
    small = {"mode": "affine"} | settings | {"group_size": 32}
    exceptions = dict.fromkeys([MIXER, DOWN], small) if settings["group_size"] == 64 else {}
    check_stored(source, target, settings, exceptions)
    lines = [x for x in capsys.readouterr().out.splitlines() if "in groups of 32" in x]
    said = "2 of 5 matrices in groups of 32, their width being no multiple of more: "
    assert lines == ([f"[INFO] {said}{MIXER}, {DOWN}."] if exceptions else [])


def test_widths_that_no_group_divides(tmp_path, target, capsys):
    """Such matrices stay float and are named, per-channel projections too; norms always do."""
    source = tmp_path / "source"
    tiny.write_model(source, **SHAPE | {"num_channels": 6, "intermediate_size": 100})
    convert(source, target, "-q", "--dtype", "bfloat16")
    out = capsys.readouterr().out
    said = "2 of 5 matrices stay float, their width being no multiple of any group size: "
    assert f"[INFO] {said}{MIXER}, {DOWN}.\n" not in out  # 192 / 6 = 32 has a group
    assert said.replace("2 of", "1 of") + f"{DOWN}.\n" in out
    got = mx.load(str(target / "model.safetensors"))
    kinds = {name: value.dtype for name, value in got.items()}
    assert kinds[f"{DOWN}.weight"] == mx.bfloat16
    assert kinds[f"{MIXER}.weight"] == mx.uint32
    assert kinds[f"{MIXER}.scales"] == kinds["model.norm.weight"] == mx.bfloat16
    check_stored(
        source,
        target,
        {"bits": 4, "group_size": 64},
        {MIXER: {"bits": 4, "group_size": 32, "mode": "affine"}, DOWN: False},
        mx.bfloat16,
    )


def test_rules(source, target):
    """The first rule that matches a whole path decides; the rest follow the default."""
    rules = [r".*\.mixer\..*=6:32", r".*(mixer|down_proj)=mxfp8", "lm_head=float", r"model\.e.*=8"]
    convert(source, target, "-q", *(word for rule in rules for word in ("--q-rule", rule)))
    check_stored(
        source,
        target,
        {"bits": 4, "group_size": 64},
        {
            MIXER: {"bits": 6, "group_size": 32, "mode": "affine"},
            DOWN: {"bits": 8, "group_size": 32, "mode": "mxfp8"},
            HEAD: False,
            "model.embed_tokens": {"bits": 8, "group_size": 64, "mode": "affine"},
        },
    )
    card = (target / "README.md").read_text()
    assert "-q --q-bits 4 --q-mode affine --q-group-size 64 --q-rule '.*\\.mixer" in card


@pytest.mark.parametrize(
    "rules, complaint",
    [
        (["lm_head"], "must be REGEX=BITS"),
        (["=4"], "must be REGEX=BITS"),
        (["lm_head="], "must be REGEX=BITS"),
        (["lm_head=four"], "must be REGEX=BITS"),
        (["lm_head=4:32:affine"], "must be REGEX=BITS"),
        (["lm_head=²"], "must be REGEX=BITS"),
        (["lm_head=7"], "bits 7"),
        (["lm_head=4:48"], "group size 48"),
        (["(=4"], "regular expression"),
        (["head=4"], "'head=4' must match a matrix"),
        (["lm_head=4", "lm_head=8"], "'lm_head=8' must match a matrix"),
        ([".*=float"], "leave all of them float"),
    ],
    ids=str,
)
def test_refused_rules(source, target, rules, complaint, capsys):
    """Rules that are none, say what MLX cannot do, or would change nothing."""
    flags = [word for rule in rules for word in ("--q-rule", rule)]
    line = refused(capsys, "--hf-path", source, "--mlx-path", target, "-q", *flags)
    assert complaint in line
    assert not target.exists()


def test_nothing_to_quantize(tmp_path, target, capsys):
    """No width has a group: better no model than one that is called quantized."""
    tiny.write_model(tmp_path / "source")
    line = refused(capsys, "--hf-path", tmp_path / "source", "--mlx-path", target, "-q")
    assert "leave all of them float" in line


def test_dequantizing_gives_floats_again(source, target):
    """What `mlx_lm.convert -d` does, with a mixture of modes: floats close to the source's."""
    convert(source, target, "-q", "--q-bits", "8", "--q-rule", r".*mixer.*=mxfp8")
    model = dequantize_model(mlx_lm.load(str(target), trust_remote_code=True)[0])
    want = parameters(load_model(source))
    got = parameters(model)
    assert got.keys() == want.keys()
    for name, value in want.items():
        # Half a step of the coarsest: 3 bits of mantissa in mxfp8.
        assert mx.abs(got[name] - value).max() <= mx.abs(value).max() / 16, name


def test_settings_of_other_kinds():
    """Values MLX cannot count."""
    for settings in ({"group_size": 2**40}, {"bits": 2**40}, {"bits": -1}, {"mode": "zz"}):
        with pytest.raises(MCSDError, match="--q-"):
            quantization.settings(**settings)
