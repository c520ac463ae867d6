"""The PyTorch reference under accelerate: two processes learn what one learns, then convert."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import tiny
from oracle import relative_error

torch = pytest.importorskip("torch", reason="the reference needs the convert extra")
pytest.importorskip("accelerate", reason="training needs the convert extra")

TESTS = Path(__file__).resolve().parent
EXAMPLE = TESTS.parent / "examples" / "train_accelerate.py"
SIZES = {
    **{"hidden-size": 24, "channels": 2, "layers": 2, "intermediate-size": 40},
    **{"steps": 5, "batch": 4, "length": 20, "lr": 1e-2},
}


def run_together(count, *command):
    """The same command as `count` processes of one group; returns what rank 0 printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count}
    common |= {"LOCAL_WORLD_SIZE": count, "OMP_NUM_THREADS": 1}
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ
            | {k: str(v) for k, v in (common | {"RANK": r, "LOCAL_RANK": r}).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(count)
    ]
    # One that waits for another for ever is killed, and what all have printed is shown.
    limit = threading.Timer(300, lambda: [process.kill() for process in processes])
    limit.start()
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        limit.cancel()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(outputs)
    return outputs[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder with what one process wrote, and two with DDP and FSDP; what rank 0 printed."""
    out = tmp_path_factory.mktemp("accelerate")
    tiny.write_tokenizer(out)
    (out / "text.txt").write_text("a b ab ba\nbb aa b a b\n" * 40, encoding="utf-8")
    flags = ["--cpu", "--tokenizer", out, "--data", out / "text.txt"]
    flags += [word for key, value in SIZES.items() for word in (f"--{key}", value)]
    assert "1 process" in run_together(1, EXAMPLE, "--out", out / "one", *flags)
    # Each is a launch of its own: a rank that opens a second group may still find the first.
    ddp = run_together(2, EXAMPLE, "--out", out / "ddp", *flags)
    fsdp = run_together(2, TESTS / "accelerated.py", EXAMPLE, "--out", out / "fsdp", *flags)
    return out, {"ddp": ddp, "fsdp": fsdp}


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(trained, sharding):
    """The same losses, and a whole model that converts; MLX gives the logits of PyTorch."""
    from mlx_mcsd import load
    from mlx_mcsd.convert.__main__ import main as convert
    from mlx_mcsd.convert.reference.modeling_mcsd import MCSDForCausalLM

    out, printed = trained
    kind = {"ddp": "2 processes (MULTI_CPU)", "fsdp": "2 processes (FSDP)"}[sharding]
    assert kind in printed[sharding]
    want = losses(out / "one")
    assert len(want) == SIZES["steps"] and want[-1] < want[0] - 0.1
    assert losses(out / sharding) == pytest.approx(want, rel=1e-5)
    alone, model = (MCSDForCausalLM.from_pretrained(out / n).eval() for n in ("one", sharding))
    for (name, a), b in zip(alone.named_parameters(), model.parameters(), strict=True):
        # Adam divides by the root of squares near zero, so rounding is magnified.
        assert relative_error(b.detach(), a.detach()) < 1e-3, name
    convert(["--hf-path", str(out / sharding), "--mlx-path", str(out / f"{sharding}-mlx")])
    twin, tokenizer = load(str(out / f"{sharding}-mlx"))
    ids = np.array(tokenizer.encode("ab ba b"))[None]
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits
    assert relative_error(twin(mx.array(ids)), logits) < 1e-5
