"""``python -m mlx_mcsd.read``: a text of any length read once, its state kept to ask for ever."""

import shlex
import sys
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from .cli import Interrupts, Parser, integer, size
from .errors import MCSDError, exits_cleanly
from .files import check_target
from .source import Source
from .tokens import stream_tokens


def setup_arg_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="mlx_mcsd.read",
        description="Read a text of any length once and save the state, to continue from.",
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="UTF-8 texts, read as one; - is standard input")
    add("--save", metavar="STATE", required=True, help="where to save the state")
    add("--model", help="a directory or a hub id (default: the bundled storyteller)")
    add("--adapter-path", help="a directory of adapters trained by mlx_lm.lora")
    add("--state", help="begin from a saved state instead of from nothing")
    add(
        "--every",
        type=integer(1),
        default=100_000,
        help="tokens after which to save what was read so far, in STATE.part, from which the same "
        "command goes on if it was interrupted (default: 100000)",
    )
    add(
        "--prefill-step-size",
        type=integer(1),
        default=2048,
        help="tokens read at a time: smaller takes less memory (default: 2048)",
    )
    return parser


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    argv = sys.argv[1:] if argv is None else argv
    args = setup_arg_parser().parse_args(argv)
    source = Source(args.files)
    check_target("--save", args.save)

    # Seconds of imports, which --help and a mistyped name need not wait for.
    from . import loading
    from .state import State

    directory = loading.resolve(args.model)
    tokenizer = loading.load_tokenizer(directory)
    model = loading.load_model(directory)
    if args.adapter_path is not None:
        loading.load_adapters(model, args.adapter_path)
    state = State(model) if args.state is None else State.load(args.state, model)

    command = shlex.join(["mlx_mcsd.read", *argv])
    part = Path(f"{args.save}.part")
    start = time.perf_counter()
    new = not (state.tokens_seen or state.pending)
    ids = chain.from_iterable(stream_tokens(tokenizer, source, first=new))
    if part.exists():
        state = resume(state, State.load(part, model), ids, part)
        print(f"Going on from {part}, behind {known(state)} tokens.", flush=True)
    begun = known(state)
    with Interrupts() as interrupts:
        for _ in read_all(state, ids, source, args.prefill_step_size, args.every, interrupts):
            state.save(part, command)
    if interrupts.asked:
        print(f"Interrupted: the same command goes on from {part}.", file=sys.stderr)
        raise KeyboardInterrupt
    if not (source.bytes and known(state)):  # the token that begins a text is none of it
        raise MCSDError("the text must not be empty but holds no tokens.")
    state.save(args.save, command)
    part.unlink(missing_ok=True)
    seconds, count = time.perf_counter() - start, known(state) - begun
    print(
        f"Read: {count} tokens ({size(source.bytes)} of text) in {seconds:.1f} s, "
        f"{count / seconds:.0f} tokens-per-sec"
    )
    print(f"State: {size(state.nbytes)} in {args.save}, {known(state)} tokens")


def known(state) -> int:
    """Tokens that a state has read, and those pending."""
    return state.tokens_seen + len(state.pending)


def resume(state, part, ids: Iterator[int], file: Path):
    """Skip what an interrupted reading read already, if it was of this very text; return its state.

    Raises:
        MCSDError: if the text, or the state it was read behind, is another.
    """
    from .state import chain_hash

    count = part.tokens_seen - known(state)
    skipped = chain_hash(state.hash, chain(state.pending, islice(ids, max(count, 0))))
    if (skipped, tuple(islice(ids, len(part.pending)))) != (part.hash, part.pending):
        raise MCSDError(f"{file} was read from another text; remove it to begin anew.")
    return part


def read_all(
    state, ids: Iterator[int], source: Source, step: int, every: int, interrupts: Interrupts
) -> Iterator[None]:
    """Read all tokens, with a progress bar; yields whenever the state is due to be saved."""
    from tqdm import tqdm

    from .generation import read

    saved, begun = state.tokens_seen, known(state)
    with tqdm(unit=" tokens", disable=None) as bar:
        # Steps always end at the same tokens, so that an interrupted reading comes to the same.
        while block := list(islice(ids, step + 1 - len(state.pending))):
            read(state, block, step, bar.update)
            if source.total:
                # How many tokens there are shows at the end; until then it is a guess.
                guess = known(state) - begun - 1
                bar.total = max(bar.n, round(guess * source.total / source.bytes))
            if interrupts.asked or state.tokens_seen - saved >= every:
                saved = state.tokens_seen
                yield
            if interrupts.asked:
                return


if __name__ == "__main__":
    main()
