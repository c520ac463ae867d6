"""The documents of a text that comes in pieces, each in pieces itself: nothing is held whole."""

import json
from collections.abc import Iterable, Iterator

from .errors import MCSDError

Document = Iterator[str]
"""The pieces of a text; those not taken before the next document is asked for are gone."""


def documents(
    pieces: Iterable[str], name: str, separator: str | None = None
) -> Iterator[Iterable[str]]:
    """Return the documents of a file, which may be empty.

    A file is one document as it stands. With a separator it is what stands between separators,
    without the newlines around it, as in training. A ``.jsonl`` file has a document a line, its
    ``text``.

    Args:
        pieces: of the file's text, cut anywhere between characters.
        name: of the file.
        separator: what stands between two documents; not of a ``.jsonl`` file.

    Raises:
        MCSDError: if a line is no JSON object with a text, or two things part the documents.
    """
    if name.endswith(".jsonl"):
        if separator is not None:
            raise MCSDError(f"a separator is for plain text but {name} has a document a line.")
        return ([text] for text in json_texts(pieces, name))
    if separator is None:
        return iter([pieces])
    return map(strip, split(pieces, separator))


def split(pieces: Iterable[str], separator: str) -> Iterator[Document]:
    """Split a text at every separator, as ``str.split`` does."""
    pieces, rest, more = iter(pieces), "", True

    def part():
        nonlocal rest, more
        while (at := rest.find(separator)) < 0:
            # What may be the beginning of a separator waits for the next piece.
            done = max(0, len(rest) - len(separator) + 1)
            before, rest = rest[:done], rest[done:]
            yield before
            if (piece := next(pieces, None)) is None:
                more = False
                yield rest
                return
            rest += piece
        before, rest = rest[:at], rest[at + len(separator) :]
        yield before

    while more:
        document = part()
        yield document
        for _ in document:  # what was not asked for
            pass


def strip(pieces: Iterable[str]) -> Document:
    """Drop the newlines at both ends, as ``str.strip`` does."""
    held = None  # newlines that may be the last
    for piece in pieces:
        piece = piece.lstrip("\r\n") if held is None else held + piece
        text = piece.rstrip("\r\n")
        if text:
            yield text
        if text or held is not None:
            held = piece[len(text) :]


def json_texts(pieces: Iterable[str], name: str) -> Iterator[str]:
    """The ``text`` of every line of a JSONL file; lines of white space are none."""
    for number, line in enumerate(map("".join, split(pieces, "\n")), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()  # half a surrogate pair is no text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            text = None
        if text is None:
            raise MCSDError(
                f'{name} must hold a JSON object with a "text" on every line but line {number} '
                "holds none."
            )
        yield text
