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
    """Return a row for the step as it runs, for it uncompiled, and for each part of it by itself.

    "products" are all matrices of the model times one token, as `x @ W.T`; "products, packed" the
    same as the step reads them on the CPU.
    """
    cache = cache_after(model, 100)
    decoder = Decoder(model, cache).warm()
    layers = model.layers
    states = [list(c.cache) for c in cache]
    x = mx.random.normal((1, 1, model.args.hidden_size))  # (1, 1, D)
    wide = mx.random.normal((1, 1, model.args.intermediate_size))  # (1, 1, F)
    products = [
        (matrix, x if matrix["weight"].shape[1] == x.shape[-1] else wide)
        for matrix in matrices(model)
    ]
    mx.eval(x, wide)

    def whole():
        return [v @ matrix["weight"].T for matrix, v in products]

    def as_packed():
        with packed():
            return [
                matrix.as_linear(v) if hasattr(matrix, "as_linear") else matrix(v)
                for matrix, v in products
            ]

    def plain():
        return [model.logits(mx.array([[1]]), _copies(model, states))]

    def mixers():
        outputs = [a.mixer(x, list(s)) for a, s in zip(layers, states, strict=True)]
        return [y for y, _ in outputs] + [a for _, state in outputs for a in state]

    parts = {
        "products": whole,
        "products, packed": as_packed,
        "mixers with their projections": mixers,
        "MLPs with theirs": lambda: [layer.mlp(x) for layer in layers],
        "norms": lambda: [n(x) for a in layers for n in (a.mixer_norm, a.mlp_norm)],
        "head": lambda: [
            model.model.embed_tokens.as_linear(x)
            if model.args.tie_word_embeddings
            else model.lm_head(x)
        ],
        "step, uncompiled": plain,
    }
    runs = {name: _timed(part) for name, part in parts.items()}
    runs = {"step": lambda: decoder.run(STEPS), **runs}
    times = interleaved(runs, repeats, "profile")
    return [
        {"part": name, "seconds": t._asdict(), "of_products": t.median / times["products"].median}
        for name, t in times.items()
    ]


def _timed(part: Callable[[], list[mx.array]]) -> Callable[[], float]:
    def run():
        start = time.perf_counter()
        for _ in range(STEPS):
            mx.eval(part())
        return (time.perf_counter() - start) / STEPS

    return run


def _copies(model: Model, states: list[list[mx.array]]) -> list:
    cache = model.make_cache()
    for c, state in zip(cache, states, strict=True):
        c.cache = list(state)
    return cache
