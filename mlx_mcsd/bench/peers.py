"""The models compared: MCSD, and mlx-lm's own llama, mamba2, rwkv7 and recurrent_gemma.

All of one size have the same vocabulary and, within 2 %, as many parameters; the weights are
random. Letters: B batch, D hidden size, L layers, F MLP width, K vocabulary.
"""

from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from ..model import Model, ModelArgs

NAMES = ("mcsd", "llama", "mamba2", "rwkv7", "recurrent_gemma")

SIZES = {
    "28m": dict(
        mcsd=dict(hidden_size=512, num_hidden_layers=8, num_channels=8, intermediate_size=1408),
        llama=dict(
            hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1408
        ),
        mamba2=dict(
            hidden_size=512, num_hidden_layers=15, num_heads=16, head_dim=64, state_size=128
        ),
        rwkv7=dict(hidden_size=512, num_hidden_layers=8, head_dim=64, intermediate_size=1984),
        recurrent_gemma=dict(
            hidden_size=512,
            num_hidden_layers=9,
            num_attention_heads=8,
            # mlx-lm's model file takes the width of gate and up together.
            intermediate_size=2 * 1360,
            attention_window_size=2048,
        ),
        vocab_size=4096,
        low_rank=32,
    ),
    # For the tests: every part of each model, nothing of its speed.
    "tiny": dict(
        mcsd=dict(hidden_size=32, num_hidden_layers=2, num_channels=4, intermediate_size=96),
        llama=dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
        ),
        mamba2=dict(hidden_size=32, num_hidden_layers=4, num_heads=4, head_dim=13, state_size=16),
        rwkv7=dict(hidden_size=32, num_hidden_layers=2, head_dim=8, intermediate_size=120),
        recurrent_gemma=dict(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=2 * 55,
            attention_window_size=64,
        ),
        vocab_size=160,
        low_rank=4,
    ),
}
"""Size -> model -> shape. The widest knob of each peer was turned until its count fitted."""


def build(name: str, size: str = "28m") -> nn.Module:
    """Return a model by its name in `NAMES`, in float32 and ready to run."""
    table = SIZES[size]
    shape = table[name] | dict(vocab_size=table["vocab_size"])
    mx.random.seed(0)
    if name == "mcsd":
        args = dict(model_type="mcsd", projection="dense", tie_word_embeddings=True)
        model = Model(ModelArgs.from_dict(args | shape))
    else:
        module = import_module(f"mlx_lm.models.{name}")
        args = dict(model_type=name, tie_word_embeddings=True)
        args |= _constants(name, shape, table["low_rank"]) | shape
        model = module.Model(module.ModelArgs.from_dict(args))
    if name == "recurrent_gemma":
        del model.lm_head  # tied, as its sanitize does it
    _randomize(model)
    model.eval()
    mx.eval(model.parameters())
    return model


def count(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(value.size for _, value in tree_flatten(model.parameters()))


def cache_after(model: nn.Module, tokens: int, batch: int = 1) -> list:
    """Return a cache of the size it has after so many tokens, without reading them.

    What grows with the text is filled with ones, what counts tokens is set, and the other states
    come from a first token. How long a step takes depends on nothing else.
    """
    probe, cache = make_prompt_cache(model), make_prompt_cache(model)
    model(mx.zeros((batch, 1), mx.int32), cache=probe)
    for first, c in zip(probe, cache, strict=True):
        if isinstance(c, ArraysCache):
            c.cache = [
                mx.full(a.shape, tokens, a.dtype) if a is not None and a.dtype == mx.int32 else a
                for a in first.cache
            ]
        else:
            B, H, _, width = first.keys.shape
            kept = min(tokens, getattr(c, "max_size", tokens))
            c.update_and_fetch(*(mx.ones((B, H, kept, width)) for _ in range(2)))
    mx.eval([c.state for c in cache])
    return cache


def _constants(name: str, shape: dict, low_rank: int) -> dict:
    """Return the arguments of a model file that its shape does not say."""
    if name == "llama":
        return dict(rms_norm_eps=1e-6)
    if name == "mamba2":
        return dict(
            intermediate_size=shape["num_heads"] * shape["head_dim"],
            layer_norm_epsilon=1e-6,
            conv_kernel=4,
            n_groups=1,
            use_bias=False,
            use_conv_bias=True,
            time_step_limit=(0.0, float("inf")),
            time_step_rank="auto",
        )
    if name == "rwkv7":
        ranks = ("a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim")
        return dict(norm_eps=1e-5) | dict.fromkeys(ranks, low_rank)
    return dict(
        attention_bias=False,
        conv1d_width=4,
        logits_soft_cap=30.0,
        num_key_value_heads=1,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        block_types=["recurrent", "recurrent", "attention"],
    )


def _randomize(model: nn.Module) -> None:
    """Fill the parameters that a model file starts at zero, which would leave parts of it idle."""

    def fill(value):
        return 0.1 * mx.random.normal(value.shape) if not value.any() else value

    model.update(tree_map(fill, model.parameters()))
