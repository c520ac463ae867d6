"""Text of any length to token ids, in constant memory and with the ids of the whole text.

A tokenizer cannot be cut anywhere: what a word becomes depends on its neighbours. So the text is
encoded in windows that overlap. The tokens given out end well before a window's end, and the next
window must agree on the last of them before its own are used: where two windows agree on a border
of tokens, no merge crosses it in either, and the two sides do not depend on each other.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

WINDOW = 2**14
"""Characters encoded at a time, at least."""

MARGIN = 2**10
"""Characters at the end of a window whose tokens may depend on what follows: not given out."""

OVERLAP = 2**10
"""Characters before those still to be given out that the next window begins with."""

AGREED = 16
"""Tokens before the border on which both windows must agree."""


def stream_tokens(tokenizer, texts: Iterable[str], first: bool = True) -> Iterator[list[int]]:
    """Encode a text that comes in pieces.

    Args:
        tokenizer: mlx-lm's wrapper around a fast tokenizer.
        texts: the pieces, cut anywhere between characters.
        first: put before the text what the tokenizer begins one with.

    Yields:
        Lists of ids; together those of the whole text.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if first:
        example = backend.encode("a")
        yield example.ids[: example.special_tokens_mask.index(0)]

    text, border, known, wanted = "", 0, [], WINDOW
    for piece in texts:
        text += piece
        if len(text) < wanted:
            continue
        ids, offsets, begin = _encode(backend, text, border, known)
        end = bisect_right(offsets, len(text) - MARGIN, key=lambda offset: offset[0]) - 1
        while end > begin and offsets[end - 1][1] > offsets[end][0]:  # within a character
            end -= 1
        if end <= begin:  # no border yet, so wait for more text
            wanted = 2 * len(text)
            continue
        yield ids[begin:end]
        known = ids[max(0, end - AGREED) : end]
        start = max(0, offsets[end][0] - OVERLAP)
        text, border, wanted = text[start:], offsets[end][0] - start, WINDOW
    ids, _, begin = _encode(backend, text, border, known)
    yield ids[begin:]


def _encode(backend, text: str, border: int, known: list[int]):
    """Ids, offsets, and the index of the first token behind the border."""
    encoding = backend.encode(text, add_special_tokens=False)
    ids, offsets = encoding.ids, encoding.offsets
    begin = bisect_left(offsets, border, key=lambda offset: offset[0])
    before = ids[max(0, begin - len(known)) : begin]
    if known and (before != known or [border] != [a for a, _ in offsets[begin : begin + 1]]):
        # Nothing in sight agrees, as in a long run of one letter; behind a border it need not.
        encoding = backend.encode(text[border:], add_special_tokens=False)
        offsets = [(a + border, b + border) for a, b in encoding.offsets]
        return encoding.ids, offsets, 0
    return ids, offsets, begin
