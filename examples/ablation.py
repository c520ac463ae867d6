"""The paper's ablation (Fig. 9) at the size of a laptop: five pairings of sections, one budget.

    python examples/ablation.py --out runs/ablation --stories CASED.txt --lower LOWER.txt

Every variant reads the same tokens in the same order from the same first weights (wherever two
variants share a tensor), once per seed. Each run leaves OUT/SEED-VARIANT.json when it is finished;
killed at any moment, the same command goes on with the first run that has none. Then it writes
OUT/ablation.md (the table and what it says of the paper's order) and OUT/ablation.png.
"""

import argparse
import json
import math
import os
import random
import statistics
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from stories_text import load_stories
from torch.nn import functional as F
from tqdm import tqdm

from mlx_mcsd.convert.reference.configuration_mcsd import MCSDConfig
from mlx_mcsd.convert.reference.modeling_mcsd import MCSDForCausalLM
from mlx_mcsd.errors import MCSDError, exits_cleanly
from mlx_mcsd.files import write_atomically
from mlx_mcsd.tokenizer import train_sentencepiece

VARIANTS = {
    "full": ["slope", "decay"],
    "without decay": ["slope"],
    "double slope": ["slope", "slope"],
    "double decay": ["decay", "decay"],
    "without slope": ["decay"],
}
PAPER = {  # training loss at 1B tokens, read from Fig. 9
    "full": 3.775,
    "without decay": 3.85,
    "double slope": 3.85,
    "double decay": 4.00,
    "without slope": 4.10,
}
COLORS = ["#2b8a3e", "#d9480f", "#f08c00", "#1971c2", "#862e9c"]
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for a mean of so many differences


def parse_args(argv=None):
    """Command line; the defaults are those of docs/ablation.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--stories", nargs="+", required=True, help="story files with capitals")
    parser.add_argument("--lower", nargs="*", default=[], help="lower-case story files")
    parser.add_argument("--seeds", type=int, default=3, choices=sorted(T_95))
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--intermediate-size", type=int, default=352)
    parser.add_argument(
        "--fusion", default="add", choices=["add", "concat"], help="concat has an o_proj"
    )
    parser.add_argument("--decay-gain", type=float, default=0.02, help="of fresh decay norms")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--bf16", action="store_true", help="projections and head in bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args(argv)


def read_data(args):
    """(batches of (steps, B, N + 1) ids by seed, held-out ids, characters held out, BOS)."""
    train, unseen = load_stories(args.stories, args.lower)
    tokenizer = args.out / "tokenizer.model"
    if not tokenizer.exists():
        write_atomically(tokenizer, train_sentencepiece(train, args.vocab_size))
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.read_bytes())
    bos, eos = processor.bos_id(), processor.eos_id()

    def encode(texts):
        return [np.array([bos, *ids, eos]) for ids in processor.encode(texts)]

    documents = encode(train)

    def batches(seed):
        """The stories in the seed's order, again and again, cut into rows."""
        wanted = args.steps * args.batch * (args.length + 1)
        rng, rows, have = random.Random(seed), [], 0
        while have < wanted:
            epoch = rng.sample(documents, len(documents))
            rows += epoch
            have += sum(map(len, epoch))
        flat = np.concatenate(rows)[:wanted]
        return torch.from_numpy(flat).view(args.steps, args.batch, args.length + 1)

    return batches, encode(unseen), sum(map(len, unseen)), sum(map(len, documents)), bos


def make_model(args, sections, seed, bos):
    """A model whose tensors depend on the seed and their names alone, not on the variant."""
    config = MCSDConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_channels=args.channels,
        num_hidden_layers=args.layers,
        intermediate_size=args.intermediate_size,
        projection="dense",
        fusion=args.fusion,
        output_projection=args.fusion == "concat",
        tie_word_embeddings=True,
        sections=sections,
        bos_token_id=bos,
    )
    model = MCSDForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            std = config.initializer_range
            torch.nn.init.normal_(parameter, std=std, generator=generator)
        elif "decay_norm" in name:
            torch.nn.init.constant_(parameter, args.decay_gain)
    return model


def next_token_loss(model, tokens, bos, reduction="mean"):
    """Cross-entropy of tokens (B, N + 1), documents starting at BOS, which itself is not asked."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(inputs, reset=inputs == bos, use_cache=False).logits
    targets = targets.masked_fill(targets == bos, -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)


@torch.no_grad()
def unseen_loss(model, documents, bos):
    """Nats per token of whole stories, each from an empty state."""
    model.eval()
    nats = 0.0
    for start in range(0, len(documents), 16):
        rows = [torch.from_numpy(ids) for ids in documents[start : start + 16]]
        # BOS is never asked for, so it pads.
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=bos)
        nats += next_token_loss(model, batch, bos, "sum").item()
    return nats / sum(len(ids) - 1 for ids in documents)


def train(args, name, seed, batches, unseen, bos):
    """One run: parameter count, training losses by step, and the loss on unseen stories."""
    model = make_model(args, VARIANTS[name], seed, bos)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, args.steps // 20)

    def share(step):
        """Of the peak rate: linear warm-up, then a cosine to a tenth."""
        after = (step - warm) / max(1, args.steps - warm)
        return (step + 1) / warm if step < warm else 0.55 + 0.45 * math.cos(math.pi * after)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    losses = []
    bar = tqdm(batches, desc=f"seed {seed}, {name}", unit="step", mininterval=1)
    for tokens in bar:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = next_token_loss(model, tokens, bos)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "unseen": unseen_loss(model, unseen, bos),
        "losses": losses,
    }


def compare(runs, better, worse):
    """Mean of (worse - better) over the seeds, paired, and the half-width of its 95 % interval."""
    pairs = zip(runs[worse], runs[better], strict=True)
    differences = [w["unseen"] - b["unseen"] for w, b in pairs]
    deviation = statistics.stdev(differences)
    return statistics.mean(differences), T_95[len(differences)] * deviation / len(
        differences
    ) ** 0.5


def verdicts(runs):
    """One line for each neighbouring pair of the paper's order."""
    lines = []
    for better, worse in pairwise(VARIANTS):
        difference, margin = compare(runs, better, worse)
        if PAPER[better] == PAPER[worse]:
            here = "equal within the margin" if abs(difference) <= margin else "they differ"
        elif abs(difference) <= margin:
            here = "not separated"
        else:
            here = "shows" if difference > 0 else "reversed"
        sign = "=" if PAPER[better] == PAPER[worse] else "<"
        lines.append(
            f"| {better} {sign} {worse} | {PAPER[worse] - PAPER[better]:.3f} "
            f"| {difference:+.3f} ± {margin:.3f} | {here} |"
        )
    return lines


def write_table(runs, facts, path):
    """The table as Markdown."""
    lines = [
        "| variant | parameters | loss, unseen stories | by seed | paper, 1B tokens |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, of_name in runs.items():
        losses = [run["unseen"] for run in of_name]
        lines.append(
            f"| {name} | {of_name[0]['parameters']:,} | {statistics.mean(losses):.3f} "
            f"± {statistics.stdev(losses):.3f} | {', '.join(f'{v:.3f}' for v in losses)} "
            f"| {PAPER[name]:.3f} |"
        )
    lines += [
        "",
        "| paper's order | its difference | here | verdict |",
        "| --- | --- | --- | --- |",
        *verdicts(runs),
        "",
        facts,
    ]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def draw(runs, path):
    """Training curves, mean of the seeds; and the losses on unseen stories, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), dpi=110)
    low, high = math.inf, 0.0
    for color, (row, (name, of_name)) in zip(COLORS, enumerate(runs.items()), strict=True):
        mean = np.mean([run["losses"] for run in of_name], axis=0)
        window = max(1, len(mean) // 20)
        smooth = np.convolve(mean, np.ones(window) / window, "valid")
        left.plot(np.arange(len(smooth)) + window, smooth, color=color, label=name, lw=1.3)
        low, high = min(low, smooth[-1]), max(high, smooth[len(smooth) // 4])
        losses = [run["unseen"] for run in of_name]
        right.plot(losses, [row] * len(losses), "o", color=color, alpha=0.6)
        right.plot([statistics.mean(losses)] * 2, [row - 0.3, row + 0.3], color=color, lw=2)
    left.set(xlabel="step", ylabel="training loss, nats a token", title="Mean of the seeds")
    left.set_ylim(low - 0.1 * (high - low), high)
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel="loss on unseen stories, nats a token", title="Each seed, and the mean")
    right.set_yticks(range(len(runs)), [f"{name}\n(paper {PAPER[name]:.3f})" for name in runs])
    right.invert_yaxis()
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


@exits_cleanly
def main(argv=None):
    """Train what is not yet trained, then write table and picture."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    # What may change between two calls that finish the same table.
    free = ("out", "seeds", "threads")
    options = {key: value for key, value in vars(args).items() if key not in free}
    batches, unseen, characters, available, bos = read_data(args)
    runs = {name: [] for name in VARIANTS}
    for seed in range(args.seeds):  # seeds outside, so that early results compare all variants
        for name in VARIANTS:
            path = args.out / f"{seed}-{name.replace(' ', '-')}.json"
            if not path.exists():
                result = train(args, name, seed, batches(seed), unseen, bos)
                write_atomically(path, json.dumps({"options": options, **result}).encode())
            runs[name].append(json.loads(path.read_text()))
            if runs[name][-1]["options"] != options:
                raise MCSDError(
                    f"{path} is of a run with other options; name another --out, or repeat those: "
                    f"{runs[name][-1]['options']}."
                )
    seen = args.steps * args.batch * args.length
    facts = (
        f"{args.layers} layers, D = {args.hidden_size}, C = {args.channels}, "
        f"F = {args.intermediate_size}, K = {args.vocab_size}, "
        f"dense projections, fusion {args.fusion}, "
        f"tied head, decay norms begin at {args.decay_gain:g}; "
        f"{seen:,} tokens a run from texts of {available:,}, "
        f"{args.batch} rows of {args.length} a step; "
        f"AdamW, peak rate {args.lr:g}; {len(unseen)} unseen stories of {characters:,} characters. "
        "Behind ± in the first table: the standard deviation over the seeds; in the second: "
        "half of the 95 % interval of the mean difference, seed by seed."
    )
    write_table(runs, facts, args.out / "ablation.md")
    draw(runs, args.out / "ablation.png")
    print((args.out / "ablation.md").read_text(), end="")


if __name__ == "__main__":
    main()
