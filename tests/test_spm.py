"""SentencePiece models of every kind of setting, and the tokenizers built from them."""

import json
import random

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import normalizers

import tiny
from mlx_mcsd import spm
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.tokenizer import check_ids, from_sentencepiece, save_tokenizer

POOLS = [
    "abc DE the dog",
    "Once upon a time  ",
    "éﬁf́ かがｶﾞ①½ㅋㅠ각",
    "你好世界",
    "👨‍👩‍👧🏽❤️☺🇩🇪",
    "\r\n\t\x01\u200b\x00 \u3000",
    " ▁",
    "<0x41><|user|>①\n<a b>",
]


def unescaped(spec):
    spec.normalizer_spec.escape_whitespaces = False
    for piece in spec.pieces:
        piece.piece = piece.piece.replace("▁", " ")


def random_texts(seed, count):
    """Snippets of unlike scripts side by side; marks of spaces only inside, where they decode."""
    rng = random.Random(seed)

    def snippet():
        pool = rng.choice(POOLS)
        start = rng.randrange(len(pool))
        return pool[start : start + rng.randrange(1, 6)]

    return ["x" + "".join(snippet() for _ in range(rng.randrange(14))) for _ in range(count)]


LOSSLESS = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
SYMBOLS = {"user_defined_symbols": ["<|user|>", "①", "\n", "<a b>", "dog"]}
LLAMA = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "byte_fallback": True,
    "remove_extra_whitespaces": False,
}
SETTINGS = {
    "the trainer's defaults": {},
    "BPE": {"model_type": "bpe"},
    "characters": {"model_type": "char"},
    "as Llama": LLAMA,
    "as Llama, unigram": LLAMA | {"model_type": "unigram"},
    "NFKC": {"normalization_rule_name": "nfkc", "model_type": "bpe"},
    "case folded": {"normalization_rule_name": "nmt_nfkc_cf"},
    "identity": {"normalization_rule_name": "identity"},
    "bytes": {"byte_fallback": True},
    "no prefix": {"add_dummy_prefix": False},
    "spaces kept": {"remove_extra_whitespaces": False, "model_type": "bpe"},
    "both": {"byte_fallback": True, **LOSSLESS},
    "suffix": {"treat_whitespace_as_suffix": True},
    "suffix, spaces kept": {"treat_whitespace_as_suffix": True, "remove_extra_whitespaces": False},
    "symbols": SYMBOLS,
    "symbols, BPE": {"model_type": "bpe", "byte_fallback": True, **SYMBOLS},
    "symbols, as Llama": LLAMA | SYMBOLS,
    "symbols, lossless": {"model_type": "bpe", **SYMBOLS, **LOSSLESS},
    "digits split": {"split_digits": True, "model_type": "bpe"},
    "pieces across words": {"split_by_whitespace": False, "split_by_unicode_script": False},
    "other special pieces": {
        "bos_id": -1,
        "pad_id": 0,
        "unk_id": 2,
        "eos_id": 1,
        "eos_piece": "<end>",
    },
    "no normaliser, unescaped": {
        "model_type": "char",
        "normalization_rule_name": "identity",
        "edit": unescaped,
        **LOSSLESS,
    },
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_same_ids(options):
    """Ids and decoded texts equal those of SentencePiece on texts of every kind."""
    proto = tiny.train_spm(**options)
    check_ids(from_sentencepiece(proto), proto, random_texts(0, 300))


def test_character_map():
    """Every character and a sample of all longer rules come out as SentencePiece rewrites them."""
    proto = tiny.train_spm(**LOSSLESS)
    spec = sentencepiece_model_pb2.ModelProto.FromString(proto)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    normalizer = normalizers.Sequence(spm._normalizers(spec, []))
    rules = spm._rules(spec.normalizer_spec.precompiled_charsmap)
    longer = sorted(rule for rule in rules if len(rule) > 1)
    assert len(longer) > 200_000
    sources = [*(rule for rule in rules if len(rule) == 1), *random.Random(0).sample(longer, 3000)]
    for source in sources:
        for text in (source, f"a {source}b"):
            if text != "a \u0344b":  # two accents, which NFC composes with the letter before
                assert normalizer.normalize_str(text) == processor.normalize(text), ascii(text)


def test_character_map_of_ones_own(tmp_path):
    """Rules for several characters, overlapping, and to what other rules rewrite."""
    rules = {"``": '"', "cat": "dog", "ca": "k", "d": "t", "q": "", "é": "e"}
    lines = [
        " ".join(f"{ord(c):X}" for c in source) + "\t" + " ".join(f"{ord(c):X}" for c in target)
        for source, target in rules.items()
    ]
    (tmp_path / "rules.tsv").write_text("\n".join(lines) + "\n")
    proto = tiny.train_spm(normalization_rule_tsv=str(tmp_path / "rules.tsv"))
    texts = ["``a cat``", "cacatcat d", "qq cqat", "dé e\u0301"]
    check_ids(from_sentencepiece(proto), proto, [*texts, *random_texts(1, 200)])
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert processor.normalize("``a cat d``") == '▁"a▁dog▁t"', "the rules are in force"


def test_special_pieces_in_a_text():
    """A control symbol is its id; what lies between is encoded as SentencePiece would alone."""
    proto = tiny.train_spm(**LLAMA)
    tokenizer = from_sentencepiece(proto)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    parts = [processor.encode(text) for text in ("the dog", " ran\n")]
    ids = tokenizer.encode("the dog</s> ran\n", add_special_tokens=False).ids
    assert ids == [*parts[0], processor.eos_id(), *parts[1]]


@pytest.mark.parametrize(
    "settings, begin, end",
    [
        (None, [1], []),
        ({}, [1], []),
        ({"add_bos_token": None}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"add_bos_token": False, "add_eos_token": True}, [], [2]),
    ],
    ids=str,
)
def test_begin_and_end(tmp_path, settings, begin, end):
    """What the source's tokenizer_config.json says of BOS and EOS is in the tokenizer."""
    from tokenizers import Tokenizer

    proto = tiny.train_spm(**LLAMA)
    save_tokenizer(tmp_path, proto, 512, settings)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain = sentencepiece.SentencePieceProcessor(model_proto=proto).encode("the dog")
    assert tokenizer.encode("the dog").ids == [*begin, *plain, *end]
    pair = tokenizer.encode("the dog", "the dog").ids
    assert pair == [*begin, *plain, *end] * 2


def test_settings_are_kept(tmp_path):
    """Special tokens and templates stay; what names a class of Python does not."""
    settings = {
        "eos_token": "<|user|>",
        "chat_template": "{{ messages }}",
        "tokenizer_class": "EvilTokenizer",
        "auto_map": {"AutoTokenizer": ["evil.T", None]},
    }
    save_tokenizer(tmp_path, tiny.train_spm(**SYMBOLS), 512, settings)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|user|>" and config["chat_template"] == "{{ messages }}"
    assert config["tokenizer_class"] == "TokenizersBackend" and "auto_map" not in config
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    assert tokenizer.eos_token_id == processor.piece_to_id("<|user|>")
    assert tokenizer("the dog ran").input_ids == [1, *processor.encode("the dog ran")]


def unused(spec):
    spec.pieces[-1].type = spec.pieces[-1].UNUSED


def damaged_map(spec):
    spec.normalizer_spec.precompiled_charsmap = spec.normalizer_spec.precompiled_charsmap[:-60_000]


def endless(spec):
    spec.pieces[-1].piece = "x" * 3000


def no_text(proto):
    """A piece whose letters are no UTF-8, which SentencePiece does not mind."""
    return proto.replace(b"QQQQ", b"Q\xff\xffQ")


def marked(spec):
    spec.pieces[-1].piece = "QQQQ"


@pytest.mark.parametrize(
    "proto, complaint",
    [
        (lambda: b"", "must be a SentencePiece model"),
        (lambda: b"junk", "must be a SentencePiece model"),
        (lambda: tiny.train_spm(model_type="word"), "of kind BPE, unigram or characters"),
        (lambda: tiny.train_spm(unused), "marked unused"),
        (
            lambda: tiny.train_spm(damaged_map),
            "normaliser|must be a SentencePiece",
        ),
        (lambda: no_text(tiny.train_spm(marked)), "a piece is no text"),
        (lambda: tiny.train_spm(endless), "a piece has 3000 characters"),
    ],
    ids=["empty", "junk", "words", "unused", "damaged map", "no text", "endless"],
)
def test_refused(proto, complaint):
    with pytest.raises(MCSDError, match=complaint):
        from_sentencepiece(proto())


def test_first_difference_is_shown():
    """Spaces as a symbol, kept from shrinking: what cannot be had is refused, with the pieces."""
    proto = tiny.train_spm(user_defined_symbols=["  "])
    with pytest.raises(
        MCSDError, match=r"disagree on .* at token \d+ they have \[.*\] and \['"
    ) as e:
        from_sentencepiece(proto)
    assert "\n" not in str(e.value)
