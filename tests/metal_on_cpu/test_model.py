"""The whole model through executed kernels, prefill and decode, against the plain forms."""

import copy

import mlx.core as mx
import numpy as np
import pytest

from metal_on_cpu import executed, needs_compiler
from mlx_mcsd import sharding
from models import Rank, mlx_model, random_tokens
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


@needs_compiler
@pytest.mark.parametrize("N", [1, 9])
def test_shares(monkeypatch, N):
    """The kernels of a rank take the constants of its own channels: 1, 2 and 2 of 5."""
    monkeypatch.setattr(sharding, "gather", lambda theta, widths, group: theta)
    monkeypatch.setattr(sharding, "sum_gradients", lambda group: lambda x: x)
    config, tensors = random_checkpoint(1, hidden_size=20, num_channels=5)
    whole = mlx_model(config, tensors).layers[0].mixer.eval()
    x = mx.random.normal((2, N + 1, 20), key=mx.random.key(0))
    _, state = whole(x[:, :1])  # a step from no state reads no decay
    y, end = whole(x[:, 1:], state)
    start = 0
    for rank in range(3):
        mixer = copy.deepcopy(whole)
        mixer.shard(Rank(rank, 3))
        own = slice(start, start := start + mixer.C)
        features = slice(own.start * 4, own.stop * 4)
        with executed() as calls:
            theta, after = mixer(x[:, 1:], [state[0][:, own], state[1][:, own], state[2]])
            mx.eval(theta, after)
        assert len(calls) == (1 if N == 1 else 3)
        assert relative_error(np.array(theta), np.array(y[..., features])) <= 1e-5
        for got, want in zip(after[:2], end[:2], strict=True):
            assert relative_error(np.array(got), np.array(want[:, own])) <= 1e-5
    assert start == 5
