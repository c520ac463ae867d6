"""From what a request asks to what is left to read: the longest beginning that was read before."""

from dataclasses import replace
from itertools import chain
from threading import Lock

from ..conversation import encode, render
from ..errors import MCSDError
from ..state import Snapshot
from .engine import Engine, Part
from .prefixes import Entry, key
from .protocol import APIError

LOOKED_AT = 64
"""Ends of messages, from the last backwards, at which a kept state is looked for."""


class Prompt:
    """A text to be continued.

    Attributes:
        start: what of it was read before.
        segments: (name to keep it under, ids) of the rest.
    """

    def __init__(self, start: Entry, segments: list[tuple[bytes | None, list[int]]], base: Entry):
        self.start, self.segments, self.base = start, segments, base

    @property
    def tokens(self) -> int:
        """Of the text."""
        return self.start.tokens + sum(len(ids) for _, ids in self.segments)

    @property
    def cached(self) -> int:
        """Tokens of the text that need not be read."""
        reread = 0 if self.start is self.base else len(self.start.snapshot.pending)
        return self.start.tokens - reread


class Prompts:
    """Looks up and names the states of texts.

    Args:
        engine: reads them.
        limit: tokens to read for one request at most.
    """

    def __init__(self, engine: Engine, limit: int):
        self.engine, self.limit = engine, limit
        self._lock = Lock()

    def text(self, text: str, base: Entry) -> Prompt:
        """A text as it is."""
        name = key(base.snapshot, f"text:{text}")
        if (entry := self.engine.prefixes.get(name)) is not None:
            return Prompt(entry, [], base)
        return self._prompt(base, [(name, self._encode(text, is_fresh(base), plain=True))], base)

    def ids(self, ids: tuple[int, ...], base: Entry) -> Prompt:
        """Tokens as they are."""
        size = self.engine.model.args.vocab_size
        if max(ids) >= size:
            raise APIError(400, f"token ids must be below {size} but got {max(ids)}.", "prompt")
        return self._prompt(base, [(None, list(ids))], base)

    def chat(self, messages, base: Entry, *, reply: bool = True) -> Prompt:
        """A conversation, up to where the assistant's next message begins, or its last one ends."""
        text = self.render(messages, base, reply=reply)
        # Beginnings to look for, the longest first: the whole, then the ends of messages.
        found, start, ends = 0, base, []
        for end in chain([len(text)], self._ends(messages, text, base)):
            ends.append(end)
            entry = self.engine.prefixes.get(key(base.snapshot, text[:end]))
            # What follows a text comes from reading its last token, so one must be left to read.
            if entry is not None and (end < len(text) or entry.snapshot.pending):
                found, start = end, entry
                break
        # Ends worth a state: the system's messages, which other conversations share; before the
        # last message, which may be edited; and the whole, for another answer.
        systems = next((i for i, (role, _) in enumerate(messages) if role != "system"), 0)
        keep = set(ends[:2])
        if systems and (system := self._end(messages[:systems], text, base)):
            keep.add(system)
        segments, at = [], found
        for end in sorted(end for end in keep if end > found):
            ids = self._encode(text[at:end], not at and is_fresh(base))
            segments.append((key(base.snapshot, text[:end]), ids))
            at = end
        return self._prompt(start, segments, base)

    def remember(self, messages, part: Part, content: str, base: Entry) -> Entry | None:
        """Keep the state after a reply, so that the conversation goes on from it.

        Returns:
            The entry, or None where the template rewrites what came before.
        """
        before = self.render(messages, base, reply=True)
        whole = self.render([*messages, ("assistant", content)], base)
        if not whole.startswith(before) or whole == before:
            return None
        rest = after(content[: part.begun], whole[len(before) :])
        if rest is None:
            return None
        pending = (*part.end.pending, *(self._encode(rest, False) if rest else ()))
        snapshot = replace(part.end, pending=pending)
        entry = Entry(snapshot, length(snapshot) - length(base.snapshot))
        self.engine.prefixes.add(key(base.snapshot, whole), entry)
        return entry

    def _prompt(self, start: Entry, segments, base: Entry) -> Prompt:
        count = len(start.snapshot.pending) + sum(len(ids) for _, ids in segments)
        if not count:
            raise APIError(400, "the text to go on with must not be empty.")
        if count > self.limit:
            raise APIError(
                400,
                f"at most {self.limit} tokens are read for a request but this needs {count}.",
                code="context_length_exceeded",
            )
        return Prompt(start, segments, base)

    def _ends(self, messages, text: str, base: Entry):
        """Where messages end in the text, the last first; not the last message itself."""
        for i in range(len(messages) - 1, max(0, len(messages) - LOOKED_AT), -1):
            if end := self._end(messages[:i], text, base):
                yield end

    def _end(self, messages, text: str, base: Entry) -> int | None:
        """Where these messages end in the text; None if the template has them differently."""
        try:
            part = self.render(messages, base)
        except APIError:  # some templates refuse a conversation that ends so
            return None
        return len(part) if text.startswith(part) else None

    def render(self, messages, base: Entry, *, reply: bool = False) -> str:
        """The text of a conversation, without what the base state has read."""
        tokenizer = self.engine.tokenizer
        try:
            text = render(tokenizer, messages, reply=reply)
        except MCSDError as error:
            raise APIError(400, str(error), "messages") from error
        if not is_fresh(base) and tokenizer.bos_token:  # it was read before
            text = text.removeprefix(tokenizer.bos_token)
        return text

    def _encode(self, text: str, first: bool, *, plain: bool = False) -> list[int]:
        with self._lock:
            if plain:
                return self.engine.tokenizer.encode(text, add_special_tokens=first)
            return encode(self.engine.tokenizer, text, first=first)


def is_fresh(base: Entry) -> bool:
    """Whether nothing is read before a text that begins here."""
    return not length(base.snapshot)


def length(snapshot: Snapshot) -> int:
    """Tokens read and pending."""
    return snapshot.tokens_seen + len(snapshot.pending)


def after(read: str, written: str) -> str | None:
    """What of a reply, as the template writes it, follows what the model wrote of it itself.

    They may differ in the space that they begin with, but in nothing else: else None.
    """
    if written.startswith(read):
        return written[len(read) :]
    read, written = read.lstrip(), written.lstrip()
    return written[len(read) :] if read and written.startswith(read) else None
