"""The way back: an MLX model as a Hugging Face directory, which transformers loads with PyTorch."""

from importlib.resources import files
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import save_config
from tqdm import tqdm

from mlx_mcsd.config import ModelArgs
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import check_tensors, read_config, read_headers, resolve, some
from mlx_mcsd.model import Model

from . import writing
from .result import Result
from .tokens import FILES, copy
from .weights import Shards

REFERENCE = ("configuration_mcsd.py", "modeling_mcsd.py")
AUTO_MAP = {
    "AutoConfig": "configuration_mcsd.MCSDConfig",
    "AutoModelForCausalLM": "modeling_mcsd.MCSDForCausalLM",
}

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- mcsd
---

# {name}

An MCSD language model for PyTorch, converted from the MLX model `{origin}` with

    python -m mlx_mcsd.convert --reverse {options}

To run it:

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("{name}")
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
"""


def reverse(mlx_path, hf_path, *, dtype=None, dequantize=False):
    """Write the Hugging Face directory of an MLX model: there and back, every bit is the same.

    Args:
        mlx_path: the model, a directory or hub id, converted here or saved by mlx-lm.
        hf_path: the directory to make; it must not exist.
        dtype: "float32", "float16" or "bfloat16"; None keeps the types.
        dequantize: unpack quantized weights, which PyTorch does not have.

    Returns:
        The directory made, a `Path`.

    Raises:
        MCSDError: for whatever is wrong with the model or the target; nothing is written then.
    """
    target = writing.new_directory(hf_path, "--hf-path")
    source = resolve(mlx_path)
    config = read_config(source)
    args = ModelArgs.from_dict(config)
    if args.mixer != "mcsd":
        raise MCSDError(
            f"[convert] the mixer must be mcsd, which the PyTorch model has, but is {args.mixer}."
        )
    check_tensors(Model(args), read_headers(source))
    result = Result(source, args)
    packed = [name for name in result.places if result.dtype(name) is None]
    if packed and not dequantize:
        raise MCSDError(
            f"[convert] {mlx_path} must hold float weights but {some(packed)} are quantized; "
            "--dequantize writes what they stand for."
        )
    # Norms are never packed: their type is the one the model had before.
    kept = {name: result.dtype(name) or result.dtype("model.norm.weight") for name in result.places}
    types = {name: getattr(mx, dtype) if dtype else kind for name, kind in kept.items()}

    stored = str(types["model.embed_tokens.weight"]).removeprefix("mlx.core.")
    gone = ("model_file", "quantization", "quantization_config")
    config = {key: value for key, value in config.items() if key not in gone}
    config |= {"dtype": stored, "torch_dtype": stored}
    config |= {"architectures": ["MCSDForCausalLM"], "auto_map": AUTO_MAP}
    origin = source.resolve().name if Path(mlx_path).exists() else str(mlx_path)
    options = f"--mlx-path {origin} --hf-path {target.name}"
    options += f" --dtype {dtype}" if dtype else ""
    options += " --dequantize" if dequantize else ""
    with writing.directory(target) as out:
        save_config(config, out / "config.json")
        for name in REFERENCE:
            text = (files("mlx_mcsd.convert.reference") / name).read_bytes()
            (out / name).write_bytes(text)
        copy((*FILES, "generation_config.json", "LICENSE"), source, out)
        write_weights(out, result, types)
        card = CARD.format(name=target.name, origin=origin, options=options)
        (out / "README.md").write_text(card)
    return target


def write_weights(out, result, types):
    """Write every tensor under its name in the layout, and read all of them back."""
    shapes = {name: result.read(name).shape for name in types}  # read only when evaluated
    groups = [{name: (types[name], shape)} for name, shape in shapes.items()]
    with Shards(out, groups, result.size, {"format": "pt"}) as shards:
        for name, kind in tqdm(types.items(), unit="tensor", disable=None):
            tensor = result.read(name)
            cast = tensor.astype(kind)
            if not mx.array_equal(mx.isfinite(tensor), mx.isfinite(cast)):
                raise MCSDError(
                    f"[convert] {name} must lie within {mx.finfo(kind).max:g} for this --dtype but "
                    "does not; use float32."
                )
            shards.append(name, cast)
            mx.clear_cache()
        shards.verify()
