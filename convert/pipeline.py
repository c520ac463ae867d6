"""A conversion from start to end: open the source, match the names, cast, quantize, write."""

import shlex
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
from google.protobuf.message import DecodeError
from mlx.utils import tree_map
from mlx_lm.utils import quantize_model

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import load_tokenizer, one_line, some
from mlx_mcsd.model import Model
from mlx_mcsd.tokenizer import save_tokenizer

from . import mapping, writing
from .checkpoint import Checkpoint

DTYPES = ("float16", "bfloat16", "float32")
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
    target = new_directory(mlx_path)
    check_choice("--dtype", dtype, (None, *DTYPES))
    check_choice("--q-mode", q_mode, QUANTIZATION)
    usual_group, usual_bits = QUANTIZATION[q_mode]
    group_size = usual_group if q_group_size is None else q_group_size
    bits = usual_bits if q_bits is None else q_bits
    if quantize:
        check_quantization(group_size, bits, q_mode)

    source = Checkpoint(hf_path)
    model = Model(source.args)
    mapping.fill(model, source)
    with TemporaryDirectory() as scratch:
        tokenizer = find_tokenizer(source, Path(scratch))
        if dtype is not None:
            check_range(source, getattr(mx, dtype))
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
        if quantize:
            options += ["-q", "--q-bits", str(bits), "--q-group-size", str(group_size)]
            options += ["--q-mode", q_mode]
        writing.write(
            target,
            model,
            config,
            source=source.directory,
            tokenizer=tokenizer,
            origin=origin,
            options=shlex.join(options),
        )
    return target


def new_directory(path):
    """Return the path to a directory that can be made there, or say why not, before any work."""
    if not str(path):
        raise MCSDError("[convert] --mlx-path must name a directory to make but is empty.")
    try:
        Path(path).lstat()
    except FileNotFoundError:
        return Path(path)
    except (OSError, ValueError) as error:  # too long, below a file, a NUL byte
        reason = getattr(error, "strerror", None) or error
        raise MCSDError(
            f"[convert] --mlx-path must name a directory to make but {str(path)[:80]!r} cannot be "
            f"one: {reason}."
        ) from None
    raise MCSDError(
        f"[convert] {path} must not exist but does; delete it or name another --mlx-path."
    )


def check_choice(flag, value, choices):
    """Refuse a value that is none of the choices; the command's parser does so for its flags."""
    if value not in choices:
        wanted = ", ".join(str(choice) for choice in choices)
        raise MCSDError(f"[convert] {flag} must be one of {wanted} but got {value!r}.")


def check_range(checkpoint, dtype):
    """Refuse a weight that is finite in the source and not in `dtype`."""
    # Read anew and let go one by one: what is evaluated through the model would stay in memory.
    weights = checkpoint.read()
    while weights:
        name, weight = weights.popitem()
        if not mx.array_equal(mx.isfinite(weight), mx.isfinite(weight.astype(dtype))):
            limit = mx.finfo(dtype).max
            raise MCSDError(
                f"[convert] {name} must lie within {limit:g} for this --dtype but does not; use "
                "float32."
            )


def check_quantization(group_size, bits, mode):
    """Let MLX judge the settings on a row of zeros, before any work."""
    # Far above what MLX knows; beyond the integers it counts in, it cannot even say so.
    if not (0 < group_size <= 1024 and 0 < bits <= 32):
        raise MCSDError(
            "[convert] --q-group-size must be from 1 to 1024 and --q-bits from 1 to 32 but got "
            f"{group_size} and {bits}."
        )
    try:
        mx.quantize(mx.zeros((1, 32 * group_size)), group_size, bits, mode)
    except ValueError as error:
        raise MCSDError(one_line(error)) from None


def find_tokenizer(checkpoint, scratch):
    """Return a directory with a tokenizer that loads and fits the model.

    It is the source's own where that has a `tokenizer.json`, else `scratch`, where one is made of
    its `tokenizer.model`; None, after a warning that says why, where neither can be.
    """
    directory = checkpoint.directory
    if (directory / "tokenizer.json").exists():
        load_tokenizer(directory)
        return directory
    reason = f"no tokenizer.json in {directory}"
    if (directory / "tokenizer.model").exists():
        try:
            proto = (directory / "tokenizer.model").read_bytes()
            save_tokenizer(scratch, proto, checkpoint.args.max_position_embeddings)
            for name in ("config.json", "chat_template.jinja"):
                if (directory / name).exists():
                    shutil.copyfile(directory / name, scratch / name)
            load_tokenizer(scratch)
            return scratch
        except (MCSDError, DecodeError, OSError) as error:
            why = one_line(error).replace(str(scratch), str(directory)).rstrip(".")
            reason += f", and none can be made of its tokenizer.model: {why}"
    print(f"warning: converting without a tokenizer: {reason}.", file=sys.stderr)
    return None


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
