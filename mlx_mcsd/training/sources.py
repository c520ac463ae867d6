"""Files to records: texts, prompts with completions, and messages, one document each."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MCSDError

PIECE = 2**18
"""Characters of a text read at a time."""

VALID = ("valid", "validation")
"""Names of held-out parts, mlx-lm's and Hugging Face's."""


@dataclass
class Record:
    """One document, to be read once.

    Attributes:
        pieces: of its text; of prompts and messages, of the JSON they are compared by.
        prompt: what is read before the completion and not learned.
        completion: of the prompt; None in a text and in messages.
        messages: (role, content), oldest first.
    """

    pieces: Iterable[str]
    prompt: str | None = None
    completion: str | None = None
    messages: list[tuple[str, str]] | None = None

    @property
    def is_text(self) -> bool:
        """Whether it is a text and no more."""
        return self.prompt is None and self.messages is None

    def measure(self, salt: str) -> tuple[int, int]:
        """Return the number of its characters, and a hash, by which copies are found."""
        characters, digest = 0, hashlib.blake2b(salt.encode(), digest_size=8)
        for piece in self.pieces:
            characters += len(piece)
            digest.update(piece.encode(errors="surrogatepass"))
        return characters, int.from_bytes(digest.digest(), "little")


class Source:
    """A file or dataset, which can be iterated over again and again.

    Attributes:
        name: of the file, for messages.
    """

    def __init__(self, name: str):
        self.name = name

    def __iter__(self) -> Iterator[Record]:
        raise NotImplementedError


class TextFile(Source):
    """A UTF-8 text: one document, or those that a separator stands between."""

    def __init__(self, name: str, separator: str | None):
        super().__init__(name)
        self.separator = separator

    def __iter__(self) -> Iterator[Record]:
        if self.separator is None:
            yield Record(self._pieces())
            return
        rest = ""
        for piece in self._pieces():
            *documents, rest = (rest + piece).split(self.separator)
            yield from (Record([d]) for d in map(_trim, documents) if d)
        if rest := _trim(rest):
            yield Record([rest])

    def _pieces(self) -> Iterator[str]:
        with _open(self.name) as file:
            while piece := _read(self.name, file.read, PIECE):
                yield piece


class JsonLines(Source):
    """A .jsonl file: an object a line."""

    def __iter__(self) -> Iterator[Record]:
        with _open(self.name) as file:
            number = 0
            while line := _read(self.name, file.readline):
                number += 1
                if not line.strip():
                    continue
                place = f"{self.name}, line {number},"
                try:
                    content = json.loads(line)
                except (ValueError, RecursionError) as error:
                    _fail(f"{place} must hold JSON but: {error}.")
                yield to_record(content, place)


class Dataset(Source):
    """What Hugging Face's ``save_to_disk`` wrote; its rows stay on the disk."""

    def __init__(self, name: str, rows):
        super().__init__(name)
        self.rows = rows

    def __iter__(self) -> Iterator[Record]:
        for number, row in enumerate(self.rows):
            yield to_record(row, f"{self.name}, row {number},")


def find(paths: list[str], separator: str | None) -> tuple[list[Source], list[Source]]:
    """Return the sources to train on, and those that a folder among them holds out.

    Raises:
        MCSDError: if a path is missing or is no data, or `datasets` is not installed.
    """
    train, valid = [], []
    for name in paths:
        path = Path(name)
        if path.is_dir() and any(
            (path / f).exists() for f in ("dataset_info.json", "dataset_dict.json")
        ):
            splits = _load_dataset(name)
            if "train" not in splits:
                _fail(f"{name} must have a split train but has {', '.join(splits)}.")
            train.append(Dataset(name, splits["train"]))
            valid += [Dataset(f"{name} ({v})", splits[v]) for v in VALID if v in splits]
        elif path.is_dir():
            if not (path / "train.jsonl").is_file():
                _fail(
                    f"{name} must hold train.jsonl, or what datasets' save_to_disk writes; of "
                    "other files name each."
                )
            train.append(JsonLines(str(path / "train.jsonl")))
            files = [path / f"{v}.jsonl" for v in VALID]
            valid += [JsonLines(str(file)) for file in files if file.is_file()]
        elif path.suffix == ".jsonl":
            train.append(JsonLines(name))
        else:
            train.append(TextFile(name, separator))
    for source in (*train, *valid):
        if not isinstance(source, Dataset):
            _open(source.name).close()
    return train, valid


def _load_dataset(name: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError:
        _fail(f"{name} needs datasets: pip install 'mlx-mcsd[train]'.")
    try:
        found = datasets.load_from_disk(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _fail(f"{name} must be a dataset saved by save_to_disk but: {error}.")
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}


def to_record(content: Any, place: str) -> Record:
    """The record of an object with ``prompt`` and ``completion``, ``messages`` or ``text``.

    Raises:
        MCSDError: naming the place, if it has none of them or they are no texts.
    """
    keys = set(content) if isinstance(content, dict) else set()
    if {"prompt", "completion"} <= keys:
        prompt, completion = content["prompt"], content["completion"]
        if not (isinstance(prompt, str) and isinstance(completion, str)):
            _fail(f"{place} must have texts for prompt and completion but has others.")
        return Record([json.dumps([prompt, completion])], prompt=prompt, completion=completion)
    if "messages" in keys:
        messages = content["messages"]
        if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
            _fail(f"{place} must have messages, a list of objects with role and content.")
        turns = [(m["role"], m["content"]) for m in messages]
        return Record([json.dumps(turns)], messages=turns)
    if "text" in keys and isinstance(content["text"], str):
        return Record([content["text"]])
    found = ", ".join(sorted(keys)) or "none"
    _fail(f"{place} must have text, prompt and completion, or messages but has {found}.")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def _trim(document: str) -> str:
    return document.strip("\r\n")


def _open(name: str):
    try:
        # Newlines as they are: what a model learns is what the file holds.
        return open(name, encoding="utf-8", newline="")
    except OSError as error:
        _fail(f"cannot read {name}: {error.strerror}.")


def _read(name: str, read, *args) -> str:
    try:
        return read(*args)
    except UnicodeDecodeError as error:
        _fail(f"{name} must be UTF-8 text but is not: {error.reason}.")


def _fail(message: str):
    raise MCSDError(f"[train] {message}")
