"""``python -m mlx_mcsd.train``: texts to a model, from scratch or from another, on this machine."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

from .cli import Parser
from .errors import MCSDError, exits_cleanly
from .files import write_atomically
from .training.config import TrainConfig, add_arguments, changes, read_yaml, to_yaml

SETTINGS = "training.yaml"


def setup_arg_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="mlx_mcsd.train",
        description="Train a model on texts, from scratch or from another model's weights, with "
        "the state carried through every document. The folder of the run is the model's.",
    )
    parser.add_argument("-c", "--config", help="a YAML file of the settings below; flags go first")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run, from its folder")
    add_arguments(parser)
    return parser


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    given = vars(setup_arg_parser().parse_args(argv))
    file, resumed = given.pop("config"), given.pop("resume")

    # Seconds of imports, which --help and a mistyped flag need not wait for.
    import mlx.core as mx

    from .training.loop import Run
    from .training.machines import from_first

    group = mx.distributed.init()
    if group.rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)

    def settle():
        settings = (read_yaml(file) if file else {}) | given
        return vars(take_up(resumed, settings) if resumed else begin(settings))

    config = TrainConfig(**from_first(group, settle))
    folder = Path(config.output_dir)
    with alone(folder, group.rank()):
        if not group.rank():
            write_atomically(folder / SETTINGS, to_yaml(config).encode())
        Run(config, folder, group).train()


def begin(settings: dict) -> TrainConfig:
    """The settings of a new run, whose folder is made.

    A folder whose data never came to be read holds no run yet: something was mistyped.

    Raises:
        MCSDError: if there is no data, a setting is unfit, or the folder holds a run.
    """
    from .config import ModelArgs
    from .training.corpus import COMPLETE
    from .training.prepare import DATA

    config = TrainConfig(**settings)
    if not config.data:
        raise MCSDError("[train] data must name what to train on but nothing is named: --data.")
    if config.output_dir is None:
        raise MCSDError("[train] output_dir must name a folder to make but is not set.")
    if not config.init_from:
        ModelArgs(**config.shape(), vocab_size=config.vocab_size or 1)  # or hours later
    folder = Path(config.output_dir)
    if (folder / DATA / COMPLETE).exists():
        raise MCSDError(
            f"[train] {folder} holds a run: go on with it by --resume {folder}, or name another "
            "output_dir."
        )
    ours = (folder / SETTINGS).exists()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not ours:
        raise MCSDError(f"[train] output_dir must be new or empty but {folder} is not.")
    folder.mkdir(parents=True, exist_ok=True)
    return config


def take_up(run: str, settings: dict) -> TrainConfig:
    """The settings of a run to go on with; what differs now is printed and kept.

    Raises:
        MCSDError: if there is no run, or what differs cannot.
    """
    folder = Path(run)
    if not (folder / SETTINGS).is_file():
        raise MCSDError(f"[train] --resume must name the folder of a run but {run} is none.")
    old = TrainConfig(**read_yaml(folder / SETTINGS))
    config = TrainConfig(**vars(old) | settings | {"output_dir": run})
    for change in changes(old, config):
        print(f"Resuming with {change}.")
    return config


@contextmanager
def alone(folder: Path, rank: int):
    """Hold the folder of a run, which the system lets go of however the process ends.

    Raises:
        MCSDError: if another process holds it.
    """
    if rank:
        yield
        return
    import fcntl

    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise MCSDError(f"[train] {folder} is being trained by another process.") from None
    try:
        for stale in (*folder.glob(".*.partial*"), *folder.glob("*/.*.partial*")):
            stale.unlink(missing_ok=True)
        yield
    finally:
        os.close(lock)


if __name__ == "__main__":
    main()
