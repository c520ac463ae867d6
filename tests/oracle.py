"""The paper's quadratic form of MCSD in NumPy float64: the judge of every other implementation.

Reads the checkpoint layout (a config and separately named tensors) and computes logits with the
N x N matrices of arXiv 2406.12230 as printed. It shares no code with what it judges, and it is as
slow as it is plain.

    B batch   N tokens   D hidden   C channels   Dc = D / C   L layers   F MLP width   K vocabulary
    U, V  current and history of slot 0     beta   slope rate of a channel     theta  mixer output
    F, E  current and history of slot 1     alpha  decay rate of a channel
"""

import json
import math
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

SECTIONS = (
    ["slope", "decay"],
    ["slope"],
    ["decay"],
    ["slope", "slope"],
    ["decay", "decay"],
)
FUSIONS = (("add", False), ("add", True), ("concat", True))

VARIANTS = [
    pytest.param(
        {
            "projection": projection,
            "fusion": fusion,
            "output_projection": output,
            "sections": sections,
        },
        id=f"{projection}-{fusion}{'-o_proj' if output else ''}-{'+'.join(sections)}",
    )
    for projection, (fusion, output), sections in product(("channel", "dense"), FUSIONS, SECTIONS)
]
"""Every valid combination of projection, fusion, output projection and sections: 30."""


# --- elementwise functions ---------------------------------------------------------------------

erf = np.vectorize(math.erf, otypes=[np.float64])


def sigmoid(x):
    """1 / (1 + e^-x), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x)


ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: (
        0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "silu": silu,
}


def rms_norm(x, eps):
    """x / sqrt(mean(x^2) + eps) over the last axis, without gain."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


# --- the mixing matrices -----------------------------------------------------------------------


def lags(N):
    """How far token m lies behind token n, (N, N), and where it lies strictly behind."""
    behind = np.arange(N)[:, None] - np.arange(N)[None, :]
    return np.maximum(behind, 0), behind > 0


def slope_matrix(N, C):
    """Eqs. 3, 5, 14: rows e^(-j beta_i) at lag j > 0, each divided by its sum; (C, N, N)."""
    beta = (2.0 ** (-8.0 / C)) ** np.arange(1, C + 1)  # (C,), Eq. 2
    lag, past = lags(N)
    matrix = np.where(past, np.exp(-lag * beta[:, None, None]), 0.0)  # (C, N, N)
    matrix[:, 0, 0] = 1.0  # "set the first number to 1"
    return matrix / matrix.sum(axis=-1, keepdims=True)


def decay_matrix(N, C):
    """Eqs. 9, 11, 17: rows alpha_i^j at lag j > 0; (C, N, N)."""
    alpha = 1.0 - 2.0 ** (-5.0 - np.arange(C))  # (C,), Eq. 8
    lag, past = lags(N)
    matrix = np.where(past, alpha[:, None, None] ** lag, 0.0)  # (C, N, N)
    matrix[:, 0, 0] = 1.0
    return matrix


def mix(matrix, history):
    """Sum over past tokens: (C, N, N) and (B, N, C, Dc) -> (B, N, C, Dc)."""
    return np.einsum("cnm,bmcd->bncd", matrix, history, optimize=True)


# --- the model ---------------------------------------------------------------------------------


def mixer(config, weight, prefix, x):
    """The MCSD block, Eqs. 1-21: (B, N, D) -> (B, N, D)."""
    B, N, D = x.shape
    C = config["num_channels"]
    channels = x.reshape(B, N, C, D // C)  # (B, N, C, Dc)

    def project(letter):
        w = weight(f"{prefix}.{letter}_proj.weight")
        if config["projection"] == "dense":
            return (x @ w.T).reshape(B, N, C, D // C)
        return np.einsum("bnci,coi->bnco", channels, w, optimize=True)

    sections = config["sections"]
    letters = ["uv", "fe"] if sections != ["decay"] else ["fe"]
    norms = ["decay_norm_0" if sections == ["decay", "decay"] else "decay_norm", "decay_norm"]
    parts = []
    for section, (current, history), norm in zip(sections, letters, norms, strict=False):
        current, history = project(current), project(history)
        if section == "slope":
            parts.append(current * silu(mix(slope_matrix(N, C), history)))  # Eq. 6
        else:
            gain = weight(f"{prefix}.{norm}.weight").reshape(C, D // C)
            E = rms_norm(mix(decay_matrix(N, C), history), config["rms_norm_eps"]) * gain
            parts.append(sigmoid(current) * E)  # second term of Eq. 20
    if config["fusion"] == "add":
        theta = sum(parts).reshape(B, N, D)  # Eqs. 20, 21
    else:
        theta = np.concatenate(parts, axis=-1).reshape(B, N, len(parts) * D)  # Eq. 13
    return theta @ weight(f"{prefix}.o_proj.weight").T if config["output_projection"] else theta


def forward(config, tensors, tokens):
    """Logits (B, N, K) of token ids (B, N), every row one document."""

    def weight(name):
        return np.asarray(tensors[name], np.float64)

    def norm(x, name):
        return rms_norm(x, config["rms_norm_eps"]) * weight(f"{name}.weight")

    act = ACTIVATIONS[config["hidden_act"]]
    x = weight("model.embed_tokens.weight")[tokens]  # (B, N, D)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        x = x + mixer(config, weight, f"{prefix}.mixer", norm(x, f"{prefix}.mixer_norm"))
        y = norm(x, f"{prefix}.mlp_norm")
        gate = act(y @ weight(f"{prefix}.mlp.gate_proj.weight").T)  # (B, N, F)
        up = y @ weight(f"{prefix}.mlp.up_proj.weight").T  # (B, N, F)
        x = x + (gate * up) @ weight(f"{prefix}.mlp.down_proj.weight").T
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return norm(x, "model.norm") @ weight(f"{head}.weight").T  # (B, N, K)


def logits(config, tensors, tokens, resets=None):
    """Logits (B, N, K) in float64.

    Args:
        config, tensors: the checkpoint layout.
        tokens: ids (B, N).
        resets: bool (B, N), true where a new document begins inside a row. Each document is
            computed alone, so nothing can pass from one to the next.
    """
    tokens = np.asarray(tokens)
    if resets is None:
        return forward(config, tensors, tokens)
    rows = []
    for row, reset in zip(tokens, np.asarray(resets, bool), strict=True):
        cuts = sorted({0, len(row), *np.flatnonzero(reset).tolist()})
        documents = [forward(config, tensors, row[None, a:b])[0] for a, b in pairwise(cuts)]
        rows.append(np.concatenate(documents))
    return np.stack(rows)


def log_softmax(z):
    """Log-probabilities of logits, over the last axis."""
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def loss(config, tensors, tokens):
    """Mean cross-entropy of each next token, in nats."""
    log_p = log_softmax(logits(config, tensors, tokens)[:, :-1])  # (B, N - 1, K)
    return -np.mean(np.take_along_axis(log_p, np.asarray(tokens)[:, 1:, None], axis=-1))


# --- checkpoints -------------------------------------------------------------------------------

CONFIG = {
    "model_type": "mcsd",
    "vocab_size": 48,
    "hidden_size": 24,
    "num_channels": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "projection": "channel",
    "fusion": "add",
    "output_projection": False,
    "sections": ["slope", "decay"],
    "mixer": "mcsd",
    "initializer_range": 0.02,
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "dtype": "float32",
    "torch_dtype": "float32",
}


def tensor_shapes(config):
    """Name and shape of every tensor of the layout."""
    D, C, F, K = (
        config[k] for k in ("hidden_size", "num_channels", "intermediate_size", "vocab_size")
    )
    sections = config["sections"]
    square = (C, D // C, D // C) if config["projection"] == "channel" else (D, D)
    letters = {1: "uv" if sections == ["slope"] else "ef", 2: "uvef"}[len(sections)]
    block = {f"mixer.{letter}_proj": square for letter in letters}
    if "decay" in sections:
        block["mixer.decay_norm"] = (D,)
    if sections == ["decay", "decay"]:
        block["mixer.decay_norm_0"] = (D,)
    if config["output_projection"]:
        block["mixer.o_proj"] = (D, len(sections) * D if config["fusion"] == "concat" else D)
    block |= {"mixer_norm": (D,), "mlp_norm": (D,)}
    block |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    shapes = {"model.embed_tokens.weight": (K, D), "model.norm.weight": (D,)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{k}.weight": shape for k, shape in block.items()}
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": (K, D)}


def random_checkpoint(rng, **config):
    """A checkpoint in which every part matters: (config, tensors float32).

    Args:
        rng: a `numpy.random.Generator`, or a seed for one.
        config: keys that replace those of `CONFIG`.
    """
    rng = np.random.default_rng(rng)
    if unknown := config.keys() - CONFIG.keys():
        raise KeyError(f"not in the checkpoint layout: {sorted(unknown)}")
    config = CONFIG | config
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:  # a gain
            value = rng.uniform(0.6, 1.4, shape)
        else:  # outputs as large as inputs, so that no residual branch drowns another
            value = rng.normal(0, 1 if "embed" in name else shape[-1] ** -0.5, shape)
        tensors[name] = value.astype(np.float32)
    return config, tensors


def write_checkpoint(directory, config, tensors):
    """Write `config.json` and `model.safetensors`, no tokenizer; returns the directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def read_checkpoint(directory):
    """Read what `write_checkpoint` wrote: (config, tensors)."""
    directory = Path(directory)
    config = CONFIG | json.loads((directory / "config.json").read_text())
    return config, load_file(directory / "model.safetensors")


def relative_error(got, want):
    """max |got - want| / max |want|; NaN counts as infinite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"shapes differ: {got.shape} and {want.shape}")
    error = np.max(np.abs(got - want)) / np.max(np.abs(want))
    return float(error) if np.isfinite(error) else math.inf
