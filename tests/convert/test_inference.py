"""The config from the tensors: inferred where there is none, compared where there is one."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import oracle
from converting import TOKENS, convert, edit_json, refused, same
from mlx_mcsd.loading import load_model

NOT_SHOWN = ("hidden_act", "rms_norm_eps", "max_position_embeddings", "initializer_range")


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_without_a_config(tmp_path, target, variant, tied, capsys):
    """Every variant is recognised by its tensors; the channels of a dense one are asked for."""
    config, tensors = oracle.random_checkpoint(1, **variant, tie_word_embeddings=tied)
    source = oracle.write_checkpoint(tmp_path / "source", config, tensors)
    want = load_model(source)(TOKENS)
    (source / "config.json").unlink()
    dense = variant["projection"] == "dense"
    if dense:
        line = refused(capsys, "--hf-path", source, "--mlx-path", target)
        assert "give --config num_channels=C" in line
    convert(source, target, *(["--config", "num_channels=2"] if dense else []))
    assert same(load_model(target)(TOKENS), want)
    got = json.loads((target / "config.json").read_text())
    if len(variant["sections"]) == 1:  # a lone section is alike added and concatenated
        got["fusion"] = config["fusion"]
    assert {key: got[key] for key in config} == config
    assert (
        "[INFO] without a config.json, hidden_act gelu, rms_norm_eps 1e-06 assumed; set others "
        "with --config KEY=VALUE.\n"
    ) in capsys.readouterr().out


def test_what_the_user_sets(source, target, capsys):
    """It goes before config.json and before what would be assumed."""
    edit_json(source / "config.json", rms_norm_eps=1e-5)
    convert(source, target, "--config", "rms_norm_eps=1e-3", "--config", "hidden_act=silu")
    config = json.loads((target / "config.json").read_text())
    assert (config["rms_norm_eps"], config["hidden_act"]) == (1e-3, "silu")
    assert load_model(target).model.layers[0].mlp_norm.eps == 1e-3
    (source / "config.json").unlink()
    convert(source, target.with_name("b"), "--config", "rms_norm_eps=1e-4")
    config = json.loads((target.with_name("b") / "config.json").read_text())
    assert (config["rms_norm_eps"], config["hidden_act"]) == (1e-4, "gelu")
    assert "without a config.json, hidden_act gelu assumed;" in capsys.readouterr().out


def test_keys_that_are_missing_are_filled(source, target):
    """A config.json may leave out what the tensors show."""
    want = load_model(source)(TOKENS)
    keys = ("vocab_size", "hidden_size", "num_channels", "num_hidden_layers", "intermediate_size")
    edit_json(source / "config.json", **dict.fromkeys(keys), sections=None, projection=None)
    convert(source, target)
    assert same(load_model(target)(TOKENS), want)


@pytest.mark.parametrize(
    "key, value, found",
    [
        ("vocab_size", 300, 272),
        ("hidden_size", 128, 64),
        ("num_channels", 4, 2),
        ("num_hidden_layers", 3, 2),
        ("num_hidden_layers", 1, 2),
        ("intermediate_size", 64, 96),
        ("projection", "dense", "channel"),
        ("output_projection", True, False),
        ("sections", ["slope"], ["slope", "decay"]),
    ],
)
@pytest.mark.parametrize("by", ["config.json", "--config"])
def test_disagreement(source, target, key, value, found, by, capsys):
    """One line with the key, what was expected and what is found; nothing is written."""
    flags = []
    if by == "--config":
        flags = ["--config", f"{key}={json.dumps(value)}"]
    else:
        edit_json(source / "config.json", **{key: value})
    line = refused(capsys, "--hf-path", source, "--mlx-path", target, *flags)
    assert f"config must agree with the tensors: {key} is {value!r} but the tensors have" in line
    assert f"have {found!r}" in line
    assert not target.exists()


def test_a_head_that_is_not_there(source, target, capsys):
    """Without lm_head the model is tied; a config that denies it is refused."""
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors")
    line = refused(capsys, "--hf-path", source, "--mlx-path", target)
    assert "tie_word_embeddings is False but the tensors have True" in line
    convert(source, target, "--config", "tie_word_embeddings=true")
    assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] is True


def test_fusion_of_another_width(tmp_path, target, capsys):
    """The width of the output projection tells adding from concatenating."""
    tensors = oracle.random_checkpoint(0, fusion="concat", output_projection=True)[1]
    config = oracle.CONFIG | {"fusion": "add", "output_projection": True}
    source = oracle.write_checkpoint(tmp_path / "source", config, tensors)
    line = refused(capsys, "--hf-path", source, "--mlx-path", target)
    assert "fusion is 'add' but the tensors have 'concat'" in line


@pytest.mark.parametrize("remove", ["model.embed_tokens", "model.layers", ".mlp."])
def test_too_little_to_infer_from(source, target, remove, capsys):
    """What is missing is named, as with a config."""
    tensors = load_file(source / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if remove not in k}, source / "model.safetensors")
    for _ in range(2):
        line = refused(capsys, "--hf-path", source, "--mlx-path", target)
        assert "the tensors do not fit the model: missing model." in line and remove in line
        (source / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["embed_tokens", "layers.0.mlp.up_proj", "layers.0.mixer.o_proj"])
@pytest.mark.parametrize("shape", [(), (0,), (1,) * 9], ids=str)
def test_shapes_of_nothing(source, target, name, shape, capsys):
    """A tensor of no, or of too many, dimensions is refused like any that does not fit."""
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {f"model.{name}.weight": np.ones(shape)}, source / "model.safetensors")
    for _ in range(2):
        refused(capsys, "--hf-path", source, "--mlx-path", target)
        assert not target.exists()
        (source / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("rms_norm_eps", "--config must be KEY=VALUE"),
        ("=3", "--config must be KEY=VALUE"),
        ("rms_norm_eps=no", "rms_norm_eps must be a positive number"),
        ("rms_norm_esp=1e-5", "did you mean 'rms_norm_eps'"),
        ("num_hidden_layers=true", "num_hidden_layers must be a positive integer"),
        ("sections=" + "[" * 9999, "sections must be one of"),
    ],
)
def test_refused_keys(source, target, text, complaint, capsys):
    """Keys nobody knows and values that do not fit."""
    line = refused(capsys, "--hf-path", source, "--mlx-path", target, "--config", text)
    assert complaint in line
    assert not target.exists()
