"""What the commands share: a parser whose mistakes end in one line, and checked numbers."""

import argparse
import math
import signal

from .errors import MCSDError


class Parser(argparse.ArgumentParser):
    """An argument parser whose usage errors are the user's errors: :class:`MCSDError`, status 1."""

    def error(self, message: str):
        """Raise, where argparse would print its usage and exit with status 2."""
        raise MCSDError(f"{message} (see {self.prog} --help)")


class Interrupts:
    """While open, Ctrl-C sets ``asked`` for a loop to look at between its steps; twice interrupts.

    So nothing is left half done, as it is where an exception breaks into a step.
    """

    asked = False

    def __enter__(self):
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def integer(low: int, high: float = math.inf):
    """Return an argparse type: an integer from ``low`` to ``high``, both included."""
    return _number(int, f"an integer {_range(low, high)}", lambda x: low <= x <= high)


def number(low: float, high: float = math.inf, *, above: bool = False):
    """Return an argparse type: a finite number from ``low`` (or strictly above) to ``high``."""
    wanted = (
        f"a number above {low:g}, at most {high:g}" if above else f"a number {_range(low, high)}"
    )
    return _number(
        float, wanted, lambda x: math.isfinite(x) and (low < x if above else low <= x) and x <= high
    )


def boolean(text: str) -> bool:
    """Argparse type: mlx-lm's reading of true and false, and nothing else."""
    if text.lower() in ("true", "t", "false", "f"):
        return text.lower() in ("true", "t")
    raise argparse.ArgumentTypeError(f"must be true or false but got {text!r}")


def size(count: int) -> str:
    """Return a number of bytes as a person reads it."""
    return f"{count / 2**10:.1f} KiB" if count < 2**20 else f"{count / 2**20:.1f} MiB"


def _range(low, high):
    return f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"


def _number(kind, wanted, fits):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"must be {wanted} but got {text!r}")
        return value

    return parse
