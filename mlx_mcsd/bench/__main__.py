"""Run a benchmark: `python -m mlx_mcsd.bench kernels`."""

import sys

from ..cli import Parser
from ..errors import exits_cleanly
from . import kernels

COMMANDS = {"kernels": kernels}


def setup_arg_parser() -> Parser:
    """Return the command's parser, with one of its own for each benchmark."""
    parser = Parser(prog="mlx_mcsd.bench", description="Measure speed, and check what is measured.")
    commands = parser.add_subparsers(required=True, metavar="benchmark")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark that is named; its checks decide the exit code."""
    args = setup_arg_parser().parse_args(argv)
    return 0 if args.run(args)["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
