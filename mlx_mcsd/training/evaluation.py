"""The held-out texts, read with the state carried on, as in training."""

import math

import mlx.core as mx
import numpy as np

from .step import Stepper, nats
from .streams import Streams

SAMPLE = 100_000
"""Tokens of the training data in which characters are counted."""


class HeldOut:
    """What is evaluated: the same segments every time.

    Args:
        documents: held out.
        tokenizer: to count characters.
        rows: at most, to read side by side.
        length: N.
        batches: segments at most; -1 is all.

    Attributes:
        tokens: that are predicted.
        characters: of those, per token.
    """

    def __init__(self, documents, tokenizer, rows: int, length: int, batches: int):
        # A row begins in the middle of a document, knowing nothing: few rows, for few tokens.
        self._rows = max(1, min(rows, documents.tokens.size // (8 * length)))
        self._streams = Streams(documents, self._rows, length, seed=None)
        width = documents.tokens.size // self._rows
        count = math.ceil((width - 1) / length)
        self._width, self._count = width, count if batches < 0 else min(count, batches)
        learned = [s.targets[s.scored] for s in map(self._segment, range(self._count))]
        self.tokens = sum(map(len, learned))
        ids = np.concatenate(learned).tolist() if learned else []
        self.characters = characters_per_token(tokenizer, ids)

    def _segment(self, number: int):
        segment = self._streams.segment(number)
        end = self._width - 1 - number * segment.inputs.shape[1]
        segment.scored[:, max(end, 0) :] = False  # there the stream begins anew
        return segment

    def loss(self, stepper: Stepper) -> float:
        """Nats per token."""
        states, total = stepper.fresh(self._rows), 0.0
        for number in range(self._count):
            segment = self._segment(number)
            logits, states = stepper.logits(
                mx.array(segment.inputs), states, mx.array(segment.reset)
            )
            found = nats(logits, mx.array(segment.targets), mx.array(segment.scored))
            mx.eval(found, states)
            total += found.item()
        return total / self.tokens


def characters_per_token(tokenizer, ids: list[int]) -> float:
    """How many characters tokens have on average; special ones count and have none."""
    text = tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
    return max(len(text), 1) / max(len(ids), 1)


def sample(documents) -> list[int]:
    """Tokens of a part's first documents that are learned."""
    ids = []
    for i in range(len(documents)):
        first, length = max(int(documents.prompts[i]), 1), int(documents.lengths[i])
        count = min(length - first, SAMPLE - len(ids))
        ids += documents.read(i, first, max(count, 0)).tolist()
        if len(ids) >= SAMPLE:
            break
    return ids
