"""The examples do what they say, each run as a user runs it but small."""

import json
import lzma
import re
from importlib import import_module
from pathlib import Path

import pytest

from mlx_mcsd.errors import MCSDError
from storybook import CASED, EXAMPLES


def test_lower_case_stories_get_their_capitals_back(stories):
    from stories_text import Truecaser, read_text, repair, split_stories

    truecase = Truecaser(split_stories(read_text(stories["cased"])))
    lower = split_stories(repair(read_text(stories["lower"])), shortest=50)
    assert [truecase(story) for story in lower] == [
        'One day Max saw his mom. "Hello, Max!" she said. He ran to Lily.\n\n'
        'She asked, "Can I play?" "Go," said Mom.',
        'Tom and I don\'t swim. "Look!" said Lily. She ran to Max.',
    ]


def test_a_name_that_only_one_story_has_gets_its_capital(stories):
    from stories_text import Truecaser

    truecase = Truecaser(["One day a ball was called round. She ran."])
    assert truecase("a cat named kip ran. he called kip round.") == (
        "A cat named Kip ran. He called Kip round."
    )


def test_paragraphs_on_lines_of_their_own_are_one_story(stories):
    from stories_text import split_stories

    whole = "One day a dog ran far away and came back home."
    text = f"{whole}\n{whole}\nOnce a cat sat.\nIt was sad.\nIt was fed.\n{whole}\nOnce.\nOne day."
    expected = [whole, whole, "Once a cat sat.\nIt was sad.\nIt was fed.", whole]
    assert split_stories(text, shortest=30) == expected


def test_stories_are_split_and_one_is_held_out(stories):
    from stories_text import load_stories

    train, unseen = load_stories([stories["cased"]], share=0.1)
    assert sorted(story[:8] for story in train + unseen) == ["Once upo", "One day ", "Tom like"]
    assert len(unseen) == 1
    assert (train, unseen) == load_stories([stories["cased"]], share=0.1)
    # The one held out, found again in lower case among the training files, is unseen no more.
    found = unseen[0].lower().replace("\n", "\n\n")
    stories["lower"].write_text(f"{found} it was a very long day. {'they ran. ' * 30}")
    assert load_stories([stories["cased"]], [stories["lower"]], share=0.1)[1] == []


def test_books_become_passages_of_whole_paragraphs(stories):
    from stories_text import load_books

    passages = load_books([stories["books"]], length=500)
    assert len(passages) > 5
    assert {line for p in passages for line in p.split("\n")} == {"The old man read a book."}


def test_training_learns_and_writes_all_it_promises(train, tmp_path, capsys):
    out = train(tmp_path / "run", 80)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    training, unseen = (
        [entry[key] for entry in log if key in entry]
        for key in ("bits_per_character", "val_bits_per_character")
    )
    # Five stories say little of one that is held out, but they can be learned.
    assert training[-1] < training[0] - 0.3
    facts = json.loads((out / "facts.json").read_text())
    assert facts["bits_per_character_unseen"] == unseen[-1]
    assert sorted(facts["sources"]) == ["books.txt", "cased.txt", "lower.txt"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    # The card of the model that is made of it: measured on MLX, with samples and replies.
    import bundle_stories

    mlx = tmp_path / "mlx"
    words = ["--run", out, "--mlx-path", mlx, "--licence", "test: none", "--replies", 6]
    bundle_stories.main([*map(str, words)])
    card = (mlx / "README.md").read_text()
    measured = float(re.search(r"\*\*([\d.]+)\*\* in float16", card)[1])
    assert measured == pytest.approx(facts["bits_per_character_unseen"], rel=1e-3)
    assert all(digest in card for digest in facts["sources"].values())
    assert "> **Once upon a time**" in card and "test: none" in card
    assert re.search(r"of 6 fresh ones, \d replies have the name", card)
    assert "{" not in card.split("## Replies")[0]
    assert (mlx / "loss.png").exists()
    assert "<|assistant|>" in (mlx / "tokenizer_config.json").read_text()

    # Killed behind the conversion, the command goes on; ended, it touches nothing.
    with pytest.raises(SystemExit):
        bundle_stories.main([*map(str, words)])
    assert f"--mlx-path must not exist yet but {mlx} does." in capsys.readouterr().err
    (mlx / "loss.png").unlink()
    (mlx / "README.md").write_text("what the converter wrote")
    bundle_stories.main([*map(str, words)])
    assert (mlx / "README.md").read_text() == card


def test_a_part_of_the_stories(train, tmp_path, capsys):
    counts = []
    for part in (1.0, 0.5):
        train(tmp_path / str(part), 1, part=part)
        printed = capsys.readouterr().err
        counts.append(
            tuple(map(int, re.search(r"(\d+) stories, .*; (\d+) held", printed).groups()))
        )
    (all_of_them, held_out), half = counts
    assert half == (all_of_them // 2, held_out)


def test_replies_are_counted(stories, monkeypatch):
    from stories_replies import loops, make_requests

    assert loops("He ran home to see his mum and dad. " * 3)
    assert loops("It was very, very very very big.")
    assert not loops("He ran home to see his mum and dad. She was very very very glad. " * 2)
    pairs = make_requests(50, seed=1)
    assert pairs == make_requests(50, seed=1) != make_requests(50, seed=2)
    assert all(name in request for request, name in pairs)
    assert not any(re.search(r"\ba [aeiou]", request) for request, _ in pairs)


def test_the_shapes_compared_have_one_budget(stories, tmp_path, monkeypatch, capsys):
    import stories_shapes

    tiny_shape = {"hidden_size": 16, "layers": 1, "intermediate_size": 24}
    monkeypatch.setattr(stories_shapes, "BASE", tiny_shape)
    few = {"base": {}, "larger": {"vocab_size": 340}, "concat": {"fusion": "concat"}}
    monkeypatch.setattr(
        stories_shapes,
        "CANDIDATES",
        {k: {"vocab_size": 330, "channels": 2} | v for k, v in few.items()},
    )
    words = ["--out", tmp_path, "--stories", stories["cased"], "--budget", 6 * 4096 * 7000 * 2]
    words += ["--only", *few, "--batch", 2, "--length", 16, "--threads", 1, "--no-names"]
    stories_shapes.main([*map(str, words)])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:5]]
    assert sorted(row[0] for row in rows) == sorted(few)
    bits = [float(row[-1]) for row in rows]
    assert bits == sorted(bits)
    for row in rows:
        shape = {**tiny_shape, "vocab_size": int(row[5]), "channels": 2, "fusion": row[7]}
        # The table's parameters are counted in the model; gains are the few that `weights` omits.
        assert float(row[8]) == pytest.approx(stories_shapes.weights(**shape) / 1e6, abs=0.006)
    assert (tmp_path / "table.md").read_text().count("\n") == 5
    # What has ended is not run again.
    monkeypatch.setattr(stories_shapes.train_stories, "main", None)
    stories_shapes.main([*map(str, words)])
    with pytest.raises(SystemExit):
        stories_shapes.main([*map(str, words), "--budget", "9e9"])
    assert "repeat its --budget, or name another --out." in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, argv, wanted",
    [
        ("train_stories", ["--stories", "none.txt"], "cannot read none.txt: No such file"),
        ("train_stories", ["--stories", "half.txt"], "must hold two stories or more"),
        ("ablation", ["--stories", "none.txt"], "cannot read none.txt: No such file"),
        ("bundle_stories", ["--run", "none", "--mlx-path", "made"], "none/hf"),
        ("stories_requests", ["--stories", "latin.txt"], "latin.txt must be UTF-8 text, plain or"),
        ("stories_requests", ["--stories", "cut.xz"], "cut.xz must be UTF-8 text, plain or .xz"),
        ("memory_picture", [], "expected the picture's path"),
        ("stories_replies", ["--model", "none"], "no directory none"),
        ("quantization_table", ["half.txt"], "must hold a story that ends in a full stop"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, script, argv, wanted):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    Path("half.txt").write_text("A story that is cut off in the mid")
    Path("latin.txt").write_bytes("Lily a dit : «é»".encode("latin-1"))
    Path("cut.xz").write_bytes(lzma.compress(CASED.encode())[:-20])
    out = ["--out", "run"] if script in ("train_stories", "ablation") else []
    with pytest.raises(SystemExit) as end:
        import_module(script).main([*argv, *out])
    error = capsys.readouterr().err
    assert end.value.code == 1 and wanted in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_texts_that_fill_no_batch_are_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from train_accelerate import rows_of

    (tmp_path / "text.txt").write_text("a" * 79)

    def tokenizer(text, verbose):
        return {"input_ids": [*text.encode()]}

    with pytest.raises(MCSDError, match="must fill a batch of 4 rows of 20 tokens but fills 3"):
        rows_of(tokenizer, [str(tmp_path / "text.txt")], 20, 4)
    assert rows_of(tokenizer, [str(tmp_path / "text.txt")], 20, 3).shape == (3, 20)


def test_the_readme_picture_is_drawn(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import memory_picture

    memory_picture.main([str(tmp_path / "memory.png")])
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_quantizations(stories, tmp_path, monkeypatch, capsys):
    import quantization_table

    import tiny

    tiny.write_model(tmp_path / "model", hidden_size=64, intermediate_size=64, num_channels=2)
    tiny.write_tokenizer(tmp_path / "model", eos_token="</s>")
    kept = ("float32", "bfloat16", "affine, 2 bits", "mxfp8")
    settings = {name: quantization_table.SETTINGS[name] for name in kept}
    monkeypatch.setattr(quantization_table, "SETTINGS", settings)
    out = tmp_path / "table.md"
    words = [stories["cased"], "--model", tmp_path / "model", "--tokens", 3, "--out", out]
    quantization_table.main([*map(str, words), "--prompt", "a b"])
    assert out.read_text() == capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in out.read_text().splitlines()[2:6]]
    assert [row[0] for row in rows] == [*kept]
    megabytes, weights, bits, rates = ([float(row[i]) for row in rows] for i in range(1, 5))
    assert weights[:2] == [32, 16] and 8 < weights[3] < 9
    # A random model says 8 bits a byte, and many rows of 2 bits say something else.
    assert bits[0] == pytest.approx(bits[1], rel=0.01) and bits[0] != bits[2]
    assert min(rates) > 0 and megabytes[1] < megabytes[0]
    assert "3 stories, " in out.read_text()
