"""Make the bundled model from the raw texts: train, convert, measure on MLX, write its card.

    python examples/bundle_stories.py --run runs/stories --mlx-path stories --bf16 \
        --licence "TinyStories: CDLA-Sharing-1.0" --licence "books: public domain" \
        --stories CASED.txt --lower LOWER.txt --books CHILDREN.txt.xz FICTION.txt.xz

Three teachers are trained first, in RUN/teacher-1 and so on, and then the storyteller in RUN, which
starts from the last of them, as it was in the middle of its training, and learns from what all of
them say. Flags of examples/train_stories.py are passed on to all of these runs; without any, RUN
must have been trained. The target must not exist yet. Killed at any moment, the same command goes
on.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import mlx.core as mx
import stories_replies
import train_stories
from mlx_lm import generate
from mlx_lm.sample_utils import make_sampler
from tqdm import tqdm

from mlx_mcsd import load
from mlx_mcsd.convert.__main__ import main as convert
from mlx_mcsd.errors import MCSDError, exits_cleanly
from mlx_mcsd.files import write_atomically
from mlx_mcsd.scoring import score

PROMPTS = [
    "Once upon a time",
    "Lily had a red ball.",
    "Tom and his dog Max went to the park.",
    "It was a rainy day, and the little bird was sad because",
    '"Mom, can I have a cookie?" asked Ben.',
]

TEACHERS = [
    "--hidden-size 256 --intermediate-size 768 --steps 4400 --weight-decay 0.1 --dropout 0.15 "
    "--embedding-dropout 0.05 --book-share 0.6 --books-flat 0.28 --books-until 0.35 --plain 0.5 "
    "--rename-asked 0.75 --drills 250 200 --drill-share 0.12 0.5",
    "--steps 6000 --weight-decay 0.4 --embedding-dropout 0.2 --books-flat 0.35 --books-until 0.5 "
    "--drill-share 0 0.5",
    "",
]
STUDENT = (
    "--steps 4000 --lr 0.003 --weight-decay 0.4 --dropout 0.1 --distill 0.9 --book-share 0 "
    "--books-flat 0 --books-until 0 --drills 0 0 --drill-share 0 0.5 --calibrate"
)
"""What the runs have that the defaults of examples/train_stories.py do not say."""

TAUGHT = """
So were {count} teachers trained. The storyteller started from the last of them, as it was in the
middle of its training after {before:.1f} million tokens, and went on {books}. Names
aside, {weight:.0f} % of what it learned from there on are the mean probabilities of these:

| teacher's parameters | bits per character, the same unseen stories | sha256 |
| --- | --- | --- |
{rows}
"""
"""What the card says of a run with teachers."""

CALIBRATED = """
In the end all logits were multiplied by {scale:.3f}, the number that fits one half of the stories
held out best. The figures are of the other half; the picture is of both, before the scaling.
"""
"""What the card says of a run with calibration."""


def train(run, flags):
    """Train teachers and storyteller; a flag that is given counts where the recipe has it too."""
    given = train_stories.parse_args(["--out", str(run), *flags])
    if given.out != run or given.teachers or given.init_from:
        raise MCSDError(
            "--out, --teachers and --init-from are chosen by the recipe but one was given; leave "
            "it out."
        )
    folders = [run / f"teacher-{number}" for number in range(1, len(TEACHERS) + 1)]
    if (run / "checkpoint.pt").exists() and not (folders[-1] / "facts.json").exists():
        raise MCSDError(f"--run must be new or this recipe's but {run} holds another training.")
    for folder, recipe in zip(folders, TEACHERS, strict=True):
        train_stories.main(["--out", str(folder), *recipe.split(), *flags])
    words = ["--out", run, "--init-from", folders[-1] / "flat.pt"]
    words += ["--teachers", *(folder / "hf" for folder in folders)]
    train_stories.main([*map(str, words), *STUDENT.split(), *flags])


def write_of_teachers(facts):
    """Markdown of the teachers of a run, empty if it had none."""
    rows = [
        f"| {teacher['parameters'] / 1e6:.2f} million | "
        f"{teacher['bits_per_character_unseen']:.4f} | `{teacher['sha256']}` |"
        for teacher in facts["teachers"]
    ]
    options = facts["options"]
    values = {
        "count": len(rows),
        "before": facts["training_tokens_before"] / 1e6,
        "books": f"with {options['book_share']:.0%} of books"
        if options["book_share"]
        else "without books",
        "weight": 100 * options["distill"],
        "rows": "\n".join(rows),
    }
    return TAUGHT.format(**values) if rows else ""


def quote(text):
    """Text as a Markdown quotation."""
    return "> {}".format(text.strip().replace("\n", "\n> ")).replace("> \n", ">\n")


def write_samples(model, tokenizer, settings):
    """Markdown of one sample a prompt, the n-th with seed n."""
    samples = []
    for seed, prompt in enumerate(PROMPTS):
        mx.random.seed(seed)
        sampler = make_sampler(settings["temperature"], settings["top_p"])
        limit = settings["max_new_tokens"]
        text = generate(model, tokenizer, prompt, sampler=sampler, max_tokens=limit)
        samples.append(quote(f"**{prompt}**{text}"))
    return "\n\n---\n\n".join(samples)


def as_typed(argv):
    """The command of a list of arguments, without the folders that files lie in."""
    words = [Path(word).name if Path(word).is_file() else word for word in argv]
    return shlex.join(["python", "examples/bundle_stories.py", *words])


@exits_cleanly
def main(argv=None):
    """Train, convert, measure, write the card."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--mlx-path", type=Path, required=True, help="folder to make")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--q-bits", type=int, help="quantize to so many bits a weight")
    parser.add_argument("--replies", type=int, default=100, help="requests to count names in")
    parser.add_argument("--licence", action="append", default=[], help="of the data; repeatable")
    args, training = parser.parse_known_args(argv)
    picture = args.mlx_path / "loss.png"  # the last file to be written
    converted = (args.mlx_path / "config.json").exists() and not picture.exists()
    if args.mlx_path.exists() and not converted:
        raise MCSDError(f"--mlx-path must not exist yet but {args.mlx_path} does.")
    if training:
        train(args.run, training)
    if not converted:
        words = ["--hf-path", args.run / "hf", "--mlx-path", args.mlx_path, "--dtype", args.dtype]
        words += ["-q", "--q-bits", args.q_bits] if args.q_bits else []
        convert([*map(str, words)])

    facts = json.loads((args.run / "facts.json").read_text())
    unseen = json.loads((args.run / "unseen.json").read_text())
    settings = json.loads((args.mlx_path / "generation_config.json").read_text())
    model, tokenizer = load(args.mlx_path)
    shape = vars(model.args)
    stories = tqdm(unseen, unit="story", desc="measuring", disable=None)
    measured = score(model, tokenizer, ([story] for story in stories))
    counts, replies = stories_replies.measure(args.mlx_path, args.replies)
    options = facts["options"]
    template = Path(__file__).with_name("stories_card.md").read_text()
    card = template.format(
        parameters=facts["parameters"] / 1e6,
        form=f"{args.q_bits} bits a weight" if args.q_bits else args.dtype,
        bits=measured.bits_per_character,
        reference_bits=facts["bits_per_character_unseen"],
        unseen_stories=facts["unseen"]["stories"],
        unseen_characters=facts["unseen"]["characters"],
        state=sum(layer.mixer.state_bytes(1) for layer in model.layers),
        tokens=facts["training_tokens_seen"] / 1e6,
        seed=options["seed"],
        cores=options["threads"],
        arithmetic="bfloat16 products" if options["bf16"] else "float32",
        command=as_typed(argv),
        asked=100 * (1 - options["plain"]),
        teachers=write_of_teachers(facts),
        calibrated=CALIBRATED.format(scale=facts["logit_scale"]) if options["calibrate"] else "",
        sources="\n".join(f"| {name} | `{digest}` |" for name, digest in facts["sources"].items()),
        licences="; ".join(args.licence) or "not named",
        temperature=settings["temperature"],
        top_p=settings["top_p"],
        last_seed=len(PROMPTS) - 1,
        counts=counts,
        told="\n\n---\n\n".join(quote(f"**{r['request']}**\n\n{r['reply']}") for r in replies[:5]),
        samples=write_samples(model, tokenizer, settings),
        **{k: v for k, v in shape.items() if isinstance(v, int | str)},
    )
    write_atomically(args.mlx_path / "README.md", card.encode())
    write_atomically(picture, (args.run / "loss.png").read_bytes())
    print(card)


if __name__ == "__main__":
    main()
