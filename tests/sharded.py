"""What one rank runs for `test_sharding.py`: `python sharded.py RESULTS`, in a group.

Every rank builds the same whole models, keeps its share of a copy, and writes down how far the
shared-out model is from the whole one. Judging that is left to the test.
"""

import copy
import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step

from mlx_mcsd import generate
from models import mlx_model, random_tokens
from oracle import VARIANTS, random_checkpoint, relative_error

B, N = 2, 12
RUNS = ((0, 9), (9, 10), (10, 12))
PROMPTS = [[5, 20, 9], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5]]
# Odd on purpose: 5 channels and 13 features are equal shares for no group but of one.
ODD = {"hidden_size": 20, "num_channels": 5, "intermediate_size": 13, "num_hidden_layers": 1}
WIDE = {"hidden_size": 128, "num_channels": 4, "intermediate_size": 160, "num_hidden_layers": 1}
QUANTIZED = {
    f"{mode}-{projection}-{fusion}": (
        {"projection": projection, "fusion": fusion, "output_projection": fusion == "concat"},
        {"mode": mode, "bits": bits, "group_size": group_size},
    )
    for mode, bits, group_size in (("affine", 8, 32), ("mxfp4", 4, 32), ("nvfp4", 4, 16))
    for projection, fusion in (("channel", "add"), ("channel", "concat"), ("dense", "concat"))
}


def logits(model):
    """Of a batch with padding and packed documents, read in runs; and the states' shapes."""
    tokens = mx.array(random_tokens(1, B, N))
    mask = np.random.default_rng(2).random((B, N)) > 0.2
    reset = np.random.default_rng(3).random((B, N)) > 0.9
    cache, parts = model.make_cache(), []
    for a, b in RUNS:
        masks = {"mask": mx.array(mask[:, a:b]), "reset": mx.array(reset[:, a:b])}
        parts.append(np.array(model(tokens[:, a:b], cache=cache, **masks)))
    shapes = [[list(a.shape) for a in c.cache] for c in cache]
    return np.where(mask[..., None], np.concatenate(parts, axis=1), 0.0), shapes


def compare(model, shared):
    """How far the logits are apart, the shapes of the shared model's states, its bytes."""
    want, _ = logits(model)
    got, states = logits(shared)
    size = sum(value.nbytes for _, value in tree_flatten(shared.parameters()))
    return {"error": float(relative_error(got, want)), "states": states, "bytes": size}


def gradients(model, shared):
    """How far each of the rank's gradients is from its share of the whole model's."""

    def loss(model, tokens):
        return nn.losses.cross_entropy(model(tokens)[:, :-1], tokens[:, 1:]).mean()

    tokens = mx.array(random_tokens(4, B, N))
    _, whole = nn.value_and_grad(model, loss)(model, tokens)
    _, mine = nn.value_and_grad(shared, loss)(shared, tokens)
    # Whole gradients in the parameters' places are shared out as those were.
    model = copy.deepcopy(model)
    model.update(whole)
    want = dict(tree_flatten(shard(model).parameters()))
    return {name: float(relative_error(g, want[name])) for name, g in tree_flatten(mine)}


def continuations(model):
    """Greedy tokens of mlx-lm's loop, prefill in pieces, and of its batches."""
    single = [
        [token for token, _ in generate_step(mx.array(p), model, max_tokens=4, prefill_step_size=2)]
        for p in PROMPTS
    ]
    generator = BatchGenerator(
        model, max_tokens=4, completion_batch_size=2, prefill_batch_size=2, prefill_step_size=4
    )
    ids = generator.insert(PROMPTS)
    batched = {i: [] for i in ids}
    while responses := generator.next_generated():
        for response in responses:
            batched[response.uid].append(response.token)
    generator.close()
    return {"single": single, "batched": [batched[i] for i in ids]}


def seed():
    args = generate.setup_arg_parser().parse_args([])
    generate.join(args)
    return args.seed


def shard(model):
    shared = copy.deepcopy(model)
    shared.shard()
    return shared


def pipeline(model):
    shared = copy.deepcopy(model)
    shared.model.pipeline(mx.distributed.init())
    return shared


def main(path):
    """Write RESULTS/RANK.json."""
    results = {"variants": {}, "gradients": {}, "quantized": {}}
    few = mx.distributed.init().size() > 2  # then what differs by the number of ranks
    for variant in VARIANTS:
        if few and not variant.id.endswith("slope+decay"):
            continue
        model = mlx_model(*random_checkpoint(5, **ODD, **variant.values[0]))
        results["variants"][variant.id] = compare(model, shard(model))
        if variant.id.endswith("slope+decay"):
            results["gradients"][variant.id] = gradients(model, shard(model))
    for name, (variant, how) in QUANTIZED.items():
        if few and how["mode"] != "affine":
            continue
        model = mlx_model(*random_checkpoint(6, **WIDE, **variant))
        nn.quantize(model, **how, class_predicate=lambda _, m: hasattr(m, "to_quantized"))
        results["quantized"][name] = compare(model, shard(model))
    model = mlx_model(*random_checkpoint(7, **ODD | {"num_hidden_layers": 4}))
    results["layers"] = compare(model, pipeline(model))
    for name, how in {"whole": copy.deepcopy, "shard": shard, "pipeline": pipeline}.items():
        results[name] = continuations(how(model))
    results["seed"] = seed()
    Path(path, f"{mx.distributed.init().rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
