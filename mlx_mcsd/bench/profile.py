"""The decode step by part: what its products take, and what everything between them adds.

Letters: D hidden size, F MLP width.
"""

import time
from collections.abc import Callable

import mlx.core as mx

from ..linear import matrices, packed
from ..model import Model
from .measure import Decoder, interleaved
from .peers import cache_after

STEPS = 8  # of a timing


def profile(model: Model, repeats: int) -> list[dict]:
    """Return a row for the step as it runs, for it uncompiled, and for parts of it by themselves.

    "products, whole" are all matrices of the model times one token as `x @ W.T`; "products" are the
    same as the step reads them, which differs on a CPU. Parts are not compiled.
    """
    cache = cache_after(model, 100)
    decoder = Decoder(model, cache).warm()
    layers = model.layers
    states = [list(c.cache) for c in cache]
    inputs = {
        size: mx.random.normal((1, 1, size))
        for size in {matrix["weight"].shape[1] for matrix in matrices(model)}
    }
    x = inputs[model.args.hidden_size]  # (1, 1, D)
    mx.eval(inputs)

    def times(rows):
        return [matrix.times_rows(inputs[matrix["weight"].shape[1]]) for matrix in rows]

    def whole():
        rows = [matrix["weight"] for matrix in matrices(model)]
        return [inputs[weight.shape[1]] @ weight.T for weight in rows]

    def mixers():
        outputs = [a.mixer(x, list(s)) for a, s in zip(layers, states, strict=True)]
        return [y for y, _ in outputs] + [a for _, state in outputs for a in state]

    in_mixers = [matrix for layer in layers for matrix in matrices(layer.mixer)]
    in_mlps = [matrix for layer in layers for matrix in matrices(layer.mlp)]
    head = [m for m in matrices(model) if not any(m is n for n in in_mixers + in_mlps)][-1:]
    parts = {
        "products, whole": whole,
        "products": lambda: times(in_mixers + in_mlps + head),
        "projections": lambda: times(in_mixers),
        "mixers, projections included": mixers,
        "products of the MLPs": lambda: times(in_mlps),
        "MLPs, products included": lambda: [layer.mlp(x) for layer in layers],
        "norms": lambda: [n(x) for a in layers for n in (a.mixer_norm, a.mlp_norm)],
        "head": lambda: times(head),
        "step, uncompiled": lambda: [model.logits(mx.array([[1]]), _copies(model, states))],
    }
    runs = {name: _timed(part) for name, part in parts.items()}
    taken = interleaved({"step": lambda: decoder.run(STEPS), **runs}, repeats, "profile")
    return [
        {
            "part": name,
            "seconds": t._asdict(),
            "of_products": t.median / taken["products, whole"].median,
        }
        for name, t in taken.items()
    ]


def _timed(part: Callable[[], list[mx.array]]) -> Callable[[], float]:
    def run():
        start = time.perf_counter()
        with packed():
            for _ in range(STEPS):
                mx.eval(part())
        return (time.perf_counter() - start) / STEPS

    return run


def _copies(model: Model, states: list[list[mx.array]]) -> list:
    cache = model.make_cache()
    for c, state in zip(cache, states, strict=True):
        c.cache = list(state)
    return cache
