"""The model's directory, as the converter writes them: `mlx_mcsd.load` and mlx-lm load it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import save_config

from ..config import ModelArgs
from ..errors import MCSDError
from ..files import replacing, write_atomically
from ..model import MODEL_FILE, SHIM, Model

WEIGHTS = "model.safetensors"


def write_config(out: Path, args: ModelArgs, dtype: str) -> None:
    """Write ``config.json``, and the file that mlx-lm imports the model from."""
    config = dataclasses.asdict(args) | {
        "architectures": ["MCSDForCausalLM"],
        "dtype": dtype,
        "torch_dtype": dtype,
        "model_file": MODEL_FILE,
    }
    with replacing(out / "config.json") as partial:
        save_config(config, partial)
    write_atomically(out / MODEL_FILE, SHIM.encode())


def write_weights(out: Path, model: Model, dtype: str) -> None:
    """Write the weights in a dtype, and their index."""
    weights = tree_map(lambda w: w.astype(getattr(mx, dtype)), model.parameters())
    write_safetensors(out / WEIGHTS, weights, {"format": "mlx"})
    weights = dict(tree_flatten(weights))
    index = {
        "metadata": {
            "total_size": sum(w.nbytes for w in weights.values()),
            "total_parameters": sum(w.size for w in weights.values()),
        },
        "weight_map": dict.fromkeys(sorted(weights), WEIGHTS),
    }
    write_atomically(out / f"{WEIGHTS}.index.json", (json.dumps(index, indent=4) + "\n").encode())


def write_safetensors(path: Path, tree: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write the arrays of a tree; the file is whole or what was there stays.

    Raises:
        MCSDError: if it cannot be written.
    """
    with replacing(path) as partial:
        try:
            mx.save_safetensors(str(partial), dict(tree_flatten(tree)), metadata)
        except RuntimeError as error:  # what MLX makes of a full disk
            raise MCSDError(f"cannot write {path}: {error}.") from error
