"""The MLX model against the float64 quadratic form, in every way it can be run."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import oracle
from models import mlx_model, one_by_one, random_splits, random_tokens, run
from oracle import VARIANTS, random_checkpoint, relative_error

TOLERANCE = 1e-5  # float32, relative to the largest logit
SHAPES = [
    pytest.param({"num_channels": 3, "hidden_size": 60}, id="C=3,Dc=20"),
    pytest.param({"num_channels": 2, "hidden_size": 120}, id="C=2,Dc=60"),
    pytest.param({"num_channels": 1, "hidden_size": 20}, id="C=1,Dc=20"),
    pytest.param({"num_channels": 10, "hidden_size": 40}, id="C=10,Dc=4"),
]
LENGTHS = (1, 2, 63, 64, 65, 200, 600)


# --- against the oracle ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    """Whole prompt, token by token, random split. The large epsilon makes Eq. 9's scale visible."""
    config, tensors = random_checkpoint(
        0, hidden_size=15, num_channels=3, rms_norm_eps=0.1, **variant
    )
    model = mlx_model(config, tensors)
    tokens = random_tokens(1, 2, 67)
    want = oracle.logits(config, tensors, tokens)
    assert relative_error(run(model, tokens), want) < TOLERANCE
    assert relative_error(run(model, tokens[:, :9], one_by_one(9)), want[:, :9]) < TOLERANCE
    splits = random_splits(2, 67)
    assert relative_error(run(model, tokens, splits), want) < TOLERANCE


@pytest.mark.parametrize("hidden_act", sorted(oracle.ACTIVATIONS))
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_activation_and_head(hidden_act, tied):
    """Every MLP activation, and a head that is the embedding."""
    config, tensors = random_checkpoint(3, hidden_act=hidden_act, tie_word_embeddings=tied)
    tokens = random_tokens(4, 1, 20)
    got = run(mlx_model(config, tensors), tokens)
    assert relative_error(got, oracle.logits(config, tensors, tokens)) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_lengths(shape):
    """Every length at once and in random runs; and 200 single steps."""
    config, tensors = random_checkpoint(5, **shape)
    model = mlx_model(config, tensors)
    tokens = random_tokens(6, 1, max(LENGTHS))
    want = oracle.logits(config, tensors, tokens)  # causal: a prefix of it is the prefix's logits
    for N in LENGTHS:
        assert relative_error(run(model, tokens[:, :N]), want[:, :N]) < TOLERANCE, N
        splits = random_splits(N, N)
        assert relative_error(run(model, tokens[:, :N], splits), want[:, :N]) < TOLERANCE, splits
    steps = run(model, tokens[:, :200], one_by_one(200))
    assert relative_error(steps, want[:, :200]) < TOLERANCE


def test_input_embeddings():
    """Embeddings given in place of tokens are used, whatever the tokens say."""
    config, tensors = random_checkpoint(8)
    model = mlx_model(config, tensors)
    tokens, other = random_tokens(9, 2, 1, 10)
    embeddings = model.model.embed_tokens(mx.array(tokens))
    got = np.array(model(mx.array(other), input_embeddings=embeddings))
    assert relative_error(got, oracle.logits(config, tensors, tokens)) < TOLERANCE


# --- state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("N", [1, 70])
def test_state_is_float32(dtype, N):
    """Weights of any dtype leave a float32 state that holds more than that dtype could."""
    model = mlx_model(*random_checkpoint(21))
    model.set_dtype(dtype)
    cache = model.make_cache()
    logits = model(mx.array(random_tokens(22, 2, N)), cache=cache)
    logits = model(mx.array(random_tokens(23, 2, 1)), cache=cache)
    assert logits.dtype == dtype
    for c in cache:
        *slots, count = c.cache
        assert [s.dtype for s in slots] == [mx.float32, mx.float32]
        assert count.dtype == mx.int32
        assert count.tolist() == [N + 1, N + 1]
        if dtype != mx.float32:
            assert all((s != s.astype(dtype).astype(mx.float32)).any().item() for s in slots)


@pytest.mark.parametrize("sections", oracle.SECTIONS, ids="+".join)
def test_state_bytes(sections):
    """One (C, Dc) float32 array a slot and a count a row, after 1 token and after 1,000."""
    config, tensors = random_checkpoint(24, sections=sections)
    model = mlx_model(config, tensors)
    cache = model.make_cache()
    L, D, B = config["num_hidden_layers"], config["hidden_size"], 2
    assert len(cache) == len(model.layers) == L
    for N in (1, 999):
        mx.eval(model(mx.array(random_tokens(25, B, N)), cache=cache))
        assert sum(c.nbytes for c in cache) == 4 * B * L * (len(sections) * D + 1)
        assert all(c.cache[0].shape == (B, 2, D // 2) for c in cache)


# --- gradients ---------------------------------------------------------------------------------


def loss_fn(model, tokens, mask=None):
    """Mean cross-entropy of each next real token."""
    logits = model(tokens, mask=mask)[:, :-1]
    nats = nn.losses.cross_entropy(logits, tokens[:, 1:])  # (B, N - 1)
    weight = mx.ones(nats.shape) if mask is None else mask[:, :-1].astype(mx.float32)
    return (nats * weight).sum() / weight.sum()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant):
    """Every tensor's directional derivative against the oracle's central difference."""
    config, tensors = random_checkpoint(26, hidden_size=15, num_channels=3, **variant)
    model = mlx_model(config, tensors)
    tokens = random_tokens(27, 2, 9)
    loss, gradients = nn.value_and_grad(model, loss_fn)(model, mx.array(tokens))
    assert loss.item() == pytest.approx(oracle.loss(config, tensors, tokens), rel=1e-5)
    gradients = dict(tree_flatten(gradients))
    rng, step = np.random.default_rng(28), 1e-5
    for name, value in tensors.items():
        along = rng.normal(0, 1, value.shape)
        ends = [
            oracle.loss(config, tensors | {name: value + sign * step * along}, tokens)
            for sign in (1, -1)
        ]
        want = (ends[0] - ends[1]) / (2 * step)
        # sanitize() is linear, so it carries the direction to the run-time names as well
        fused = model.sanitize(
            {
                k: mx.array(along if k == name else np.zeros_like(v), mx.float32)
                for k, v in tensors.items()
            }
        )
        got = sum((gradients[k] * v).sum().item() for k, v in fused.items())
        # the derivative is a sum of terms of either sign, so measure against their size
        size = sum((gradients[k] * v).square().sum().item() for k, v in fused.items()) ** 0.5
        assert abs(got - want) < 1e-4 * size, name


def test_gradients_with_padding():
    """A left-padded batch, one row all padding: the gradients of its rows alone, no NaN."""
    config, tensors = random_checkpoint(29)
    model = mlx_model(config, tensors)
    real = random_tokens(30, 2, 70)
    padded = random_tokens(31, 3, 136)
    padded[:2, 66:] = real
    mask = (mx.arange(136) >= 66) & mx.array([[True], [True], [False]])
    _, want = nn.value_and_grad(model, loss_fn)(model, mx.array(real))
    _, got = nn.value_and_grad(model, loss_fn)(model, mx.array(padded), mask)
    for (name, g), (_, w) in zip(tree_flatten(got), tree_flatten(want), strict=True):
        assert relative_error(g, w) < TOLERANCE, name


def test_gradients_through_the_state():
    """Gradients flow from a continuation into what made its state, rows without any token too."""
    config, tensors = random_checkpoint(36)
    model = mlx_model(config, tensors)
    tokens = random_tokens(37, 2, 12)
    mask = np.ones((2, 12), bool)
    mask[1, :7] = False  # this row's first token comes in the second run

    def in_runs(model):
        cache = model.make_cache()
        runs = [
            model(mx.array(tokens[:, a:b]), cache=cache, mask=mx.array(mask[:, a:b]))
            for a, b in ((0, 5), (5, 7), (7, 8), (8, 12))
        ]
        return mx.concatenate(runs, axis=1)[:, 7:].square().mean()

    def at_once(model):
        return model(mx.array(tokens), mask=mx.array(mask))[:, 7:].square().mean()

    _, got = nn.value_and_grad(model, in_runs)(model)
    _, want = nn.value_and_grad(model, at_once)(model)
    for (name, g), (_, w) in zip(tree_flatten(got), tree_flatten(want), strict=True):
        assert relative_error(g, w) < TOLERANCE, name


def test_gradient_at_the_initial_state():
    """The first token reads no state, the second does: a finite gradient, never 0 / 0."""
    model = mlx_model(*random_checkpoint(38))
    mixer = model.layers[0].mixer
    x = mx.random.normal((1, 2, 24), key=mx.random.key(0))
    *slots, count = mixer.init_state(1)
    for n, reached in ((1, False), (2, True)):

        def outputs(*slots, n=n):
            return mixer(x[:, :n], [*slots, count])[0].sum()

        for gradient in mx.grad(outputs, argnums=(0, 1))(*slots):
            assert mx.isfinite(gradient).all().item()
            assert (gradient != 0).all().item() == reached


# --- names -------------------------------------------------------------------------------------


def sanitized(model, tensors):
    return model.sanitize({name: mx.array(value) for name, value in tensors.items()})


@pytest.mark.parametrize("variant", VARIANTS)
def test_sanitize(variant):
    """Separate names become the run-time tree; run-time names pass through untouched."""
    config, tensors = random_checkpoint(32, **variant)
    model = mlx_model(config, tensors)
    tree = dict(tree_flatten(model.parameters()))
    fused = sanitized(model, tensors)
    assert fused.keys() == tree.keys()
    again = model.sanitize(dict(fused))
    assert again.keys() == fused.keys()
    assert all(mx.array_equal(again[name], fused[name]).item() for name in fused)


@pytest.mark.parametrize("projection", ["channel", "dense"])
def test_sanitize_quantized(projection):
    """Quantized separate names fuse into what quantizing the fused weight gives."""
    model = mlx_model(*random_checkpoint(33, projection=projection, hidden_size=64))
    parts = {
        f"model.layers.0.mixer.{letter}_proj": mx.random.normal(
            (2, 32, 32) if projection == "channel" else (64, 64), key=mx.random.key(i)
        )
        for i, letter in enumerate("uvef")
    }
    quantized = {
        f"{name}.{part}": array
        for name, weight in parts.items()
        for part, array in zip(
            ("weight", "scales", "biases"), mx.quantize(weight, group_size=32, bits=4), strict=True
        )
    }
    fused = mx.concatenate(list(parts.values()), axis=-2)
    want = mx.quantize(fused, group_size=32, bits=4)
    got = model.sanitize(quantized)
    for part, array in zip(("weight", "scales", "biases"), want, strict=True):
        name = f"model.layers.0.mixer.uvef_proj.{part}"
        assert mx.array_equal(got.pop(name), array).item(), part
    assert not got


def test_sanitize_tied_head():
    """A head beside tied embeddings is dropped; beside untied ones it stays."""
    config, tensors = random_checkpoint(34, tie_word_embeddings=True)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    assert "lm_head.weight" not in sanitized(mlx_model(config, tensors), tensors | head)
    config, tensors = random_checkpoint(34)
    assert "lm_head.weight" in sanitized(mlx_model(config, tensors), tensors)


LAYER = "model.layers.1."


@pytest.mark.parametrize(
    "change, complaint",
    [
        pytest.param({LAYER + "mixer.e_proj.weight": None}, "mixer.f_proj", id="part missing"),
        pytest.param({LAYER + "mixer.decay_norm.weight": None}, "decay_norm", id="gain missing"),
        pytest.param({LAYER + "mlp.up_proj.weight": None}, "gate_proj", id="up missing"),
        pytest.param({"lm_head.weight": None}, "lm_head", id="head missing"),
        pytest.param({LAYER + "mixer.x_proj.weight": (24, 24)}, "x_proj", id="unexpected"),
        pytest.param({"model.layers.2.mlp_norm.weight": (24,)}, "layers.2", id="layer too many"),
        pytest.param({"model.norm.weight": (25,)}, "model.norm", id="gain of wrong shape"),
        pytest.param({"model.embed_tokens.weight": (24, 48)}, "embed_tokens", id="transposed"),
    ],
)
def test_strict(change, complaint):
    """A tensor missing, left over or misshapen fails; the message names it or its companions."""
    config, tensors = random_checkpoint(35)
    model = mlx_model(config, tensors)
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=complaint):
        model.load_weights(list(sanitized(model, tensors).items()), strict=True)
