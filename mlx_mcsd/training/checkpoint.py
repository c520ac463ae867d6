"""Checkpoints: one safetensors file each, there whole or not at all, nothing in it executed."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import MCSDError
from ..loading import read_header
from .export import write_safetensors

FORMAT = "mlx_mcsd.checkpoint 1"


def all_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    return sorted(folder.glob("[0-9]*.safetensors"))


def check(tree: dict[str, Any], step: int) -> None:
    """Raise MCSDError if a number is not finite: nobody could go on from such a checkpoint."""
    floats = [a for _, a in tree_flatten(tree) if mx.issubdtype(a.dtype, mx.floating)]
    if not mx.stack([mx.isfinite(a).all() for a in floats]).all().item():
        raise MCSDError(f"[train] the weights or the optimiser are not finite at step {step}.")


def save(folder: Path, step: int, tree: dict[str, Any], facts: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, and delete all but the newest ones.

    Args:
        folder: of the run's checkpoints.
        step: of the run.
        tree: of arrays, finite ones.
        facts: what JSON holds.
        keep: how many checkpoints to leave.

    Raises:
        MCSDError: if it cannot be written.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"{step:08d}.safetensors"
    write_safetensors(path, tree, {"format": FORMAT, "facts": json.dumps(facts)})
    for old in all_of(folder)[:-keep]:
        old.unlink()
    return path


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tree and the facts of a checkpoint.

    Raises:
        MCSDError: if the file is damaged, or something else.
    """
    read_header(path)
    tensors, metadata = mx.load(str(path), return_metadata=True)
    if metadata.get("format") != FORMAT:
        raise MCSDError(f"[train] {path} must be a checkpoint of this version but is none.")
    return tree_unflatten(list(tensors.items())), json.loads(metadata["facts"])
