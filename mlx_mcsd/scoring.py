"""What a model's predictions of a text are worth, in bits.

A document x_1 ... x_n, behind the token that begins every text, costs

    bits = - sum_i log2 p(x_i | x_1 ... x_(i-1))

from an empty state, carried from its first token to its last. The token that ends a text is x_n,
predicted like the others, where a document is whole; the token that begins one costs nothing. A
tokenizer that begins texts with no token leaves x_1 unpredicted: it costs log2 K, a guess among
all K tokens, so that bits are always enough to write the text down.

    bits per character = bits / characters       Unicode code points of the documents
    bits per byte      = bits / bytes            of their UTF-8
    perplexity         = 2^(bits / n)            by tokens: comparable under one tokenizer only
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple, dataclass
from itertools import chain, islice

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream, wired_limit

from .errors import MCSDError
from .tokens import stream_tokens


@dataclass
class Score:
    """What documents cost; scores of different documents can be added.

    Attributes:
        documents: those that hold something.
        characters: Unicode code points.
        bytes: of the documents in UTF-8.
        tokens: predicted, those that end a document included.
        bits: of all predictions together.
    """

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    bits: float = 0.0

    @property
    def bits_per_character(self) -> float:
        """Bits for a Unicode code point."""
        return self.bits / self.characters

    @property
    def bits_per_byte(self) -> float:
        """Bits for a byte of UTF-8."""
        return self.bits / self.bytes

    @property
    def perplexity(self) -> float:
        """2^(bits per token)."""
        each = self.bits / self.tokens
        return 2.0**each if each < 1024 else math.inf

    def __add__(self, other: "Score") -> "Score":
        return Score(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def as_dict(self) -> dict[str, float]:
        """Counts and figures by name."""
        figures = ("bits_per_character", "bits_per_byte", "perplexity")
        return asdict(self) | {name: getattr(self, name) for name in figures}


def score(
    model,
    tokenizer,
    documents: Iterable[Iterable[str]],
    *,
    end: bool = True,
    step_size: int = 512,
    progress: Callable[[], None] | None = None,
) -> Score:
    """Score documents, each from an empty state, in memory that does not depend on their length.

    Short documents are read many at a time: they are packed one behind the other, and the state is
    reset where one begins.

    Args:
        model: an MCSD model.
        tokenizer: mlx-lm's wrapper, from :func:`mlx_mcsd.load`.
        documents: each a text in pieces, cut anywhere between characters; empty ones count nothing.
        end: whether documents are whole, so that the token that ends a text counts.
        step_size: tokens read at a time.
        progress: called after each step.

    Raises:
        MCSDError: if a prediction is no finite number.
    """
    total, cache = Score(), model.make_cache()
    tokens = _tokens(total, tokenizer, documents, end, model.args.vocab_size)
    step = list(islice(tokens, step_size + 1))
    with wired_limit(model, [generation_stream]), mx.stream(generation_stream):
        while len(step) > 1:
            ids, begins, counts = zip(*step, strict=True)
            reset = mx.array([begins[:-1]]) if any(begins) else None
            logits = model(mx.array([ids[:-1]]), cache=cache, reset=reset)[0]  # (N, K)
            costs = _costs(logits.astype(mx.float32), mx.array(ids[1:]))  # (N,)
            mx.eval(costs, [c.cache for c in cache])
            total.bits += float(np.array(costs, np.float64)[list(counts[1:])].sum())
            total.tokens += sum(counts[1:])
            if not math.isfinite(total.bits):
                raise MCSDError("[score] predictions must be finite numbers but one is not.")
            mx.clear_cache()
            if progress is not None:
                progress()
            step = [step[-1], *islice(tokens, step_size)]
    return total


def _costs(logits: mx.array, targets: mx.array) -> mx.array:
    """Bits of each target (N,) under its logits (N, K)."""
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return (mx.logsumexp(logits, axis=-1) - chosen) / math.log(2)


def _tokens(
    total: Score, tokenizer, documents, end: bool, K: int
) -> Iterator[tuple[int, bool, bool]]:
    """Every token of the documents, whether it begins one, and whether its prediction counts.

    What no prediction says, the documents' size and the cost of a first token, goes to the total.
    """
    for document in documents:
        pieces = filter(None, document)
        if (first := next(pieces, None)) is None:
            continue
        total.documents += 1
        batches = stream_tokens(tokenizer, _measured(total, chain([first], pieces)))
        begin = next(batches)  # what the tokenizer begins a text with
        yield from ((token, i == 0, False) for i, token in enumerate(begin))
        if not begin:
            total.bits += math.log2(K)
            total.tokens += 1
        started = bool(begin)
        for token in (token for batch in batches for token in batch):
            yield token, not started, started
            started = True
        if end and tokenizer.eos_token_id is not None:
            yield tokenizer.eos_token_id, not started, started


def _measured(total: Score, pieces: Iterable[str]) -> Iterator[str]:
    for piece in pieces:
        total.characters += len(piece)
        total.bytes += len(piece.encode())
        yield piece
