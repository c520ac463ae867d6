"""Make the bundled model of a finished training run: convert, measure on MLX, write its card.

    python examples/bundle_stories.py --run runs/stories --mlx-path mlx_mcsd/assets/stories \
        --licence "TinyStories: CDLA-Sharing-1.0" --licence "books: public domain" \
        --command "python examples/train_stories.py ..."

Reads what examples/train_stories.py wrote into RUN. The target must not exist yet.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import generate
from mlx_lm.sample_utils import make_sampler
from tqdm import tqdm

from mlx_mcsd import load

PROMPTS = [
    "Once upon a time",
    "Lily had a red ball.",
    "Tom and his dog Max went to the park.",
    "It was a rainy day, and the little bird was sad because",
    '"Mom, can I have a cookie?" asked Ben.',
]


def bits_per_character(model, tokenizer, texts):
    """Bits per character of whole texts, the end included, each from an empty state."""
    nats = 0.0
    for text in tqdm(texts, unit="story", desc="measuring"):
        tokens = mx.array([*tokenizer.encode(text), tokenizer.eos_token_id])
        logits = model(tokens[None, :-1])
        nats += nn.losses.cross_entropy(logits[0], tokens[1:], reduction="sum").item()
    return nats / math.log(2) / sum(map(len, texts))


def write_samples(model, tokenizer, settings):
    """Markdown of one sample a prompt, the n-th with seed n."""
    samples = []
    for seed, prompt in enumerate(PROMPTS):
        mx.random.seed(seed)
        sampler = make_sampler(settings["temperature"], settings["top_p"])
        limit = settings["max_new_tokens"]
        text = generate(model, tokenizer, prompt, sampler=sampler, max_tokens=limit)
        quoted = f"**{prompt}**{text}".strip().replace("\n", "\n> ")
        samples.append(f"> {quoted}".replace("> \n", ">\n"))
    return "\n\n---\n\n".join(samples)


def main(argv=None):
    """Convert, measure, write the card."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--mlx-path", type=Path, required=True, help="folder to make")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--licence", action="append", default=[], help="of the data; repeatable")
    parser.add_argument(
        "--command", action="append", default=[], help="as it was typed; repeatable"
    )
    args = parser.parse_args(argv)
    convert = [sys.executable, "-m", "mlx_mcsd.convert", "--hf-path", args.run / "hf"]
    subprocess.run([*convert, "--mlx-path", args.mlx_path, "--dtype", args.dtype], check=True)
    shutil.copyfile(args.run / "loss.png", args.mlx_path / "loss.png")

    facts = json.loads((args.run / "facts.json").read_text())
    unseen = json.loads((args.run / "unseen.json").read_text())
    settings = json.loads((args.mlx_path / "generation_config.json").read_text())
    model, tokenizer = load(args.mlx_path)
    shape = vars(model.args)
    template = Path(__file__).with_name("stories_card.md").read_text()
    card = template.format(
        parameters=facts["parameters"] / 1e6,
        dtype=args.dtype,
        bits=bits_per_character(model, tokenizer, unseen),
        reference_bits=facts["bits_per_character_unseen"],
        unseen_stories=facts["unseen"]["stories"],
        unseen_characters=facts["unseen"]["characters"],
        state=sum(layer.mixer.state_bytes(1) for layer in model.layers),
        tokens=facts["training_tokens_seen"] / 1e6,
        seed=facts["options"]["seed"],
        commands="\n".join(f"    {line}" for line in args.command),
        sources="\n".join(f"| {name} | `{digest}` |" for name, digest in facts["sources"].items()),
        licences="; ".join(args.licence) or "not named",
        temperature=settings["temperature"],
        top_p=settings["top_p"],
        last_seed=len(PROMPTS) - 1,
        samples=write_samples(model, tokenizer, settings),
        **{k: v for k, v in shape.items() if isinstance(v, int | str)},
    )
    (args.mlx_path / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
