"""``python -m mlx_mcsd.evaluate``: what a model's predictions are worth, in bits or at tasks."""

import importlib.util
import json
import time

from .cli import Parser, integer
from .documents import documents
from .errors import MCSDError, exits_cleanly
from .source import Source

COLUMNS = {
    "documents": ",",
    "characters": ",",
    "bytes": ",",
    "tokens": ",",
    "bits_per_character": ".4f",
    "bits_per_byte": ".4f",
    "perplexity": ".2f",
}


def setup_arg_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="mlx_mcsd.evaluate",
        description="Bits per character and perplexity of texts, the state carried through each; "
        "or accuracy at tasks of lm_eval.",
    )
    add = parser.add_argument
    add(
        "files",
        nargs="*",
        metavar="FILE",
        help="UTF-8 texts, each one document from an empty state, as it stands; of .jsonl every "
        'line\'s "text" is one; - is standard input',
    )
    add("--model", help="a directory or a hub id (default: the bundled storyteller)")
    add("--adapter-path", help="a directory of adapters trained by mlx_lm.lora")
    add(
        "--separator",
        help="what parts the documents of a text, such as '<|endoftext|>'; newlines around it "
        "are dropped. Documents parted so, and those of .jsonl, are whole: the token that ends a "
        "text counts for them",
    )
    add(
        "--prefill-step-size",
        type=integer(1),
        default=512,
        help="tokens read at a time: smaller takes less memory (default: 512)",
    )
    add("--json", action="store_true", help="print the figures as JSON")
    group = parser.add_argument_group("tasks, instead of files; needs lm_eval").add_argument
    group(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="tasks to be evaluated by lm_eval: its own by name, which it downloads, or YAML files",
    )
    group("--num-shots", type=integer(0), help="examples before each question")
    group("--limit", type=integer(1), help="questions of each task at most")
    group("--max-tokens", type=integer(1), help="tokens to generate (default: what the task says)")
    group("--batch-size", type=integer(1), default=8, help="texts at a time (default: 8)")
    group("--seed", type=integer(0, 2**32 - 1), default=123, help="of examples (default: 123)")
    group(
        "--apply-chat-template",
        action="store_true",
        help="put questions in the tokenizer's chat template",
    )
    return parser


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = setup_arg_parser().parse_args(argv)
    if bool(args.files) == bool(args.tasks):
        raise MCSDError("name files to score, or --tasks, one of the two (see --help).")
    if args.separator == "":
        raise MCSDError("--separator must not be empty.")
    sources = {name: Source([name]) for name in args.files}
    if args.tasks and importlib.util.find_spec("lm_eval") is None:
        raise MCSDError("--tasks needs lm_eval: pip install 'mlx-mcsd[evaluate]'.")

    # Seconds of imports, which --help and a mistyped name need not wait for.
    from . import loading

    directory = loading.resolve(args.model)
    tokenizer = loading.load_tokenizer(directory)
    if args.apply_chat_template and not tokenizer.has_chat_template:
        raise MCSDError(f"--apply-chat-template needs a chat template but {directory} has none.")
    model = loading.load_model(directory)
    if args.adapter_path is not None:
        loading.load_adapters(model, args.adapter_path)
    figures = do_tasks if args.tasks else score_files
    report, text = figures(model, tokenizer, sources, args)
    print(json.dumps({"model": str(directory)} | report) if args.json else text)


def do_tasks(model, tokenizer, _, args) -> tuple[dict, str]:
    """The results of tasks, as JSON values and as lm_eval's tables."""
    from lm_eval.utils import make_table

    from .harness import Adapter, run_tasks

    adapter = Adapter(
        model,
        tokenizer,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        use_chat_template=args.apply_chat_template,
    )
    options = {"num_shots": args.num_shots, "limit": args.limit, "seed": args.seed}
    found = run_tasks(adapter, args.tasks, **options)
    tables = [make_table(found, column) for column in ("results", "groups") if found.get(column)]
    return {"tasks": found["results"]}, "\n".join(tables).rstrip()


def score_files(model, tokenizer, sources: dict[str, Source], args) -> tuple[dict, str]:
    """The scores of files and their total, as JSON values and as a table."""
    from .scoring import Score

    start = time.perf_counter()
    scores = {name: score_file(model, tokenizer, source, args) for name, source in sources.items()}
    seconds, total = time.perf_counter() - start, sum(scores.values(), Score())
    files = [{"file": name} | score.as_dict() for name, score in scores.items()]
    rows = table(scores if len(scores) == 1 else scores | {"total": total})
    rate = f"{total.tokens:,} tokens in {seconds:.1f} s, {total.tokens / seconds:,.0f} a second"
    return {"files": files, "total": total.as_dict()}, f"{rows}\n{rate}"


def score_file(model, tokenizer, source: Source, args):
    """The score of one file, with a progress bar."""
    from tqdm import tqdm

    from .scoring import score

    (name,) = source.names
    whole = args.separator is not None or name.endswith(".jsonl")
    with tqdm(desc=name, total=source.total, unit="B", unit_scale=True, disable=None) as bar:
        found = score(
            model,
            tokenizer,
            documents(source, name, args.separator),
            end=whole,
            step_size=args.prefill_step_size,
            progress=lambda: bar.update(source.bytes - bar.n),
        )
    if not found.characters:
        raise MCSDError(f"{name} must hold text but is empty.")
    return found


def table(scores) -> str:
    """Figures of each file, a row each, in columns as wide as they need to be."""
    rows = [["", *(name.replace("_per_", "/").replace("character", "char") for name in COLUMNS)]]
    for name, score in scores.items():
        figures = score.as_dict()
        rows.append([name, *(format(figures[key], form) for key, form in COLUMNS.items())])
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = (
        [row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], widths, strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


if __name__ == "__main__":
    main()
