"""Ask the storyteller for stories as a user would, and count: is the name there, does it loop?

    python examples/stories_replies.py --out replies.md

The requests are drawn afresh from names, heroes, things and phrasings, some of which no request of
the training has; the replies are sampled with the model's own settings.
"""

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler
from tqdm import tqdm

from mlx_mcsd import load
from mlx_mcsd.conversation import encode, render
from mlx_mcsd.errors import exits_cleanly
from mlx_mcsd.files import write_atomically
from mlx_mcsd.generation import stream_generate
from mlx_mcsd.sampling import SETTINGS, model_defaults

NAMES = """Max Lily Tom Anna Ben Mia Sam Lucy Jack Daisy Leo Emma Oliver Zoe Finn Bella Charlie Ruby
Noah Chloe Henry Molly Oscar Luna Peter Rosie Toby Ella Felix Nora Hugo Maya Jake Sophie Milo Alice
Rex Poppy Theo Grace Bruno Coco Pip Nina Gus Tina Fred Olivia Kai Amy""".split()  # noqa: SIM905
HEROES = """dog cat rabbit bear mouse fox frog bird duck squirrel pony elephant lion fish turtle boy
girl boy girl prince princess robot dragon farmer""".split()  # noqa: SIM905
THINGS = """ball kite boat cake tree flower hat key train balloon drum apple puddle star book
snowman""".split()  # noqa: SIM905
ASK = (
    "Tell me a story about a {hero} named {name}.",
    "Tell me a story about a {hero} named {name}",
    "tell me a story about a {hero} named {name}",
    "Can you tell me a story about a little {hero} called {name}?",
    "Please write a short story about a {hero} whose name is {name}.",
    "I'd like to hear a story about {name} the {hero}.",
    "Tell me a story about {name}.",
    "Could you tell me a bedtime story about {name}, please?",
    "Tell me a story about {name} and a {thing}.",
    "Write a story about a {hero} named {name} who finds a {thing}.",
    "Story about {name} and the big {thing}",
    "My daughter {name} wants a story about a {hero}.",
)
COUNTED = ("named", "loops", "ended")


def make_requests(count, seed):
    """(request, name) pairs; the same seed gives the same."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        name, hero, thing = rng.choice(NAMES), rng.choice(HEROES), rng.choice(THINGS)
        text = rng.choice(ASK).format(name=name, hero=hero, thing=thing)
        # "an elephant", "an apple"
        pairs.append((re.sub(r"\ba(?= [aeiou])", "an", text), name))
    return pairs


def loops(text):
    """Whether a text says the same eight words three times, or one word four times in a row."""
    words = re.findall(r"[\w']+", text.lower())
    runs = Counter(tuple(words[i : i + 8]) for i in range(len(words) - 7))
    return max(runs.values(), default=0) >= 3 or bool(re.search(r"\b(\w+)(\W+\1\b){3}", text))


def reply(model, tokenizer, sampler, request, limit):
    """(text, why it ended) of an answer in a new conversation."""
    prompt = encode(tokenizer, render(tokenizer, [("user", request)], reply=True), first=True)
    text = ""
    for response in stream_generate(model, tokenizer, prompt, sampler=sampler, max_tokens=limit):
        text += response.text
    return text.strip(), response.finish_reason


def measure(directory, count=100, seed=0):
    """Ask, and count.

    Args:
        directory: of the model.
        count: requests.
        seed: of the requests and of the sampling.

    Returns:
        A dict of counts, and the replies as a list of dicts.
    """
    model, tokenizer = load(directory)
    settings = {name: default for name, (_, _, default) in SETTINGS.items()}
    settings |= model_defaults(Path(directory))
    limit = settings.pop("max_tokens")
    sampler = make_sampler(**settings)
    replies = []
    for number, (request, name) in enumerate(tqdm(make_requests(count, seed), unit="reply")):
        mx.random.seed(seed * 100_003 + number)
        text, reason = reply(model, tokenizer, sampler, request, limit)
        replies.append(
            {
                "request": request,
                "reply": text,
                "named": bool(re.search(rf"\b{name}\b", text)),
                "loops": loops(text),
                "ended": reason == "stop",
            }
        )
    counts = {key: sum(r[key] for r in replies) for key in COUNTED}
    return {"replies": count, **counts}, replies


@exits_cleanly
def main(argv=None):
    """Measure, and write every reply down to be read."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="mlx_mcsd/assets/stories", help="MLX model directory")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="Markdown of all replies")
    args = parser.parse_args(argv)
    counts, replies = measure(args.model, args.count, args.seed)
    print(json.dumps(counts))
    if args.out:
        texts = []
        for r in replies:
            found = " ".join(f"[{key}: {r[key]}]" for key in COUNTED)
            texts.append(f"**{r['request']}** {found}\n\n{r['reply']}\n")
        write_atomically(args.out, "\n".join(texts).encode())


if __name__ == "__main__":
    main()
