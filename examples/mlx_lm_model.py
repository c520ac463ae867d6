"""Write MCSD as a model file of mlx-lm itself, ready to be proposed there: mlx_lm/models/mcsd.py.

    python examples/mlx_lm_model.py mcsd.py

With the file in place mlx-lm runs our models without --trust-remote-code and without this package.
The arguments, the equations and the recurrence are copied from the package's own source, comments
and all; what is written out below is the frame around them, in plain operations: no kernels, no
sharding. The same package always gives the same file.
"""

import argparse
import ast
import re
from importlib.resources import files
from pathlib import Path
from string import Template

FRAME = Template('''\
# Copyright © 2026 Apple Inc.

"""MCSD: a slope section and a decay section over one fixed-decay recurrence, fused.

Source: "MCSD: An Efficient Language Model with Diverse Fusion", arXiv 2406.12230; equation numbers
are the paper's. Letters: B batch, N tokens, D hidden size, C channels, Dc = D / C, F MLP width,
K vocabulary, T tokens per chunk.
"""

import math
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, List, NamedTuple, Optional, Sequence, Union

import mlx.core as mx
import mlx.nn as nn

from .base import BaseModelArgs, create_ssm_mask
from .cache import ArraysCache
from .switch_layers import SwitchLinear

CHUNK = $CHUNK  # T


@dataclass
class ModelArgs(BaseModelArgs):
$fields

    def __post_init__(self):
        if self.hidden_size % self.num_channels:
            raise ValueError(
                "hidden_size must be divisible by num_channels but got "
                f"{self.hidden_size} and {self.num_channels}."
            )
        if self.num_channels > $MAX_CHANNELS:
            raise ValueError(
                f"num_channels must be at most $MAX_CHANNELS but got {self.num_channels}."
            )


$slopes


$decays


$slope


$decay


def scan(x, lam, h0, mask=None):
    """h_{n+1} = lambda (h_n + x_n): the state before each token and the last, float32.

    Args:
        x: (B, N, C, Dc).
        lam: C decays.
        h0: (B, C, Dc) float32.
        mask: (B, N) bool; the state passes a token that is False unchanged.
    """
    return (step if x.shape[1] == 1 else chunked)(x, lam, h0, mask)


$step


$chunked


$count_tokens


$_states


@lru_cache(maxsize=64)
def _powers(lam, stride, lag):
    """Weights, in the state after element i, of element j (C, T, T) and of the start (T, C).

    The powers are taken in double precision: lambda^stride would lose its digits in float32.
    """
    T = range(CHUNK)
    weight = [
        [[v ** (stride * (i - j) + lag) if j <= i else 0.0 for j in T] for i in T] for v in lam
    ]
    decay = [[v ** (stride * (i + 1)) for v in lam] for i in T]
    return mx.array(weight), mx.array(decay)


@lru_cache(maxsize=64)
def _column(lam):
    """The decays as (C, 1) float32."""
    return mx.array(lam)[:, None]


$Slot


$_slots


class MCSD(nn.Module):
    """The MCSD block (Eqs. 1-21). State: one (B, C, Dc) array per section and the count n, (B,)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        D, C = args.hidden_size, args.num_channels
        self.C, self.Dc = C, D // C
        self.channelwise = args.projection == "channel"
        self.concat = args.fusion == "concat"
        self._slots = _slots(args.sections)
        self._lam = {"slope": tuple(math.exp(-b) for b in slopes(C)), "decay": decays(C)}
        self._beta = mx.array(slopes(C))[:, None]  # (C, 1)

        # One matrix holds every projection, its rows in the order U, V, E, F.
        used = {name for slot in self._slots for name in (slot.current, slot.history)}
        self.projections = "".join(name for name in "uvef" if name in used)
        k = len(self.projections)
        self[f"{self.projections}_proj"] = (
            SwitchLinear(self.Dc, k * self.Dc, C, bias=False)
            if self.channelwise
            else nn.Linear(D, k * D, bias=False)
        )
        for slot in self._slots:
            if slot.section == "decay":
                self[slot.norm] = nn.RMSNorm(D, args.rms_norm_eps)
        if args.output_projection:
            theta = len(self._slots) * D if self.concat else D
            self.o_proj = nn.Linear(theta, D, bias=False)

    @property
    def fused(self):
        return {f"{self.projections}_proj": tuple(f"{p}_proj" for p in self.projections)}

    def init_state(self, batch):
        shape = (batch, self.C, self.Dc)
        return [mx.zeros(shape, mx.float32) for _ in self._slots] + [mx.zeros(batch, mx.int32)]

    def __call__(self, x: mx.array, state=None, mask: Optional[mx.array] = None):
        B, N, _ = x.shape
        *past, count = self.init_state(B) if state is None else state
        projected = self._project(x)
        n, count = count_tokens(count, N, mask)
        n = n[..., None, None]  # (B, N, 1, 1)
        outputs = []
        for i, slot in enumerate(self._slots):
            current, history = projected[slot.current], projected[slot.history]
            h, past[i] = scan(history, self._lam[slot.section], past[i], mask)
            if slot.section == "slope":
                outputs.append(slope(current, history, h, n, self._beta))
            else:
                norm = self[slot.norm]
                outputs.append(decay(current, history, h, n, norm.weight, norm.eps))
        # theta (B, N, C, Dc), or (B, N, C, 2 Dc) with each channel's sections side by side
        theta = mx.concatenate(outputs, axis=-1) if self.concat else sum(outputs[1:], outputs[0])
        theta = theta.reshape(B, N, -1).astype(x.dtype)
        return self.o_proj(theta) if "o_proj" in self else theta, [*past, count]

    def _project(self, x):
        """U, V, E, F (Eqs. 1, 7), each (B, N, C, Dc), by their lower-case names."""
        B, N, _ = x.shape
        C, Dc, k = self.C, self.Dc, len(self.projections)
        proj = self[f"{self.projections}_proj"]
        if self.channelwise:
            if mx.default_device() == mx.cpu:
                x = x.astype(mx.float32)  # the only dtype of gathered products on the CPU
            x = x.reshape(B * N, C, Dc).swapaxes(0, 1)  # (C, B*N, Dc)
            y = proj(x, mx.arange(C))  # (C, B*N, k*Dc)
            y = y.reshape(C, B, N, k * Dc).transpose(1, 2, 0, 3)  # (B, N, C, k*Dc)
            parts = mx.split(y, k, axis=-1)
        else:
            parts = [p.reshape(B, N, C, Dc) for p in mx.split(proj(x), k, axis=-1)]
        return dict(zip(self.projections, parts))


ACTIVATIONS = {"gelu": nn.gelu, "gelu_pytorch_tanh": nn.gelu_approx, "silu": nn.silu}


class MLP(nn.Module):
    fused = {"gate_up_proj": ("gate_proj", "up_proj")}

    def __init__(self, args: ModelArgs):
        super().__init__()
        D, F = args.hidden_size, args.intermediate_size
        self.hidden_act = args.hidden_act
        self.gate_up_proj = nn.Linear(D, 2 * F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(ACTIVATIONS[self.hidden_act](gate) * up)


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.mixer = MCSD(args)
        self.mlp_norm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.mlp = MLP(args)

    def __call__(self, x: mx.array, cache=None, mask: Optional[mx.array] = None) -> mx.array:
        state = None if cache is None or cache.empty() else cache.cache
        y, state = self.mixer(self.mixer_norm(x), state, mask)
        if cache is not None:
            cache.cache = state
            cache.advance(x.shape[1])
        x = x + y
        return x + self.mlp(self.mlp_norm(x))


class MCSDModel(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)

    def __call__(self, inputs, cache=None, input_embeddings=None) -> mx.array:
        x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        cache = cache or [None] * len(self.layers)
        mask = create_ssm_mask(x, cache[0])
        for layer, c in zip(self.layers, cache):
            x = layer(x, c, mask)
        return self.norm(x)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = MCSDModel(args)
        self._tied = args.tie_word_embeddings
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self,
        inputs: mx.array,
        cache: Optional[Any] = None,
        input_embeddings: Optional[mx.array] = None,
    ) -> mx.array:
        x = self.model(inputs, cache, input_embeddings)
        return self.model.embed_tokens.as_linear(x) if self._tied else self.lm_head(x)

    @property
    def layers(self):
        return self.model.layers

    def make_cache(self):
        return [ArraysCache(len(layer.mixer._slots) + 1) for layer in self.layers]

$sanitize
''')

# What is copied: function, class or method -> the file it lies in.
COPIED = {
    "mixers/mcsd.py": ("slopes", "decays", "slope", "decay", "Slot", "_slots"),
    "recurrence.py": ("step", "chunked", "count_tokens", "_states"),
    "model.py": ("Model.sanitize",),
}
TYPES = {"TokenIds": "Union[int, List[int], None]", "list[str]": "List[str]"}


def module_source(name):
    """The text of one of the package's modules."""
    return (files("mlx_mcsd") / name).read_text(encoding="utf-8")


def find(tree, name):
    """The definition of a name, dots for methods; a ValueError where there is none."""
    for part in name.split("."):
        tree = next((n for n in tree.body if getattr(n, "name", None) == part), None)
        if tree is None:
            raise ValueError(f"{name} is not defined where it was; mend COPIED.")
    return tree


def is_check(node):
    """Whether a statement only checks arguments: nobody outside the mixer calls these there."""
    if isinstance(node, ast.If):
        return all(isinstance(inner, ast.Raise) for inner in node.body) and not node.orelse
    return isinstance(node, ast.Assign) and "check_scan(" in ast.unparse(node.value)


def copy(source, name, keep_checks=False):
    """The text of a definition, decorators and comments included, without its argument checks."""
    node = find(ast.parse(source), name)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = source.splitlines()
    dropped = set()
    for inner in [] if keep_checks else ast.walk(node):
        if is_check(inner):
            dropped.update(range(inner.lineno, inner.end_lineno + 1))
    text = "\n".join(lines[i - 1] for i in range(first, node.end_lineno + 1) if i not in dropped)
    text = re.sub(r"\n\n +Raises:\n(?: +\S.*\n)+?(?= +\"\"\")", "\n    ", text)
    return text.replace("MCSDError", "ValueError").replace("[Model] ", "")


def fields(source):
    """The fields of ModelArgs, those without a default first, as a dataclass needs them."""
    lines = {True: [], False: []}
    for node in find(ast.parse(source), "ModelArgs").body:
        if isinstance(node, ast.AnnAssign):
            kind = ast.unparse(node.annotation)
            kind = "str" if kind.startswith("Literal") else TYPES.get(kind, kind)
            value = "" if node.value is None else f" = {ast.unparse(node.value)}".replace("'", '"')
            lines[node.value is None].append(f"    {node.target.id}: {kind}{value}")
    return "\n".join(lines[True] + lines[False])


def constant(source, name):
    """The value of a constant of a module."""
    (value,) = re.findall(rf"^{name} = (\d+)", source, re.MULTILINE)
    return value


def generate():
    """Return the text of the file."""
    config = module_source("config.py")
    parts = {"fields": fields(config), "MAX_CHANNELS": constant(config, "MAX_CHANNELS")}
    parts["CHUNK"] = constant(module_source("recurrence.py"), "CHUNK")
    for file, names in COPIED.items():
        source = module_source(file)
        for name in names:
            text = copy(source, name, keep_checks=name == "Model.sanitize")
            parts[name.split(".")[-1]] = text
    return FRAME.substitute(parts)


def main(argv=None):
    """Write the file named on the command line, or print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", help="the file to write (default: standard output)")
    args = parser.parse_args(argv)
    text = generate()
    if args.output is None:
        print(text, end="")
    else:
        Path(args.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
