"""Files that are whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import MCSDError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write a file at, which takes the place of ``path``, whole, when the block ends.

    Raises:
        MCSDError: naming the path and why the system refuses; what was there is left as it was.
    """
    target = Path(os.path.realpath(path))  # replacing a link would leave its target behind
    if target.exists() and not target.is_file():
        raise MCSDError(f"cannot write {path}: it must be a file, or not be there yet.")
    # MLX tells what to write by the suffix.
    partial = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        open(partial, "xb").close()
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise MCSDError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that at every moment the old one or the new one is there, whole.

    Raises:
        MCSDError: see :func:`replacing`.
    """
    with replacing(path) as partial:
        partial.write_bytes(data)


def check_target(flag: str, path: str) -> None:
    """Raise where a file could not be written, which nobody wants to hear after hours."""
    folder = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path):
        raise MCSDError(f"{flag} must name a file but {path} is a directory.")
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise MCSDError(f"{flag} must name a file in a directory to write to, not {path}.")
