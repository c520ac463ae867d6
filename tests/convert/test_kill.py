"""A conversion killed at any moment leaves the whole model or none, and the next one tidies up.

MLX_MCSD_KILLS sets how many are killed.
"""

import os
import random
import signal
import subprocess
import sys
import time

import tiny
from converting import convert

COUNT = int(os.environ.get("MLX_MCSD_KILLS", 5))
# Imports take a second, and are not what is to be killed.
CHILD = """
import sys
from mlx_mcsd.convert.__main__ import main
from mlx_mcsd.convert import pipeline
print("ready", flush=True)
sys.stdin.readline()
main(["--hf-path", sys.argv[1], "--mlx-path", sys.argv[2], "--no-verify"])
"""


def start(source, target):
    """Start a conversion, the imports done; returns the process."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, source, target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout.readline() == "ready\n"
    child.stdin.write("\n")
    child.stdin.flush()
    return child


def writing_begins(child, home):
    """Wait until a partial directory is there that was not; returns when that was."""
    before = set(home.glob(".*"))
    while child.poll() is None and not set(home.glob(".*")) - before:
        time.sleep(0.0005)
    return time.monotonic()


def contents(directory):
    """Name -> bytes of every file below."""
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }


def clear(directory):
    """Remove a directory of files."""
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()


def test_killed(tmp_path):
    """SIGKILL at random moments from the first file's until after the last's."""
    wide = {"hidden_size": 384, "intermediate_size": 1024, "num_channels": 2}
    tiny.write_model(tmp_path / "source", **wide)
    home = tmp_path / "home"
    home.mkdir()
    target = home / "target"
    child = start(tmp_path / "source", target)
    began = writing_begins(child, home)
    while not target.exists() and child.poll() is None:
        time.sleep(0.0005)
    duration = time.monotonic() - began
    child.communicate()
    whole = contents(target)
    assert child.returncode == 0 and {"config.json", "model.safetensors"} <= whole.keys()
    clear(target)

    rng = random.Random(0)
    partial = complete = 0
    for i in range(COUNT):
        child = start(tmp_path / "source", target)
        began = writing_begins(child, home)
        # At once, then later and later; the first run, from a cold disk, may have taken longest.
        moment = 1.1 * duration * (i + rng.random()) / COUNT if i else 0.0
        try:
            child.wait(max(0, began + moment - time.monotonic()))
            duration = min(duration, time.monotonic() - began)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
        child.communicate()
        if target.exists():
            assert contents(target) == whole, f"killed after {moment:.3f} s"
            clear(target)
            complete += 1
        left = list(home.iterdir())
        assert all(path.name.startswith(".target.") for path in left), left
        assert len(left) <= 1, "a run takes away what the one before left"
        partial += bool(left)
    print(f"{partial} of {COUNT} left a part, {complete} the whole, in {duration:.3f} s")
    assert partial, "every kill came too late to prove anything"

    convert(tmp_path / "source", target)
    assert [path.name for path in home.iterdir()] == ["target"]
    assert contents(target) == whole
