"""Which tensor of a source fills which parameter of the model, with nothing over and nothing open.

The checkpoint layout and the run-time tree differ in one thing only: matrices that read the same
input may be apart, or stacked in any mix, on disk, and are one below the other at run time. Which
those are is said once, by each module's `fused`. Names are compared whole.
"""

from dataclasses import dataclass
from itertools import permutations

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import some

# The types of weights, as they arrive: MLX has no float64 on a GPU.
TYPES = {"F64": mx.float32, "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


@dataclass(frozen=True)
class Part:
    """One matrix of a parameter: the `index`-th of the `count` stacked in a source tensor."""

    source: str
    index: int = 0
    count: int = 1


@dataclass
class Parameter:
    """A parameter of the model and what fills it.

    Attributes:
        name: at run time.
        shape: before quantization.
        dtype: likewise.
        parts: in the order of its rows.
        settings: group size, bits and mode of its quantization; None leaves it float.
    """

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    parts: list[Part]
    settings: dict | None = None

    def stored(self) -> dict[str, tuple[mx.Dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of what is written: itself, or weight, scales and biases."""
        if self.settings is None:
            return {self.name: (self.dtype, self.shape)}
        *rows, width = self.shape
        bits, group = self.settings["bits"], self.settings["group_size"]
        path = self.name.removesuffix("weight")
        affine = self.settings["mode"] == "affine"
        scales = (self.dtype if affine else mx.uint8, (*rows, width // group))
        packed = {f"{path}weight": (mx.uint32, (*rows, width * bits // 32))}
        packed[f"{path}scales"] = scales
        return packed | ({f"{path}biases": scales} if affine else {})


class Layout:
    """The names a source may use for a model's tensors.

    Of U, V, E, F any may be stacked, in any order, under the joined name: `uv_proj`, `fe_proj`,
    `uvef_proj`; gate and up likewise, as `gate_up_proj`.

    Attributes:
        shapes: parameter -> shape.
        parts: parameter -> the names of its parts, each stored alone.
        names: name -> (parameter, its parts in the order stacked).
    """

    def __init__(self, model):
        self.shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
        self.parts = {name: [name] for name in self.shapes}
        self.names = {name: (name, (0,)) for name in self.shapes}
        for path, module in model.named_modules():
            for whole, parts in getattr(module, "fused", {}).items():
                parameter = f"{path}.{whole}.weight"
                self.parts[parameter] = [f"{path}.{part}.weight" for part in parts]
                stems = [part.removesuffix("_proj") for part in parts]
                joint = "" if whole == "".join(stems) + "_proj" else "_"
                for count in range(1, len(parts) + 1):
                    for stacked in permutations(range(len(parts)), count):
                        name = joint.join(stems[i] for i in stacked) + "_proj"
                        self.names[f"{path}.{name}.weight"] = (parameter, stacked)


def assign(model, tensors, names):
    """Return what fills each parameter of a model, in the order of its parameters.

    Args:
        model: a `Model`; only the shapes of its parameters count.
        tensors: source name -> (stored type, shape).
        names: source name -> name in the layout, of those that are to be used.

    Returns:
        A list of `Parameter`, and the source's name of a head that is stored beside the embedding
        it is tied to, or None.

    Raises:
        MCSDError: tensors that are missing, that have no place or share one, or of another shape or
            type than their place needs.
    """
    layout = Layout(model)
    fillers = {parameter: [[] for _ in parts] for parameter, parts in layout.parts.items()}
    unexpected, head = [], None
    for source, name in names.items():
        if name == "lm_head.weight" and model.args.tie_word_embeddings:
            head = source
            check(source, *tensors[source], layout.shapes["model.embed_tokens.weight"])
        elif name not in layout.names:
            unexpected.append(source if source == name else f"{source} (renamed {name})")
        else:
            parameter, stacked = layout.names[name]
            for index, part in enumerate(stacked):
                fillers[parameter][part].append(Part(source, index, len(stacked)))

    slots = [
        (name, filler)
        for parameter, parts in layout.parts.items()
        for name, filler in zip(parts, fillers[parameter], strict=True)
    ]
    if twice := [
        f"{name} by {some(part.source for part in filler)}"
        for name, filler in slots
        if len(filler) > 1
    ]:
        raise MCSDError(f"[convert] every tensor must be filled once but is twice: {some(twice)}.")
    missing = [name for name, filler in slots if not filler]
    if missing or unexpected:
        raise MCSDError(mismatch(missing, unexpected))

    parameters = []
    for name, shape in layout.shapes.items():
        parts = [filler for (filler,) in fillers[name]]
        kinds = set()
        for part in parts:
            kind, found = tensors[part.source]
            check(part.source, kind, found, shape, len(parts), part.count)
            kinds.add(TYPES[kind])
        # Of two types the one that holds the numbers of both.
        dtype = kinds.pop() if len(kinds) == 1 else mx.float32
        parameters.append(Parameter(name, tuple(shape), dtype, parts))
    return parameters, head


def mismatch(missing, unexpected):
    """The message for tensors that do not match a model's, both sides of it."""
    sides = [f"missing {some(missing)}"] if missing else []
    sides += [f"unexpected {some(unexpected)}"] if unexpected else []
    advice = "; rules for other names go into a --name-map" if unexpected else ""
    return f"[convert] the tensors do not fit the model: {'; '.join(sides)}{advice}."


def check(source, kind, found, shape, parts=1, stacked=1):
    """Refuse a tensor whose type or shape does not fit its place.

    Args:
        source: its name.
        kind: its stored type.
        found: its shape.
        shape: of the parameter.
        parts: how many matrices make up the parameter.
        stacked: how many of them the tensor holds.
    """
    if kind not in TYPES:
        raise MCSDError(f"[convert] {source} must hold {', '.join(TYPES)} but holds {kind}.")
    wanted = [(*shape[:-2], shape[-2] // parts * stacked, shape[-1]) if shape[1:] else tuple(shape)]
    if len(shape) == 3:  # or the blocks on the diagonal of square matrices
        D = shape[0] * shape[2]
        wanted.append((stacked * D, D))
    if tuple(found) not in wanted:
        raise MCSDError(
            f"[convert] {source} must have shape {' or '.join(map(str, wanted))} but has {found}."
        )
