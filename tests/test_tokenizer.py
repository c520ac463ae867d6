"""SentencePiece models written as Hugging Face tokenizers: same ids, nothing lost."""

import json
import random
import subprocess
import sys

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.tokenizer import (
    check_ids,
    from_sentencepiece,
    save_tokenizer,
    train_sentencepiece,
)

TEXTS = [
    "",
    " ",
    "\n",
    "Once upon a time, a dog named Max ran.\n\n  Then he slept.",
    "   three spaces, a tab\tand \r\n",
    "The mark of a space: \u2581, a byte piece: <0x41>, and \x00 too.",
    "na\u00efve caf\u00e9 \u4f60\u597d \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600\ufe0f",
]


STORY = """Once upon a time there was a little dog named Max. Max liked to run in the park.
One day, Max saw a big red ball. "Can I play with the ball?" he asked. The girl said, "Yes!"
"""


@pytest.fixture(scope="module")
def proto():
    return train_sentencepiece([STORY] * 3, 330)


@pytest.fixture(scope="module")
def escaped_proto(proto):
    spec = sentencepiece_model_pb2.ModelProto.FromString(proto)
    spec.normalizer_spec.escape_whitespaces = True
    return spec.SerializeToString()


def random_text(seed):
    rng = random.Random(seed)
    pools = ["abc de", " \n\t", "\u2581<>0x41/", "\u00e9\u4f60\U0001f600\ufffd\u0000"]
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(80)))


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_known_texts_survive(proto, text):
    check_ids(from_sentencepiece(proto), proto, [text])


def test_random_texts_survive_with_the_same_ids(proto):
    check_ids(from_sentencepiece(proto), proto, [random_text(seed) for seed in range(500)])


def test_real_stories_have_the_same_ids(proto, data_dir):
    stories = (data_dir / "tinystories" / "train_head_2MiB.txt").read_text()[:200_000]
    check_ids(from_sentencepiece(proto), proto, stories.split("<|endoftext|>"))


def test_a_difference_is_named(proto):
    # A tokenizer without merges spells every word letter by letter.
    tokenizer = from_sentencepiece(proto)
    spec = json.loads(tokenizer.to_str())
    spec["model"]["merges"] = []
    with pytest.raises(MCSDError, match="disagree on 'Once upon"):
        check_ids(Tokenizer.from_str(json.dumps(spec)), proto, ["Once upon a time"])


def test_beginning_of_text_comes_first(proto):
    bos = sentencepiece.SentencePieceProcessor(model_proto=proto).bos_id()
    tokenizer = from_sentencepiece(proto)
    assert tokenizer.encode("Once").ids == [
        bos,
        *tokenizer.encode("Once", add_special_tokens=False).ids,
    ]


def test_escaped_spaces(escaped_proto):
    """The mark of a space in a text is not told from a space then; ids are equal all the same."""
    check_ids(from_sentencepiece(escaped_proto), escaped_proto, TEXTS)


def rebuild(proto, drop):
    """The same model without one of its special pieces."""
    spec = sentencepiece_model_pb2.ModelProto.FromString(proto)
    kept = [piece for piece in spec.pieces if piece.piece != drop]
    del spec.pieces[:]
    spec.pieces.extend(kept)
    return spec.SerializeToString()


def test_a_model_without_a_beginning(proto):
    """No piece begins texts, so none is put there."""
    without = rebuild(proto, "<s>")
    tokenizer = from_sentencepiece(without)
    assert tokenizer.encode("Once").ids == tokenizer.encode("Once", add_special_tokens=False).ids


def test_a_model_without_padding_names_none(proto, tmp_path):
    save_tokenizer(tmp_path, rebuild(proto, "<pad>"), context=512)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "pad_token" not in config
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")


def test_transformers_and_mlx_lm_read_it_alike(proto, tmp_path):
    save_tokenizer(tmp_path, proto, context=512)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    script = """
import json, sys
from transformers import AutoTokenizer
from mlx_lm.tokenizer_utils import load
from pathlib import Path
here = Path(sys.argv[1])
hf, ours = AutoTokenizer.from_pretrained(here), load(here)
texts = json.loads((here / "texts.json").read_text())
streams = []
for text in texts:
    detokenizer = ours.detokenizer
    for token in ours.encode(text, add_special_tokens=False):
        detokenizer.add_token(token)
    detokenizer.finalize()
    streams.append(detokenizer.text)
print(json.dumps({
    "ids": [hf.encode(t) for t in texts],
    "decoded": [hf.decode(hf.encode(t), skip_special_tokens=True) for t in texts],
    "streamed": streams,
}))
"""
    out = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True
    )
    read = json.loads(out.stdout.splitlines()[-1])
    assert read["ids"] == [[processor.bos_id(), *processor.encode(text)] for text in TEXTS]
    assert read["decoded"] == TEXTS
    assert read["streamed"] == TEXTS
