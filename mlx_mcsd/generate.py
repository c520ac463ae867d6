"""``python -m mlx_mcsd.generate``: text from a prompt, as it is made."""

import json
import os
import shlex
import sys

from .cli import Interrupts, Parser, boolean, integer, size
from .errors import MCSDError, exits_cleanly
from .files import check_target
from .sampling import add_arguments, add_eos_tokens, begin, make_sampler, model_defaults

PROMPT = "Once upon a time"


def setup_arg_parser() -> Parser:
    """Return the parser: the flags of ``mlx_lm.generate`` that a fixed-size state has a use for."""
    parser = Parser(prog="mlx_mcsd.generate", description="Generate text with an MCSD model.")
    add = parser.add_argument
    add("--model", help="a directory or a hub id (default: the bundled storyteller)")
    add("--adapter-path", help="a directory of adapters trained by mlx_lm.lora")
    add(
        "--prompt",
        "-p",
        help=r"the prompt, \n and \t understood; - reads standard input "
        f'(default: "{PROMPT}", or none behind a --state). Without a chat template the model '
        "continues it",
    )
    add("--system-prompt", help="system message of the chat template")
    add("--prefill-response", help="how the answer begins, of the chat template")
    add("--ignore-chat-template", action="store_true", help="use the raw prompt")
    add("--chat-template-config", help="further arguments of the chat template, a JSON object")
    add_arguments(parser)
    add(
        "--prefill-step-size",
        type=integer(1),
        default=2048,
        help="prompt tokens read at a time: smaller takes less memory (default: 2048)",
    )
    add("--state", help="continue from a state that --save-state or mlx_mcsd.read saved")
    add("--save-state", metavar="FILE", help="save the state at the end, to continue from")
    add(
        "--pipeline",
        action="store_true",
        help="launched on several machines by mlx.launch: give each of them whole layers, rather "
        "than whole channels of every layer",
    )
    add("--prompt-cache-file", help="continue from a cache that mlx_lm.cache_prompt saved")
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
    argv = sys.argv[1:] if argv is None else argv
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    if args.prompt_cache_file is not None and (args.state or args.save_state):
        raise MCSDError("--prompt-cache-file goes with neither --state nor --save-state.")
    if args.save_state is not None:
        check_target("--save-state", args.save_state)
    prompt = read_prompt(args.prompt, continues=args.state is not None)
    template = read_template_config(args.chat_template_config)

    # Seconds of imports, which --help and a mistyped flag need not wait for.
    import mlx.core as mx

    from . import loading
    from .generation import stream_generate
    from .state import State

    cache, path = None, args.model
    if args.prompt_cache_file is not None:
        cache, path = load_cache(args.prompt_cache_file, args.model)
    directory = loading.resolve(path)
    parser.set_defaults(**model_defaults(directory))
    args = parser.parse_args(argv)

    tokenizer = loading.load_tokenizer(directory)
    group = join(args)
    model = loading.load_model(directory, lazy=True)
    if args.pipeline:
        model.model.pipeline(group)
    else:
        model.shard(group)
    mx.eval(model.parameters())  # of what is shared out, this process reads its share alone
    if args.adapter_path is not None:
        loading.load_adapters(model, args.adapter_path)
    state = State(model) if args.state is None else State.load(args.state, model)
    if cache is not None:
        check_cache(cache, model, args.prompt_cache_file)
        state.cache = cache
    add_eos_tokens(tokenizer, args.extra_eos_token)

    chat = tokenizer.has_chat_template and not args.ignore_chat_template
    if chat and prompt:
        tokens = chat_tokens(args, tokenizer, prompt, template)
    else:
        warn_of_chat_flags(args)
        # What was read before began with the beginning-of-text token already.
        special = cache is None and not (state.tokens_seen or state.pending)
        tokens = tokenizer.encode(prompt, add_special_tokens=special) if prompt else []
    if not (tokens or state.pending):
        raise MCSDError("the prompt must not be empty but holds no tokens.")

    begin(args.seed, state)
    if args.verbose:
        print("=" * 10)
    if args.verbose and not chat:
        print(prompt, end="", flush=True)
    try:
        with Interrupts() as interrupts:
            for response in stream_generate(
                model,
                tokenizer,
                tokens,
                state=state,
                max_tokens=args.max_tokens,
                sampler=make_sampler(args, tokenizer),
                after_text=not (chat and tokens),
                prefill_step_size=args.prefill_step_size,
            ):
                print(response.text, end="", flush=True)
                if interrupts.asked:
                    break
    finally:
        print(flush=True)
    if args.save_state is not None:
        state.save(args.save_state, shlex.join(["mlx_mcsd.generate", *argv]))
    if interrupts.asked:
        raise KeyboardInterrupt
    # The look-ahead step may still wait for the others: all leave together, or it complains.
    mx.eval(mx.distributed.all_sum(mx.array(0), group=group))
    if args.verbose:
        print_summary(response, state)


def join(args):
    """The group of processes that mlx.launch has started, one if it has not; the first prints."""
    import mlx.core as mx

    group = mx.distributed.init()
    if group.size() > 1:
        whole = ("adapter_path", "state", "save_state", "prompt_cache_file")
        if given := [f"--{f.replace('_', '-')}" for f in whole if getattr(args, f) is not None]:
            raise MCSDError(f"{given[0]} needs one process but {group.size()} were launched.")
        if args.seed is None:  # every process draws the same tokens
            args.seed = mx.distributed.all_max(mx.random.randint(0, 2**31 - 1), group=group).item()
        if group.rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    return group


def read_prompt(prompt: str | None, continues: bool = False) -> str:
    """The prompt itself, or of ``-`` what standard input holds; there may be none to continue."""
    if prompt is None:
        return "" if continues else PROMPT
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
    if not (prompt or continues):
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


def chat_tokens(args, tokenizer, prompt: str, template: dict) -> list[int]:
    """The prompt as a message of a chat, in tokens."""
    from .conversation import render

    def text(content):
        system = [("system", args.system_prompt)] if args.system_prompt is not None else []
        messages = [*system, ("user", content)]
        return render(tokenizer, messages, reply=True, **template) + (args.prefill_response or "")

    whole = text(prompt)
    if args.prompt_cache_file is not None:
        # The state holds all that comes before the prompt.
        whole = whole[text("<query>").index("<query>") :]
    elif args.state is not None:
        whole = whole.removeprefix(tokenizer.bos_token or "")
    return tokenizer.encode(whole, add_special_tokens=False)


def warn_of_chat_flags(args) -> None:
    """Say which flags have no effect without a chat template."""
    flags = ("system_prompt", "prefill_response", "chat_template_config")
    if given := [f"--{f.replace('_', '-')}" for f in flags if getattr(args, f) is not None]:
        verb = "has" if len(given) == 1 else "have"
        why = f"{', '.join(given)} {verb} no effect without a chat template."
        print(f"warning: {why}", file=sys.stderr)


def print_summary(response, state) -> None:
    """mlx-lm's closing lines, and the size of the state."""
    from .state import state_bytes

    print("=" * 10)
    print(f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec")
    print(
        f"Generation: {response.generation_tokens} tokens, "
        f"{response.generation_tps:.3f} tokens-per-sec"
    )
    print(f"Peak memory: {response.peak_memory:.3f} GB")
    grows = state_bytes(state.model, 1) != state_bytes(state.model, 2**20)
    print(f"State: {size(state.nbytes)}{'' if grows else ', whatever the context length'}")


if __name__ == "__main__":
    main()
