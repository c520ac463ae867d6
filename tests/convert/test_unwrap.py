"""Names of tensors without what trainers wrap around them; nothing left out in silence."""

import pytest
import torch

from mlx_mcsd.convert.checkpoint import Checkpoint
from mlx_mcsd.errors import MCSDError

NAMES = ("model.embed_tokens.weight", "model.layers.0.mixer.u_proj.weight", "lm_head.weight")
STATE = {name: torch.full((2, 3), float(i)) for i, name in enumerate(NAMES)}
TIED = {name: value for name, value in STATE.items() if name != "lm_head.weight"}


def under(prefix, state=STATE):
    """Every name with a prefix."""
    return {prefix + name: value for name, value in state.items()}


def inside(part, state=STATE):
    """Every name with a part behind its first."""
    return {name.replace(".", f".{part}.", 1): value for name, value in state.items()}


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]}
WRAPPED = {
    "bare": STATE,
    "state_dict": {"state_dict": STATE},
    "model": {"model": STATE, "optimizer": OPTIMIZER, "epoch": 3},
    "module": {"module": STATE},
    "model_state_dict": {"model_state_dict": STATE, "optimizer_state_dict": OPTIMIZER},
    "all of them": {"state_dict": {"model": {"module": under("module._orig_mod.")}}, "step": 1},
    "module.": under("module."),
    "_orig_mod.": under("_orig_mod."),
    "both": under("_orig_mod.module."),
    "both, in turn": under("module._orig_mod."),
    "compiled within": inside("_orig_mod"),
    "sharded within": inside("_fsdp_wrapped_module._checkpoint_wrapped_module"),
    "Lightning": {"state_dict": under("model."), "pytorch-lightning_version": "2.5"},
    "Lightning, compiled": {"state_dict": under("model._orig_mod.")},
}


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("saved", WRAPPED.values(), ids=WRAPPED)
def test_unwrapped(tmp_path, saved, options):
    """The model's names and values come out; what lies beside them is named with the reason."""
    torch.save(saved, tmp_path / "x.pt", **options)
    found = Checkpoint(tmp_path / "x.pt")
    assert found.tensors == {name: ("F32", (2, 3)) for name in NAMES}
    assert all(found.load(name).tolist() == value.tolist() for name, value in STATE.items())


def test_tied(tmp_path):
    """Without a head every name begins with `model.`, which is no wrapper then."""
    for saved in (TIED, under("module.", TIED), under("model.", TIED)):
        torch.save(saved, tmp_path / "x.pt")
        assert Checkpoint(tmp_path / "x.pt").tensors.keys() == TIED.keys()


def test_ignored(tmp_path):
    """Each value beside the model, with the reason."""
    torch.save(WRAPPED["model"] | {"a\nb": 1}, tmp_path / "x.pt")
    assert Checkpoint(tmp_path / "x.pt").ignored == {
        "optimizer.state.0.exp_avg": "beside model",
        "optimizer.param_groups.0.lr": "no tensor: float",
        "epoch": "no tensor: int",
        "'a\\nb'": "no tensor: int",
    }


REFUSED = {
    "two models": ({"model": STATE, "state_dict": STATE}, "model and state_dict; save one"),
    "two of a name": (STATE | under("module.", STATE), "once but has"),
    "two of a name, nested": (
        {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)},
        "must hold a.b once",
    ),
    "no tensors": ({"epoch": 1}, "must hold tensors but has none"),
    "only a wrapper's": ({}, "must hold tensors but has none"),
    "quantized": ({"a.weight": torch.ones(1), "a.scales": torch.ones(1)}, "is quantized"),
}


@pytest.mark.parametrize("saved, complaint", REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, saved, complaint):
    """Which of two is the model nobody can tell."""
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(MCSDError, match=complaint):
        Checkpoint(tmp_path / "x.pt")


def test_float64(tmp_path):
    """Float64 becomes float32, infinities included; larger numbers are refused."""
    torch.save({"w": torch.tensor([1 / 3, float("inf")], dtype=torch.float64)}, tmp_path / "x.pt")
    loaded = Checkpoint(tmp_path / "x.pt").load("w")
    assert loaded.tolist() == torch.tensor([1 / 3, float("inf")]).tolist()
    torch.save({"w": torch.tensor([1e300], dtype=torch.float64)}, tmp_path / "x.pt")
    with pytest.raises(MCSDError, match="w must fit float32"):
        Checkpoint(tmp_path / "x.pt").load("w")


def test_types_of_mlx(tmp_path):
    """Each type as MLX's own; float8 it does not have."""
    values = [1.0, 2.0, 0.0]
    for dtype in ("bfloat16", "float16", "float32", "int64", "uint8", "bool"):
        tensor = torch.tensor(values).to(getattr(torch, dtype))
        torch.save({"w": tensor}, tmp_path / "x.pt")
        loaded = Checkpoint(tmp_path / "x.pt").load("w")
        assert str(loaded.dtype) == f"mlx.core.{dtype}"
        assert loaded.tolist() == tensor.tolist()
    torch.save({"w": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "x.pt")
    with pytest.raises(MCSDError, match="w must be of a type that MLX has"):
        Checkpoint(tmp_path / "x.pt").load("w")


def test_nan_of_any_kind(tmp_path):
    """A signalling NaN in float64 is a NaN in float32."""
    value = torch.tensor([0x7FF4000000000000]).view(torch.float64)
    torch.save({"w": value}, tmp_path / "x.pt")
    (loaded,) = Checkpoint(tmp_path / "x.pt").load("w").tolist()
    assert loaded != loaded


def test_model_is_no_wrapper_of_some(tmp_path):
    """`model.` is taken off all names or none."""
    state = under("model.", TIED) | {"other.weight": torch.ones(1)}
    torch.save(state, tmp_path / "x.pt")
    assert Checkpoint(tmp_path / "x.pt").tensors.keys() == state.keys()
