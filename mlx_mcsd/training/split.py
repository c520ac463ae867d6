"""Which documents are held out, decided before any is encoded."""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ..errors import MCSDError
from .sources import Records


@dataclass
class Survey:
    """What a first reading tells of the records.

    Attributes:
        characters: of each record, int64.
        hashes: of each, uint64; equal ones are copies.
        counts: records of each source.
        messages: whether there are any.
    """

    characters: np.ndarray
    hashes: np.ndarray
    counts: list[int]
    messages: bool


def survey(sources: list[Records], seed: int) -> Survey:
    """Read everything once and count.

    Raises:
        MCSDError: if something cannot be read, or there is no text.
    """
    found, counts, messages = [], [], False
    with tqdm(desc="Reading", unit=" characters", unit_scale=True, disable=None) as bar:
        for source in sources:
            before = len(found)
            for record in source:
                found.append(record.measure(str(seed)))
                messages |= record.messages is not None
                bar.update(found[-1][0])
            counts.append(len(found) - before)
    characters = np.array([c for c, _ in found], np.int64)
    if not characters.sum():
        names = ", ".join(source.name for source in sources)
        raise MCSDError(f"[train] the data must hold text but there is none in {names}.")
    return Survey(characters, np.array([h for _, h in found], np.uint64), counts, messages)


class Split:
    """Which documents are held out; copies of one always fall on the same side.

    Documents are held out whole, in the order of their hashes, until there are enough characters.
    Where that leaves far too few, because documents are long, the end of the next is held out too.

    Args:
        found: the survey.
        fraction: of all characters.
    """

    def __init__(self, found: Survey, fraction: float):
        order = np.argsort(found.hashes, kind="stable")
        hashes, sums = found.hashes[order], np.cumsum(found.characters[order])
        ends = np.flatnonzero(np.append(hashes[1:] != hashes[:-1], True))  # of each run of copies
        wanted = fraction * sums[-1]
        whole = int(np.searchsorted(sums[ends], wanted, side="right"))
        self._last = hashes[ends[whole - 1]] if whole else None
        missing = wanted - (sums[ends[whole - 1]] if whole else 0)
        self._cut, self._keep = None, 0
        if missing > wanted / 2:
            following = ends[whole - 1] + 1 if whole else 0
            self._cut = hashes[following]
            # What is missing is cut from all copies of the document alike.
            copies = int((hashes == self._cut).sum())
            self._keep = int(found.characters[order[following]] - missing / copies)

    def trained_on(self, digest: np.uint64, characters: int, is_text: bool = True) -> int:
        """How many of the characters of a document are trained on; the others are held out."""
        if self._last is not None and digest <= self._last:
            return 0
        # A prompt and its completion, or messages, cannot be cut.
        return self._keep if digest == self._cut and is_text else characters
