"""Settings that must precede every import of MLX and transformers, and the optional sample data."""

import os
from pathlib import Path

# On the CPU each newly compiled shape costs a run of the C++ compiler, about a second.
os.environ["MLX_DISABLE_COMPILE"] = "1"
# The newest GPUs would multiply float32 with 11 bits.
os.environ["MLX_ENABLE_TF32"] = "0"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

import mlx.core as mx
import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_runtest_setup(item):
    if item.get_closest_marker("metal") and not mx.metal.is_available():
        pytest.skip("needs a GPU with Metal")


@pytest.fixture(scope="session")
def root():
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir():
    """Sample data shared between checkouts: $MLX_MCSD_DATA, or ../shared/data beside this one."""
    path = Path(os.environ.get("MLX_MCSD_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip("no sample data: MLX_MCSD_DATA is unset and ../shared/data is absent")
    return path
