"""Builds the models under test from a checkpoint of the layout, and runs them."""

from itertools import pairwise

import mlx.core as mx
import numpy as np

import oracle


def mlx_model(config, tensors):
    """The MLX model, every weight loaded strictly."""
    from mlx_mcsd.model import Model, ModelArgs

    model = Model(ModelArgs.from_dict(config))
    weights = model.sanitize({name: mx.array(value) for name, value in tensors.items()})
    model.load_weights(list(weights.items()), strict=True)
    mx.eval(model.parameters())
    return model


def torch_model(directory):
    """The PyTorch reference, read by `from_pretrained`, nothing missing and nothing left over."""
    from mlx_mcsd.convert.reference.modeling_mcsd import MCSDForCausalLM

    model, report = MCSDForCausalLM.from_pretrained(directory, output_loading_info=True)
    wrong = {kind: names for kind, names in report.items() if names}
    if wrong:
        raise ValueError(f"{directory} did not load cleanly: {wrong}")
    return model.eval()


class Rank:
    """A member of a group that is not there: enough to be given a share."""

    def __init__(self, rank, ranks):
        self.rank, self.size = lambda: rank, lambda: ranks


def one_by_one(N):
    """Runs of a single token: [(0, 1), (1, 2), ...]."""
    return [(n, n + 1) for n in range(N)]


def random_splits(seed, N, pieces=4):
    """Up to `pieces` runs of random lengths that cover N tokens: [(start, stop), ...]."""
    rng = np.random.default_rng(seed)
    inner = rng.choice(np.arange(1, N), min(pieces, N) - 1, replace=False) if N > 1 else []
    return list(pairwise([0, *sorted(int(cut) for cut in inner), N]))


def random_tokens(seed, *shape):
    """Ids of the default vocabulary."""
    return np.random.default_rng(seed).integers(0, oracle.CONFIG["vocab_size"], shape)


def run(model, tokens, splits=None, cache=None, **masks):
    """Logits (B, N, K) of tokens (B, N): at once, or through a cache in runs (start, stop)."""
    if splits is None:
        masks = {name: mx.array(mask) for name, mask in masks.items()}
        return np.array(model(mx.array(tokens), cache=cache, **masks))
    cache = model.make_cache() if cache is None else cache
    parts = []
    for a, b in splits:
        pieces = {name: mx.array(mask[:, a:b]) for name, mask in masks.items()}
        parts.append(np.array(model(mx.array(tokens[:, a:b]), cache=cache, **pieces)))
    return np.concatenate(parts, axis=1)
