"""The config of a model, from what its tensors are called and shaped.

What the tensors show must agree with `config.json`; what they cannot show is taken from it, from
the user, or assumed, in this order.
"""

import dataclasses
import re

from mlx_mcsd.config import ModelArgs
from mlx_mcsd.errors import MCSDError

from .mapping import mismatch

LAYER = re.compile(r"model\.layers\.([0-9]{1,4})\.(.+)\.weight")
REST = ("model.embed_tokens.weight", "model.norm.weight")
PROJECTIONS = re.compile(r"mixer\.([uvef]{1,4})_proj")
# What a config cannot do without -> the tensor that shows it.
SHOWN_BY = {
    "vocab_size": "model.embed_tokens.weight",
    "num_hidden_layers": "model.layers.0",
    "intermediate_size": "model.layers.0.mlp.gate_proj.weight",
}

# The MLP's matrices -> how many times F their rows are.
MLP = {"mlp.gate_proj": 1, "mlp.up_proj": 1, "mlp.gate_up_proj": 2, "mlp.up_gate_proj": 2}

# Letters of the projections, whether there is a decay_norm and a decay_norm_0 -> sections.
SECTIONS = {
    ("uv", False, False): ["slope"],
    ("ef", True, False): ["decay"],
    ("efuv", True, False): ["slope", "decay"],
    ("efuv", False, False): ["slope", "slope"],
    ("efuv", True, True): ["decay", "decay"],
}


def infer(shapes, projection=None):
    """Return the config keys that tensors determine.

    Args:
        shapes: name in the layout -> shape.
        projection: where known; square matrices are dense or blocks on a diagonal.
    """
    found, layers, block = {}, set(), {}
    for name, shape in shapes.items():
        if match := LAYER.fullmatch(name):
            layers.add(int(match[1]))
            block.setdefault(match[2], shape)  # any layer's: they must all agree in the end
    embedding = shapes.get("model.embed_tokens.weight", ())
    if len(embedding) == 2:
        found = dict(zip(("vocab_size", "hidden_size"), embedding, strict=True))
    if not layers:
        return found
    found["num_hidden_layers"] = max(layers) + 1
    if widths := [shape[0] // MLP[n] for n, shape in block.items() if n in MLP and shape]:
        found["intermediate_size"] = widths[0]
    projections = {m[1]: shape for n, shape in block.items() if (m := PROJECTIONS.fullmatch(n))}
    letters = "".join(sorted(set("".join(projections))))
    norms = ("mixer.decay_norm" in block, "mixer.decay_norm_0" in block)
    if sections := SECTIONS.get((letters, *norms)):
        found["sections"] = sections
    if channels := {shape[0] for shape in projections.values() if len(shape) == 3}:
        found |= {"projection": "channel", "num_channels": min(channels)}
    elif projections and projection != "channel":
        found["projection"] = "dense"
    found["output_projection"] = "mixer.o_proj" in block
    if "hidden_size" in found and len(sections or ()) == 2 and "mixer.o_proj" in block:
        found["fusion"] = "add" if block["mixer.o_proj"][-1:] == embedding[1:] else "concat"
    # A name nobody knows may be the head's.
    if "lm_head.weight" not in shapes and all(n in REST or LAYER.fullmatch(n) for n in shapes):
        found["tie_word_embeddings"] = True
    return found


def complete(config, overrides, shapes):
    """Return the whole config of a source.

    Args:
        config: the content of `config.json`, or None.
        overrides: keys the user sets.
        shapes: name in the layout -> shape.

    Returns:
        The checked `ModelArgs`, the config to write, and a line on what was merely assumed, or "".

    Raises:
        MCSDError: keys that are unknown or unfit, that disagree with the tensors, or that nothing
            tells.
    """
    given = (config or {}) | overrides
    if given.get("model_type", "mcsd") != "mcsd":
        ModelArgs.from_dict(given)  # says so, before another architecture's tensors are called odd
    found = infer(shapes, given.get("projection"))
    if wrong := [
        f"{key} is {given[key]!r} but the tensors have {value!r}"
        for key, value in found.items()
        # A value of another type is unfit whatever the tensors have, and refused below.
        if key in given and type(given[key]) is type(value) and given[key] != value
    ]:
        raise MCSDError(f"[convert] the config must agree with the tensors: {'; '.join(wrong)}.")
    whole = {"model_type": "mcsd"} | found | given
    if needed := [name for key, name in SHOWN_BY.items() if key not in whole]:
        raise MCSDError(mismatch(needed, [n for n in shapes if not LAYER.fullmatch(n)]))
    if "num_channels" not in whole:
        raise MCSDError(
            "[convert] num_channels must be known but dense projections do not show it; give "
            "--config num_channels=C."
        )
    args = ModelArgs.from_dict(whole)
    if config is not None:
        return args, whole, ""
    everything = dataclasses.asdict(args)
    unseen = [key for key in ("hidden_act", "rms_norm_eps") if key not in given]
    assumed = [f"{key} {everything[key]}" for key in unseen]
    note = (
        f"without a config.json, {', '.join(assumed)} assumed; set others with --config KEY=VALUE."
        if assumed
        else ""
    )
    return args, everything | whole, note
