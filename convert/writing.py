"""A directory that is there complete or not at all: filled beside its place, then renamed."""

import fcntl
import os
import shutil
from contextlib import contextmanager, nullcontext, suppress
from glob import escape
from pathlib import Path
from secrets import token_hex

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import one_line

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW

CARD = """---
library_name: mlx
pipeline_tag: text-generation
tags:
- mlx
- mcsd
---

# {name}

An MCSD language model in MLX format, converted from `{origin}` with

    python -m mlx_mcsd.convert {options}

{verification}To run it:

    pip install mlx-mcsd
    python -m mlx_mcsd.generate --model {name} --prompt "Once upon a time"

The commands of mlx-lm run it as well, {how}.
"""


def card(name, origin, options, verification="", model_file=True):
    """The README.md of a converted model.

    Args:
        name: of its directory.
        origin: what it calls the source.
        options: the command's options.
        verification: a sentence on how the result was compared with the source, or nothing.
        model_file: whether it has the file that mlx-lm imports the model from.
    """
    how = "with `--trust-remote-code`" if model_file else "where mlx-lm has `models/mcsd.py`"
    paragraph = f"{verification}\n\n" if verification else ""
    return CARD.format(name=name, origin=origin, options=options, verification=paragraph, how=how)


def new_directory(path, flag):
    """Return the path to a directory that can be made there, or say why not, before any work."""
    if not str(path):
        raise MCSDError(f"[convert] {flag} must name a directory to make but is empty.")
    try:
        Path(path).lstat()
    except FileNotFoundError:
        return Path(path)
    except (OSError, ValueError) as error:  # too long, below a file, a NUL byte
        reason = getattr(error, "strerror", None) or error
        raise MCSDError(
            f"[convert] {flag} must name a directory to make but {str(path)[:80]!r} cannot be one: "
            f"{reason}."
        ) from None
    raise MCSDError(f"[convert] {path} must not exist but does; delete it or name another {flag}.")


@contextmanager
def directory(target):
    """A directory to fill, renamed to `target` when the block ends well and removed when not.

    What a killed run left of the same target is removed first. A run holds a lock on its directory
    for as long as it lives, which the system lets go of however it dies.
    """
    target = Path(target)
    new_parents = [parent for parent in target.parents if not parent.exists()]
    partial = lock = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target)
        partial, lock = make_partial(target)
        yield partial
        for file in partial.rglob("*"):
            flush(file)
        flush(partial)
        partial.rename(target)
        flush(target.parent)
    except OSError as error:
        raise MCSDError(f"[convert] {target} could not be written: {one_line(error)}") from error
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)
        for parent in new_parents:  # the innermost first; one that holds something stays
            with suppress(OSError):
                parent.rmdir()


def make_partial(target):
    """Make a locked directory beside the target; returns its path and the lock."""
    while True:
        partial = target.with_name(f".{target.name}.{token_hex(4)}.partial")
        partial.mkdir()
        # Until it is locked another run may take it for stale and remove it.
        with suppress(FileNotFoundError):
            lock = os.open(partial, DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            except OSError:
                pass  # a file system without locks, where no run removes what another left
            if partial.exists():
                return partial, lock
            os.close(lock)


def remove_stale(target):
    """Remove the partial directories of a target that no living process holds."""
    for partial in target.parent.glob(f".{escape(target.name)}.{'[0-9a-f]' * 8}.partial"):
        with suppress(OSError):  # no directory, not ours, or gone meanwhile
            lock = os.open(partial, DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial)
            finally:
                os.close(lock)


def flush(path):
    """Make sure that a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some file systems have nothing to flush for a directory, and say so.
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
