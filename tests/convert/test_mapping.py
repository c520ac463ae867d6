"""Names and shapes of a source: every way a matrix may be stored fills the same parameter."""

import json

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import oracle
from converting import WIDE, convert, refused
from mlx_mcsd.convert import matching
from mlx_mcsd.convert.mapping import Layout
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.mixers import base, mcsd
from models import mlx_model

# --- the layout --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_layout(variant, tied):
    """Every tensor of the layout has a place, the one `sanitize` takes it to; none stays open."""
    config, tensors = oracle.random_checkpoint(1, **variant, tie_word_embeddings=tied)
    model = mlx_model(config, tensors)
    layout = Layout(model)
    parts = [name for names in layout.parts.values() for name in names]
    assert sorted(parts) == sorted(tensors)
    for parameter, names in layout.parts.items():
        assert model.sanitize({n: mx.array(tensors[n]) for n in names}).keys() == {parameter}
        for part, name in enumerate(names):
            assert layout.names[name] == (parameter, (part,))
    # What mlx-lm saved brings the run-time names.
    assert all(layout.names[p] == (p, tuple(range(len(n)))) for p, n in layout.parts.items())


@pytest.mark.parametrize(
    "name",
    [
        "xmodel.norm.weight",
        "model.norm.weight.old",
        "model.norm.weight\n",
        "modelXnorm.weight",
        "model.layers.0.mixer.x_proj.weight",
        "model.layers.0.mixer.uu_proj.weight",
        "model.layers.0.mixer.u_proj.bias",
        "model.layers.9.mixer.u_proj.weight",
        "model.layers.-1.mixer.u_proj.weight",
        "model.layers.00.mixer.u_proj.weight",
    ],
    ids=repr,
)
def test_names_are_compared_whole(name):
    """A name that only contains, or only resembles, one of the layout has no place."""
    assert name not in Layout(mlx_model(*oracle.random_checkpoint(1))).names


def test_a_mixer_of_its_own(source, target, monkeypatch):
    """Parameters that another registered mixer adds are converted under their own names."""

    class Biased(mcsd.MCSD):
        def __init__(self, args):
            super().__init__(args)
            self.gain = mx.zeros(3)

    monkeypatch.setitem(base._REGISTRY, "biased", Biased)
    rewrite(source, {f"model.layers.{i}.mixer.gain": np.arange(3.0) + i for i in range(2)})
    convert(source, target, "--config", "mixer=biased")
    got = mx.load(str(target / "model.safetensors"))
    assert got["model.layers.1.mixer.gain"].tolist() == [1, 2, 3]


# --- separate or stacked -----------------------------------------------------------------------


def rewrite(source, new, *old):
    """Add tensors to a source and remove others."""
    tensors = load_file(source / "model.safetensors") | new
    tensors = {name: value for name, value in tensors.items() if name not in old}
    save_file(tensors, source / "model.safetensors")


def restack(source, layer, groups, axis, joint=""):
    """Replace matrices of one layer by stacks of several, each group a list of letters."""
    prefix = f"model.layers.{layer}.{'mlp' if joint else 'mixer'}"
    tensors = load_file(source / "model.safetensors")
    new = {}
    for group in groups:
        parts = [tensors.pop(f"{prefix}.{letter}_proj.weight") for letter in group]
        new[f"{prefix}.{joint.join(group)}_proj.weight"] = np.concatenate(parts, axis)
    save_file(tensors | new, source / "model.safetensors")


@pytest.mark.parametrize("projection", ["channel", "dense"])
@pytest.mark.parametrize(
    "first, second",
    [
        (["uvef"], ["uv", "ef"]),
        (["uv", "e", "f"], ["u", "fe", "v"]),
        (["u", "vef"], ["fevu"]),
    ],
    ids=str,
)
def test_any_stack_of_projections(tmp_path, target, projection, first, second):
    """However U, V, E, F are stacked, each in every layer as it likes, the result is the same."""
    config, tensors = oracle.random_checkpoint(0, **WIDE, projection=projection)
    source = oracle.write_checkpoint(tmp_path / "source", config, tensors)
    convert(source, target)
    axis = 1 if projection == "channel" else 0
    restack(source, 0, first, axis)
    restack(source, 1, second, axis)
    restack(source, 1, [["gate", "up"]], 0, "_")
    again = target.with_name("again")
    convert(source, again)
    assert (again / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()


def test_filled_twice(source, target, capsys):
    """A matrix that is there alone and in a stack: neither is taken."""
    u = load_file(source / "model.safetensors")["model.layers.0.mixer.u_proj.weight"]
    rewrite(source, {"model.layers.0.mixer.uv_proj.weight": np.concatenate([u, u], 1)})
    line = refused(capsys, "--hf-path", source, "--mlx-path", target)
    assert "model.layers.0.mixer.u_proj.weight by model.layers.0.mixer.u" in line
    assert "model.layers.0.mixer.v_proj.weight by model.layers.0.mixer.uv" in line
    assert not target.exists()


def on_diagonal(blocks):
    """(C, Dc, Dc) -> (D, D)."""
    C, Dc, _ = blocks.shape
    square = np.zeros((C * Dc, C * Dc), blocks.dtype)
    for c in range(C):
        square[c * Dc : (c + 1) * Dc, c * Dc : (c + 1) * Dc] = blocks[c]
    return square


@pytest.mark.parametrize("with_config", [True, False])
def test_blocks_on_a_diagonal(source, target, with_config):
    """Square matrices with zeros off the blocks, alone or stacked, become the blocks."""
    convert(source, target)
    tensors = load_file(source / "model.safetensors")
    for name, value in tensors.items():
        if ".mixer." in name and value.ndim == 3:
            tensors[name] = on_diagonal(value)
    prefix = "model.layers.0.mixer"
    fe = [tensors.pop(f"{prefix}.{letter}_proj.weight") for letter in "fe"]
    tensors[f"{prefix}.fe_proj.weight"] = np.concatenate(fe)
    save_file(tensors, source / "model.safetensors")
    again, flags = target.with_name("again"), []
    if not with_config:
        (source / "config.json").unlink()
        flags = ["--config", "num_channels=2", "--config", "projection=channel"]
    convert(source, again, *flags)
    assert (again / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()


@pytest.mark.parametrize("value", [-0.5, 1e-30, np.nan])
def test_off_the_blocks(source, target, value, capsys):
    """One number beside the blocks is enough to refuse; the message names it and the tensor."""
    name = "model.layers.1.mixer.v_proj.weight"
    square = on_diagonal(load_file(source / "model.safetensors")[name])
    square[3, 40] = value
    rewrite(source, {name: square})
    line = refused(capsys, "--hf-path", source, "--mlx-path", target, "--allow-nonfinite")
    assert f"{name} must be zero off its 2 diagonal blocks" in line
    assert f"up to {abs(value):g} there" in line
    assert not target.exists()


# --- rules -------------------------------------------------------------------------------------

RULES = [
    {"from": r"wte\.weight", "to": "model.embed_tokens.weight"},
    {"from": r"(?P<head>lm_head)\.w", "to": r"\g<head>.weight"},
    {"from": r"ln_f\.weight", "to": "model.norm.weight"},
    {"from": r"h\.\d+\.rotary.*", "ignore": "MCSD has no positions"},
    {"from": r"h\.(\d+)\.ln_(1|2)\.weight", "to": r"model.layers.\1.ln\2.weight"},
    {"from": r"h\.([0-9]+)\.(.+)", "to": r"model.layers.\1.\2"},
]


def renamed(source, rules=RULES):
    """Give a source names of its own and a tensor to ignore; returns the file of rules."""
    tensors = {}
    for name, value in load_file(source / "model.safetensors").items():
        name = name.replace("model.layers.", "h.").replace("model.embed_tokens", "wte")
        name = name.replace("lm_head.weight", "lm_head.w").replace("model.norm", "ln_f")
        tensors[name] = value
    tensors["h.0.rotary.freq"] = np.ones(3, np.float32)
    save_file(tensors, source / "model.safetensors")
    file = source.with_name("rules.json")
    file.write_text(json.dumps({"rules": rules}))
    return file


def test_name_map(source, target, capsys):
    """Rules with captures, the first that fits; what they ignore is said with its reason."""
    convert(source, target)
    capsys.readouterr()
    again = target.with_name("again")
    convert(source, again, "--name-map", str(renamed(source)))
    assert (again / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()
    assert "[INFO] 1 ignored: h.0.rotary.freq (MCSD has no positions).\n" in capsys.readouterr().out
    assert "--name-map rules.json" in (again / "README.md").read_text()


@pytest.mark.parametrize(
    "rules, complaint",
    [
        (RULES[:2], "missing model.layers.0.mixer_norm.weight, "),
        (RULES[:1] + RULES[2:], "missing lm_head.weight; unexpected lm_head.w; "),
        (
            [*RULES[:5], {"from": r"h\.(.+)", "to": "model.norm.weight"}],
            "norm.weight by h.0.m",
        ),
        ([*RULES[:5], {"from": r"h\.(.+)", "to": r"model.layer.\1"}], "(renamed model.layer.0."),
        ([{"from": "(", "to": "x"}], "'(' -> 'x' must be a regular expression"),
        ([{"from": "x", "to": r"\1"}], "invalid group reference"),
        ([{"from": "x", "to": r"\g<n>"}], "must be a regular expression"),
        ([{"from": "x" * 501, "to": "y"}], "at most 500 characters"),
        ([{"from": "(" * 490, "to": "y"}], "must be a regular expression"),
        ([{"from": "x"}], "rule 1 of"),
        ([*RULES, {"from": "x", "to": "y", "ignore": "z"}], "rule 7 of"),
        ([{"from": "x", "to": 3}], "rule 1 of"),
        ([{"from": "x", "to": ""}], "rule 1 of"),
        (["x"], "rule 1 of"),
        ({}, "must hold {"),
    ],
    ids=str,
)
def test_refused_rules(source, target, rules, complaint, capsys):
    """Rules that say nothing, too much or what is not there."""
    file = renamed(source, rules)
    line = refused(capsys, "--hf-path", source, "--mlx-path", target, "--name-map", file)
    assert complaint in line
    assert not target.exists()


def test_rules_that_would_take_forever(monkeypatch):
    """A process matches, and is ended: no pattern can hang a conversion."""
    monkeypatch.setattr(matching, "SECONDS", 0.5)
    with pytest.raises(MCSDError, match=r"rules\.json: matching must take less than 0\.5 s"):
        matching.first_matches([("(a|aa)+b", "")], ["a" * 100], "rules.json")
    with pytest.raises(MCSDError, match=r"rules\.json: matching must take less than 0\.5 s"):
        # Forever on any text, the empty one too, which is tried to see whether a rule is one.
        matching.first_matches([("(?:|(?=)){40}(?!)", "")], [], "rules.json")
    with pytest.raises(MCSDError, match="names must have at most 500"):
        matching.first_matches([("a", "")], ["a" * 501], "rules.json")
