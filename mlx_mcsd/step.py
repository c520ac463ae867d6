"""One token, embedding to logits, as one compiled function: the state has a fixed shape.

A KV cache cannot do this, since its shape changes with every token. The fused operations and the
Python that is not run save a quarter of a 28M model's step on the CPU.
"""

from itertools import count

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from . import kernels
from .linear import packable, packed

PLAIN_TOKENS = 4
"""Steps before the compiled one. On a CPU compiling is a run of the C++ compiler, some 0.4 s, for
each of six kernels, once per machine: the first words need not wait for that."""


def can_read(model, cache: list[ArraysCache] | None) -> bool:
    """Tell whether the model is at rest and whole, and its state there and without padding."""
    first = cache[0] if cache else None
    return (
        isinstance(first, ArraysCache)
        and not first.empty()
        and first.left_padding is None
        and first.lengths is None
        and not model.training
        and model.model.pipeline_size == 1
        and model.layers[0].mlp.sharding_group is None
    )


def make(model):
    """Return ``read(inputs (B, 1), cache) -> logits (B, 1, K)`` for a model, updating the cache.

    The parameters are inputs of what is compiled: a new value, or a new layer, takes effect at the
    next token. Another batch size or dtype compiles once more.
    """

    def step(inputs, states, _):
        cache = model.make_cache()
        _put(cache, states)
        return model.logits(inputs, cache), [c.cache for c in cache]

    compiled = mx.compile(step, inputs=model)
    layers = packable(model)
    tokens = count()

    def read(inputs, cache):
        if next(tokens) < PLAIN_TOKENS:
            return model.logits(inputs, cache)
        for layer in layers:
            layer.pack()
        with packed():
            # What chooses between kernels and plain forms is part of the key it compiles under.
            logits, states = compiled(
                inputs, [c.cache for c in cache], kernels.available(mx.float32)
            )
        for layer in layers:
            layer.keep_packed()
        _put(cache, states)
        return logits

    return read


def _put(cache, states) -> None:
    for c, state in zip(cache, states, strict=True):
        c.cache = state
