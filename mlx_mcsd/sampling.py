"""How the next token is chosen: the flags, the model's own settings, mlx-lm's sampler."""

import argparse

from .cli import Parser, integer, number
from .errors import MCSDError

SETTINGS = {
    "max_tokens": ("max_new_tokens", integer(1), 100),
    "temp": ("temperature", number(0), 1),
    "top_p": ("top_p", number(0, 1, above=True), 1),
    "min_p": ("min_p", number(0, 1), 0),
    "top_k": ("top_k", integer(0), 0),
}
"""Flags ``generation_config.json`` may set: its key, what is fit, the value if it says nothing."""


def add_arguments(parser: Parser) -> None:
    """Add the flags of ``mlx_lm.generate`` that choose tokens and end the text."""
    theirs = "default: the model's generation_config.json, else"
    add = parser.add_argument
    add(
        "--max-tokens",
        "-m",
        type=SETTINGS["max_tokens"][1],
        help=f"tokens to generate at most ({theirs} 100)",
    )
    add(
        "--extra-eos-token",
        nargs="+",
        default=(),
        help="tokens (or their ids) that end the text as well",
    )
    add(
        "--temp",
        type=SETTINGS["temp"][1],
        help=f"sampling temperature, 0 is greedy ({theirs} 0)",
    )
    add(
        "--top-p",
        type=SETTINGS["top_p"][1],
        help=f"sample from the likeliest tokens of this total probability ({theirs} 1)",
    )
    add(
        "--min-p",
        type=SETTINGS["min_p"][1],
        help=f"drop tokens less likely than this fraction of the likeliest ({theirs} 0)",
    )
    add(
        "--top-k",
        type=SETTINGS["top_k"][1],
        help=f"sample from this many tokens, 0 is all ({theirs} 0)",
    )
    add(
        "--xtc-probability",
        type=number(0, 1),
        default=0.0,
        help="how often to exclude the top choices, XTC sampling (default: 0)",
    )
    add(
        "--xtc-threshold",
        type=number(0, 0.5),
        default=0.1,
        help="probability from which XTC calls a token a top choice (default: 0.1)",
    )
    add(
        "--min-tokens-to-keep",
        type=integer(1),
        default=1,
        help="tokens that min-p keeps at least (default: 1)",
    )
    add("--seed", type=integer(0, 2**64 - 1), help="seed of the sampling, for the same text again")


def model_defaults(directory) -> dict[str, float]:
    """What ``generation_config.json`` says of our flags; without its ``do_sample``, greedy."""
    from .loading import read_json

    file = directory / "generation_config.json"
    config = read_json(file) if file.exists() else {}
    defaults = {}
    for flag, (key, fit, default) in SETTINGS.items():
        try:
            defaults[flag] = default if config.get(key) is None else fit(str(config[key]))
        except argparse.ArgumentTypeError as error:
            raise MCSDError(f"{key} in {file} {error}.") from None
    return defaults if config.get("do_sample") else defaults | {"temp": 0}


def add_eos_tokens(tokenizer, tokens) -> None:
    """Let further tokens, or their ids, end the text."""
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        # Asked for a token it lacks, a tokenizer may answer with the one for unknown text.
        is_id = token.isdecimal() and len(token) < 10 and int(token) < len(tokenizer)
        if token not in vocabulary and not is_id:
            raise MCSDError(f"--extra-eos-token {token!r} is no token of this model's tokenizer.")
        tokenizer.add_eos_token(token)


def make_sampler(args, tokenizer):
    """mlx-lm's sampler, kept to the ids the tokenizer can spell: a vocabulary may be padded."""
    from mlx_lm.sample_utils import make_sampler

    known = len(tokenizer)
    sampler = make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        min(args.min_tokens_to_keep, known),
        top_k=args.top_k if args.top_k < known else 0,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=[
            *tokenizer.encode("\n", add_special_tokens=False),
            *(token for token in tokenizer.eos_token_ids if token < known),
        ],
    )
    return lambda logprobs: sampler(logprobs[..., :known])


def begin(seed: int | None, state=None) -> None:
    """Set where sampling stands: at a seed, or where a loaded state left it."""
    import mlx.core as mx

    if seed is not None:
        mx.random.seed(seed)
    elif state is not None and state.random_key is not None:
        high, low = state.random_key.tolist()
        mx.random.seed(high << 32 | low)  # a seed is the two halves of the key
