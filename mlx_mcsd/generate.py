"""``python -m mlx_mcsd.generate``: text from a prompt, as it is made."""

import argparse
import json
import sys

from .cli import Parser, boolean, integer, number
from .errors import MCSDError, exits_cleanly

PROMPT = "Once upon a time"
SETTINGS = {
    "max_tokens": ("max_new_tokens", integer(1), 100),
    "temp": ("temperature", number(0), 1),
    "top_p": ("top_p", number(0, 1, above=True), 1),
    "min_p": ("min_p", number(0, 1), 0),
    "top_k": ("top_k", integer(0), 0),
}
"""Flags ``generation_config.json`` may set: its key, what is fit, the value if it says nothing."""


def setup_arg_parser() -> Parser:
    """Return the parser: the flags of ``mlx_lm.generate`` that a fixed-size state has a use for."""
    theirs = "default: the model's generation_config.json, else"
    parser = Parser(prog="mlx_mcsd.generate", description="Generate text with an MCSD model.")
    add = parser.add_argument
    add("--model", help="a directory or a hub id (default: the bundled storyteller)")
    add("--adapter-path", help="a directory of adapters trained by mlx_lm.lora")
    add(
        "--prompt",
        "-p",
        default=PROMPT,
        help=r"the prompt, \n and \t understood; - reads standard input "
        f'(default: "{PROMPT}"). Without a chat template the model continues it',
    )
    add("--system-prompt", help="system message of the chat template")
    add("--prefill-response", help="how the answer begins, of the chat template")
    add("--ignore-chat-template", action="store_true", help="use the raw prompt")
    add("--chat-template-config", help="further arguments of the chat template, a JSON object")
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
    add(
        "--prefill-step-size",
        type=integer(1),
        default=2048,
        help="prompt tokens read at a time: smaller takes less memory (default: 2048)",
    )
    add("--prompt-cache-file", help="continue from a state saved by mlx_lm.cache_prompt")
    add(
        "--verbose",
        type=boolean,
        default=True,
        help="true: the text and what it took; false: only the generated text (default: true)",
    )
    return parser


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    prompt = read_prompt(args.prompt)
    template = read_template_config(args.chat_template_config)

    # Seconds of imports, which --help and a mistyped flag need not wait for.
    import mlx.core as mx
    from mlx_lm.generate import stream_generate

    from . import loading

    cache, path = None, args.model
    if args.prompt_cache_file is not None:
        cache, path = load_cache(args.prompt_cache_file, args.model)
    directory = loading.resolve(path)
    parser.set_defaults(**model_defaults(directory))
    args = parser.parse_args(argv)

    tokenizer = loading.load_tokenizer(directory)
    model = loading.load_model(directory)
    if args.adapter_path is not None:
        loading.load_adapters(model, args.adapter_path)
    if cache is None:
        cache = model.make_cache()
    else:
        check_cache(cache, model, args.prompt_cache_file)
    add_eos_tokens(tokenizer, args.extra_eos_token)

    chat = tokenizer.has_chat_template and not args.ignore_chat_template
    if chat:
        tokens = chat_tokens(args, tokenizer, prompt, template)
    else:
        warn_of_chat_flags(args)
        # A saved state has read the beginning-of-text token already.
        special = args.prompt_cache_file is None
        tokens = tokenizer.encode(prompt, add_special_tokens=special)
    if not tokens:
        raise MCSDError("the prompt must not be empty but holds no tokens.")

    if args.seed is not None:
        mx.random.seed(args.seed)
    if args.verbose:
        print("=" * 10)
    if echo := args.verbose and not chat:
        print(prompt, end="", flush=True)
    try:
        for response in stream_generate(
            model,
            tokenizer,
            tokens,
            max_tokens=args.max_tokens,
            sampler=make_sampler(args, tokenizer),
            prompt_cache=cache,
            prefill_step_size=args.prefill_step_size,
        ):
            if echo and response.generation_tokens == 1:
                print(trimmed_space(tokenizer, prompt, tokens, response), end="")
            print(response.text, end="", flush=True)
    finally:
        print(flush=True)
    if args.verbose:
        print_summary(response, cache, model)


def read_prompt(prompt: str) -> str:
    """The prompt itself, or of ``-`` what standard input holds."""
    if prompt == "-" and sys.stdin is None:
        raise MCSDError("--prompt - needs standard input but it is closed.")
    try:
        if prompt == "-":
            prompt = sys.stdin.read()
        else:
            prompt = prompt.replace("\\n", "\n").replace("\\t", "\t")
        prompt.encode()  # bytes that are no text come as surrogates, which no tokenizer takes
    except UnicodeError:
        raise MCSDError("the prompt must be UTF-8 text but is not.") from None
    if not prompt:
        raise MCSDError("the prompt must not be empty; give one with --prompt.")
    return prompt


def read_template_config(text: str | None) -> dict:
    """The arguments that ``--chat-template-config`` holds."""
    try:
        config = {} if text is None else json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise MCSDError(f"--chat-template-config must be a JSON object but got {text!r}.")
    return config


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


def load_cache(file: str, model: str | None):
    """The saved state, and the model that made it: the one asked for, if one was."""
    from pathlib import Path

    from mlx_lm.models.cache import load_prompt_cache

    from .loading import one_line

    if not Path(file).exists():
        raise MCSDError(f"no prompt cache {file}.")
    try:
        cache, metadata = load_prompt_cache(file, return_metadata=True)
        maker = metadata["model"]
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        raise MCSDError(
            f"{file} must be a prompt cache of mlx_lm.cache_prompt but: {one_line(error)}"
        ) from error
    if model is not None and Path(model).resolve() != Path(maker).resolve():
        raise MCSDError(f"{file} was made by the model {maker} but --model is {model}.")
    return cache, maker


def check_cache(cache, model, file: str) -> None:
    """Raise unless the saved state has the shape of the model's."""

    def shapes(states):
        return [[(a.shape, a.dtype) for a in state] for state in states]

    expected = shapes(layer.mixer.init_state(1) for layer in model.layers)
    if shapes(getattr(c, "cache", []) for c in cache) != expected:
        raise MCSDError(f"the state in {file} is another model's: it does not fit this one.")


def add_eos_tokens(tokenizer, tokens) -> None:
    """Let further tokens, or their ids, end the text."""
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        # Asked for a token it lacks, a tokenizer may answer with the one for unknown text.
        if token not in vocabulary and not (token.isdecimal() and int(token) < len(tokenizer)):
            raise MCSDError(f"--extra-eos-token {token!r} is no token of this model's tokenizer.")
        tokenizer.add_eos_token(token)


def chat_tokens(args, tokenizer, prompt: str, template: dict) -> list[int]:
    """The prompt as a message of a chat, in tokens."""
    from jinja2 import TemplateError

    def render(content):
        messages = [{"role": "user", "content": content}]
        if args.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": args.system_prompt})
        if prefilled := args.prefill_response is not None:
            messages.append({"role": "assistant", "content": args.prefill_response})
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            continue_final_message=prefilled,
            add_generation_prompt=not prefilled,
            **template,
        )

    try:
        text = render(prompt)
        if args.prompt_cache_file is not None:
            # The state holds all that comes before the prompt.
            text = text[render("<query>").index("<query>") :]
        return tokenizer.encode(text, add_special_tokens=False)
    # A template is a program of the model's maker: this is what one may run into.
    except (
        *(TemplateError, ArithmeticError, LookupError, RecursionError),
        *(AttributeError, TypeError, ValueError),
    ) as error:
        from .loading import one_line

        raise MCSDError(f"the chat template refuses this prompt: {one_line(error)}") from error


def warn_of_chat_flags(args) -> None:
    """Say which flags have no effect without a chat template."""
    flags = ("system_prompt", "prefill_response", "chat_template_config")
    if given := [f"--{f.replace('_', '-')}" for f in flags if getattr(args, f) is not None]:
        verb = "has" if len(given) == 1 else "have"
        why = f"{', '.join(given)} {verb} no effect without a chat template."
        print(f"warning: {why}", file=sys.stderr)


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


def trimmed_space(tokenizer, prompt: str, tokens: list[int], first) -> str:
    """The space between an echoed prompt and its continuation, where the detokenizer dropped it."""
    text = tokenizer.decode([*tokens, first.token], skip_special_tokens=True)
    return " " if text.startswith(f"{prompt} ") and not first.text.startswith(" ") else ""


def print_summary(response, cache, model) -> None:
    """mlx-lm's closing lines, and the size of the state."""
    print("=" * 10)
    print(f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec")
    print(
        f"Generation: {response.generation_tokens} tokens, "
        f"{response.generation_tps:.3f} tokens-per-sec"
    )
    print(f"Peak memory: {response.peak_memory:.3f} GB")
    size = sum(c.nbytes for c in cache)
    size = f"{size / 2**10:.1f} KiB" if size < 2**20 else f"{size / 2**20:.1f} MiB"
    grows = any(m.state_bytes(1) != m.state_bytes(2**20) for m in (x.mixer for x in model.layers))
    print(f"State: {size}{'' if grows else ', whatever the context length'}")


if __name__ == "__main__":
    main()
