"""Where weights are looked for: every layout, and nothing outside the directory."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from converting import WIDE, convert, edit_json, refused, same
from mlx_mcsd.convert import locate
from mlx_mcsd.convert.checkpoint import Checkpoint
from mlx_mcsd.errors import MCSDError

SAFE, INDEX = "model.safetensors", "model.safetensors.index.json"


def state(source):
    """The weights of a checkpoint."""
    return load_file(source / SAFE)


def shard(source, save, stem, suffix):
    """Write the weights as three shards and their index."""
    tensors = state(source)
    names = sorted(tensors)
    files = {f"{stem}-{i + 1:05}-of-00003{suffix}": names[i::3] for i in range(3)}
    for file, part in files.items():
        save({name: tensors[name] for name in part}, source / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (source / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    (source / SAFE).unlink()


def as_one(file, **options):
    """Write the weights with torch.save to one file."""

    def write(source):
        torch.save(state(source), source / file, **options)
        (source / SAFE).unlink()

    return write


LAYOUTS = {
    "safetensors": lambda s: None,
    "shards": lambda s: shard(s, save_file, "model", ".safetensors"),
    "bin": as_one("pytorch_model.bin"),
    "bin shards": lambda s: shard(s, torch.save, "pytorch_model", ".bin"),
    "pt": as_one("step 100.pt"),
    "ckpt": as_one("last.ckpt"),
    "pth": as_one("last.pth", _use_new_zipfile_serialization=False),
    "other name": lambda s: (s / SAFE).rename(s / "weights.safetensors"),
    "beside a trainer's files": lambda s: (
        as_one("final.pt")(s),
        [(s / f).write_bytes(b"?") for f in ("training_args.bin", "optimizer.pt", "rng_state.pth")],
    ),
    "bin beside safetensors": lambda s: (s / "pytorch_model.bin").write_bytes(b"?"),
}


@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(source, lay_out):
    """The same tensors, whatever files they lie in."""
    wanted = Checkpoint(source)
    wanted = {name: wanted.load(name) for name in wanted.tensors}
    lay_out(source)
    found = Checkpoint(source)
    assert found.tensors.keys() == wanted.keys() and not found.ignored
    assert all(same(found.load(name), wanted[name]) for name in wanted)


@pytest.mark.parametrize("file", ["x.pt", "x.bin", "x.safetensors", "no suffix"])
def test_one_file(source, file, tmp_path):
    """A file alone, beside its config or without any."""
    wanted = state(source)
    if file.endswith("safetensors"):
        (source / SAFE).rename(source / file)
    else:
        as_one(file)(source)
    found = Checkpoint(source / file)
    assert found.directory == source and found.config["model_type"] == "mcsd"
    assert all(found.load(k).tolist() == v.tolist() for k, v in wanted.items())
    (tmp_path / "alone").mkdir()
    (source / file).rename(tmp_path / "alone" / file)
    found = Checkpoint(tmp_path / "alone" / file)
    assert found.config is None and found.tensors.keys() == wanted.keys()


def put_index(source, weight_map):
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def point(source, file):
    """An index that places one tensor elsewhere."""
    put_index(source, dict.fromkeys(state(source), SAFE) | {"model.norm.weight": file})


def outside(source, file=SAFE):
    """Make a file of the checkpoint a link to one beside it."""
    (source.parent / "outside").mkdir(exist_ok=True)
    (source / file).rename(source.parent / "outside" / file)
    (source / file).symlink_to(source.parent / "outside" / file)


def sparse(source, file, size):
    (source / file).touch()
    os.truncate(source / file, size)


def fifo(source, file):
    (source / file).unlink(missing_ok=True)
    os.mkfifo(source / file)


REFUSED = {
    "index above": (lambda s: point(s, f"../source/{SAFE}"), "in its own directory"),
    "index absolute": (lambda s: point(s, str(s / SAFE)), "in its own directory"),
    "index of a number": (lambda s: point(s, 7), "in its own directory"),
    "index of a list": (lambda s: point(s, [SAFE]), "in its own directory"),
    "index of nothing": (lambda s: point(s, ""), "in its own directory"),
    "index of the directory": (lambda s: point(s, "."), "in its own directory"),
    "index below": (lambda s: point(s, f"below/{SAFE}"), "in its own directory"),
    "index of a config": (lambda s: point(s, "config.json"), "in its own directory"),
    "index of a NUL": (lambda s: point(s, "a\0.safetensors"), "weights missing"),
    "index of two lines": (lambda s: put_index(s, {"a\nb": SAFE}), "printable"),
    "index of other files": (lambda s: point(s, "pytorch_model.bin"), "weights missing"),
    "index empty": (lambda s: put_index(s, {}), "must have a weight_map"),
    "index a list": (lambda s: put_index(s, []), "must have a weight_map"),
    "index without a map": (lambda s: (s / INDEX).write_text("{}"), "must have a weight_map"),
    "index nested": (lambda s: (s / INDEX).write_text('{"a":' * 10**5), "must hold JSON"),
    "index of gigabytes": (lambda s: sparse(s, INDEX, 2**40), "at most 67108864 bytes"),
    "index a pipe": (lambda s: fifo(s, INDEX), "must be a file"),
    "index a link": (lambda s: (point(s, SAFE), outside(s, INDEX)), "a link out of it"),
    "index in a loop": (lambda s: (s / INDEX).symlink_to(INDEX), "symbolic link"),
    "tensor not listed": (
        lambda s: put_index(s, dict.fromkeys(list(state(s))[1:], SAFE)),
        "its index does not list",
    ),
    "tensor not there": (
        lambda s: put_index(s, dict.fromkeys([*state(s), "more.weight"], SAFE)),
        "must hold more.weight",
    ),
    "shard not listed": (
        lambda s: (
            put_index(s, dict.fromkeys(state(s), SAFE)),
            save_file({"a": torch.ones(1)}, s / "model-2.safetensors"),
        ),
        "also has model-2.safetensors",
    ),
    "shard of three, no index": (
        lambda s: (s / SAFE).rename(s / "model-00001-of-00003.safetensors"),
        "also hold model-00002-of-00003.safetensors, model-00003-of-00003.safetensors",
    ),
    "shard twice": (
        lambda s: shutil.copy(s / SAFE, s / "model2.safetensors"),
        "is stored twice",
    ),
    "weights linked": (outside, "a link out of it"),
    "weights linked to nowhere": (
        lambda s: ((s / SAFE).unlink(), (s / SAFE).symlink_to("gone")),
        "No such file",
    ),
    "weights a pipe": (lambda s: fifo(s, SAFE), "must be a file"),
    "weights a directory": (
        lambda s: ((s / SAFE).unlink(), (s / SAFE).mkdir()),
        "must be a file",
    ),
    "weights a device": (
        lambda s: ((s / SAFE).unlink(), (s / SAFE).symlink_to("/dev/zero")),
        "a link out of it",
    ),
    "weights of holes": (lambda s: os.truncate(s / SAFE, 2**40), "download it again"),
    "two models": (
        lambda s: ((s / SAFE).rename(s / "a.safetensors"), (s / "b.pt").touch()),
        "has a.safetensors, b.pt; name one",
    ),
    "config linked": (lambda s: outside(s, "config.json"), "a link out of it"),
    "config a pipe": (lambda s: fifo(s, "config.json"), "must be a file"),
    "config of holes": (lambda s: sparse(s, "config.json", 2**40), "on the disk"),
    "config large": (lambda s: sparse(s, "config.json", 2**26 + 1), "at most 67108864 bytes"),
    "config of commas": (
        lambda s: (s / "config.json").write_text('{"a": [' + "[]," * 5_000_000 + "1]}"),
        "at most 4000000 values",
    ),
    "config nested": (lambda s: (s / "config.json").write_text('{"a":' * 10**5), "must hold JSON"),
    "config no UTF-8": (lambda s: (s / "config.json").write_bytes(b'{"\xff": 1}'), "hold JSON"),
    "config with a mark": (
        lambda s: (s / "config.json").write_bytes(b"\xef\xbb\xbf{}"),
        "must hold JSON",
    ),
    "config of digits": (
        lambda s: (s / "config.json").write_text('{"vocab_size": %s}' % ("9" * 5000)),
        "must hold JSON",
    ),
    "generation a pipe": (lambda s: fifo(s, "generation_config.json"), "must be a file"),
    "tokenizer a pipe": (lambda s: fifo(s, "tokenizer.json"), "must be a file"),
    "tokenizer linked": (lambda s: outside(s, "tokenizer.json"), "a link out of it"),
    "tokenizer of a gigabyte": (lambda s: sparse(s, "tokenizer.json", 2**30), "at most 67108864"),
    "template linked": (
        lambda s: (s / "chat_template.jinja").symlink_to("/etc/hostname"),
        "a link out of it",
    ),
}


@pytest.mark.parametrize("spoil, complaint", REFUSED.values(), ids=REFUSED)
def test_refused(source, target, spoil, complaint, capsys):
    """One line within a moment, and nothing made."""
    spoil(source)
    start = time.monotonic()
    assert complaint in refused(capsys, "--hf-path", source, "--mlx-path", target)
    assert time.monotonic() - start < 10
    assert not target.exists()


WRONG = [10**400, "64", [64], {}, True, -64]
WRONG_CONFIGS = [
    *((key, value) for key in ("sections", "fusion", "rms_norm_eps") for value in WRONG),
    *(
        (key, value)
        for key in ("hidden_size", "vocab_size", "num_hidden_layers")
        for value in (*WRONG, 64.5, 2**70, "9" * 99)
    ),
]


@pytest.mark.parametrize("key, value", WRONG_CONFIGS, ids=str)
def test_refused_config(source, target, key, value, capsys):
    """A value of the wrong type or size."""
    edit_json(source / "config.json", **{key: value})
    assert "[" in refused(capsys, "--hf-path", source, "--mlx-path", target)
    assert not target.exists()


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_device(device, target, capsys):
    """A device given as the file."""
    assert "must be a file" in refused(capsys, "--hf-path", device, "--mlx-path", target)


def test_directory_may_be_a_link(source, target):
    """Where a user's own link leads is what they asked for."""
    (source.parent / "link").symlink_to(source)
    convert(source.parent / "link", target)
    (source / SAFE).rename(source / "kept")
    (source / SAFE).symlink_to("kept")
    assert Checkpoint(source.parent / "link").tensors


def test_hub_cache(tmp_path, target):
    """A snapshot of links to the cache's blobs, as the hub's library lays it out."""
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / "0123abcd"
    tiny.write_model(tmp_path / "source", **WIDE)
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted((tmp_path / "source").iterdir())):
        file.rename(cache / "blobs" / f"{i:040}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040}")
    convert(snapshot, target)
    assert (target / SAFE).exists() and not (target / SAFE).is_symlink()


def test_hub_without_safetensors(tmp_path, monkeypatch):
    """A second request asks the hub for .bin files, where the first gave no weights."""
    tiny.write_model(tmp_path / "source", **WIDE)
    as_one("pytorch_model.bin")(tmp_path / "source")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "source")

    bin_file = tmp_path / "source" / "pytorch_model.bin"
    bin_file.rename(tmp_path / "hidden")
    monkeypatch.setattr(locate, "resolve", lambda path: tmp_path / "source")
    monkeypatch.setattr(
        locate,
        "snapshot_download",
        lambda *a, **k: (download(*a, **k), (tmp_path / "hidden").rename(bin_file)),
    )
    assert Checkpoint("owner/name").tensors
    assert asked == [("owner/name", ["pytorch_model*.bin*"])]


def test_hub_fails(tmp_path, monkeypatch):
    """The second request may fail as the first may."""

    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(locate, "resolve", lambda path: tmp_path)
    monkeypatch.setattr(locate, "snapshot_download", fail)
    with pytest.raises(MCSDError, match="no route"):
        Checkpoint("owner/name")
