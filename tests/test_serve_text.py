"""The text of an answer: whole characters, notes with the text they belong to, known moments."""

import json

import pytest

import serving
import tiny
from mlx_mcsd.loading import load_tokenizer
from mlx_mcsd.server.text import Text
from tiny import TEMPLATE

FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
SAMPLES = [
    "né 你好",
    f"a{FAMILY}b",
    "\U0001f1eb\U0001f1f7 ab",
    "ab 1\ufe0f\u20e3",
    "e\u0301 \U0001f44d\U0001f3fd.",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny.write_model(directory)
    return load_tokenizer(directory)


def stretches(tokenizer, text, stop=()):
    """(text, notes, settled) after each token, and at the end; a token's note is its number."""
    made = Text(tokenizer, stop)
    found = []
    for i, token in enumerate(tokenizer.encode(text, add_special_tokens=False)):
        made.add(token, i)
        found.append((*made.take(), made.settled))
        if made.stopped:
            break
    made.finish()
    return [*found, (*made.take(), made.settled)], made


@pytest.mark.parametrize("text", SAMPLES)
def test_no_stretch_breaks_a_character(tokenizer, text):
    found, _ = stretches(tokenizer, text)
    assert "".join(stretch for stretch, _, _ in found) == text
    for stretch, _, _ in found:
        assert "\ufffd" not in stretch
        assert not stretch.startswith(("\u200d", "\ufe0f", "\u20e3", "\U0001f3fd"))
    whole = [s for s, _, _ in found if FAMILY[0] in s]
    assert all(FAMILY in s for s in whole)


@pytest.mark.parametrize("text", SAMPLES)
def test_notes_come_once_and_in_order_with_the_text_of_their_token(tokenizer, text):
    found, _ = stretches(tokenizer, text)
    tokens = len(tokenizer.encode(text, add_special_tokens=False))
    assert [note for _, notes, _ in found for note in notes] == list(range(tokens))
    sent = ""
    for stretch, notes, _ in found:
        sent += stretch
        assert not notes or sent  # none before its text


@pytest.mark.parametrize("text", SAMPLES)
def test_a_moment_is_known_only_where_tokens_spell_whole_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    found, _ = stretches(tokenizer, text)
    known = 0
    for i, (_, _, settled) in enumerate(found[:-1]):
        if settled is not None:
            assert tokenizer.decode(ids[: i + 1]) == text[:settled]
            known += 1
    assert found[-1][2] == len(text)
    assert 0 < known < len(ids)


def test_a_stop_string_takes_its_tokens_notes_with_it(tokenizer):
    found, made = stretches(tokenizer, "baab ab你b", stop=("b 你", "ab你"))
    assert made.stopped
    assert "".join(stretch for stretch, _, _ in found) == "baab "
    ids = tokenizer.encode("baab ab你b", add_special_tokens=False)
    starts = [len(tokenizer.decode(ids[:i])) for i in range(len(ids))]
    noted = [note for _, notes, _ in found for note in notes]
    assert noted == [i for i, start in enumerate(starts) if start < len("baab ")]
    assert made.settled is None or made.settled <= len("baab ")


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_what_goes_on_with_a_text_keeps_the_space_that_begins_it(tmp_path, template):
    """Behind a prompt or a plain conversation; a templated reply follows the decoder."""
    model = tmp_path / "model"
    serving.write_model(model)
    spec = json.loads((model / "tokenizer.json").read_text())
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    spec["decoder"] = {"type": "Sequence", "decoders": [spec["decoder"], strip]}
    (model / "tokenizer.json").write_text(json.dumps(spec))
    if template:
        (model / "chat_template.jinja").write_text(template)
    with serving.running(model, tmp_path) as (server, app):
        space = app.engine.tokenizer.convert_tokens_to_ids(" a")
        body = {"max_tokens": 2, "n": 2, "temperature": 0, "logit_bias": {str(space): 100}}

        def texts(path, **prompt):
            choices = serving.ask(server, "POST", path, body | prompt)[1]["choices"]
            return [c["text"] if "text" in c else c["message"]["content"] for c in choices]

        assert texts("/v1/completions", prompt="b") == [" a a"] * 2
        assert texts("/v1/completions", prompt=[1]) == ["a a"] * 2  # behind <s> a text begins
        talk = [{"role": "user", "content": "b"}]
        reply = "a a" if template else " a a"
        assert texts("/v1/chat/completions", messages=talk) == [reply] * 2
