"""The whole model through executed kernels, prefill and decode, against the plain forms."""

import mlx.core as mx
import numpy as np
import pytest

from metal_on_cpu import executed, needs_compiler
from models import mlx_model, random_tokens
from oracle import random_checkpoint, relative_error


@needs_compiler
@pytest.mark.parametrize("fusion", ["add", "concat"])
def test_prefill_and_decode(fusion, N=70):
    config, tensors = random_checkpoint(
        np.random.default_rng(0), fusion=fusion, output_projection=fusion == "concat"
    )
    model = mlx_model(config, tensors).eval()
    tokens = mx.array(random_tokens(0, 2, N + 3))

    def read():
        cache = model.make_cache()
        logits = [model(tokens[:, :N], cache=cache)]
        logits += [model(tokens[:, n : n + 1], cache=cache) for n in range(N, N + 3)]
        states = [slot for layer in cache for slot in layer.cache]
        mx.eval(logits, states)
        return [mx.concatenate(logits, axis=1), *states]

    with executed() as calls:
        got = read()
    L = len(model.layers)
    names = [c.launch.name.removeprefix("mlx_mcsd_") for c in calls]
    assert sorted(names[: 3 * L]) == ["decay_scan"] * 2 * L + ["mcsd_mix"] * L
    assert names[3 * L :] == ["mcsd_step"] * 3 * L
    for g, w in zip(got, read(), strict=True):
        assert relative_error(np.array(g), np.array(w)) <= 1e-5
