"""The judge is judged: by hand arithmetic from the equations, and by a plain recurrent loop."""

import math
from fractions import Fraction

import numpy as np
import pytest

import oracle
from oracle import VARIANTS, random_checkpoint, relative_error

EXACT = 1e-12  # float64 against float64


# --- by hand -----------------------------------------------------------------------------------


def test_slope_matrix_by_hand():
    """C = 1: beta = 2^-8, and row 3 weighs lag 1 and lag 2 as 1 : e^-beta."""
    w = math.exp(-(2**-8))
    want = [[1, 0, 0], [1, 0, 0], [w / (1 + w), 1 / (1 + w), 0]]
    np.testing.assert_allclose(oracle.slope_matrix(3, 1), [want], rtol=1e-14)


def test_slope_rates_by_hand():
    """C = 2: beta = 1/16 and 1/256 (Eq. 2), read off as the ratio of two neighbouring lags."""
    matrix = oracle.slope_matrix(4, 2)
    np.testing.assert_allclose(-np.log(matrix[:, 3, 0] / matrix[:, 3, 1]), [1 / 16, 1 / 256])


def test_decay_matrix_by_hand():
    """C = 2: alpha = 31/32 and 63/64 (Eq. 8); the newest past token is already decayed once."""
    for matrix, alpha in zip(
        oracle.decay_matrix(3, 2), (Fraction(31, 32), Fraction(63, 64)), strict=True
    ):
        a = float(alpha)
        np.testing.assert_allclose(matrix, [[1, 0, 0], [a, 0, 0], [a * a, a, 0]], rtol=1e-15)


def test_erf_and_activations_by_hand():
    """gelu(x) = x Phi(x), Phi(1) = 0.8413447460685429; silu(1) = 1 / (1 + 1/e)."""
    x = np.array([1.0, -1.0, 0.0])
    np.testing.assert_allclose(
        oracle.ACTIVATIONS["gelu"](x), [0.8413447460685429, -0.15865525393145707, 0], rtol=1e-12
    )
    np.testing.assert_allclose(
        oracle.ACTIVATIONS["silu"](x), [1 / (1 + 1 / math.e), -1 / (1 + math.e), 0], rtol=1e-12
    )
    tanh = 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715))
    np.testing.assert_allclose(
        oracle.ACTIVATIONS["gelu_pytorch_tanh"](x), [tanh, tanh - 1, 0], rtol=1e-12
    )


def tiny(**config):
    """D = C = 1, two tokens in the vocabulary, and a mixer whose projections are single numbers."""
    config = oracle.CONFIG | {
        "vocab_size": 2,
        "hidden_size": 1,
        "num_channels": 1,
        "num_hidden_layers": 1,
        "intermediate_size": 1,
        "rms_norm_eps": 1e-12,
        **config,
    }
    ones = {name: np.ones(shape) for name, shape in oracle.tensor_shapes(config).items()}
    for letter, value in zip("uvef", (2.0, 3.0, 5.0, 7.0), strict=True):
        ones[f"model.layers.0.mixer.{letter}_proj.weight"] *= value
    return config, ones


def test_mixer_by_hand():
    """x = (1, -1, 2): every Eq. from 1 to 20 written out, with u, v, e, f = 2, 3, 5, 7."""
    config, tensors = tiny()
    x = np.array([1.0, -1.0, 2.0])
    w = math.exp(-(2**-8))
    V = [3.0, 3.0, (-3.0 + w * 3.0) / (1 + w)]  # first token: itself
    a = 31 / 32
    E = [5.0, a * 5.0, a * -5.0 + a * a * 5.0]
    want = [
        2 * x[n] * V[n] / (1 + math.exp(-V[n]))
        + 1 / (1 + math.exp(-7 * x[n])) * E[n] / math.sqrt(E[n] ** 2 + 1e-12)
        for n in range(3)
    ]
    got = oracle.mixer(config, tensors.__getitem__, "model.layers.0.mixer", x[None, :, None])
    np.testing.assert_allclose(got[0, :, 0], want, rtol=1e-12)


def test_concat_is_per_channel():
    """Eq. 13: theta = [slope_0, decay_0, slope_1, decay_1], seen through an identity o_proj row."""
    config, tensors = random_checkpoint(0, fusion="concat", output_projection=True)
    D, C = config["hidden_size"], config["num_channels"]
    prefix = "model.layers.0.mixer"
    x = np.random.default_rng(1).normal(size=(1, 5, D))

    def select(features):
        chosen = dict(tensors)
        chosen[f"{prefix}.o_proj.weight"] = np.eye(2 * D)[features]
        return oracle.mixer(config, chosen.__getitem__, prefix, x)

    theta = np.arange(2 * D).reshape(C, 2, D // C)
    alone = config | {"fusion": "add", "output_projection": False}
    slope = oracle.mixer(alone | {"sections": ["slope"]}, tensors.__getitem__, prefix, x)
    decay = oracle.mixer(alone | {"sections": ["decay"]}, tensors.__getitem__, prefix, x)
    np.testing.assert_allclose(select(theta[:, 0].ravel()), slope, rtol=1e-12)
    np.testing.assert_allclose(select(theta[:, 1].ravel()), decay, rtol=1e-12)


def test_logits_by_hand():
    """One token through the whole skeleton: residuals, GeGLU, final norm, head."""
    config, tensors = tiny()
    tensors["model.embed_tokens.weight"] = np.array([[0.5], [-0.25]])
    tensors["model.layers.0.mlp.up_proj.weight"] = np.array([[3.0]])
    tensors["model.layers.0.mlp.down_proj.weight"] = np.array([[-2.0]])
    tensors["lm_head.weight"] = np.array([[4.0], [-6.0]])
    # RMSNorm of one feature is its sign, so for token 0 the mixer reads 1:
    x = 0.5 + 2 * 3 / (1 + math.exp(-3)) + 1 / (1 + math.exp(-7))
    x = x + -2.0 * (0.8413447460685429 * 3.0)  # gelu(1) * 3, then down
    want = np.array([4.0, -6.0]) * np.sign(x)
    np.testing.assert_allclose(oracle.logits(config, tensors, [[0]])[0, 0], want, rtol=1e-9)


# --- by the recurrent form ---------------------------------------------------------------------


def recurrent_mixer(config, weight, prefix, x):
    """Section 2.3 as printed: a Python loop over Eqs. 16 (slope) and 19 (decay)."""
    C, eps = config["num_channels"], config["rms_norm_eps"]
    Dc = x.shape[-1] // C
    i = np.arange(C)[:, None]
    beta, alpha = 2.0 ** (-8.0 * (i + 1) / C), 1 - 2.0 ** (-5.0 - i)  # (C, 1)

    def project(letter, token):
        w = weight(f"{prefix}.{letter}_proj.weight")
        if config["projection"] == "dense":
            return (w @ token).reshape(C, Dc)
        return np.stack([w[c] @ token[c * Dc : (c + 1) * Dc] for c in range(C)])

    out = []
    for row in x:
        S, thetas = {}, []
        for n, token in enumerate(row):
            parts = []
            for slot, section in enumerate(config["sections"]):
                first = slot == 0 and config["sections"] != ["decay"]
                current = project("u" if first else "f", token)
                history = project("v" if first else "e", token)
                state = S.get(slot, np.zeros((C, Dc)))
                read = state if n else history
                if section == "slope":
                    parts.append(current * read / (1 + np.exp(-read)))
                    Z = (1 - np.exp(-(n + 1) * beta)) / (1 - np.exp(-beta))
                    S[slot] = (1 - 1 / Z) * state + history / Z
                else:
                    name = "decay_norm"
                    if config["sections"] == ["decay", "decay"] and slot == 0:
                        name = "decay_norm_0"
                    gain = weight(f"{prefix}.{name}.weight").reshape(C, Dc)
                    scale = np.sqrt((read**2).sum(-1, keepdims=True) / Dc + eps)
                    parts.append(gain * read / scale / (1 + np.exp(-current)))
                    S[slot] = alpha * (state + history)
            if config["fusion"] == "concat":
                thetas.append(np.concatenate(parts, axis=1).ravel())
            else:
                thetas.append(np.sum(parts, axis=0).ravel())
        out.append(np.stack(thetas))
    theta = np.stack(out)  # (B, N, D) or (B, N, len(sections) D)
    return theta @ weight(f"{prefix}.o_proj.weight").T if config["output_projection"] else theta


@pytest.mark.parametrize("variant", VARIANTS)
def test_quadratic_equals_recurrent(variant):
    """Both forms of the paper, on the whole mixer, C = 3 and Dc = 5."""
    config, tensors = random_checkpoint(3, hidden_size=15, num_channels=3, **variant)
    x = np.random.default_rng(4).normal(size=(2, 17, 15))

    def weight(name):
        return tensors[name].astype(np.float64)

    prefix = "model.layers.1.mixer"
    got = oracle.mixer(config, weight, prefix, x)
    assert relative_error(got, recurrent_mixer(config, weight, prefix, x)) < EXACT


def test_long_history_equals_recurrent():
    """400 tokens: far past the fast channels' windows."""
    config, tensors = random_checkpoint(5)
    x = np.random.default_rng(6).normal(size=(1, 400, config["hidden_size"]))
    args = config, tensors.__getitem__, "model.layers.0.mixer", x
    assert relative_error(oracle.mixer(*args), recurrent_mixer(*args)) < 1e-10


# --- properties the rest of the suite leans on -------------------------------------------------


def test_every_tensor_matters():
    """A random checkpoint hides nothing: moving any one tensor moves the logits visibly."""
    tokens = np.random.default_rng(0).integers(0, 48, (1, 12))
    for variant in (
        {"fusion": "concat", "output_projection": True, "projection": "dense"},
        {"sections": ["decay", "decay"]},
    ):
        config, tensors = random_checkpoint(7, **variant)
        want = oracle.logits(config, tensors, tokens)
        for name, value in tensors.items():
            noise = np.random.default_rng(1).normal(0, 0.1, value.shape)
            moved = oracle.logits(config, tensors | {name: value * (1 + noise)}, tokens)
            assert relative_error(moved, want) > 1e-3, name


def test_resets_are_documents_alone():
    """A reset at 0 changes nothing, one elsewhere restarts: the tail equals the tail alone."""
    config, tensors = random_checkpoint(8)
    tokens = np.random.default_rng(9).integers(0, 48, (2, 11))
    resets = np.zeros((2, 11), bool)
    resets[0, 0] = resets[1, 4] = True
    got = oracle.logits(config, tensors, tokens, resets)
    plain = oracle.logits(config, tensors, tokens)
    assert relative_error(got[0], plain[0]) < EXACT
    assert relative_error(got[1, :4], plain[1, :4]) < EXACT
    assert relative_error(got[1, 4:], oracle.logits(config, tensors, tokens[1:, 4:])[0]) < EXACT
    assert relative_error(got[1, 5:], plain[1, 5:]) > 1e-2


def test_loss_of_a_flat_model_is_log_k():
    """Equal logits leave ln K nats a token."""
    config, tensors = random_checkpoint(10)
    tensors["lm_head.weight"] = np.zeros_like(tensors["lm_head.weight"])
    assert oracle.loss(config, tensors, [[1, 2, 3]]) == pytest.approx(math.log(48), rel=1e-12)


def test_checkpoint_round_trip(tmp_path):
    """What is written is what is read, bit for bit."""
    config, tensors = random_checkpoint(11, tie_word_embeddings=True)
    got_config, got = oracle.read_checkpoint(
        oracle.write_checkpoint(tmp_path / "model", config, tensors)
    )
    assert got_config == config
    assert got.keys() == tensors.keys()
    assert all(np.array_equal(got[k], tensors[k]) for k in tensors)


def test_relative_error_sees_nan():
    """A NaN must fail every `< tolerance`."""
    assert relative_error([1.0, math.nan], [1.0, 2.0]) == math.inf
    assert relative_error([1.0, 2.5], [1.0, 2.0]) == 0.25
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error([1.0], [1.0, 2.0])
