"""Files to records: texts, prompts with completions, and messages, one document each."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..documents import split, strip
from ..errors import MCSDError
from ..source import Source

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
            digest.update(piece.encode())
        return characters, int.from_bytes(digest.digest(), "little")


@dataclass
class Records:
    """The records of a file or a dataset, which can be iterated over again and again.

    Attributes:
        name: of the file, for messages.
        read: begins to read it.
    """

    name: str
    read: Callable[[], Iterator[Record]]

    def __iter__(self) -> Iterator[Record]:
        return self.read()


def text_file(name: str, separator: str | None) -> Records:
    """A UTF-8 text: one document, or those that a separator stands between.

    Newlines stay as they are, except around a separator: a model learns what the file holds.
    """

    def read():
        if separator is None:
            yield Record(_text(name))
            return
        for document in map(strip, split(_text(name), separator)):
            if first := next(document, ""):
                yield Record(chain([first], document))

    return Records(name, read)


def json_lines(name: str) -> Records:
    """A .jsonl file: an object a line."""

    def read():
        for number, line in enumerate(map("".join, split(_text(name), "\n")), 1):
            if not line.strip():
                continue
            place = f"{name}, line {number},"
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                _fail(f"{place} must hold JSON but: {error}.")
            yield to_record(content, place)

    return Records(name, read)


def dataset(name: str, rows) -> Records:
    """What Hugging Face's ``save_to_disk`` wrote; its rows stay on the disk."""

    def read():
        for number, row in enumerate(rows):
            yield to_record(row, f"{name}, row {number},")

    return Records(name, read)


def _text(name: str) -> Source:
    text = Source([name])
    if text.total is None:
        _fail(f"{name} must be a file, which is read more than once, but is a stream.")
    return text


def find(paths: list[str], separator: str | None) -> tuple[list[Records], list[Records]]:
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
            train.append(dataset(name, splits["train"]))
            valid += [dataset(f"{name} ({v})", splits[v]) for v in VALID if v in splits]
            continue
        files = [name]
        if path.is_dir():
            if not (path / "train.jsonl").is_file():
                _fail(
                    f"{name} must hold train.jsonl, or what datasets' save_to_disk writes; of "
                    "other files name each."
                )
            held_out = (path / f"{v}.jsonl" for v in VALID)
            files = [str(file) for file in (path / "train.jsonl", *held_out) if file.is_file()]
        for file in files:
            _text(file)  # before hours of work: it can be read
        is_json = Path(files[0]).suffix == ".jsonl"
        first, *others = (json_lines(f) if is_json else text_file(f, separator) for f in files)
        train.append(first)
        valid += others
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
        if not (_is_text(prompt) and _is_text(completion)):
            _fail(f"{place} must have texts for prompt and completion but has others.")
        return Record([json.dumps([prompt, completion])], prompt=prompt, completion=completion)
    if "messages" in keys:
        messages = content["messages"]
        if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
            _fail(f"{place} must have messages, a list of objects with role and content.")
        turns = [(m["role"], m["content"]) for m in messages]
        return Record([json.dumps(turns)], messages=turns)
    if "text" in keys and _is_text(content["text"]):
        return Record([content["text"]])
    found = ", ".join(sorted(keys)) or "none"
    _fail(f"{place} must have text, prompt and completion, or messages but has {found}.")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        _is_text(message.get(key)) for key in ("role", "content")
    )


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def _fail(message: str):
    raise MCSDError(f"[train] {message}")
