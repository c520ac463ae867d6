"""SentencePiece tokenizers: trained to lose nothing, and written for Hugging Face and mlx-lm.

A bare ``tokenizer.model`` loads with different ids unless its class is known, so a
``tokenizer.json`` is built from the model's own specification (`spm.py`) and its ids are compared
on sample text before use.
"""

import io
import json
import re
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from . import spm
from .errors import MCSDError

SPECIAL = ("bos", "eos", "unk", "pad")
NOT_KEPT = ("auto_map", "legacy", "sp_model_kwargs", "use_fast", "backend", "from_slow")

# Newlines, runs of spaces, code, other scripts, emoji with joiners, SentencePiece's mark of a space
# and its byte pieces as text.
SAMPLES = (
    'Once upon a time, there was a little dog named Max.\n"Hello!" he said. It\'s fun.',
    "  two  spaces\n\n\tand a tab \r\n",
    "na\u00efve cafe\u0301 \u2014 \u201cquotes\u201d \u2026 \u2581 <0x41>",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u304b\u3099 \uff76\uff9e\u3000\uff21 \u2460",
    "\ufb01 \u00bd \ud55c\uad6d\uc5b4 \u314b\u3160 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f44d\U0001f3fd",
    "def f(x):\n    return {'a': x ** 2}  # 12345\n\n\tif x != 0 and y <= 1e-5:\n\t\tpass;",
    "",
    " ",
    "\n",
)


def train_sentencepiece(texts, vocab_size, control=(), whole=()):
    """Train a lossless SentencePiece BPE model: byte fallback, newline a piece, spaces unescaped.

    Args:
        texts: an iterable of strings; their order does not matter.
        vocab_size: K, more than the 256 bytes and 5 special pieces.
        control: further special tokens, such as those of a chat template.
        whole: strings that are one piece wherever they stand, spaces in them included.

    Returns:
        The bytes of a ``tokenizer.model`` with <unk> 0, <s> 1, </s> 2, <pad> 3, then ``control``.

    Raises:
        MCSDError: if the texts are too few for so many pieces, or the pieces for these characters.
    """
    buffer = io.BytesIO()
    options = dict(
        sentence_iterator=iter(texts),
        model_writer=buffer,
        vocab_size=vocab_size,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        byte_fallback=True,
        character_coverage=0.9999,
        pad_id=3,
        user_defined_symbols=["\n", *(string.replace(" ", "\u2581") for string in whole)],
        control_symbols=list(control),
        max_sentence_length=1 << 20,
        minloglevel=2,
    )
    try:
        sentencepiece.SentencePieceTrainer.train(**options)
    except RuntimeError as error:
        raise MCSDError(f"[tokenizer] {_bound(str(error), vocab_size)}") from None
    # The trainer needs escaped spaces to find words; unescaped, a text that holds the mark itself
    # survives too.
    model = sentencepiece_model_pb2.ModelProto.FromString(buffer.getvalue())
    for piece in model.pieces:
        piece.piece = piece.piece.replace("\u2581", " ")
    model.normalizer_spec.escape_whitespaces = False
    return model.SerializeToString()


def _bound(message, vocab_size):
    """What SentencePiece's message says about the vocabulary, in one line."""
    message = " ".join(message.split())
    for word, pattern in (("most", r"too high.*<= (\d+)"), ("least", r"\d+ vs (\d+)")):
        if bound := re.search(pattern, message):
            return f"vocab_size must be at {word} {bound[1]} for these texts but is {vocab_size}."
    return f"SentencePiece refuses the texts: {message[-200:]}"


def from_sentencepiece(proto, *, bos=True, eos=False):
    """Build a fast tokenizer with the ids of a SentencePiece model.

    Args:
        proto: the bytes of a ``tokenizer.model``: BPE, unigram or characters, of any settings.
        bos: put its BOS, if it has one, before every text.
        eos: put its EOS, if it has one, after every text.

    Returns:
        A ``tokenizers.Tokenizer``. A text's control symbols (``</s>``) get their ids, which
        SentencePiece itself would spell; what lies between is encoded as SentencePiece would alone.

    Raises:
        MCSDError: if the model is of another kind, damaged, or if the ids differ on the samples.
    """
    spec = _specification(proto)
    tokenizer = spm.build(spec, bos=bos, eos=eos)
    check_ids(tokenizer, proto, [*SAMPLES, *_pieces(spec)])
    return tokenizer


def _specification(proto):
    """The parsed model, if SentencePiece itself takes it."""
    try:
        sentencepiece.SentencePieceProcessor(model_proto=proto)
        spec = sentencepiece_model_pb2.ModelProto.FromString(proto)
        spm.check(spec)
        return spec
    except (RuntimeError, DecodeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MCSDError(
            f"[tokenizer] tokenizer.model must be a SentencePiece model but is none: {reason}"
        ) from None


def _pieces(spec):
    """Texts made of the model's own words, eight at a time; its symbols also between others."""
    normal = [p.piece.replace("\u2581", " ") for p in spec.pieces if p.type == p.NORMAL]
    symbols = [p.piece for p in spec.pieces if p.type == p.USER_DEFINED]
    control = tuple(p.piece for p in spec.pieces if p.type in (p.CONTROL, p.UNKNOWN))
    texts = ["".join(normal[i : i + 8]) for i in range(0, min(len(normal), 4000), 8)]
    texts += [f"a {s}b{s} {s}" for s in symbols[:100]]
    return [text for text in texts if not any(c in text for c in control)]


def check_ids(tokenizer, proto, texts):
    """Compare a fast tokenizer with its SentencePiece model on texts: ids, and ids decoded.

    Raises:
        MCSDError: showing the first text on which they differ, and the first pieces that do.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    for text in texts:
        ids, wanted = tokenizer.encode(text, add_special_tokens=False).ids, processor.encode(text)
        if ids != wanted:
            first = next(
                (i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b),
                min(len(ids), len(wanted)),
            )
            a, b = tokenizer.id_to_token, processor.id_to_piece
            raise MCSDError(
                f"[tokenizer] tokenizer.json and tokenizer.model disagree on {_short(text)}: at "
                f"token {first} they have {[a(i) for i in ids[first : first + 3]]} and "
                f"{[b(i) for i in wanted[first : first + 3]]}; supply a tokenizer.json."
            )
        # SentencePiece shows an unknown piece as a question mark.
        if processor.unk_id() not in ids and tokenizer.decode(ids) != processor.decode(ids):
            raise MCSDError(
                f"[tokenizer] tokenizer.json and tokenizer.model disagree on {_short(text)}: they "
                f"decode it to {_short(tokenizer.decode(ids))} and "
                f"{_short(processor.decode(ids))}; supply a tokenizer.json."
            )


def _short(text):
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def save_tokenizer(directory, proto, context, settings=None):
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json into a directory.

    Args:
        directory: where to write; it must exist.
        proto: the bytes of the SentencePiece model.
        context: the training context in tokens, for ``model_max_length``.
        settings: an existing ``tokenizer_config.json``, whose special tokens, chat template and
            ``add_bos_token`` and ``add_eos_token`` are kept; None begins texts with BOS.

    Raises:
        MCSDError: as `from_sentencepiece`.
    """
    directory = Path(directory)
    settings = settings or {}
    flags = {f"add_{kind}_token": settings.get(f"add_{kind}_token") for kind in ("bos", "eos")}
    spec = _specification(proto).trainer_spec
    tokenizer = from_sentencepiece(
        proto,
        bos=flags["add_bos_token"] is not False,  # null and absent are Hugging Face's default
        eos=flags["add_eos_token"] is True,
    )
    special = {f"{kind}_token": getattr(spec, f"{kind}_piece") for kind in SPECIAL}
    config = {
        # A model may do without: SentencePiece names a piece for padding but makes none by default.
        **{
            name: piece
            for name, piece in special.items()
            if tokenizer.token_to_id(piece) is not None
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        # What names or configures a class of Python is not taken over; the ids are in the JSON.
        **{k: v for k, v in settings.items() if k not in NOT_KEPT and k not in flags},
        "tokenizer_class": "TokenizersBackend",
    }
    (directory / "tokenizer.model").write_bytes(proto)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
