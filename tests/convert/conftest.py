"""What every test of the converter starts from."""

import pytest

import tiny
from converting import WIDE


@pytest.fixture
def source(tmp_path):
    """A checkpoint with a tokenizer, two layers, widths that can be quantized."""
    tiny.write_model(tmp_path / "source", **WIDE)
    return tmp_path / "source"


@pytest.fixture
def target(tmp_path):
    """Where to convert to; nothing is there yet."""
    return tmp_path / "target"
