"""From files to tokens: what is a document, what is held out, what is learned."""

import json
import os
from itertools import chain

import numpy as np
import pytest

import tiny
from mlx_mcsd import loading
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.training import corpus, vocabulary
from mlx_mcsd.training.encoding import Encoder, Pieces
from mlx_mcsd.training.sources import Record, find, text_file, to_record
from mlx_mcsd.training.split import Split, Survey, survey


def texts(source):
    return ["".join(record.pieces) for record in source]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.write_model(folder, num_hidden_layers=1)
    tiny.write_tokenizer(folder, eos_token="</s>")
    return loading.load_tokenizer(folder)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatty")
    tiny.write_model(folder, num_hidden_layers=1)
    tiny.write_tokenizer(folder, eos_token="</s>", chat_template=tiny.TEMPLATE)
    return loading.load_tokenizer(folder)


@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_a_text_file_is_one_document_or_several(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("mlx_mcsd.source.BYTES", piece)
    file = tmp_path / "a.txt"
    file.write_bytes("one\r\n<|e|>\ntwo ü\n\nmore\n<|e|><|e|>\n<|e|>last".encode())
    assert texts(text_file(str(file), None)) == [file.read_bytes().decode()]
    assert texts(text_file(str(file), "<|e|>")) == ["one", "two ü\n\nmore", "last"]


@pytest.mark.parametrize("piece", [1, 3, 4, 5, 1000])
@pytest.mark.parametrize("taken", [0, 2, 5, 9])
def test_the_rest_of_a_document_can_be_left(tmp_path, monkeypatch, piece, taken):
    monkeypatch.setattr("mlx_mcsd.source.BYTES", piece)
    file = tmp_path / "a.txt"
    file.write_text("fürst||second||third")

    def heads(separator):
        records = text_file(str(file), separator)
        return ["".join(Pieces(record.pieces, lambda n: None).take(taken)) for record in records]

    assert heads("||") == [text[:taken] for text in ("fürst", "second", "third")]
    assert heads(None) == ["fürst||second||third"[:taken]]


def test_a_stream_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(MCSDError, match="must be a file, which is read more than once"):
        find([str(tmp_path / "pipe.txt")], None)


def test_folders_and_lists(tmp_path):
    for name, text in (("train", "t"), ("valid", "v")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n\n")
    (tmp_path / "x.md").write_text("m")
    train, valid = find([str(tmp_path), str(tmp_path / "x.md")], None)
    assert list(map(texts, train)) == [["t"], ["m"]]
    assert list(map(texts, valid)) == [["v"]]


def test_a_dataset_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a", "b ü"]})
    rows.save_to_disk(tmp_path / "rows")
    parts = datasets.DatasetDict({"train": rows, "validation": rows.select([1])})
    parts.save_to_disk(tmp_path / "parts")
    train, valid = find([str(tmp_path / "rows"), str(tmp_path / "parts")], None)
    assert list(map(texts, train)) == [["a", "b ü"]] * 2
    assert list(map(texts, valid)) == [["b ü"]]


def test_a_dataset_without_the_library(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").touch()
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MCSDError, match=r"needs datasets: pip install 'mlx-mcsd\[train\]'"):
        find([str(tmp_path)], None)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"prompt": 1, "completion": "x"}, "must have texts for prompt and completion"),
        ({"messages": []}, "must have messages, a list of objects with role and content"),
        ({"messages": [{"role": "user"}]}, "must have messages, a list of objects"),
        ({"text": "\ud83d"}, "must have text, prompt and completion, or messages but has text"),
        ({"prompt": "\ud83d", "completion": ""}, "must have texts for prompt and completion"),
        ({"text": 3}, "must have text, prompt and completion, or messages but has text"),
        ({"a": 3, "prompt": ""}, "or messages but has a, prompt"),
        ([], "or messages but has none"),
    ],
)
def test_records_that_are_none(tmp_path, content, complaint):
    with pytest.raises(MCSDError) as error:
        to_record(content, "a.jsonl, line 3,")
    assert str(error.value).startswith("[train] a.jsonl, line 3,") and complaint in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a.jsonl, line 2, must hold JSON but"),
        ("a.txt", b"abc\xff", r"a.txt must be UTF-8 text but is not"),
        ("a.txt", b"", r"the data must hold text but there is none in .*a.txt"),
        ("missing.txt", None, r"cannot read .*missing.txt: No such file"),
        ("missing.jsonl", None, r"cannot read .*missing.jsonl: No such file"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(MCSDError, match=complaint):
        survey(find([str(tmp_path / name)], None)[0], 0)


def test_a_folder_that_holds_none(tmp_path):
    with pytest.raises(MCSDError, match=r"must hold train.jsonl, or what"):
        find([str(tmp_path)], None)


def found(characters, hashes):
    return Survey(np.array(characters), np.array(hashes, np.uint64), [len(hashes)], False)


def test_copies_fall_on_one_side():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64 - 1, 40, dtype=np.uint64)[rng.integers(0, 40, 200)]
    characters = 50 + (hashes % 7).astype(np.int64)
    for fraction in (0.01, 0.02, 0.05, 0.1, 0.5):
        split = Split(found(characters, hashes), fraction)
        kept = [split.trained_on(h, int(c)) for h, c in zip(hashes, characters, strict=True)]
        by_hash = {}
        for h, k, c in zip(hashes, kept, characters, strict=True):
            assert by_hash.setdefault(h, k) == k and 0 <= k <= c
        held = (characters - kept).sum() / characters.sum()
        assert 0.4 * fraction < held <= 1.6 * fraction


def test_the_tokenizer_sees_nothing_that_is_held_out(tmp_path):
    """Of texts, of prompts with completions and of messages."""
    turns = [[{"role": "user", "content": f"m{i}"}] for i in range(40)]
    rows = [{"messages": turn} for turn in turns]
    rows += [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(40)]
    rows += [{"text": f"t{i}"} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources, _ = find([str(tmp_path / "d.jsonl")], None)
    known = survey(sources, 0)
    split = Split(known, 0.3)
    records = [r for source in sources for r in source]
    kept = [
        split.trained_on(h, int(c), r.is_text) > 0
        for h, c, r in zip(known.hashes, known.characters, records, strict=True)
    ]
    words = [[f"m{i}"] for i in range(40)] + [[f"p{i}", f"c{i}"] for i in range(40)]
    words += [[f"t{i}"] for i in range(40)]
    wanted = [w for row, keep in zip(words, kept, strict=True) if keep for w in row]
    assert [*vocabulary._sample(sources, known, split, seed=0)] == wanted
    for kind in (slice(40), slice(40, 80), slice(80, 120)):
        assert 0 < sum(kept[kind]) < 40


def test_of_one_long_text_the_end_is_held_out():
    split = Split(found([1000], [5]), 0.1)
    assert split.trained_on(np.uint64(5), 1000) == 900
    assert split.trained_on(np.uint64(5), 1000, is_text=False) == 1000


def test_small_documents_are_held_out_whole():
    split = Split(found([10] * 100, range(100)), 0.1)
    kept = [split.trained_on(np.uint64(h), 10) for h in range(100)]
    assert set(kept) == {0, 10} and sum(kept) == 900


def test_nothing_is_held_out_where_nothing_is_asked_for():
    split = Split(found([10, 20], [3, 1]), 0.0)
    assert [split.trained_on(np.uint64(h), c) for h, c in ((3, 10), (1, 20))] == [10, 20]


def test_a_text_is_cut_anywhere():
    for pieces in (["abcdef"], ["ab", "c", "def"], list("abcdef")):
        for cut in range(7):
            seen = []
            whole = Pieces(pieces, seen.append)
            assert "".join(whole.take(cut)) == "abcdef"[:cut]
            assert "".join(whole) == "abcdef"[cut:]
            assert sum(seen) == 6


def test_what_of_a_text_is_encoded(tokenizer):
    encoder = Encoder(tokenizer)
    ids = tokenizer.encode("ab ba")
    eos = tokenizer.eos_token_id
    assert list(chain(*encoder.text(["ab", " ba"]))) == [*ids, eos]
    assert list(chain(*encoder.text(["ab ba"], begins=False))) == [*ids[1:], eos]
    assert list(chain(*encoder.text(["ab ba"], ends=False))) == ids


def test_a_completion_is_learned_and_its_prompt_is_not(tokenizer, chatty):
    record = Record([], prompt="a b", completion=" ab")
    ids, prompt = Encoder(tokenizer).turns(record)
    assert tokenizer.decode(ids[prompt:]) == " ab</s>"
    assert ids[:prompt] == tokenizer.encode("a b")
    ids, prompt = Encoder(chatty).turns(record)
    assert chatty.decode(ids[:prompt]) == "<s>[user]a b[/]\n[assistant]"
    assert chatty.decode(ids[prompt:]) == " ab[/]\n</s>"


def test_messages(chatty):
    talk = [("user", "a"), ("assistant", "b"), ("user", "ab"), ("assistant", "ba")]
    text = "<s>[user]a[/]\n[assistant]b[/]\n[user]ab[/]\n[assistant]ba[/]\n</s>"
    for mask_prompt, learned in ((False, text), (True, "ba[/]\n</s>")):
        ids, prompt = Encoder(chatty, mask_prompt).turns(Record([], messages=talk))
        assert chatty.decode(ids) == text
        assert chatty.decode(ids[prompt:]) == learned
    ids, prompt = Encoder(chatty, True).turns(Record([], messages=talk[:3]))
    assert prompt == 0, "there is no reply to learn alone"


def test_a_template_that_ends_a_reply_itself(tmp_path):
    tiny.write_model(tmp_path, num_hidden_layers=1)
    template = "{% for m in messages %}{{ m.content }}</s>\n{% endfor %}"
    tiny.write_tokenizer(tmp_path, eos_token="</s>", chat_template=template)
    tokenizer = loading.load_tokenizer(tmp_path)
    ids, _ = Encoder(tokenizer).turns(Record([], messages=[("user", "a"), ("assistant", "b")]))
    assert tokenizer.decode(ids) == "a</s>\nb</s>\n"


@pytest.mark.parametrize("vocab_size", [2**16, 2**16 + 1])
def test_a_corpus_holds_what_was_written(tmp_path, tokenizer, vocab_size):
    (tmp_path / "a.txt").write_text("a b|ab ba|" + "bab " * 90)
    lines = [{"prompt": "a", "completion": "b"}, {"text": "abba"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train, _ = find([str(tmp_path / n) for n in ("a.txt", "b.jsonl")], "|")
    what = survey(train, 0)
    what.hashes[:] = [3, 4, 1, 5, 6]
    split = Split(what, 0.2)  # the long one's end: 74 of 374 characters
    encoder = Encoder(tokenizer)
    corpus.write(tmp_path / "data", train, what, split, [], encoder, vocab_size)
    data = corpus.Corpus(tmp_path / "data")
    assert data.train.tokens.dtype == (np.uint16 if vocab_size <= 2**16 else np.uint32)

    def documents(part):
        return [
            (tokenizer.decode(part.read(i, 0, int(n)).tolist()), int(part.prompts[i]))
            for i, n in enumerate(part.lengths)
        ]

    cut = len(documents(data.train)[2][0]) - len("<s>")
    assert 280 < cut < 300
    rest = ("bab " * 90)[cut:]
    assert documents(data.train) == [
        ("<s>a b</s>", 0),
        ("<s>ab ba</s>", 0),
        ("<s>" + ("bab " * 90)[:cut], 0),
        ("<s>ab</s>", 2),
        ("<s>abba</s>", 0),
    ]
    assert documents(data.valid) == [(rest + "</s>", 0)]
    place = str(tmp_path / "b.jsonl")
    assert data.describe([1, 3]) == (f"document 2 of {tmp_path / 'a.txt'}, document 1 of {place}")
    assert data.describe(list(range(5)) * 2).endswith("and 5 more")

    (tmp_path / "data" / "train.tokens").write_bytes(b"abcd")
    with pytest.raises(MCSDError, match=r"must hold \d+ tokens but holds .*delete"):
        corpus.Corpus(tmp_path / "data")


def test_sources_held_out_whole(tmp_path, tokenizer):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 9)
    train, _ = find([str(tmp_path / "train.txt")], None)
    valid, _ = find([str(tmp_path / "valid.txt")], None)
    corpus.write(tmp_path / "d", train, survey(train, 0), None, valid, Encoder(tokenizer), 300)
    data = corpus.Corpus(tmp_path / "d")
    for part, word in ((data.train, "train"), (data.valid, "valid")):
        assert tokenizer.decode(part.tokens.tolist()) == f"<s>{f'{word} ' * 9}</s>"
