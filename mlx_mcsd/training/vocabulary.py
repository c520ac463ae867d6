"""The tokenizer of a run: taken over, or trained on the data."""

import random
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from ..errors import MCSDError
from ..loading import read_json
from ..tokenizer import save_tokenizer, train_sentencepiece
from .sources import Record, Records
from .split import Split, Survey

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)

SAMPLE = 10_000_000
"""Characters that a tokenizer is trained on, at most; more cost time and change little."""

PIECE = 2**18
"""Characters of a long text that are taken into the sample or left out of it together."""

TEMPLATE = """\
{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>
{{ message['content'] }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
"""For messages where the tokenizer has no template."""


def take_over(path: str, out: Path, context: int) -> None:
    """Write a tokenizer into a directory: that of another directory, or a SentencePiece model.

    Raises:
        MCSDError: if there is none.
    """
    source = Path(path)
    try:
        if source.is_file():
            save_tokenizer(out, source.read_bytes(), context)
        elif (source / "tokenizer.json").is_file():
            for name in FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, out / name)
        elif (source / "tokenizer.model").is_file():
            settings = source / "tokenizer_config.json"
            settings = read_json(settings) if settings.is_file() else None
            save_tokenizer(out, (source / "tokenizer.model").read_bytes(), context, settings)
        else:
            raise MCSDError(
                f"[train] tokenizer must be a directory with tokenizer.json or tokenizer.model, or "
                f"a SentencePiece model, but {path} is none."
            )
    except OSError as error:
        raise MCSDError(f"[train] cannot read {path}: {error.strerror}.") from error


def train(
    sources: list[Records], found: Survey, split: Split | None, vocab_size: int, seed: int
) -> bytes:
    """Train a SentencePiece model on what is trained on, or on a sample of it.

    Raises:
        MCSDError: if the data are too few for a vocabulary of this size.
    """
    return train_sentencepiece(_sample(sources, found, split, seed), vocab_size)


def _sample(sources, found, split, seed) -> Iterator[str]:
    rng, share = random.Random(seed), SAMPLE / max(found.characters.sum(), 1)
    for number, record in enumerate(chain.from_iterable(sources)):
        kept = int(found.characters[number])
        if split is not None:
            kept = split.trained_on(found.hashes[number], kept, record.is_text)
        for text in _texts(record):
            if record.is_text:
                text = text[:kept]
                kept -= len(text)
            elif not kept:
                continue
            for start in range(0, len(text), PIECE):
                if rng.random() < share:
                    yield text[start : start + PIECE]


def _texts(record: Record):
    if record.messages is not None:
        return [content for _, content in record.messages]
    return record.pieces if record.is_text else [record.prompt, record.completion]
