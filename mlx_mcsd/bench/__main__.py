"""``python -m mlx_mcsd.bench``: MCSD beside models of the same size, each checked, then timed."""

import sys

from ..cli import Parser
from ..errors import exits_cleanly
from . import flags

TASKS = {
    "decode": "a token's time by context length, and a profile of it",
    "prefill": "a prompt's time by length, and the peak of memory meanwhile",
    "memory": "the state and the peak of memory by context length",
    "batch": "latency and throughput by batch size",
    "all": "decode, prefill, memory and batch",
}
TRAINING = "check and time a mixer's training step: in chunks, and by the paper's square matrices"
KERNELS = "check every Metal kernel against its plain form, then time it"


def setup_arg_parser() -> Parser:
    """Return the command's parser, with one of its own for each benchmark."""
    parser = Parser(
        prog="mlx_mcsd.bench",
        description="Measure MCSD beside mlx-lm's models of the same size, with random weights: "
        "each is checked, then timed in turn with the others.",
    )
    commands = parser.add_subparsers(required=True, dest="task", metavar="benchmark")
    for name, text in TASKS.items():
        command = commands.add_parser(name, help=text, description=f"Measure {text}.")
        flags.add_model_arguments(command)
        command.set_defaults(run=_compare)
    command = commands.add_parser(
        "training", help=TRAINING, description=f"{TRAINING.capitalize()}."
    )
    flags.add_training_arguments(command)
    command.set_defaults(run=_training)
    command = commands.add_parser("kernels", help=KERNELS, description=f"{KERNELS.capitalize()}.")
    flags.add_kernel_arguments(command)
    command.set_defaults(run=_kernels)
    return parser


# Seconds of imports, which --help and a mistyped flag need not wait for.
def _compare(args) -> dict:
    from . import compare

    return compare.run(args)


def _training(args) -> dict:
    from . import training

    return training.run(args)


def _kernels(args) -> dict:
    from . import kernels

    return kernels.run(args)


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark that is named; its checks decide the exit code."""
    args = setup_arg_parser().parse_args(argv)
    return 0 if args.run(args)["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
