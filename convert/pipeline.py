"""A conversion from start to end: open the source, match the names, cast, quantize, write."""

import shlex
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.utils import quantize_model

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import load_tokenizer, one_line, some
from mlx_mcsd.model import Model

from . import mapping, writing
from .checkpoint import Checkpoint

# Group size and bits where none are asked for, as in mlx-lm.
QUANTIZATION = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}


def convert(
    hf_path,
    mlx_path="mlx_model",
    *,
    dtype=None,
    quantize=False,
    q_bits=None,
    q_group_size=None,
    q_mode="affine",
):
    """Convert a checkpoint to a directory that `mlx_mcsd.load` and the mlx-lm commands load.

    Args:
        hf_path: a directory in the checkpoint layout, or a hub id.
        mlx_path: the directory to make; it must not exist.
        dtype: "float32", "float16" or "bfloat16", of all weights that are not quantized; None keeps
            the source's types.
        quantize: quantize every matrix whose width is a multiple of the group size.
        q_bits: bits per quantized weight; None is the mode's usual number.
        q_group_size: weights that share a scale; None is the mode's usual number.
        q_mode: "affine", "mxfp4", "nvfp4" or "mxfp8".

    Returns:
        The directory made, a `Path`.

    Raises:
        MCSDError: for whatever is wrong with the source, the target or the options. Nothing is
            written then.
    """
    target = Path(mlx_path)
    if target.exists() or target.is_symlink():
        raise MCSDError(
            f"[convert] {target} must not exist but does; delete it or name another --mlx-path."
        )
    usual_group, usual_bits = QUANTIZATION[q_mode]
    group_size, bits = q_group_size or usual_group, q_bits or usual_bits
    if quantize:
        check_quantization(group_size, bits, q_mode)

    source = Checkpoint(hf_path)
    model = Model(source.args)
    mapping.fill(model, source)
    check_tokenizer(source.directory)

    if dtype is not None:
        model.update(tree_map(lambda w: w.astype(getattr(mx, dtype)), model.parameters()))
    stored = str(model.model.embed_tokens.weight.dtype).removeprefix("mlx.core.")
    config = {k: v for k, v in source.config.items() if k not in ("auto_map", "_name_or_path")}
    config |= {"dtype": stored, "torch_dtype": stored, "model_file": writing.SHIM_NAME}
    if quantize:
        report_unquantized(model, group_size)
        model, config = quantize_model(model, config, group_size, bits, mode=q_mode)

    origin = str(hf_path) if not Path(hf_path).exists() else source.directory.resolve().name
    options = ["--hf-path", origin, "--mlx-path", target.name]
    options += ["--dtype", dtype] if dtype else []
    options += ["-q", "--q-bits", str(bits), "--q-group-size", str(group_size)] if quantize else []
    options += ["--q-mode", q_mode] if quantize else []
    writing.write(
        target,
        model,
        config,
        source=source.directory,
        origin=origin,
        options=shlex.join(options),
    )
    return target


def check_quantization(group_size, bits, mode):
    """Let MLX judge the settings on a row of zeros, before any work."""
    try:
        mx.quantize(mx.zeros((1, 32 * group_size)), group_size, bits, mode)
    except ValueError as error:
        raise MCSDError(one_line(error)) from None


def check_tokenizer(directory):
    """Refuse a tokenizer that does not fit the model; warn where there is none."""
    if (directory / "tokenizer.json").exists():
        load_tokenizer(directory)
    else:
        print(
            f"warning: no tokenizer.json in {directory}; converting without a tokenizer.",
            file=sys.stderr,
        )


def report_unquantized(model, group_size):
    """Say in one line which matrices stay float because their width is no multiple of the group."""
    layers = [(p, m) for p, m in model.named_modules() if hasattr(m, "to_quantized")]
    odd = [path for path, module in layers if module.weight.shape[-1] % group_size]
    if len(odd) == len(layers):
        raise MCSDError(
            "[convert] --q-group-size must divide the width of some matrix but "
            f"{group_size} divides none; use a smaller one, or no -q."
        )
    if odd:
        print(
            f"[INFO] {len(odd)} of {len(layers)} matrices stay float, "
            f"their width being no multiple of {group_size}: {some(odd)}."
        )
