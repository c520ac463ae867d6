"""Tiny models on disk, complete with a tokenizer, for the tests of everything around the model."""

import io
import json

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, normalizers, processors

import oracle

SPECIAL = ["<unk>", "<s>", "</s>"]
PIECES = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "▁b", "\n"]
"""In SentencePiece's manner: every byte is a piece, so any text is spelled and got back."""

TEMPLATE = (
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""A chat template of the usual kind."""

VOCAB_SIZE = 272
"""Padded, as embeddings often are: the tokenizer knows fewer ids."""


def write_tokenizer(directory, template="<s> $A", **config):
    """Write `tokenizer.json` and `tokenizer_config.json`; by default <s> begins every encoding."""
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    merges = [("▁", "a"), ("▁", "b")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(template, None, [("<s>", 1)])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>"} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(directory, seed=0, **config):
    """Write a random checkpoint in the layout, and its tokenizer; returns (config, tensors)."""
    config, tensors = oracle.random_checkpoint(seed, **{"vocab_size": VOCAB_SIZE} | config)
    oracle.write_checkpoint(directory, config, tensors)
    write_tokenizer(directory)
    return config, tensors


SENTENCES = [
    *['Once upon a time a little dog named Max said: "Yes!" ﬁne ½ é, and ran to the park.'] * 3,
    "the cat sat on the mat ...   two  spaces\tand tabs",
    "你好，世界。今天天气很好 你好 def f(x): return x ** 2  # 123",
]


def train_spm(edit=None, **options):
    """The bytes of a small SentencePiece model; `edit` changes its specification."""
    if "normalization_rule_tsv" not in options:
        options = {"normalization_rule_name": "nmt_nfkc"} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=(buffer := io.BytesIO()),
        minloglevel=2,
        hard_vocab_limit=False,
        character_coverage=1.0,
        **{"vocab_size": 380 if options.get("byte_fallback") else 110} | options,
    )
    spec = sentencepiece_model_pb2.ModelProto.FromString(buffer.getvalue())
    if edit:
        edit(spec)
    return spec.SerializeToString()
