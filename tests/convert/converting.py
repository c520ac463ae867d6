"""Runs the converter and looks at what it wrote."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_mcsd.convert.__main__ import main

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_channels": 2}
"""Widths 64 and 32 take part in quantization by groups of 32."""

TOKENS = mx.array(np.random.default_rng(0).integers(0, 48, (2, 9)))


def convert(source, target, *flags):
    """Run the command in this process; it compares with PyTorch only where a test says --verify."""
    unasked = [] if "--verify" in flags else ["--no-verify"]
    main(["--hf-path", str(source), "--mlx-path", str(target), *unasked, *flags])


def edit_json(file, **changes):
    """Set keys of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def parameters(model):
    """Name -> array of everything that is saved."""
    return dict(tree_flatten(model.parameters()))


def same(a, b):
    """Equal in shape, type and every bit that counts."""
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b).item()


def refused(capsys, *argv):
    """Run a command that must end with one line on stderr and status 1; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(arg) for arg in argv])
    assert exit.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line
