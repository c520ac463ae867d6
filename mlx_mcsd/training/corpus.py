"""Records to tokens on the disk, once: data may be larger than memory, and are read from there.

FOLDER/train.tokens, valid.tokens        uint16, or uint32 where K > 65,536
FOLDER/train.documents, valid.documents  where each document begins, and what of it is a prompt
FOLDER/corpus.json                       written last: with it the folder is complete
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import MCSDError
from ..files import write_atomically
from ..loading import read_json
from .encoding import Encoder, Pieces
from .sources import Records
from .split import Split, Survey

INDEX = np.dtype([("start", "<i8"), ("prompt", "<i8"), ("record", "<i8")])
PARTS = ("train", "valid")
COMPLETE = "corpus.json"


class Documents:
    """One part's documents, read from the disk as they are wanted.

    Attributes:
        tokens: of all, one behind the other.
        lengths: tokens of each, int64.
        prompts: tokens at the start of each that are not learned, int64.
        records: the number of the record that each came from, int64.
    """

    def __init__(self, folder: Path, part: str, dtype: np.dtype):
        self.tokens = _map(folder / f"{part}.tokens", dtype)
        index = _map(folder / f"{part}.documents", INDEX)
        self._starts = np.array(index["start"])
        self.prompts, self.records = np.array(index["prompt"]), np.array(index["record"])
        self.lengths = np.diff(self._starts, append=self.tokens.size)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, place: int, count: int) -> np.ndarray:
        """Some tokens of a document."""
        start = self._starts[document] + place
        return self.tokens[start : start + count]


class Corpus:
    """The documents of both parts, and where they came from.

    Args:
        folder: as `write` left it.

    Attributes:
        train: what is trained on.
        valid: what is held out.
        digest: of the tokens, equal on every machine that read the same data alike.

    Raises:
        MCSDError: if a file is missing or was cut short.
    """

    def __init__(self, folder: Path):
        facts = read_json(folder / COMPLETE)
        dtype = np.dtype(facts["dtype"])
        self.train, self.valid = (Documents(folder, part, dtype) for part in PARTS)
        self.digest = facts["digest"]
        self._sources, self._ends = facts["sources"], list(accumulate(facts["records"]))
        for part in PARTS:
            found, wanted = getattr(self, part).tokens.size, facts["tokens"][part]
            if found != wanted:
                raise MCSDError(
                    f"[train] {folder / part}.tokens must hold {wanted} tokens but holds {found}; "
                    f"delete {folder} and resume, to encode the data anew."
                )

    def describe(self, documents: list[int]) -> str:
        """Name documents trained on by their files and their places in these."""
        names = []
        for record in self.train.records[documents[:5]].tolist():
            i = bisect_right(self._ends, record)
            first = self._ends[i - 1] if i else 0
            names.append(f"document {record - first + 1} of {self._sources[i]}")
        more = len(documents) - len(names)
        return ", ".join(names) + (f" and {more} more" if more else "")


def write(
    folder: Path,
    sources: list[Records],
    found: Survey,
    split: Split | None,
    held_out: list[Records],
    encoder: Encoder,
    vocab_size: int,
) -> None:
    """Write the tokens of all records into a folder.

    Args:
        folder: to make.
        sources: what to train on.
        found: their survey.
        split: what of them to hold out.
        held_out: sources that are held out whole.
        encoder: texts to ids.
        vocab_size: K.
    """
    folder.mkdir(exist_ok=True)
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    train, valid = writers = [_Writer(folder, part, dtype) for part in PARTS]
    bar = tqdm(
        total=int(found.characters.sum()),
        desc="Encoding",
        unit=" characters",
        unit_scale=True,
        disable=None,
    )
    with bar:
        for number, record in enumerate(chain.from_iterable(sources)):
            kept = characters = int(found.characters[number])
            if split is not None:
                kept = split.trained_on(found.hashes[number], characters, record.is_text)
            if not record.is_text:
                ids, prompt = encoder.turns(record)
                (train if kept else valid).add([ids], number, prompt)
                bar.update(characters)
                continue
            pieces = Pieces(record.pieces, bar.update)
            if kept:
                train.add(encoder.text(pieces.take(kept), ends=kept == characters), number)
            if kept < characters:
                valid.add(encoder.text(pieces, begins=not kept), number)
    for number, record in enumerate(chain.from_iterable(held_out)):
        ids, prompt = ([], 0) if record.is_text else encoder.turns(record)
        valid.add(encoder.text(record.pieces) if record.is_text else [ids], number, prompt)
    for writer in writers:
        writer.close()
    facts = {
        "dtype": dtype.str,
        "tokens": {part: w.count for part, w in zip(PARTS, writers, strict=True)},
        "digest": "".join(w.digest.hexdigest() for w in writers),
        "sources": [source.name for source in sources],
        "records": found.counts,
    }
    write_atomically(folder / COMPLETE, (json.dumps(facts, indent=2) + "\n").encode())


class _Writer:
    """Writes one part's tokens and index."""

    def __init__(self, folder: Path, part: str, dtype: np.dtype):
        self._tokens = open(folder / f"{part}.tokens", "wb")  # noqa: SIM115 (see `close`)
        self._index = open(folder / f"{part}.documents", "wb")  # noqa: SIM115
        self._dtype = dtype
        self.count, self.digest = 0, hashlib.blake2b(digest_size=8)

    def add(self, ids: Iterable[list[int]], record: int, prompt: int = 0) -> None:
        """Write a document, its ids in blocks; one without any is left out."""
        start = self.count
        for block in ids:
            data = np.array(block, self._dtype).tobytes()
            self._tokens.write(data)
            self.digest.update(data)
            self.count += len(block)
        if self.count > start:
            entry = np.array([(start, prompt, record)], INDEX).tobytes()
            self._index.write(entry)
            self.digest.update(entry)

    def close(self) -> None:
        self._tokens.close()
        self._index.close()


def _map(file: Path, dtype: np.dtype) -> np.ndarray:
    try:
        if not file.stat().st_size:  # which cannot be mapped
            return np.zeros(0, dtype)
        return np.memmap(file, dtype, mode="r")
    except (OSError, ValueError) as error:
        raise MCSDError(
            f"[train] {file} must be whole but: {error}; delete {file.parent} and resume."
        ) from error
