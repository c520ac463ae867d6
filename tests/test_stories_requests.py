"""Requests made of stories fit them, and the streams hold them as the chat template writes them."""

import argparse
import random
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

from mlx_mcsd.tokenizer import save_tokenizer, train_sentencepiece

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

STORIES = [
    "Once upon a time, there was a little girl named Lily. Lily had a red kite. The kite flew over "
    "a hill. Lily's friend Ben ran after the kite. Ben was fast. Lily hugged Ben.",
    'One day, a big bear called Max found a drum. Max hit the drum. "Stop!" said a bird. The bird '
    "was angry, so Max gave the drum to the bird.",
    "It rained all day. An old man sat in his boat. He had an umbrella. The umbrella was big and "
    "the boat was small. Then the sun came out.",
    "Tom and Anna went to the lake. Tom saw a duck. Anna saw the duck, too. Tom laughed.",
]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import stories_requests

    return stories_requests


@pytest.fixture
def requests(module, monkeypatch):
    requests = module.Requests(STORIES)
    # In four stories every word is frequent, and all of them are short.
    monkeypatch.setattr(requests, "stories", 1000)
    monkeypatch.setattr(module, "SHORTEST", 50)
    return requests


def test_a_request_asks_for_what_the_story_has(module, requests):
    asked = {story: set() for story in STORIES}
    for seed in range(400):
        rng = random.Random(seed)
        story = STORIES[seed % len(STORIES)]
        text = requests.request(story, rng)
        asked[story].add(text)
        names = set(module.NAME.findall(text))
        assert all(story.count(name) >= 2 or name in story.split(".")[0] for name in names), text
        assert "{" not in text and not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
        if quoted := re.search(r'"(.+)"', text):
            assert story.startswith(quoted[1])
    everything = ["\n".join(texts) for texts in asked.values()]
    assert "a little girl named Lily" in everything[0] and "a kite" in everything[0]
    assert "Lily and Ben" in everything[0]
    assert "a bear named Max" in everything[1] and "a drum" in everything[1]
    assert "an umbrella" in everything[2] and "named" not in everything[2]
    assert "Tom and Anna" in everything[3] and "a duck" in everything[3]
    # Somebody may just begin.
    assert all(
        story.split(". ")[0] in texts for story, texts in zip(STORIES, everything, strict=True)
    )
    assert any(STORIES[0].startswith(text) and "." not in text for text in asked[STORIES[0]])
    # What is in every story nobody asks for.
    assert "a man" not in everything[2] and "a day" not in everything[2]


def test_names_are_exchanged_all_through_a_story(module, requests):
    found = set()
    for seed in range(300):
        story = requests.rename(STORIES[0], random.Random(seed))
        girl, boy = re.search(r"named (\w+)\.", story)[1], re.search(r"friend (\w+)", story)[1]
        assert girl in module.GIRLS and boy in module.BOYS
        assert re.sub(rf"\b{boy}\b", "Ben", re.sub(rf"\b{girl}\b", "Lily", story)) == STORIES[0]
        found |= {girl, boy}
    assert len(found) > 250  # all alike
    both = requests.rename("Lily met Anna. Anna met Lily.", random.Random(0))
    first, second = re.match(r"(\w+) met (\w+)\.", both).groups()
    assert first != second and both == f"{first} met {second}. {second} met {first}."
    many = " met ".join(module.GIRLS)
    names = requests.rename(many, random.Random(0)).split(" met ")
    assert sorted(names) == sorted(module.GIRLS) and names != module.GIRLS


def test_a_name_is_one_token(module):
    proto = train_sentencepiece(STORIES, 1500, (module.USER, module.ASSISTANT), module.NAME_PIECES)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    pieces = processor.encode("Max met Tommy.\nOlivia ran.", out_type=str)
    assert [p for p in pieces if p.strip() in ("Max", "Tommy", "Olivia")] == [
        *("Max", " Tommy", "Olivia")
    ]


def test_an_animal_becomes_another_one_everywhere(module):
    found = {module.Requests.disguise(STORIES[1], random.Random(seed)) for seed in range(200)}
    assert STORIES[1] in found and len(found) > 10
    for story in found - {STORIES[1]}:
        assert "bear" not in story and "called Max" in story
    assert {module.Requests.disguise(STORIES[2], random.Random(s)) for s in range(99)} == {
        STORIES[2]
    }


def deal(module, requests, stories, **shares):
    shares = {"plain": 0.0, "rename": 0.0, "rename_asked": 0.0} | shares
    return module.conversations(stories, requests, random.Random(0), **shares)


def test_every_story_is_told_once_a_pass(module, requests):
    half = {"plain": 0.5, "rename_asked": 0.75}
    documents = deal(module, requests, STORIES * 50, **half)
    plain = [d for d in documents if isinstance(d, str)]
    pairs = [p for d in documents if not isinstance(d, str) for p in d if p not in module.TALK]
    assert len(plain) + len(pairs) == 200 and 70 < len(plain) < 130
    assert set(plain) == set(STORIES)
    assert max(len(d) for d in documents if not isinstance(d, str)) >= 2
    assert deal(module, requests, ["A dog ran."] * 9) == ["A dog ran."] * 9
    assert documents == deal(module, requests, STORIES * 50, **half)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_as_many_asked_for_stories_are_renamed_as_wished(module, requests, share):
    story = STORIES[3]
    documents = deal(module, requests, [story] * 400, rename=1 - share, rename_asked=share)
    told = [reply for document in documents for _, reply in document]
    told = [reply for reply in told if "lake" in reply]
    assert len(told) == 400
    renamed = sum(reply != story for reply in told)
    assert renamed == 400 * share if share != 0.5 else 160 < renamed < 240


def test_a_drill_names_whom_it_was_asked_about(module, requests):
    rng = random.Random(0)
    drills = [requests.drill(rng) for _ in range(300)]
    asked = [drill[0] for drill in drills if not isinstance(drill, str)]
    assert 180 < len(asked) < 240
    two = 0
    for request, text in asked:
        names = set(module.NAME.findall(request))
        assert names and names <= set(module.NAME.findall(text)) and "{" not in request + text
        assert len(module.NAME.findall(text)) >= 5
        two += len(names) == 2
    assert 50 < two < 120
    # Others come between, of the stories, and name nobody.
    between = "It rained all day."
    assert between in requests.nameless and not module.NAME.search(" ".join(requests.nameless))
    assert 50 < sum(between in text for _, text in asked) < 150
    assert not any(between in str(requests.drill(rng, far=0.0)) for _ in range(300))


@pytest.fixture
def streams(module, requests, tmp_path):
    from stories_streams import Streams

    proto = train_sentencepiece(STORIES, 330, (module.USER, module.ASSISTANT))
    save_tokenizer(tmp_path, proto, 64, {"chat_template": module.CHAT_TEMPLATE})
    args = argparse.Namespace(
        **{"seed": 0, "batch": 2, "length": 8, "plain": 0.5, "rename": 1.0, "rename_asked": 0.75},
        **{"book_share": 0.5, "books_flat": 0.2, "books_until": 0.8},
        **{"steps": 10_000, "drills": [0, 0], "drill_share": [0.0, 0.0]},
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    books = [["A book."] * 3, ["Another one, which is longer."] * 5]
    return Streams(processor, STORIES * 4, books, requests, args), tmp_path


def test_conversations_are_what_the_chat_template_writes(streams):
    streams, path = streams
    tokenizer = AutoTokenizer.from_pretrained(path)
    pairs = [("Tell me a story.", STORIES[0]), ("Another one, please.", STORIES[1])]
    messages = [{"role": "system", "content": "Be kind."}]
    for request, reply in pairs:
        messages += [{"role": "user", "content": request}]
        messages += [{"role": "assistant", "content": f" {reply}\n"}]
    encoded = streams.encode(pairs)
    assert tokenizer.apply_chat_template(messages)["input_ids"] == encoded
    assert streams.encode(STORIES[0]) == [*tokenizer(STORIES[0])["input_ids"], 2]
    # A reply is asked for with exactly what stood before one in training.
    asked = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True)["input_ids"]
    assert encoded[: len(asked)] == asked and encoded[len(asked) - 1] == 5


def test_only_what_the_assistant_says_is_learned(streams):
    streams, _ = streams
    tokens, ignored, fresh = streams.next(0.0)
    assert fresh and tokens.shape == ignored.shape == (2, 9)
    rows, targets = streams.rows, ~streams.ignored
    assert not targets[np.isin(rows, (1, 4, 5))].any() and targets[rows == 2].all()
    # Row 0 begins with a document, so that its requests can be told from its replies.
    asking = False
    for token, learned in zip(rows[0], targets[0], strict=True):
        asking = token == 4 or (asking and token != 5)
        assert learned == (not asking and token not in (1, 5))
    assert 0.5 < targets.mean() < 0.95


def test_books_fade_out(streams):
    streams, _ = streams
    shares = [streams.book_share(p) for p in (0.0, 0.2, 0.5, 0.8, 1.0)]
    assert shares == pytest.approx([0.5, 0.5, 0.25, 0.0, 0.0])
    assert streams.books[:4] == ["A book.", "Another one, which is longer."] * 2
    seen = {}
    for progress in (0.0, 1.0):
        streams.rows, streams.deal = None, 0
        streams.next(progress)
        text = streams.processor.decode(streams.rows[0].tolist())
        seen[progress] = text.count("nother one, which")
    assert seen[0.0] > 0 == seen[1.0]


def test_names_come_back_to_what_the_stories_have(streams):
    streams, _ = streams
    known = {" Lily", " Ben", " Max", " Tom", " Anna"}
    seen = {}
    for progress in (0.0, 1.0):
        streams.rows, streams.deal, streams.stories = None, 0, STORIES * 99
        streams.next(progress)
        # Stories that nobody asked for: behind BOS comes no request.
        rows = streams.rows.flatten().tolist()
        begins = [i for i, t in enumerate(rows) if t == 1 and rows[i + 1 : i + 2] not in ([], [4])]
        texts = [streams.processor.decode(rows[i : i + 60]).split(".")[0] for i in begins]
        seen[progress] = [any(name in text for name in known) for text in texts if "little" in text]
    assert len(seen[0.0]) > 5 and sum(seen[0.0]) < len(seen[0.0]) / 2
    assert len(seen[1.0]) > 5 and all(seen[1.0])


@pytest.mark.parametrize("drills", [0, 1, 30])
def test_drills_come_first_and_when_the_books_are_gone(streams, drills):
    streams, _ = streams
    streams.args.drills, streams.args.drill_share = [drills, 2 * drills], [0.2, 0.8]
    streams.args.steps, streams.args.books_until = 1000, 0.2
    streams.stories = STORIES * 20  # a deal of them is a dozen steps
    told = "Then the sun came out."  # which no drill says

    deals, shares = [], {}
    for step in range(500):
        tokens, _, fresh = streams.next(step / 1000)
        assert tokens.shape == (2, 9)
        if fresh:
            text = "".join(streams.processor.decode(row.tolist()) for row in streams.rows)
            deals.append((step, told in text))
            shares[step] = text.count("Everybody liked") / len(text)
    begins = [(b + s, False) for b, n in ((0, drills), (200, 2 * drills)) for s in range(0, n, 25)]
    assert [deal for deal in deals if not deal[1]] == begins
    assert {(drills, True), (200 + 2 * drills, True)} <= {*deals}
    assert shares[drills] < shares[200 + 2 * drills]
    streams.rows = None
    streams.next(1.0)
    assert not any("Everybody liked" in streams.processor.decode(r.tolist()) for r in streams.rows)


def test_a_stream_goes_on_where_it_stood(streams):
    streams, _ = streams
    for _ in range(30):
        streams.next(0.1)
    state = streams.state()
    expected = [streams.next(0.2)[0] for _ in range(100)]
    streams.restore(state)
    assert all((streams.next(0.2)[0] == segment).all() for segment in expected)
