"""The text of one answer as its tokens come, and which tokens each stretch of it began with."""

from ..text import TextStream


class Text:
    """Turns tokens into text that can be sent: whole characters, up to a stop string.

    Args:
        tokenizer: of the tokens.
        stop: strings that end the text and are no part of it; they may span tokens.
        after_text: whether text stands before, so that a space which begins this one is kept.
    """

    def __init__(self, tokenizer, stop=(), after_text=False):
        self._stream = TextStream(tokenizer, stop, after_text=after_text)
        self._ready = ""
        self._notes = []
        self._taken = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self._stream.stopped

    @property
    def settled(self) -> int | None:
        """Characters of the text so far, if they are just what the tokens so far spell.

        A state that has read those tokens goes on exactly after these characters. None while
        something waits: bytes for the rest of their character, text that may be a stop string.
        """
        stream = self._stream
        return stream.shown if not stream.tail and stream.shown == stream.length else None

    def add(self, token: int, note=None) -> None:
        """Read a token; ``note`` comes back from `take` with the text that the token begins."""
        self._notes.append((self._stream.length, note))
        self._ready += self._stream.add(token)

    def finish(self) -> None:
        """No token follows: what waited is text after all."""
        self._ready += self._stream.finish()

    def take(self) -> tuple[str, list]:
        """The text that is ready and not taken yet, and the notes of tokens that begin in it."""
        text, self._ready = self._ready, ""
        self._taken += len(text)
        notes = [note for start, note in self._notes if start < self._taken]
        self._notes = self._notes[len(notes) :]
        return text, notes
