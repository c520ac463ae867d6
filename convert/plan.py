"""What a conversion will do, known before a single number is read."""

import json
import math
from dataclasses import dataclass

from mlx_mcsd.config import ModelArgs
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import some
from mlx_mcsd.model import MODEL_FILE, Model

from . import naming, quantization
from .inference import complete
from .mapping import Parameter, assign

# Of a source's config: where its code is, and where it was.
NOT_KEPT = ("auto_map", "_name_or_path", "model_file")


@dataclass
class Plan:
    """A conversion.

    Attributes:
        args: the model's.
        config: what `config.json` will hold.
        names: source name -> name in the layout, of all that are used.
        parameters: what fills each parameter of the model, in order.
        ignored: source name -> why it is not used, of all that is not.
        head: the source's name of a head that must equal the embedding it is tied to, or None.
        notes: lines a user should read.
    """

    args: ModelArgs
    config: dict
    names: dict[str, str]
    parameters: list[Parameter]
    ignored: dict[str, str]
    head: str | None
    notes: list[str]

    @property
    def size(self) -> int:
        """How many numbers the model has."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters)


def make_plan(
    source,
    *,
    dtype=None,
    settings=None,
    q_rules=(),
    name_map=None,
    config=(),
    model_file=True,
):
    """Return the plan of a conversion.

    Args:
        source: a `Checkpoint`.
        dtype: an `mx.Dtype` for all weights that are not quantized, or None.
        settings: of the quantization, from `quantization.settings`, or None.
        q_rules: see `quantization.choose`.
        name_map: a file of rules, see `naming`, or None.
        config: texts KEY=VALUE.
        model_file: name the file in `config.json` that mlx-lm imports the model from.

    Raises:
        MCSDError: for whatever does not fit.
    """
    rules = [] if name_map is None else naming.read_rules(name_map)
    names, ignored = naming.rename(source.tensors, rules, name_map)
    ignored = source.ignored | ignored
    shapes = {name: source.tensors[key][1] for key, name in names.items()}
    args, whole, assumed = complete(source.config, overrides(config), shapes)
    model = Model(args)
    parameters, head = assign(model, source.tensors, names)
    if head:
        ignored[head] = "the embedding once more, which it is tied to"
    notes = [f"{len(ignored)} ignored: {some(f'{k} ({v})' for k, v in ignored.items())}."]
    notes = notes if ignored else []
    notes += [assumed] if assumed else []
    for parameter in parameters if dtype is not None else ():
        parameter.dtype = dtype
    embedding = next(p for p in parameters if p.name == "model.embed_tokens.weight")
    stored = str(embedding.dtype).removeprefix("mlx.core.")
    whole = {k: v for k, v in whole.items() if k not in NOT_KEPT}
    whole |= {"dtype": stored, "torch_dtype": stored}
    whole |= {"model_file": MODEL_FILE} if model_file else {}
    if settings:
        chosen, entry, lines = quantization.choose(model, settings, q_rules)
        for parameter in parameters:
            parameter.settings = chosen.get(parameter.name.removesuffix(".weight"))
        whole |= {"quantization": entry, "quantization_config": entry}
        notes += lines
    return Plan(args, whole, names, parameters, ignored, head, notes)


def overrides(texts):
    """Return the keys of ``KEY=VALUE`` texts; a value is JSON, or else the text itself."""
    keys = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise MCSDError(f"[convert] --config must be KEY=VALUE but got {text[:100]!r}.")
        try:
            keys[key] = json.loads(value)
        except (ValueError, RecursionError):
            keys[key] = value
    return keys
