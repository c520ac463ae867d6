"""The one error a user can cause, and how the commands report it."""

import functools
import os
import sys


class MCSDError(ValueError):
    """A mistake of the user's: one line saying what was expected, what came and what to do."""


def exits_cleanly(main):
    """Wrap a command's ``main`` so that a user's mistake ends in one line instead of a traceback.

    A :class:`MCSDError` is printed on stderr as ``error: <one line>`` and exits with status 1; an
    interrupt (Ctrl-C) exits with status 130, a reader who left (``| head``) with 1. Every other
    exception is a bug and passes through.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            try:
                return main(*args, **kwargs)
            finally:
                sys.stdout.flush()  # a reader who left is noticed here and not at exit
        except MCSDError as error:
            print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
            raise SystemExit(1) from None
        except BrokenPipeError:
            # Python flushes once more on its way out, to somewhere that takes it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return wrapped
