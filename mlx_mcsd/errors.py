"""The one error a user can cause, and how the commands report it."""

import functools
import io
import os
import sys


class MCSDError(ValueError):
    """A mistake of the user's: one line saying what was expected, what came and what to do."""


def exits_cleanly(main):
    """Wrap a command's ``main`` so that a user's mistake ends in one line instead of a traceback.

    A :class:`MCSDError`, and what the system refuses (OSError: a full disk, a closed stream), is
    printed on stderr as ``error: <one line>`` and exits with status 1; an interrupt (Ctrl-C) exits
    with status 130, a reader who left (``| head``) with 1, silently. Every other exception is a
    bug and passes through. Characters that the encoding of stdout lacks are printed as ``?``.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            if sys.stdout is None:
                raise MCSDError("standard output must be open but is closed.")
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="replace")
            try:
                return main(*args, **kwargs)
            finally:
                _flush()
        except BrokenPipeError:
            raise SystemExit(1) from None
        except (MCSDError, OSError) as error:
            print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return wrapped


def _flush():
    """Flush stdout here and not at exit, so that a reader who left or a full disk is noticed."""
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes once more on its way out, to somewhere that takes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
