"""What the command prints: the plan, one JSON object, and nothing written where none was asked."""

import json

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file

from converting import convert, edit_json
from mlx_mcsd.convert import pipeline, streaming


def listing(directory):
    """Every path below a directory, and when it was changed."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def stack(source):
    """Store two projections of layer 0 as one, in another order than the model."""
    tensors = load_file(source / "model.safetensors")
    prefix = "model.layers.0.mixer"
    fe = [tensors.pop(f"{prefix}.{p}_proj.weight") for p in "fe"]
    tensors[f"{prefix}.fe_proj.weight"] = np.concatenate(fe, 1)
    save_file(tensors, source / "model.safetensors")


def test_dry_run(source, target, capsys, monkeypatch):
    """A line for each tensor: from, to, shape, type; no weight is read, nothing is touched."""
    stack(source)
    before = listing(target.parent)
    monkeypatch.setattr(streaming.Reader, "read", lambda *_: 1 / 0)
    flags = ["--dry-run", "--dtype", "float16", "-q", "--q-group-size", "32"]
    convert(source, target, *flags, "--q-rule", "lm_head=float")
    assert listing(target.parent) == before
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = {line.split("  ")[0]: line.split() for line in captured.out.splitlines()}
    quantized = ["affine", "4", "bits,", "groups", "of", "32"]
    uvef = "model.layers.0.mixer.uvef_proj.weight"
    u, fe = f"{uvef[:21]}u_proj.weight", f"{uvef[:21]}fe_proj.weight"
    assert lines[u] == [u, "2x32x32", "F32", uvef, "2x128x32", *quantized]
    assert lines["lm_head.weight"][1:] == ["272x64", "F32", "lm_head.weight", "272x64", "float16"]
    row = lines[f"{fe} [2,1 of 2]"]
    assert row == [fe, "[2,1", "of", "2]", "2x64x32", "F32", uvef, "2x128x32", *quantized]
    last = captured.out.splitlines()[-1]
    assert last.startswith(f"Would write {target}: 22 tensors fill 15 parameters, 88,512 numbers")


def test_json(source, target, capsys):
    """The last word is one object; its tensors are those of the files, its sources all there is."""
    stack(source)
    edit_json(source / "config.json", rms_norm_eps=1e-5)
    convert(source, target, "--json", "-q")
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    assert (report["source"], report["target"], report["written"]) == ("source", str(target), True)
    stored = mx.load(str(target / "model.safetensors"))
    assert report["bytes"] == sum(value.nbytes for value in stored.values())
    assert report["config"] == json.loads((target / "config.json").read_text())
    assert report["config"]["rms_norm_eps"] == 1e-5
    for tensor in report["tensors"]:
        packed = tensor["to"].removesuffix("weight") + "scales" in stored
        assert bool(tensor["quantization"]) is packed
        assert packed or list(stored[tensor["to"]].shape) == tensor["shape"]
    used = {part["name"] for tensor in report["tensors"] for part in tensor["from"]}
    assert used == load_file(source / "model.safetensors").keys()
    first = next(
        t for t in report["tensors"] if t["to"].endswith("layers.0.mixer.uvef_proj.weight")
    )
    assert [part["part"] for part in first["from"]] == [[0, 1], [0, 1], [1, 2], [0, 2]]
    assert report["parameters"] == sum(int(np.prod(t["shape"])) for t in report["tensors"])
    assert "groups of 32" in report["notes"][0]


def test_ignored_things_are_reported(tmp_path, source, target, capsys):
    """What else lay in the file, and a head that is the embedding once more."""
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, source / "model.safetensors")
    edit_json(source / "config.json", tie_word_embeddings=True)
    report = pipeline.convert(source, target, dry_run=True)
    assert report.plan.ignored == {"lm_head.weight": "the embedding once more, which it is tied to"}
    assert "lm_head.weight  ignored: the embedding once more" in report.table()
    assert not report.written and not target.exists()
