"""What `import mlx_mcsd` does, in a process of its own: little, and nothing against the user."""

import json
import os
import subprocess
import sys

NAMES = ["load", "Model", "ModelArgs", "State", "stream_generate"]
REPORT = """
import json, os, sys
import mlx_mcsd
light = "mlx.core" not in sys.modules
names = [getattr(mlx_mcsd, name).__name__ for name in json.loads(sys.argv[1])]
tf32 = os.environ["MLX_ENABLE_TF32"]
print(json.dumps({"light": light, "names": names, "tf32": tf32}))
"""


def report(**environment):
    kept = {k: v for k, v in os.environ.items() if k != "MLX_ENABLE_TF32"}
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", REPORT, json.dumps(NAMES)],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stderr == ""
    return json.loads(out.stdout)


def test_import_is_light_exports_resolve_and_float32_stays_float32():
    assert report() == {
        "light": True,
        "names": NAMES,
        "tf32": "0",
    }


def test_a_user_who_wants_tf32_keeps_it():
    assert report(MLX_ENABLE_TF32="1")["tf32"] == "1"
