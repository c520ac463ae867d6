"""Choose the storyteller's shape: train each candidate with one budget, and write the table.

    python examples/stories_shapes.py --out runs/shapes --stories CASED.txt --lower LOWER.txt

A budget is a number of floating-point operations, 6 a weight and token, so that a larger model
reads less. Every run resumes if it was killed; one that has ended is not run again.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import train_stories

from mlx_mcsd.errors import MCSDError, exits_cleanly
from mlx_mcsd.files import write_atomically

BASE = {"hidden_size": 256, "layers": 5, "intermediate_size": 768}
CANDIDATES = {
    "base": {},
    "narrower": {"hidden_size": 192, "intermediate_size": 576},
    "wider": {"hidden_size": 320, "intermediate_size": 960},
    "shallower": {"layers": 3},
    "deeper": {"layers": 8},
    "per-channel projections": {"projection": "channel"},
    "fusion concat": {"fusion": "concat"},
}
STORIES_ALONE = ["--plain", "1", "--rename", "0", "--drills", "0", "0", "--drill-share", "0", "0"]
# What a pass or two over them needs; many need more.
STORIES_ALONE += ["--dropout", "0.1", "--embedding-dropout", "0", "--weight-decay", "0.1"]
TOKENS = 4096  # a step: 16 rows of 256


def weights(hidden_size, layers, intermediate_size, *, vocab_size=3072, channels=8, **shape):
    """How many weights a shape has, gains aside."""
    square = hidden_size**2
    mixer = 4 * square // (channels if shape.get("projection") == "channel" else 1)
    mixer += 2 * square if shape.get("fusion") == "concat" else 0
    mlp = 3 * hidden_size * intermediate_size
    return layers * (mixer + mlp) + vocab_size * hidden_size


def table(results):
    """Markdown, the best first."""
    lines = [
        "| shape | D | L | C | F | K | projection | fusion | M parameters | M tokens | bits/char |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, facts in sorted(results.items(), key=lambda x: x[1]["bits_per_character_unseen"]):
        o = facts["options"]
        cells = [
            *(name, o["hidden_size"], o["layers"], o["channels"], o["intermediate_size"]),
            *(o["vocab_size"], facts["projection"], facts["fusion"]),
            f"{facts['parameters'] / 1e6:.2f}",
            f"{facts['training_tokens_seen'] / 1e6:.2f}",
            f"{facts['bits_per_character_unseen']:.4f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


@exits_cleanly
def main(argv=None):
    """Run what has not ended yet; flags of train_stories.py are passed on."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--stories", nargs="+", required=True, help="story files with capitals")
    parser.add_argument("--lower", nargs="*", default=[], help="lower-case story files")
    parser.add_argument("--budget", type=float, default=4e13, help="operations a run")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    args, more = parser.parse_known_args(argv)
    results = {}
    for name in args.only:
        shape = {**BASE, **CANDIDATES[name]}
        out = args.out / name.replace(" ", "-")
        steps = round(args.budget / (6 * weights(**shape) * TOKENS))
        if not (out / "facts.json").exists():
            flags = [f"--{k.replace('_', '-')}={v}" for k, v in shape.items()]
            flags += [f"--steps={steps}", f"--evaluate-every={steps}", "--checkpoint-every=50"]
            data = ["--stories", *args.stories, "--lower", *args.lower]
            print(f"{name}: {steps} steps", file=sys.stderr)
            with redirect_stdout(sys.stderr):
                train_stories.main(["--out", str(out), *data, *STORIES_ALONE, *flags, *more])
        facts = json.loads((out / "facts.json").read_text())
        if facts["options"]["steps"] != steps:
            raise MCSDError(
                f"{out} is of a run of {facts['options']['steps']} steps, not {steps}; repeat its "
                "--budget, or name another --out."
            )
        config = json.loads((out / "hf" / "config.json").read_text())
        results[name] = facts | {key: config[key] for key in ("projection", "fusion")}
        write_atomically(args.out / "table.md", table(results).encode())
    print(table(results))


if __name__ == "__main__":
    main()
