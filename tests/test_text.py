"""Text as it is generated: nothing broken, lost or shown twice, and nothing past a stop."""

import json

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import load_tokenizer, resolve
from mlx_mcsd.text import Detokenizer, TextStream, complete

FAMILY, SKIN, FLAG = "👨‍👩‍👧", "👍🏽", "🇩🇪"
TEXTS = [
    "Once upon a time,  two\n\n\tspaces",
    "你好世界",
    "é你🙂a🙂🙂",
    f"{FAMILY}{SKIN} {FLAG}🇫🇷 1️⃣ ❤️‍🔥 🏴󠁧󠁢󠁥󠁮󠁧󠁿!",
    "a\ufffdb ▁ e\u0301",
]


def byte_level():
    """A tokenizer in GPT-2's manner, with pieces that end inside a character."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, "Ġð", "ŁĻ", "Ga"]
    merges = [("Ġ", "ð"), ("Ł", "Ļ")]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace(directory):
    """A tokenizer whose decoder trims the space that begins a text."""
    tiny.write_tokenizer(directory)
    spec = json.loads((directory / "tokenizer.json").read_text())
    spec["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return Tokenizer.from_str(json.dumps(spec))


@pytest.fixture(scope="module", params=["bundled", "sentencepiece", "strip", "byte-level"])
def tokenizer(request, tmp_path_factory):
    """Tokenizers of each kind of decoder."""
    directory = tmp_path_factory.mktemp("tokenizer")
    if request.param == "bundled":
        return load_tokenizer(resolve())
    if request.param == "sentencepiece":
        tiny.write_model(directory)
        return load_tokenizer(directory)
    backend = byte_level() if request.param == "byte-level" else metaspace(directory)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    return TokenizerWrapper(fast, Detokenizer)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def streamed(tokenizer, tokens, **options):
    """The pieces of tokens' text, and the stream at its end."""
    stream = TextStream(tokenizer, **options)
    pieces = []
    for token in tokens:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    return [p for p in [*pieces, stream.finish()] if p], stream


# --- whole characters --------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:6])
def test_pieces_add_up_to_the_text(tokenizer, text):
    if "▁" in text and tokenizer.decode(encode(tokenizer, text)) != text:
        text = text.replace("▁", "")  # in SentencePiece's manner the mark is a space
    pieces, stream = streamed(tokenizer, encode(tokenizer, text))
    assert "".join(pieces) == text
    assert stream.length == stream.shown == len(text)
    assert len(pieces) > 1


@pytest.mark.parametrize("emoji", [FAMILY, SKIN, FLAG, "1️⃣", "❤️‍🔥", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"])
def test_emoji_arrive_whole(tokenizer, emoji):
    pieces, _ = streamed(tokenizer, encode(tokenizer, f"a{emoji}b{emoji}"))
    whole = "".join(pieces)
    ends = {0, 1, 1 + len(emoji), 2 + len(emoji), len(whole)}
    assert whole == f"a{emoji}b{emoji}"
    assert set(np.cumsum([len(p) for p in pieces]).tolist()) <= ends


def test_letters_do_not_wait(tokenizer):
    tokens = encode(tokenizer, "ab 漢b")
    stream = TextStream(tokenizer)
    assert "".join(map(stream.add, tokens)) == "ab 漢b"


def test_a_part_of_a_character_is_never_shown_and_comes_back(tokenizer):
    for text in TEXTS[1:3]:
        tokens = encode(tokenizer, text)
        for cut in range(1, len(tokens)):
            first, stream = streamed(tokenizer, tokens[:cut])
            assert "\ufffd" not in "".join(first)
            assert text.startswith("".join(first))
            rest, _ = streamed(tokenizer, tokens[cut:], tail=stream.tail, after_text=True)
            assert "".join(first + rest) == text


def test_a_space_after_text_is_kept_and_one_before_any_follows_the_decoder(tokenizer):
    tokens = encode(tokenizer, " a b")
    assert "".join(streamed(tokenizer, tokens, after_text=True)[0]) == " a b"
    assert "".join(streamed(tokenizer, tokens)[0]) == tokenizer.decode(tokens)


def test_special_tokens_are_no_text():
    tokenizer = load_tokenizer(resolve())
    tokens = [1, *encode(tokenizer, "你"), 2, *encode(tokenizer, "a"), 3]
    assert streamed(tokenizer, tokens)[0] == ["你", "a"]


def test_bytes_that_are_no_text_do_not_wait_for_ever_and_break_nothing_after():
    tokenizer = load_tokenizer(resolve())
    byte = tokenizer.convert_tokens_to_ids("<0xFF>")
    stream = TextStream(tokenizer)
    shown = [stream.add(byte) for _ in range(100)]
    assert "".join(shown).count("\ufffd") >= 92
    assert "".join(map(stream.add, encode(tokenizer, "ab 你"))).endswith("ab 你")


def test_detokenizer_keeps_mlx_lms_interface():
    tokenizer = load_tokenizer(resolve())
    one, two = tokenizer.detokenizer, tokenizer.detokenizer
    assert isinstance(one, Detokenizer) and one is not two
    tokens = encode(tokenizer, "你好 a")
    for token in tokens:
        one.add_token(token)
    one.finalize()
    assert (one.text, one.tokens, two.text, two.tokens) == ("你好 a", tokens, "", [])
    assert (one.last_segment, one.last_segment) == ("你好 a", "")
    one.reset()
    one.add_token(tokens[-1])
    assert (one.text, one.tokens) == (" a", tokens[-1:])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("ab", 2),
        ("e\u0301", 2),
        ("a1", 1),
        ("a" + FAMILY, 1),
        (FAMILY + "a", 6),
        (FAMILY[:2], 0),
        (FLAG + FLAG[:1], 2),
        ("👩" + "\u200d👩" * 40, 81),  # no emoji is that long: it waits no more
    ],
)
def test_complete(text, count):
    assert complete(text) == count


# --- stop strings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("ab\nUser: c", ["\nUser:"], "ab"),
        ("ab\nUse c", ["\nUser:"], "ab\nUse c"),
        ("ab\nUse", ["\nUser:"], "ab\nUse"),
        ("\nUser:", ["\nUser:"], ""),
        ("a b c d", ["d", "b c"], "a "),
        ("aab", ["ab"], "a"),
        (f"a{FAMILY}b", [f"{FAMILY}b"], "a"),
        (f"a{FAMILY}", ["b"], f"a{FAMILY}"),
        ("\n \na b\nc", ["\n"], "\n \na b"),
        ("\n\n", ["\n"], "\n\n"),
        ("你好世", ["好"], "你"),
    ],
)
def test_stop_strings_end_the_text_and_are_not_shown(tokenizer, text, stop, want):
    pieces, stream = streamed(tokenizer, encode(tokenizer, text), stop=stop)
    assert "".join(pieces) == want
    assert stream.shown == len(want)
    assert stream.stopped == (want != text)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(MCSDError, match="must not be empty"):
        TextStream(load_tokenizer(resolve()), stop=["a", ""])
