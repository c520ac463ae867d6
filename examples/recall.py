"""What a memory of fixed decays recalls: pairs to look up, and a needle at a distance.

    python examples/recall.py --out runs/recall

Pairs: "k1 v1 k2 v2 ... k7 ? k2 ?": P random pairs, then every key once more in another order, its
value to be told. Attention keeps every pair; here all must fit in 2 L D numbers. Needle: a marked
value, then noise, the value to be told at every distance; the noise is either of tokens that are
never values, or of the values themselves. Tiny models learn each task from scratch, in a minute or
two of one core each. Each leaves OUT/NAME.json, and a run that was stopped goes on with those that
are missing, with the same --steps and --seed; then come OUT/recall.md and OUT/recall.png.
"""

import argparse
import io
import json
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from tqdm import tqdm

from mlx_mcsd import Model, ModelArgs
from mlx_mcsd.errors import MCSDError, exits_cleanly
from mlx_mcsd.files import write_atomically

KEYS = VALUES = NOISE = 32
MARK = VALUES + NOISE  # of the needle, behind values and noise
PAIRS = (2, 4, 8, 16, 32)
DISTANCES = [2**i for i in range(1, 15)]
LENGTHS = (16, 64, 256, 1024)  # of the needle's training texts
TOKENS = 1024  # a step of training, about


def pairs_batch(rng, rows, P):
    """Tokens and targets (rows, 4P), targets -1 where nothing is asked."""
    keys = rng.permuted(np.tile(np.arange(KEYS), (rows, 1)), axis=1)[:, :P]
    values = KEYS + rng.integers(0, VALUES, (rows, P))
    order = rng.permuted(np.tile(np.arange(P), (rows, 1)), axis=1)
    told = np.stack([keys, values], axis=-1).reshape(rows, 2 * P)
    asked = np.take_along_axis(told.reshape(rows, P, 2), order[..., None], axis=1)
    tokens = np.concatenate([told, asked.reshape(rows, 2 * P)], axis=1)
    targets = np.full_like(tokens, -1)
    targets[:, 2 * P :: 2] = asked[..., 1]
    return tokens, targets


def needle_batch(rng, rows, N, own_kind):
    """Tokens and targets (rows, N): mark, value, noise; the value, asked from there on."""
    low, high = (0, VALUES) if own_kind else (VALUES, VALUES + NOISE)
    tokens = rng.integers(low, high, (rows, N))
    tokens[:, 0], tokens[:, 1] = MARK, rng.integers(0, VALUES, rows)
    targets = np.repeat(tokens[:, 1:2], N, axis=1)
    targets[:, 0] = -1
    return tokens, targets


def make_model(D, C):
    """An MCSD model of two layers, in the variant of the published sizes."""
    variant = {"projection": "dense", "fusion": "concat", "output_projection": True}
    shape = {"hidden_size": D, "num_channels": C, "intermediate_size": 2 * D}
    args = ModelArgs(vocab_size=MARK + 1, num_hidden_layers=2, **shape, **variant)
    return Model(args)


def train(model, batch, steps, rng, name):
    """Learn from ``batch(rng)``, AdamW with warm-up and cosine."""
    warm = max(1, steps // 20)
    rates = (
        optim.linear_schedule(0, 3e-3, warm),
        optim.cosine_decay(3e-3, max(1, steps - warm), 1e-4),
    )
    optimizer = optim.AdamW(optim.join_schedules(list(rates), [warm]), weight_decay=0.1)

    def loss(tokens, targets):
        costs = nn.losses.cross_entropy(model(tokens), mx.maximum(targets, 0))
        asked = targets >= 0
        return (costs * asked).sum() / asked.sum()

    value_and_grad = nn.value_and_grad(model, loss)
    for _ in (bar := tqdm(range(steps), desc=name, disable=None)):
        value, gradients = value_and_grad(*map(mx.array, batch(rng)))
        optimizer.update(model, optim.clip_grad_norm(gradients, 1.0)[0])
        mx.eval(model.parameters(), optimizer.state, value)
        bar.set_postfix(loss=f"{value.item():.3f}")


def right(model, tokens, targets, step=512):
    """Whether each target is told (rows, N), read with carried state in constant memory."""
    cache, told = model.make_cache(), []
    for i in range(0, tokens.shape[1], step):
        logits = model(mx.array(tokens[:, i : i + step]), cache=cache)
        told.append(np.array(logits.argmax(axis=-1)))
    return np.concatenate(told, axis=1) == targets


def learn_pairs(name, make, steps, seed):
    """Accuracy by the number of pairs."""
    mx.random.seed(seed)
    rng, model = np.random.default_rng(seed), make()

    def batch(rng):
        P = int(rng.choice(PAIRS))
        return pairs_batch(rng, TOKENS // (4 * P), P)

    train(model, batch, steps, rng, name)
    found = {}
    for P in PAIRS:
        tokens, targets = pairs_batch(rng, 4096 // P, P)
        found[P] = float(right(model, tokens, targets)[targets >= 0].mean())
    return found


def learn_needle(name, make, steps, seed, own_kind):
    """Accuracy by the distance, in tokens, from the value to the last token read."""
    mx.random.seed(seed)
    rng, model = np.random.default_rng(seed), make()

    def batch(rng):
        N = int(rng.choice(LENGTHS))
        return needle_batch(rng, TOKENS // N, N, own_kind)

    train(model, batch, steps, rng, name)
    found = right(model, *needle_batch(rng, 32, DISTANCES[-1] + 2, own_kind))[:, 1:]
    # Over the last fifth before each distance, so that 32 texts are enough.
    return {d: float(found[:, -(-4 * d // 5) : d + 1].mean()) for d in DISTANCES}


CURVES = {
    **{f"D = {D}, C = 8": (learn_pairs, partial(make_model, D, 8), {}) for D in (16, 32, 64)},
    **{
        f"C = {C}, other noise": (learn_needle, partial(make_model, 32, C), {"own_kind": False})
        for C in (2, 4, 8)
    },
    "C = 8, noise of values": (learn_needle, partial(make_model, 32, 8), {"own_kind": True}),
}
COLORS = {
    **{"D = 16, C = 8": "#a9d8a0", "D = 32, C = 8": "#69db7c", "D = 64, C = 8": "#2b8a3e"},
    **{"C = 2, other noise": "#d9480f", "C = 4, other noise": "#9c36b5"},
    **{"C = 8, other noise": "#1971c2", "C = 8, noise of values": "#1971c2"},
}


def table(results, by):
    """A Markdown table: a curve a row."""
    first, *_ = results.values()
    head = [by, *(f"{int(x):,}" for x in first)]
    rows = [[name, *(f"{y:.0%}" for y in found.values())] for name, found in results.items()]
    rule = ["---", *["---:"] * len(first)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def picture(pairs, needle):
    """The PNG's bytes: accuracy by pairs, and by distance beside the longest windows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_pairs, by_distance) = pyplot.subplots(1, 2, figsize=(10, 3.6), dpi=110)
    for axes, results in ((by_pairs, pairs), (by_distance, needle)):
        for name, found in results.items():
            x, y = zip(*((int(x), 100 * y) for x, y in found.items()), strict=True)
            line = "--" if "of values" in name else "-"
            axes.plot(x, y, line, marker="o", markersize=3, color=COLORS[name], label=name)
        axes.axhline(100 / VALUES, color="#868e96", lw=0.8, ls=":")
        axes.set(xscale="log", ylim=(0, 105), ylabel="right, %")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if results:
            axes.legend(frameon=False, fontsize=8, loc="lower left")
    by_pairs.set(xlabel="pairs to remember", title="Looking up one of many pairs")
    by_pairs.set_xticks(PAIRS, PAIRS)
    by_pairs.minorticks_off()
    for C in (2, 4, 8):
        by_distance.axvline(2 ** (4 + C), color=COLORS[f"C = {C}, other noise"], lw=0.8, ls=":")
    by_distance.set_xticks(DISTANCES[1::2], DISTANCES[1::2], fontsize=8)
    by_distance.minorticks_off()
    title = "Keeping one value, D = 32 (dotted: 2^(4+C))"
    by_distance.set(xlabel="tokens since the value", title=title)
    figure.tight_layout()
    figure.savefig(buffer := io.BytesIO(), format="png")
    pyplot.close(figure)
    return buffer.getvalue()


@exits_cleanly
def main(argv=None):
    """Learn what is missing, then write the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--steps", type=int, default=2000, help="of training, a model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=CURVES, metavar="NAME", help="no others")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    asked = {"steps": args.steps, "seed": args.seed}
    results = {}
    for name, (learn, make, options) in CURVES.items():
        file = args.out / f"{name}.json"
        if not file.exists() and name in (args.only or CURVES):
            found = learn(name, make, args.steps, args.seed, **options)
            write_atomically(file, json.dumps({"options": asked, "right": found}).encode())
        if file.exists():
            result = json.loads(file.read_text())
            if result["options"] != asked:
                raise MCSDError(
                    f"{file} is of a run with other options; name another --out, or repeat those: "
                    f"{result['options']}."
                )
            results[name] = result["right"]
    pairs = {name: r for name, r in results.items() if CURVES[name][0] is learn_pairs}
    needle = {name: r for name, r in results.items() if CURVES[name][0] is learn_needle}
    tables = [table(r, by) for r, by in ((pairs, "pairs"), (needle, "tokens since")) if r]
    print(text := "\n\n".join(tables))
    write_atomically(args.out / "recall.md", f"{text}\n".encode())
    write_atomically(args.out / "recall.png", picture(pairs, needle))


if __name__ == "__main__":
    main()
