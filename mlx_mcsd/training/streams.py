"""Tokens as B endless streams, read in segments of N tokens.

In every epoch the documents lie one behind the other in a new order, and the row of tokens so made
is cut into B equal parts; a stream is its part of the first epoch, then of the second, and so on.
Which tokens are in which segment follows from the seed and the segment's number alone, so that a
resumed run needs to remember nothing but that number.

Letters: B streams (rows), N tokens of a segment, W tokens of a stream in an epoch.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from ..errors import MCSDError


@dataclass
class Segment:
    """What a step reads, each (B, N).

    Attributes:
        inputs: int32.
        targets: int32, the tokens that follow.
        scored: bool, whether a target is learned: no first token of a document, no prompt.
        reset: bool, whether an input begins a document: nothing before it is remembered.
    """

    inputs: np.ndarray
    targets: np.ndarray
    scored: np.ndarray
    reset: np.ndarray


class Streams:
    """The streams of a set of documents.

    Args:
        documents: a `corpus.Documents`.
        rows: B.
        length: N.
        seed: of the order of the documents; None keeps theirs.
        pack: begin a document that would be cut, but fits into a segment, with the next segment.
        forget: part of the segments that begin as if nothing had been read, so that a model
            trained on few long documents knows how to begin too.

    Raises:
        MCSDError: if there are fewer tokens than rows.
    """

    def __init__(
        self,
        documents,
        rows: int,
        length: int,
        seed: int | None,
        pack: bool = False,
        forget: float = 0.0,
    ):
        self.forget = forget
        self.documents, self.rows, self.length = documents, rows, length
        self.seed, self.pack = seed, pack
        if documents.tokens.size < 2 * rows:
            raise MCSDError(
                f"[train] batch_size must be at most half of the {documents.tokens.size} tokens of "
                f"data but is {rows}."
            )
        self._epoch = lru_cache(maxsize=2)(self._lay_out)
        self._width = cache(lambda epoch: self._epoch(epoch)[2])

    def _lay_out(self, epoch: int):
        """The order of an epoch's documents, where each begins in its row of tokens, and W."""
        count, N = len(self.documents), self.length
        if self.seed is None:
            order = np.arange(count)
        else:
            order = np.random.default_rng([self.seed, epoch]).permutation(count)
        lengths = self.documents.lengths[order]
        if not self.pack:
            starts = np.cumsum(lengths) - lengths
            return order, starts, int(lengths.sum()) // self.rows
        starts, end = np.empty(count, np.int64), 0
        for i, tokens in enumerate(lengths.tolist()):
            if tokens <= N < end % N + tokens:
                end += N - end % N
            starts[i] = end
            end += tokens
        segments = -(-end // N)
        return order, starts, -(-segments // self.rows) * N

    def segment(self, number: int) -> Segment:
        """The segment of a number, from 0 on."""
        shape = (self.rows, self.length + 1)
        tokens, places = np.zeros(shape, np.int32), np.full(shape, -1, np.int64)
        prompts, cuts = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for row, column, document, place, count in self._runs(number, self.length + 1):
            at = slice(column, column + count)
            tokens[row, at] = self.documents.read(document, place, count)
            places[row, at] = np.arange(place, place + count)
            prompts[row, at] = self.documents.prompts[document]
            # What was before in the stream is another document, or another place of this one.
            cuts[row, column] = True
        known = places >= 0
        if number:
            first = places[:, 0]
            # A segment's first token goes on with the one before, unless a part begins there.
            cuts[:, 0] &= (first == 0) | self._begins(number)
        else:
            cuts[:, 0] = True
        if self.forget:
            cuts[:, 0] |= np.random.default_rng([self.seed, number]).random(self.rows) < self.forget
        scored = known & ~cuts & (places >= prompts)
        return Segment(tokens[:, :-1], tokens[:, 1:], scored[:, 1:], cuts[:, :-1] & known[:, :-1])

    def named(self, number: int) -> list[int]:
        """The documents in a segment, in the order of the data."""
        return sorted({document for _, _, document, _, _ in self._runs(number, self.length)})

    def _begins(self, number: int) -> bool:
        """Whether the parts of an epoch begin with a segment."""
        return self._position(number * self.length)[1] == 0

    def _position(self, token: int) -> tuple[int, int]:
        """The epoch of a stream's token and its place in it."""
        if not self.pack:  # every epoch has as many tokens
            return divmod(token, self._width(0))
        epoch = 0
        while token >= (width := self._width(epoch)):
            token, epoch = token - width, epoch + 1
        return epoch, token

    def _runs(self, number: int, count: int):
        """The runs of one document's tokens: (row, column, document, place in it, count)."""
        first = number * self.length
        column = 0
        while column < count:
            epoch, offset = self._position(first + column)
            order, starts, width = self._epoch(epoch)
            take = min(count - column, width - offset)
            for row in range(self.rows):
                begin = row * width + offset
                i = max(int(np.searchsorted(starts, begin, side="right")) - 1, 0)
                while i < len(starts) and starts[i] < begin + take:
                    start = int(starts[i])
                    end = start + int(self.documents.lengths[order[i]])
                    a, b = max(begin, start), min(begin + take, end)
                    if a < b:
                        yield row, column + a - begin, int(order[i]), a - start, b - a
                    i += 1
            column += take
