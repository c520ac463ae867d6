"""Text as it is generated: whole characters only, emoji with their joiners, up to a stop string."""

import regex
from mlx_lm.tokenizer_utils import StreamingDetokenizer

from .errors import MCSDError

PART = "\ufffd"
"""What a tokenizer decodes a part of a character to."""

MOST_TOKENS = 8
"""Tokens without a whole character for longer than this are no text, and shown as they decode."""

MOST_JOINED = 64
"""Code points that are waited for; no emoji has as many."""

CLUSTER = regex.compile(r"\X")
MAY_GROW = regex.compile(
    r"[\p{Extended_Pictographic}\p{Regional_Indicator}\p{Emoji_Modifier}"
    r"0-9#*\u200d\ufe0f\u20e3\U000e0020-\U000e007f]\Z"
)
"""Ends of a text that a joiner, a skin tone or the like may follow."""


def complete(text: str) -> int:
    """Return how many characters of ``text`` no later one can join: all but an emoji at its end."""
    if MAY_GROW.search(text) and len(last := CLUSTER.findall(text)[-1]) <= MOST_JOINED:
        return len(text) - len(last)
    return len(text)


class Detokenizer(StreamingDetokenizer):
    """mlx-lm's interface, for any tokenizer: tokens in, whole characters out, each once.

    Every piece is decoded behind the one before it, because decoders trim and join by what stands
    before. mlx-lm's own for such tokenizers repeats neighbours that are spelled in bytes.

    Attributes:
        text: of the tokens so far; a part of a character is never in it, not even at the end.
        tokens: so far.
        tail: the last of them, whose text is not whole yet.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self.reset()

    def reset(self) -> None:
        """Begin a text."""
        self.text, self.offset = "", 0
        self.tokens: list[int] = []
        self.tail: list[int] = []
        self._before: list[int] = []

    def resume(self, tail=()) -> None:
        """Begin in the middle of a text that ended with ``tail``, short of a whole character."""
        self.reset()
        self._before = self._tokenizer.encode("a", add_special_tokens=False)
        self.tail = list(tail)

    def add_token(self, token: int) -> None:
        """Read a token."""
        self.tokens.append(token)
        if token in self._special:
            return
        self.tail.append(token)
        before, text = self._decode(self._before), self._decode(self._before + self.tail)
        if text.endswith(PART) and len(self.tail) < MOST_TOKENS:
            return
        self.text += text[len(before) :]
        self._before, self.tail = self.tail, []

    def finalize(self) -> None:
        """End the text; what is left of ``tail`` is none."""

    def _decode(self, tokens) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


class TextStream:
    """The text to show of tokens as they come.

    Args:
        tokenizer: mlx-lm's wrapper, from :func:`mlx_mcsd.load`.
        stop: strings that end the text and are not part of it; white space alone ends only a text
            that holds more.
        tail: tokens that the text before ended with, short of a whole character.
        after_text: whether text stands before, so that a space which begins this one is kept.

    Attributes:
        stopped: whether a stop string came.
        length: characters that the tokens spell, shown or not.
        shown: characters that were shown.

    Raises:
        MCSDError: if a stop string is empty.
    """

    def __init__(self, tokenizer, stop=(), tail=(), after_text: bool = False):
        from mlx_lm.generate import TextStateMachine

        if "" in stop:
            raise MCSDError("a stop string must not be empty; leave it out.")
        self._detokenizer = tokenizer.detokenizer
        if after_text:
            self._detokenizer.resume(tail)
        self._blanks = bool(stop) and all(s.isspace() for s in stop)
        edges = {"text": [(s, None) for s in stop]} if stop else None
        self._machine = TextStateMachine(edges)
        self._state = self._machine.make_state("text")
        self._ready = ""
        self.length = self.shown = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self._state[0] is None

    @property
    def text(self) -> str:
        """What the tokens spell, shown or not."""
        return self._detokenizer.text

    @property
    def tail(self) -> list[int]:
        """Tokens whose text is not whole yet."""
        return self._detokenizer.tail

    def add(self, token: int) -> str:
        """Read a token; return the text that is certain now, often none."""
        self._detokenizer.add_token(token)
        text = self._detokenizer.last_segment
        self.length += len(text)
        if self._blanks:
            rest = text.lstrip()
            self._ready += text[: len(text) - len(rest)]
            text, self._blanks = rest, not rest
        self._state, text, _ = self._machine.step(self._state, text)
        return self._show(self._ready + text, complete)

    def finish(self) -> str:
        """Return the text that waited; no token follows."""
        text = ""
        if not self.stopped:
            self._state, text, _ = self._machine.flush(self._state)
        return self._show(self._ready + text, len)

    def _show(self, text: str, end) -> str:
        count = end(text)
        self._ready = text[count:]
        self.shown += count
        return text[:count]
