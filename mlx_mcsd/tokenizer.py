"""SentencePiece tokenizers: trained to lose nothing, and written for Hugging Face and mlx-lm.

A bare ``tokenizer.model`` loads with different ids unless its class is known, so a
``tokenizer.json`` is built from the model's own specification and its ids are compared on sample
text before use.
"""

import io
import json
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from .errors import MCSDError

SPECIAL = ("bos", "eos", "unk", "pad")

# Newlines, runs of spaces, other scripts, the SentencePiece space mark and byte pieces as text.
SAMPLES = (
    'Once upon a time, there was a little dog named Max.\n"Hello!" he said. It\'s fun.',
    "  two  spaces\n\n\tand a tab \r\n",
    "na\u00efve caf\u00e9 \u2014 \u201cquotes\u201d \u2026 \u4f60\u597d \u2581 <0x41>",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "def f(x):\n    return {'a': x ** 2}  # 12345",
)


def train_sentencepiece(texts, vocab_size):
    """Train a lossless SentencePiece BPE model: byte fallback, newline a piece, spaces unescaped.

    Args:
        texts: an iterable of strings; their order does not matter.
        vocab_size: K, more than the 256 bytes and 5 special pieces.

    Returns:
        The bytes of a ``tokenizer.model`` with <unk> 0, <s> 1, </s> 2, <pad> 3.
    """
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
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
        user_defined_symbols=["\n"],
        max_sentence_length=1 << 20,
        minloglevel=2,
    )
    # The trainer needs escaped spaces to find words; unescaped, a text that holds the mark itself
    # survives too.
    model = sentencepiece_model_pb2.ModelProto.FromString(buffer.getvalue())
    for piece in model.pieces:
        piece.piece = piece.piece.replace("\u2581", " ")
    model.normalizer_spec.escape_whitespaces = False
    return model.SerializeToString()


def from_sentencepiece(proto):
    """Build a fast tokenizer with the ids of a lossless SentencePiece BPE model.

    Args:
        proto: the bytes of a ``tokenizer.model`` trained with byte fallback, the identity
            normaliser, no dummy prefix and unescaped white space.

    Returns:
        A ``tokenizers.Tokenizer`` that puts the model's BOS first.

    Raises:
        MCSDError: if the model is of another kind, or if the ids differ on the samples.
    """
    spec = sentencepiece_model_pb2.ModelProto.FromString(proto)
    normal = spec.normalizer_spec
    lossless = (
        spec.trainer_spec.model_type == spec.trainer_spec.BPE
        and spec.trainer_spec.byte_fallback
        and normal.name == "identity"
        and not (normal.add_dummy_prefix or normal.remove_extra_whitespaces)
        and not normal.escape_whitespaces
    )
    if not lossless:
        raise MCSDError(
            "[tokenizer] expected a SentencePiece BPE model with byte fallback, identity "
            "normalisation and unescaped white space; supply a tokenizer.json for any other."
        )
    ids = {piece.piece: i for i, piece in enumerate(spec.pieces)}
    if (bos := spec.trainer_spec.bos_piece) not in ids:
        raise MCSDError(
            f"[tokenizer] expected a model with a piece {bos} to begin texts but got none."
        )
    words = {p.piece for p in spec.pieces if p.type in (p.NORMAL, p.USER_DEFINED)}
    merges = []
    for piece in spec.pieces:  # in order of score, which is the order of the merges
        if piece.type == piece.NORMAL:
            splits = ((piece.piece[:k], piece.piece[k:]) for k in range(1, len(piece.piece)))
            pairs = [pair for pair in splits if words.issuperset(pair)]
            merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    trainer = spec.trainer_spec
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    control = [p.piece for p in spec.pieces if p.type in (p.CONTROL, p.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in control])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, ids[bos])]
    )
    check_ids(tokenizer, proto, SAMPLES)
    return tokenizer


def check_ids(tokenizer, proto, texts):
    """Compare ids and round trips of a fast tokenizer with its SentencePiece model on texts.

    Raises:
        MCSDError: naming the first text on which they differ.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if ids != processor.encode(text) or tokenizer.decode(ids) != text:
            raise MCSDError(
                f"[tokenizer] tokenizer.json and tokenizer.model disagree on {text[:60]!r}."
            )


def save_tokenizer(directory, proto, context):
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json into a directory.

    Args:
        directory: where to write; it must exist.
        proto: the bytes of the SentencePiece model.
        context: the training context in tokens, for ``model_max_length``.
    """
    directory = Path(directory)
    spec = sentencepiece_model_pb2.ModelProto.FromString(proto).trainer_spec
    tokenizer = from_sentencepiece(proto)
    special = {f"{kind}_token": getattr(spec, f"{kind}_piece") for kind in SPECIAL}
    config = {
        "tokenizer_class": "TokenizersBackend",
        # A model may do without: SentencePiece names a piece for padding but makes none by default.
        **{
            name: piece
            for name, piece in special.items()
            if tokenizer.token_to_id(piece) is not None
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (directory / "tokenizer.model").write_bytes(proto)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
