"""Text files of any length, decoded as they are read."""

import codecs
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from .errors import MCSDError

BYTES = 2**14
"""Bytes read from a file at a time."""


class Source:
    """Files as one text, decoded as they are read.

    Attributes:
        names: of the files; - is standard input.
        bytes: read so far.
        total: bytes of all files, None where one is a stream.

    Raises:
        MCSDError: if a file cannot be read, or holds something else than UTF-8.
    """

    def __init__(self, names: list[str]):
        self.names = names
        self.bytes, self.total = 0, 0
        for name in names:
            if name != "-" and Path(name).is_fifo():  # opened twice, it would have lost its text
                self.total = None
                continue
            with self._open(name) as file:
                status = os.fstat(file.fileno())
                stream = self.total is None or not stat.S_ISREG(status.st_mode)
                self.total = None if stream else self.total + status.st_size

    def __iter__(self) -> Iterator[str]:
        """The text, piece by piece."""
        for name in self.names:
            decoder = codecs.getincrementaldecoder("utf-8")()
            done = 0
            with self._open(name) as file:
                while data := file.read(BYTES):
                    self.bytes += len(data)
                    yield self._decode(decoder, data, name, done)
                    done += len(data)
                yield self._decode(decoder, b"", name, done)

    @staticmethod
    def _decode(decoder, data: bytes, name: str, done: int) -> str:
        done -= len(decoder.getstate()[0])  # bytes of a character begun
        try:
            return decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise MCSDError(
                f"{name} must be UTF-8 text but is not at byte {done + error.start}."
            ) from None

    @staticmethod
    def _open(name: str):
        if name == "-" and sys.stdin is None:
            raise MCSDError("- needs standard input but it is closed.")
        try:
            return nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb")
        except OSError as error:
            raise MCSDError(f"cannot read {name}: {error.strerror}.") from error
