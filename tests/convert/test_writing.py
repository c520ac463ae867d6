"""The output: in shards that hold what was meant, there complete or not at all."""

import gc
import json
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import oracle
from converting import TOKENS, convert, refused, same
from mlx_mcsd.convert import pipeline, streaming, weights, writing
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import load_model

# --- shards ------------------------------------------------------------------------------------


def test_shards(source, target, monkeypatch):
    """Files within the limit, an index, the same model; a matrix and its scales stay together."""
    convert(source, target, "-q", "--q-group-size", "32")
    monkeypatch.setattr(weights, "SHARD_BYTES", 8000)
    monkeypatch.setattr(streaming, "CHUNK", 999)
    many = target.with_name("many")
    convert(source, many, "-q", "--q-group-size", "32")
    whole = mx.load(str(target / "model.safetensors"))
    index = json.loads((many / "model.safetensors.index.json").read_text())
    homes = dict(index["weight_map"])
    files = sorted(many.glob("*.safetensors"))
    n = len(files)
    assert n > 3
    assert [f.name for f in files] == [
        f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)
    ]
    parts = {file.name: mx.load(str(file)) for file in files}
    for name, value in whole.items():
        assert same(parts[index["weight_map"].pop(name)].pop(name), value)
    assert not index["weight_map"] and not any(parts.values())
    alone = (weights.n_bytes((v.dtype, v.shape)) for v in whole.values())
    assert max(f.stat().st_size for f in files) < 8000 + max(alone)
    for name in homes:
        assert homes[name] == homes[name.rpartition(".")[0] + ".weight"]
    assert index["metadata"] == {
        "total_size": sum(value.nbytes for value in whole.values()),
        "total_parameters": 88_512,
    }
    assert same(load_model(many)(TOKENS), load_model(target)(TOKENS))


def test_every_tensor_begins_at_a_multiple_of_its_width(tmp_path):
    """Types of one, two and four bytes in one file: whoever maps it into memory can read it."""
    arrays = {
        "a": mx.array([[1, 2, 3]], mx.uint8),
        "b": mx.array([[4, 5, 6]], mx.float16),
        "c": mx.array([[7]], mx.uint32),
    }
    group = {name: (value.dtype, value.shape) for name, value in arrays.items()}
    with weights.Shards(tmp_path, [group], 7, {"format": "mlx"}) as shards:
        for name, value in arrays.items():
            shards.append(name, value)
        shards.verify()
    with open(tmp_path / "model.safetensors", "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    assert size % 8 == 0
    begins = {name: header[name]["data_offsets"][0] for name in arrays}
    assert begins == {"c": 0, "b": 4, "a": 10}
    with safe_open(tmp_path / "model.safetensors", "numpy") as tensors:
        assert tensors.metadata() == {"format": "mlx"}
        assert {name: tensors.get_tensor(name).tolist() for name in arrays} == {
            name: value.tolist() for name, value in arrays.items()
        }


def test_what_the_disk_changed_is_noticed(source, target, monkeypatch, capsys):
    """One bit that does not come back as it was written: no model."""
    verify = weights.Shards.verify

    def damage(shards):
        with open(shards.directory / "model.safetensors", "r+b") as file:
            file.seek(-5, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 64]))
        verify(shards)

    monkeypatch.setattr(weights.Shards, "verify", damage)
    line = refused(capsys, "--hf-path", source, "--mlx-path", target)
    assert "model.safetensors must read back as it was written but differs" in line
    assert [path.name for path in target.parent.iterdir()] == ["source"]


def test_rows_that_are_forgotten(tmp_path):
    """A tensor that is written short, or too long, is a mistake of ours, and seen."""
    spec = {"x": (mx.float16, (3, 4))}
    with weights.Shards(tmp_path, [spec], 12, {}) as shards:
        shards.append("x", mx.ones((2, 4), mx.float16))
        with pytest.raises(RuntimeError, match="x lacks 8 bytes"):
            shards.verify()
        with pytest.raises(RuntimeError, match="other rows than promised"):
            shards.append("x", mx.ones((2, 4), mx.float16))
        with pytest.raises(RuntimeError, match="other rows than promised"):
            shards.append("x", mx.ones((1, 4), mx.float32))


# --- memory ------------------------------------------------------------------------------------

STATUS = Path("/proc/self/status")


def resident(key):
    """Bytes of this process that lie in memory: VmRSS now, VmHWM at most."""
    return int(re.search(rf"{key}:\s+([0-9]+) kB", STATUS.read_text())[1]) * 1024


def write_shards(source, D, L):
    """A dense checkpoint of 64 D^2 bytes a layer, a shard each; returns the size of the largest."""
    config = {"hidden_size": D, "intermediate_size": 4 * D, "vocab_size": 16 * D}
    config |= {"num_hidden_layers": L, "num_channels": 4, "projection": "dense"}
    config = oracle.CONFIG | config | {"tie_word_embeddings": True}
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    shards, numbers = {}, np.random.default_rng(0).normal(size=16 * D * D).astype(np.float32)
    for name, shape in oracle.tensor_shapes(config).items():
        layer = name.split(".")[2] if ".layers." in name else L
        shards.setdefault(int(layer), {})[name] = numbers[: math.prod(shape)].reshape(shape)
    homes = {}
    for number, shard in shards.items():
        file = f"model-{number + 1:05}-of-{L + 1:05}.safetensors"
        save_file(shard, source / file)
        homes |= dict.fromkeys(shard, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return max(file.stat().st_size for file in source.glob("*.safetensors"))


@pytest.mark.skipif(not STATUS.exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("flags", [[], ["-q", "--dtype", "float16"]], ids=["float", "quantized"])
def test_memory_does_not_grow_with_the_model(tmp_path, target, flags):
    """A source in twelve shards takes no more than a few; MLX_MCSD_LONG=1 takes one of 3 GB."""
    long = os.environ.get("MLX_MCSD_LONG")
    shard = write_shards(tmp_path / "source", *((2048, 11) if long else (512, 11)))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    convert(tmp_path / "source", target, *flags)
    peak = resident("VmHWM") - before
    total = sum(file.stat().st_size for file in (tmp_path / "source").glob("*.safetensors"))
    print(f"{total / 1e6:.0f} MB, shards of {shard / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert peak < (shard + 1e9 if long else total / 3)


# --- all or nothing ----------------------------------------------------------------------------


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

    monkeypatch.setattr(pipeline, "save_config", stop)
    path = target / "mine" / "new" / "a" / "b"
    assert "No space" in refused(capsys, "--hf-path", source, "--mlx-path", path)
    assert {p.name for p in target.rglob("*")} == {"mine", "new", "other"}
    (target / "mine" / "new" / "other").unlink()
    monkeypatch.setattr(pipeline, "save_config", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(source, path / "c")
    assert {p.name for p in target.rglob("*")} == {"mine", "new"}


@pytest.mark.parametrize(
    "error, status",
    [(OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130)],
    ids=["disk full", "Ctrl-C"],
)
@pytest.mark.parametrize("at", ["pwrite", "fsync", "rename"])
def test_stopped_while_writing(source, target, monkeypatch, at, error, status, capsys):
    """However the writing ends early, no trace of it stays."""
    calls = []

    def stop(*_, **__):
        calls.append(at)
        if at != "pwrite" or len(calls) == 9:
            (partial,) = (p for p in target.parent.iterdir() if p != source)
            assert (partial / "model.safetensors").exists(), "too early to prove anything"
            raise error
        return real(*_)

    real = os.pwrite
    monkeypatch.setattr(writing.Path if at == "rename" else os, at, stop)
    with pytest.raises(SystemExit) as exit:
        convert(source, target)
    monkeypatch.undo()
    assert exit.value.code == status
    assert [path.name for path in target.parent.iterdir()] == ["source"]
    if status == 1:
        assert "could not be written" in capsys.readouterr().err


def test_a_system_that_writes_little_at_a_time(source, target, monkeypatch):
    """A write may take less than it is given."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:1000], at))
    convert(source, target)
    assert same(load_model(source)(TOKENS), load_model(target)(TOKENS))


def test_a_limit_of_the_system(source, target, capsys):
    """A file that may not grow on: one line, and nothing stays."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9999, before[1]))
    try:
        line = refused(capsys, "--hf-path", source, "--mlx-path", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "could not be written" in line and "File too large" in line
    assert [path.name for path in target.parent.iterdir()] == ["source"]


HOLD = """
import sys, time
from mlx_mcsd.convert.writing import directory
with directory(sys.argv[1]) as out:
    (out / "begun").touch()
    print(out, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_run_left_goes(root, source, target):
    """Its directory is removed by the next run; that of a run that lives is left alone."""
    command = [sys.executable, "-c", HOLD, target]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as run:
        dead = target.parent / run.stdout.readline().strip()
        run.kill()
    elsewhere, lock = writing.make_partial(target.with_name(target.name + ".2"))
    os.close(lock)
    bystander = target.with_name(f".{target.name}.note.partial")
    bystander.write_text("no directory")
    assert (dead / "begun").exists()
    with pytest.raises(MCSDError, match="Directory not empty"), writing.directory(target) as alive:
        assert not dead.exists()
        (alive / "begun").touch()
        convert(source, target)
        assert (alive / "begun").exists(), "of a run that lives"
    assert not alive.exists(), "the run that was late found the place taken"
    assert elsewhere.exists() and bystander.exists()
    assert same(load_model(source)(TOKENS), load_model(target)(TOKENS))


def test_a_file_system_without_locks(source, target, monkeypatch):
    """There a run works as well, but what another left stays: it might live."""

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    left, lock = writing.make_partial(target)
    os.close(lock)
    monkeypatch.setattr(writing.fcntl, "flock", refuse)
    convert(source, target)
    assert left.exists() and (target / "config.json").exists()
