"""Damaged checkpoints: one line, or a model whose tensors are those that the damaged file declares.

MLX_MCSD_FUZZ sets how many there are, in all.
"""

import io
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout

import mlx.core as mx
import pytest
import safetensors.torch
import torch

import fuzzing
from mlx_mcsd.convert.__main__ import main

COUNT = int(os.environ.get("MLX_MCSD_FUZZ", 240))
SECONDS, STUCK = 10, 100
"""Of work, and of waiting, which a disk that is busy with others may take."""
PARTS = {
    "model.layers.0.mixer.uvef_proj.weight": [f"mixer.{k}_proj" for k in "uvef"],
    "model.layers.0.mlp.gate_up_proj.weight": ["mlp.gate_proj", "mlp.up_proj"],
}


class TooLong(BaseException):
    """The time is up; no handler of errors takes it for one."""


def alarm(*_):
    """Stop a conversion that hangs."""
    raise TooLong


def run(source, target):
    """Run the command; returns its exit status and what it said on stderr."""
    err = io.StringIO()
    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, STUCK)
    began = time.process_time()
    try:
        with redirect_stderr(err), redirect_stdout(io.StringIO()):
            main(["--hf-path", str(source), "--mlx-path", str(target), "--no-verify"])
        return 0, err.getvalue()
    except SystemExit as exit:
        return exit.code, err.getvalue()
    finally:
        assert time.process_time() - began < SECONDS
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def declared(source):
    """Name -> tensor of what the files say, by torch and the safetensors library."""
    state = {}
    for file in sorted(source.iterdir()):
        if file.suffix == ".safetensors":
            state |= safetensors.torch.load_file(file)
        elif file.suffix in (".bin", ".pt", ".pth"):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected pickle protocol")
                saved = torch.load(file, map_location="cpu", weights_only=True)
            state |= saved.get("state_dict", saved)
    return {name.replace("module.", "").replace("_orig_mod.", ""): v for name, v in state.items()}


def parts_of(name):
    """The declared tensors that a tensor of the result is made of, one below the other."""
    return [f"model.layers.0.{part}.weight" for part in PARTS.get(name, [])] or [name]


def check(source, target, status, said):
    """Judge one conversion; returns what is wrong with it, or nothing."""
    lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
    if status not in (0, 1):
        return f"status {status}"
    if status == 1:
        if len(lines) != 1 or not lines[0].startswith("error: ") or len(lines[0]) > 2000:
            return f"no single line: {said!r}"
        if [path for path in target.parent.iterdir() if path != source]:
            return "something was left"
        return ""
    if lines:
        return f"success with words: {said!r}"
    try:
        state = declared(source)
    except Exception as error:
        return f"read, but others refuse it: {error}"
    result = mx.load(str(target / "model.safetensors"))
    used = {part for name in result for part in parts_of(name)}
    if state.keys() - used - ({"lm_head.weight"} if "lm_head.weight" not in result else set()):
        return f"left out: {state.keys() - used}"
    for name, array in result.items():
        parts = [state[part].to(torch.float32) for part in parts_of(name)]
        wanted = torch.cat(parts, -2) if parts[1:] else parts[0]
        got = torch.tensor(array.astype(mx.float32).tolist())
        if got.shape != wanted.shape or not torch.equal(got, wanted):
            return f"{name} differs from what the file declares"
    return ""


@pytest.mark.parametrize("kind", fuzzing.KINDS)
def test_damaged(tmp_path, kind):
    """No traceback, no hang, nothing half-made, and no tensor that the file does not declare."""
    source = fuzzing.write_source(tmp_path / "source", kind)
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(source, home / "whole")
    assert check(home / "whole", home / "target", *run(home / "whole", home / "target")) == ""
    assert (home / "target").exists()
    shutil.rmtree(home)
    failures, converted = [], 0
    for seed in range(-(-COUNT // len(fuzzing.KINDS))):
        home.mkdir()
        done = fuzzing.damage(source, home / "source", kind, seed)
        status, said = run(home / "source", home / "target")
        converted += status == 0
        if wrong := check(home / "source", home / "target", status, said):
            failures.append(f"{kind} {seed} ({done}): {wrong}")
        shutil.rmtree(home)
    print(f"{kind}: {converted} of {seed + 1} converted")
    assert not failures, "\n".join(failures[:10])
    # In bytes on a Mac, in units of 1024 elsewhere.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak * (1 if sys.platform == "darwin" else 1024) < 4 * 2**30
