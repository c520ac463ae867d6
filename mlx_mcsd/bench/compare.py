"""Runs the benchmarks that compare models: measure, print, save."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

from ..errors import MCSDError
from ..files import write_atomically
from . import flags, tasks
from .report import machine, table


def run(args) -> dict:
    """Measure what the command asks for; of the rows see :mod:`mlx_mcsd.bench.tasks`.

    Returns:
        What :func:`finish` does.

    Raises:
        MCSDError: if the folder cannot be made.
    """
    if args.output_dir is not None:
        _folder(args.output_dir)  # a mistake in it should not wait for the figures
    default = flags.QUICK if args.quick else {}
    settings = tasks.Settings(
        contexts=tuple(sorted(args.contexts or default.get("contexts", flags.CONTEXTS))),
        batches=tuple(sorted(args.batches or default.get("batches", flags.BATCHES))),
        models=tuple(args.models),
        size=args.size,
        repeats=args.repeats or default.get("repeats", flags.REPEATS),
        memory_limit=args.memory_limit * 2**30,
        time_limit=args.time_limit,
    )
    models = tasks.entries(settings)
    wanted = ("decode", "prefill", "memory", "batch") if args.task == "all" else (args.task,)
    rows = [row for name in wanted for row in getattr(tasks, name)(settings, models)]
    failed = "decoding differs from reading at once; its speed means nothing."
    return finish(rows, args.task, args.output_dir, failed)


def finish(rows: list[dict], task: str, output_dir: str | None, failed: str) -> dict:
    """Print the rows as a table, and save them and their plots where a folder is given.

    Returns:
        ``ok``, True if every row passed its gate; ``machine``; and ``rows``.

    Raises:
        MCSDError: if the folder cannot be made.
    """
    result = {"ok": all(row["ok"] for row in rows), "machine": machine(), "rows": rows}
    print(f"{describe(result['machine'])}\n\n{table(rows)}")
    if not result["ok"]:
        print(f"\nFAILED: {failed}")
    if output_dir is not None:
        file = _folder(output_dir) / f"{task}.json"
        write_atomically(file, json.dumps(result, indent=1).encode())
        print("\n" + "\n".join(map(str, [file, *_plots(result, file)])))
    return result


def describe(found: dict) -> str:
    """Return a line that names the machine."""
    return (
        f"{found['processor']}, {found['cores']} cores, {found['system']}, {found['device']}, "
        f"{found['blas']}, mlx {found['versions']['mlx']}, mlx-lm {found['versions']['mlx-lm']}"
    )


def _folder(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MCSDError(f"[bench] --output-dir cannot be made: {error}.") from None
    return folder


def _plots(result: dict, file: Path) -> list[Path]:
    if find_spec("matplotlib") is None:
        print("no plots: matplotlib is missing (pip install 'mlx-mcsd[plot]').", file=sys.stderr)
        return []
    from .plots import plot

    return plot(result["rows"], describe(result["machine"]), file)
