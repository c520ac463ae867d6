"""Settings that must precede every import of MLX and transformers, and the optional sample data."""

import io
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
import tqdm

import tiny
from mlx_mcsd import load
from storybook import stories, train  # noqa: F401, fixtures

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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model whose tokenizer has an end of text: (directory, config, tensors)."""
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    config, tensors = tiny.write_model(directory)
    tiny.write_tokenizer(directory, eos_token="</s>")
    return directory, config, tensors


@pytest.fixture(scope="module")
def loaded(checkpoint):
    """Model and tokenizer of ``checkpoint``."""
    return load(checkpoint[0])


@pytest.fixture
def command(capsys):
    """Calls a command's main with arguments: (exit code, output, errors)."""

    def call(main, *argv):
        code = 0
        try:
            main([*map(str, argv)])
        except SystemExit as caught:
            code = caught.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def bars(monkeypatch):
    """The progress bars to come, and where each stands by and by: (bar, [(n, total)])."""
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            bars.append((self, []))

        def update(self, n):
            super().update(n)
            bars[-1][1].append((self.n, self.total))

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    return bars
