"""The model in the package: small, complete, lossless, as good as its card says, and no more."""

import hashlib
import math
import re

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_mcsd import load
from mlx_mcsd.generate import main
from mlx_mcsd.loading import resolve

TEXTS = [
    "Once upon a time, there was a dog.\n\n  He slept.  \n",
    "\t\r\n \u2581 <0x41> na\u00efve \u4f60\u597d \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "def f(x):\n    return x  # 100%",
]


@pytest.fixture(scope="module")
def bundled():
    return load()


@pytest.fixture(scope="module")
def card():
    return (resolve() / "README.md").read_text()


def test_size(bundled, card):
    model, _ = bundled
    parameters = sum(p.size for _, p in tree_flatten(model.parameters()))
    assert 3e6 <= parameters <= 7.5e6
    assert f"{parameters / 1e6:.2f} million" in card
    assert sum(f.stat().st_size for f in resolve().iterdir()) <= 15e6


def test_float16_on_disk_and_float32_on_the_cpu(bundled):
    stored = mx.load(str(resolve() / "model.safetensors"))
    assert {a.dtype for a in stored.values()} == {mx.float16}
    if mx.default_device() == mx.cpu:
        assert {p.dtype for _, p in tree_flatten(bundled[0].parameters())} == {mx.float32}


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_tokenizer_loses_nothing(bundled, text):
    _, tokenizer = bundled
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_story_streams_and_ends_by_itself(capsys):
    main(["--seed", "3"])
    out = capsys.readouterr().out
    story = out.split("=" * 10)[1].strip()
    assert story.startswith("Once upon a time")
    words = re.findall(r"[a-z']+", story.lower())
    assert len(words) > 40
    assert len(set(words)) > len(words) / 5
    assert "State: " in out


@pytest.mark.parametrize("dialog", [1, 2])
def test_a_conversation_is_what_it_was_taught(bundled, dialog):
    """Control tokens around the request; a reply ends like a story, so that another can follow."""
    _, tokenizer = bundled
    turns = [("user", "Tell me a story."), ("assistant", "A dog ran."), ("user", "Another one.")]
    messages = [{"role": r, "content": t} for r, t in turns[: 2 * dialog - 1]]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    assert (ids[0], ids[1], ids[-1]) == (tokenizer.bos_token_id, user, assistant)
    assert ids.count(tokenizer.eos_token_id) == ids.count(assistant) - 1 == dialog - 1
    assert tokenizer.decode(ids[2:-1], skip_special_tokens=True).startswith("Tell me a story.")


def test_the_one_who_was_asked_for_is_in_the_story(card, root, monkeypatch):
    """Of a hundred, as the card counts them; of twenty others, asked here."""
    monkeypatch.syspath_prepend(str(root / "examples"))
    from stories_replies import measure

    named, looping, ended = map(
        int, re.search(r"of 100 fresh ones, (\d+) .*?, (\d+) loop .*?, (\d+) end", card).groups()
    )
    assert named >= 90 and looping == 0 and ended >= 95
    counts, replies = measure(resolve(), 20, seed=3)
    told = [r["reply"] for r in replies]
    assert counts["named"] >= 15, told  # chance: some of five hundred names
    assert counts["loops"] <= 1 and counts["ended"] >= 17, told


def test_the_card_names_the_data_it_was_trained_on(card, data_dir):
    rows = re.findall(r"^\| (\S+) \| `([0-9a-f]{64})` \|", card, re.MULTILINE)
    assert len(rows) == 4
    for name, digest in rows:
        (path,) = data_dir.rglob(name)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


def test_bits_per_character_on_stories_it_never_saw(bundled, card, data_dir, root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "examples"))
    from stories_text import load_stories

    model, tokenizer = bundled
    cased, lower = ("train_head_2MiB.txt", "train_lower_rest.txt")
    data = data_dir / "tinystories"
    _, unseen = load_stories([data / cased], [data / lower])
    stories = unseen[1:24:2]  # of the 57 that calibrated nothing, minutes without OpenBLAS
    nats = 0.0
    for story in stories:
        ids = mx.array([*tokenizer.encode(story), tokenizer.eos_token_id])
        logits = model(ids[None, :-1])[0]
        nats += nn.losses.cross_entropy(logits, ids[1:], reduction="sum").item()
    bits = nats / math.log(2) / sum(map(len, stories))
    claimed = float(re.search(r"\*\*([\d.]+)\*\* in float16", card)[1])
    assert claimed <= 0.9
    assert bits == pytest.approx(claimed, abs=0.06)  # twelve stories stand for the slice
