"""Records to token ids, as mlx-lm encodes what it fine-tunes on."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, takewhile

from .. import conversation
from ..tokens import stream_tokens
from .sources import Record


class Pieces:
    """A text in pieces that can be cut in two.

    Args:
        pieces: of the text.
        seen: called with the characters of each piece as it is read.
    """

    def __init__(self, pieces: Iterable[str], seen: Callable[[int], None]):
        self._pieces, self._seen = iter(pieces), seen

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            self._seen(len(piece))
            yield piece

    def take(self, characters: int) -> Iterator[str]:
        """The pieces of so many characters; those that follow are left."""
        while characters and (piece := next(self._pieces, None)) is not None:
            head, rest = piece[:characters], piece[characters:]
            if rest:
                self._pieces = chain([rest], self._pieces)
            characters -= len(head)
            self._seen(len(head))
            yield head


class Encoder:
    """Encodes records; a document ends with the tokenizer's end of text, if it has one.

    Args:
        tokenizer: mlx-lm's wrapper.
        mask_prompt: of messages, learn the last reply alone.
    """

    def __init__(self, tokenizer, mask_prompt: bool = False):
        self._tokenizer, self._mask_prompt = tokenizer, mask_prompt
        eos = tokenizer.eos_token_id
        self._end = [] if eos is None else [eos]

    def text(
        self, pieces: Iterable[str], *, begins: bool = True, ends: bool = True
    ) -> Iterator[list[int]]:
        """The ids of a text in blocks; or of its beginning, or its end."""
        yield from stream_tokens(self._tokenizer, pieces, begins)
        if ends:
            yield self._end

    def turns(self, record: Record) -> tuple[list[int], int]:
        """The ids of a prompt and completion, or of messages, and how many are not learned.

        As in mlx-lm a prompt and its completion go through the chat template, if there is one.

        Raises:
            MCSDError: if the chat template refuses the messages.
        """
        encode, messages = self._tokenizer.encode, record.messages
        if messages is None and not self._tokenizer.has_chat_template:
            ids = encode(record.prompt + record.completion)
            return self._ended(ids), _common(encode(record.prompt), ids)
        masked = self._mask_prompt
        if messages is None:
            messages, masked = [("user", record.prompt), ("assistant", record.completion)], True
        ids = self._render(messages)
        if not (masked and messages[-1][0] == "assistant"):
            return self._ended(ids), 0
        prompt = self._render(messages[:-1], reply=True) if messages[1:] else []
        return self._ended(ids), _common(prompt, ids)

    def _render(self, messages, **options) -> list[int]:
        text = conversation.render(self._tokenizer, messages, **options)
        return conversation.encode(self._tokenizer, text, first=True)

    def _ended(self, ids: list[int]) -> list[int]:
        # Most templates end a reply so themselves, perhaps with a newline behind.
        return ids if self._end and self._end[0] in ids[-2:] else [*ids, *self._end]


def _common(a: list[int], b: list[int]) -> int:
    """How many ids two lists begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
