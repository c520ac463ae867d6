"""States kept at the ends of messages, so that a conversation is never read twice.

A state cannot be cut back, but it is small: one is kept wherever a later request may go on from.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

from ..state import Snapshot


@dataclass(frozen=True)
class Entry:
    """Where a text may be continued.

    Attributes:
        snapshot: what was read, and what of the text is pending.
        tokens: of the text, those pending included and those of a base state not.
    """

    snapshot: Snapshot
    tokens: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return sum(a.nbytes for layer in self.snapshot.arrays for a in layer)


def key(base: Snapshot, text: str) -> bytes:
    """The name of a text that is read after a base state."""
    begun = f"{base.hash}{base.pending}\n{text}"
    return hashlib.blake2b(begun.encode(), digest_size=32).digest()


class Prefixes:
    """Entries by :func:`key`, the least recently used dropped beyond ``max_bytes`` of states.

    Any thread may call it.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._lock = Lock()

    def __len__(self):
        return len(self._entries)

    def get(self, name: bytes) -> Entry | None:
        """The entry of this name, from now on the one used last; None if there is none."""
        with self._lock:
            if name in self._entries:
                self._entries.move_to_end(name)
            return self._entries.get(name)

    def add(self, name: bytes, entry: Entry) -> None:
        """Keep an entry, in place of one of the same name."""
        with self._lock:
            if old := self._entries.pop(name, None):
                self.nbytes -= old.nbytes
            self._entries[name] = entry
            self.nbytes += entry.nbytes
            while self.nbytes > self.max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.nbytes -= oldest.nbytes
