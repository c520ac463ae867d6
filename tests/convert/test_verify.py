"""The comparison of a result with its source: passes every honest result, and finds every other."""

import json

import mlx.core as mx
import numpy as np
import pytest

import oracle
import tiny
from converting import WIDE, edit_json
from mlx_mcsd.config import ModelArgs
from mlx_mcsd.convert.checkpoint import Checkpoint
from mlx_mcsd.convert.pipeline import convert
from mlx_mcsd.convert.result import Result
from mlx_mcsd.errors import MCSDError

torch = pytest.importorskip("torch")

from mlx_mcsd.convert import result, verify  # noqa: E402

SETTINGS = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    **{
        f"{bits} bits": {"quantize": True, "q_bits": bits, "q_group_size": 32}
        for bits in (2, 3, 4, 5, 6, 8)
    },
    "4 bits of bfloat16": {"quantize": True, "q_group_size": 32, "dtype": "bfloat16"},
    **{mode: {"quantize": True, "q_mode": mode} for mode in ("mxfp4", "mxfp8", "nvfp4")},
}


def compare(source, target, **tokens):
    """Verify a target against a source whose names are those of the layout."""
    checkpoint = Checkpoint(source)
    names = {name: name for name in checkpoint.tensors}
    args = ModelArgs.from_dict(checkpoint.config)
    return verify.verify(target, checkpoint, names, args, **tokens)


def rewrite(directory, change):
    """Let a function change the arrays of a converted model."""
    file = str(directory / "model.safetensors")
    arrays = dict(mx.load(file))
    change(arrays)
    mx.eval(arrays)
    mx.save_safetensors(file, arrays, {"format": "mlx"})


@pytest.fixture
def converted(source, target):
    """A source, and what was made of it, not yet verified."""

    def make(**options):
        convert(source, target, verification=False, **options)
        return source, target

    return make


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_honest_results(converted, options):
    """To 1e-5 in every type, since the reference is given what was stored."""
    found = compare(*converted(**options), ids=range(3, 40))
    assert 0 < found.difference <= 1e-5 == found.tolerance
    if not options:
        assert found.effect is None and found.step is None
        return
    packed = "quantize" in options
    assert found.effect > 100 * found.difference, "what rounding does is measured apart"
    assert (found.step is not None) == packed
    assert 0 < found.agreement <= 1
    assert ("Quantization" if packed else "Rounding") in found.text()
    assert found.json()["difference"] == found.difference


@pytest.mark.parametrize("variant", oracle.VARIANTS[::4])
def test_variants(tmp_path, target, variant):
    """Every variant of the model; packed, so that every tensor is compared number by number too."""
    config, tensors = oracle.random_checkpoint(1, **WIDE | variant)
    source = oracle.write_checkpoint(tmp_path / "source", config, tensors)
    convert(source, target, quantize=True, q_group_size=32, q_bits=8, verification=False)
    found = compare(source, target)
    assert found.difference <= 1e-5 and found.step <= 1


def swap_rows(name):
    def change(arrays):
        array = arrays[name]
        order = [1, 0, *range(2, array.shape[-2])]
        arrays[name] = mx.take(array, mx.array(order), axis=-2)

    return change


LAYER = "model.layers.1"
SPOILED = {
    "one number": lambda a: a.update(
        {"model.norm.weight": a["model.norm.weight"] * mx.array([1.001] + [1.0] * 63)}
    ),
    "rows of a projection": swap_rows(f"{LAYER}.mixer.uvef_proj.weight"),
    "rows of gate and up": swap_rows(f"{LAYER}.mlp.gate_up_proj.weight"),
    "rows of the embedding": swap_rows("model.embed_tokens.weight"),
    "rows of the head": swap_rows("lm_head.weight"),
    "gains": lambda a: a.update({f"{LAYER}.mixer.decay_norm.weight": mx.ones(64) * 1.01}),
    "not a number": lambda a: a.update({"model.norm.weight": mx.full(64, float("nan"))}),
}


@pytest.mark.parametrize("change", SPOILED.values(), ids=SPOILED)
def test_spoiled_weights(converted, change):
    """One wrong number is enough."""
    source, target = converted()
    rewrite(target, change)
    with pytest.raises(MCSDError, match="of the largest but differ by"):
        compare(source, target, ids=range(48))


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_blocks_of_rows(tmp_path, target, monkeypatch, tied, quantize):
    """A few rows at a time give the same figures as all, and the last ones are compared too."""
    config, tensors = oracle.random_checkpoint(1, **WIDE | {"tie_word_embeddings": tied})
    source = oracle.write_checkpoint(tmp_path / "source", config, tensors)
    q = {"quantize": True, "q_group_size": 32} if quantize else {"dtype": "bfloat16"}
    convert(source, target, verification=False, **q)
    whole = compare(source, target)
    sizes, read = [], verify.Source.blocks

    def blocks(self, name):
        for block in read(self, name):
            sizes.append(len(block))
            yield block

    monkeypatch.setattr(verify.Source, "blocks", blocks)
    monkeypatch.setattr(verify, "ROWS", 7)
    monkeypatch.setattr(result, "ROWS", 7)
    found = compare(source, target)
    assert max(sizes) == 7
    assert found.difference <= 1e-5
    assert found.effect == pytest.approx(whole.effect, rel=1e-3)
    assert (found.step, found.agreement) == (whole.step, whole.agreement)

    path = "model.embed_tokens" if tied else "lm_head"
    kind = "scales" if quantize else "weight"

    def last(arrays):
        array = arrays[f"{path}.{kind}"]
        arrays[f"{path}.{kind}"] = mx.concatenate([array[:-1], array[-1:] * 2])

    rewrite(target, last)
    with pytest.raises(MCSDError, match=r"is off by|but differ by"):
        compare(source, target)


@pytest.mark.parametrize("q_mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_spoiled_packed_weights(converted, q_mode):
    """Packed rows that changed places, their scales with them, are no packing of the source's."""
    source, target = converted(
        quantize=True, q_mode=q_mode, q_group_size=16 if q_mode == "nvfp4" else 32
    )

    def change(arrays):
        path = f"{LAYER}.mixer.uvef_proj"
        for kind in ("weight", "scales", "biases"):
            if f"{path}.{kind}" in arrays:
                swap_rows(f"{path}.{kind}")(arrays)

    rewrite(target, change)
    with pytest.raises(MCSDError, match=r"layers.1.mixer.u_proj.weight is off by"):
        compare(source, target)


@pytest.mark.parametrize("key, value", [("hidden_act", "silu"), ("rms_norm_eps", 1e-3)])
def test_spoiled_config(converted, key, value):
    """The result is run as its own config says."""
    source, target = converted()
    edit_json(target / "config.json", **{key: value})
    with pytest.raises(MCSDError, match="must be the source's"):
        compare(source, target)


def test_other_tokens(converted):
    """The text goes to each side as its own tokenizer reads it."""
    source, target = converted()
    assert compare(source, target, ids=[5, 6, 7], source_ids=[5, 6, 7]).difference <= 1e-5
    with pytest.raises(MCSDError, match="must be the source's"):
        compare(source, target, ids=[5, 6, 7], source_ids=[5, 9, 7])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torch_files(tmp_path, source, target, legacy):
    """Read by torch itself, names in wrappers included."""
    convert(source, target, verification=False)
    weights = {
        f"_orig_mod.{name}": torch.from_numpy(np.array(array)).t().contiguous().t()
        if array.ndim == 2
        else torch.from_numpy(np.array(array))
        for name, array in mx.load(str(source / "model.safetensors")).items()
    }
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((source / "config.json").read_bytes())
    torch.save(
        {"state_dict": weights, "epoch": 3},
        other / "pytorch_model.bin",
        _use_new_zipfile_serialization=not legacy,
    )
    assert compare(other, target).difference <= 1e-5


def test_stacked_and_square_matrices(tmp_path):
    """Projections stacked in a source, in their own order, and blocks in square matrices."""
    _, tensors = tiny.write_model(tmp_path / "source", **WIDE)
    checkpoint = Checkpoint(tmp_path / "source")
    stacked, square = dict(tensors), np.zeros((64, 64), np.float32)
    layer = "model.layers.0.mixer"
    parts = [stacked.pop(f"{layer}.{part}_proj.weight") for part in "vu"]
    stacked[f"{layer}.vu_proj.weight"] = np.concatenate(parts, axis=1)
    gate_up = [stacked.pop(f"model.layers.0.mlp.{part}_proj.weight") for part in ("gate", "up")]
    stacked["model.layers.0.mlp.gate_up_proj.weight"] = np.concatenate(gate_up)
    for c, block in enumerate(tensors[f"{layer}.e_proj.weight"]):
        square[32 * c : 32 * c + 32, 32 * c : 32 * c + 32] = block
    stacked[f"{layer}.e_proj.weight"] = square
    other = tmp_path / "other"
    oracle.write_checkpoint(other, checkpoint.config, stacked)
    args = ModelArgs.from_dict(checkpoint.config)
    source = verify.Source(Checkpoint(other), {name: name for name in stacked}, args)
    assert source.places.keys() == tensors.keys()
    for name, wanted in tensors.items():
        assert np.array_equal(torch.cat(list(source.blocks(name))), wanted), name


def adversarial(rng):
    """Weights of unkind distributions, (16, 256) each."""
    normal = rng.standard_normal((16, 256))
    yield normal
    yield rng.standard_t(2, (16, 256))
    yield np.abs(normal) + 5
    yield np.where(rng.random((16, 256)) < 0.02, 100, normal * 1e-3)
    yield np.zeros((16, 256))
    yield np.full((16, 256), 0.3)
    yield rng.uniform(-1, 1, (16, 256)) ** 9
    yield normal * 1e-5


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize(
    "mode, bits, group",
    [
        *(("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)),
        *(("affine", 4, 128), ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)),
    ],
)
def test_no_packing_is_refused(tmp_path, mode, bits, group, dtype):
    """What is allowed is enough for any weights, and within four steps of nothing else."""
    settings = {"mode": mode, "bits": bits, "group_size": group}
    (tmp_path / "config.json").write_text(json.dumps({"quantization": settings}))
    stored = object.__new__(Result)
    stored.settings, stored.places = settings, {"x.weight": ("x.weight", 0, 1)}
    stored.homes = {"x.weight": tmp_path / "model.safetensors"}
    for weight in adversarial(np.random.default_rng(0)):
        weight = weight.astype(np.float32)
        packed = mx.quantize(mx.array(weight).astype(dtype), group, bits, mode)
        names = ("x.weight", "x.scales", "x.biases")
        mx.save_safetensors(str(stored.homes["x.weight"]), dict(zip(names, packed, strict=False)))
        ((unpacked, allowed),) = (map(np.array, block) for block in stored.unpacked("x.weight"))
        assert (np.abs(unpacked - weight) <= allowed).all()
        assert (allowed <= np.abs(weight).max() + 0.006).all()


def test_without_torch(converted, monkeypatch):
    """Asked for, and not to be had: one line that says how to get it."""
    source, target = converted()
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    assert not verify.available()
    with pytest.raises(MCSDError, match="pip install"):
        compare(source, target)


def test_what_torch_refuses(tmp_path, source, target):
    """Pickles of protocol 4 are read and compared, and it is said that torch does not."""
    convert(source, target, verification=False)
    arrays = mx.load(str(source / "model.safetensors")).items()
    weights = {name: torch.from_numpy(np.array(array)) for name, array in arrays}
    torch.save(weights, file := source / "pytorch_model.bin", pickle_protocol=4)
    (source / "model.safetensors").unlink()
    found = compare(source, target)
    assert found.unread == file.name and file.name in found.text()
    weights["model.norm.weight"] *= 1.01
    torch.save(weights, file, pickle_protocol=4)
    with pytest.raises(MCSDError, match="must be the source's"):
        compare(source, target)


def test_one_legacy_file_at_a_time(source, monkeypatch):
    """What torch cannot leave on the disk is let go of before the next file is read."""
    arrays = mx.load(str(source / "model.safetensors"))
    (source / "model.safetensors").unlink()
    names = sorted(arrays)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        torch.save(
            {name: torch.from_numpy(np.array(arrays[name])) for name in part},
            source / f"pytorch_model-0000{number}-of-00002.bin",
            _use_new_zipfile_serialization=False,
        )
    checkpoint = Checkpoint(source)
    args = ModelArgs.from_dict(checkpoint.config)
    opened = verify.Source(checkpoint, {name: name for name in names}, args)
    for name in names:
        assert np.array_equal(torch.cat(list(opened.blocks(name))), np.array(arrays[name]))
        assert list(opened.opened) == next(
            part for part in (names[::2], names[1::2]) if name in part
        )
