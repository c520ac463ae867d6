"""The one error a user can cause, and how the commands report it."""

import functools
import sys


class MCSDError(ValueError):
    """A mistake of the user's: one line saying what was expected, what came and what to do."""


def exits_cleanly(main):
    """Wrap a command's ``main`` so that a user's mistake ends in one line instead of a traceback.

    A :class:`MCSDError` is printed on stderr as ``error: <one line>`` and exits with status 1; an
    interrupt (Ctrl-C) exits with status 130. Every other exception is a bug and passes through.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except MCSDError as error:
            print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return wrapped
