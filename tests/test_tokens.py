"""A text in pieces gives the ids of the whole text, whatever the tokenizer."""

import json
import lzma
import random
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

from mlx_mcsd import tokens
from mlx_mcsd.loading import load_tokenizer, resolve
from mlx_mcsd.tokens import stream_tokens

KINDS = ["bundled", "prepend", "metaspace", "byte-level"]


def bundled():
    return json.loads((resolve() / "tokenizer.json").read_text())


def with_marks():
    """The bundled tokenizer with spaces written as marks, as most of its kind have them."""
    spec = bundled()
    model = spec["model"]
    model["vocab"] = {piece.replace(" ", "▁"): i for piece, i in model["vocab"].items()}
    model["merges"] = [[part.replace(" ", "▁") for part in merge] for merge in model["merges"]]
    return spec


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    """Tokenizers that treat the beginning of a text, spaces and words in different ways."""
    if request.param == "bundled":
        return load_tokenizer(resolve())
    spec = with_marks()
    if request.param == "prepend":
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        parts = [{"type": "Prepend", "prepend": "▁"}, replace]
        spec["normalizer"] = {"type": "Sequence", "normalizers": parts}
    elif request.param == "metaspace":
        marks = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
        spec["pre_tokenizer"] = marks | {"split": True}
    else:
        spec["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        }
        spec["model"]["vocab"] = {
            piece.replace("▁", "Ġ"): i for piece, i in spec["model"]["vocab"].items()
        }
        spec["model"]["merges"] = [
            [part.replace("▁", "Ġ") for part in merge] for merge in spec["model"]["merges"]
        ]
    return SimpleNamespace(backend_tokenizer=Tokenizer.from_str(json.dumps(spec)))


def cut(text, seed, most):
    """The text in pieces of random lengths."""
    rng = random.Random(seed)
    while text:
        n = rng.randint(1, most)
        yield text[:n]
        text = text[n:]


def streamed(tokenizer, text, most=1000, **options):
    lists = list(stream_tokens(tokenizer, cut(text, 0, most), **options))
    return [i for ids in lists for i in ids], len(lists)


WORDS = [
    "Once",
    " upon",
    " a",
    "time",
    "\n",
    "\n\n",
    "  ",
    " 漢字",
    "🙂",
    "é",
    ".",
    "</s>",
    "x" * 50,
]


def texts():
    rng = random.Random(1)
    yield "words", "".join(rng.choices(WORDS, k=6000))
    yield "letters", "".join(rng.choices("ab \n.é漢🙂", k=15000))
    yield "runs", "a" * 9000 + " " * 9000 + "\n" * 5000 + "ab" * 5000 + "🙂" * 3000 + "the end"


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in texts()])
def test_ids_are_those_of_the_whole_text(tokenizer, text, monkeypatch):
    for name, value in (("WINDOW", 3000), ("MARGIN", 300), ("OVERLAP", 300)):
        monkeypatch.setattr(tokens, name, value)
    got, windows = streamed(tokenizer, text)
    assert got == tokenizer.backend_tokenizer.encode(text).ids
    assert windows > len(text) / 6000


def test_windows_that_cannot_agree_lose_nothing(monkeypatch):
    """In a long run a window begins where no token of the text does."""
    for name, value in (("WINDOW", 3000), ("MARGIN", 300), ("OVERLAP", 300)):
        monkeypatch.setattr(tokens, name, value)
    backend = Tokenizer.from_str(json.dumps(bundled()))
    backend.add_tokens(["a" * 7])
    text = "Once" + "a" * 20_001 + " upon a time " + "a" * 9_001
    got, _ = streamed(SimpleNamespace(backend_tokenizer=backend), text)
    assert got == backend.encode(text).ids


def test_ids_of_a_novel_are_those_of_the_whole(tokenizer, data_dir):
    with lzma.open(data_dir / "books" / "fiction.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read(300_000)
    got, windows = streamed(tokenizer, text, 50_000)
    assert got == tokenizer.backend_tokenizer.encode(text).ids
    assert windows >= 4


def test_no_more_is_held_than_windows(tokenizer, monkeypatch):
    encoded = []
    backend = tokenizer.backend_tokenizer

    def encode(text, **options):
        encoded.append(len(text))
        return backend.encode(text, **options)

    watched = SimpleNamespace(
        no_truncation=backend.no_truncation, no_padding=backend.no_padding, encode=encode
    )
    pieces = ("Once upon a time. " * 1000 for _ in range(40))
    count = sum(map(len, stream_tokens(SimpleNamespace(backend_tokenizer=watched), pieces)))
    assert count > 100_000
    assert max(encoded) <= tokens.WINDOW + tokens.OVERLAP + tokens.MARGIN + 18_000
    assert sum(encoded) < 1.2 * 18_000 * 40  # nor much encoded twice


def test_what_begins_a_text_comes_once_or_not_at_all():
    tokenizer = load_tokenizer(resolve())
    ids = tokenizer.encode("a b", add_special_tokens=False)
    assert streamed(tokenizer, "a b")[0] == [tokenizer.bos_token_id, *ids]
    assert streamed(tokenizer, "a b", first=False)[0] == ids
    assert streamed(tokenizer, "", first=False)[0] == []
