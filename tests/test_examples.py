"""The examples do what they say, each run as a user runs it but small."""

import hashlib
import json
import lzma
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch

from mlx_mcsd.errors import MCSDError

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

CASED = """Once upon a time there was a dog named Max. Max had a friend, a girl named Lily.
"Hello, Max!" she said. Her mom smiled. "Go and play," said Mom. So they ran to the park.
<|endoftext|>
One day Lily went to the park with her mom. "Look!" she said. "What a ball!" Then I ran.
She and Max ran fast. I think Max was happy.
<|endoftext|>
Tom liked to swim. Tom and Max swam all day. "I love you, Max!" he said.
<|endoftext|>
A story that is cut off in the mid
"""
LOWER = """nd of one that begins before the file does.
one day max saw his mom. "hello, max!" she said. he ran to lily.

she asked, "can i play?" "go," said mom.
tom and i donâ€™t swim. â€œlook!â€ said lily. she ran to max.
"""


@pytest.fixture
def stories(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    cased, lower, books = tmp_path / "cased.txt", tmp_path / "lower.txt", tmp_path / "books.txt"
    cased.write_text(CASED, encoding="utf-8")
    lower.write_text(LOWER, encoding="utf-8")
    books.write_text("# A book\n\nThe old man\nread a book.\n\n" * 200, encoding="utf-8")
    threads = torch.get_num_threads()
    yield {"cased": cased, "lower": lower, "books": books}
    torch.set_num_threads(threads)


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


@pytest.fixture
def train(stories):
    import train_stories

    def run(out, steps, **more):
        options = {
            **{"vocab_size": 330, "hidden_size": 16, "channels": 2, "layers": 1},
            **{"intermediate_size": 24, "batch": 2, "length": 16, "steps": steps, "threads": 1},
            **{"evaluate_every": 20, "checkpoint_every": 2},
            **more,
        }
        flags = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
        data = ["--stories", stories["cased"], "--lower", stories["lower"]]
        data += ["--books", stories["books"], "--no-names", "--drills", 2, 2, "--drill-share", 0, 0]
        train_stories.main([*map(str, ["--out", out, *data]), *flags])
        return out

    return run


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


@pytest.fixture
def taught(train, tmp_path):
    """Two teachers, the tokenizer that they share, and tokens."""
    folders = [train(tmp_path / f"teacher-{seed}", 4, seed=seed) / "hf" for seed in (1, 2)]
    tokens = torch.randint(0, 330, (2, 24), generator=torch.Generator().manual_seed(0))
    return folders, (folders[0] / "tokenizer.model").read_bytes(), tokens


def test_teachers_say_together_what_comes_next(taught):
    from stories_teachers import Teachers

    from mlx_mcsd.convert.reference.modeling_mcsd import MCSDForCausalLM

    folders, tokenizer, tokens = taught
    is_name = torch.zeros(330, dtype=torch.bool)
    is_name[tokens[0, 7]] = True
    teachers = Teachers(folders, tokenizer, is_name, weight=0.7)
    reset = torch.zeros(2, 24, dtype=torch.bool)
    reset[1, 11] = True
    models = [MCSDForCausalLM.from_pretrained(folder) for folder in folders]
    with torch.no_grad():
        whole = sum(
            torch.softmax(m.lm_head(m.model(tokens, reset=reset).last_hidden_state), -1)
            for m in models
        )
        alone = torch.softmax(models[0](tokens, reset=reset).logits, -1)
    whole = whole / 2
    assert (whole - alone).abs().max() > 1e-4
    for _ in range(2):  # a state carried over two segments, and none over a fresh start
        first = teachers.probabilities(tokens[:, :10], reset[:, :10], fresh=True)
        second = teachers.probabilities(tokens[:, 10:], reset[:, 10:], fresh=False)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-8)

    logits = torch.randn(48, 330, generator=torch.Generator().manual_seed(0))
    targets = torch.roll(tokens, -1, 1).masked_fill(reset, -100).flatten()
    spoken = torch.log_softmax(logits, -1)
    text = -spoken[range(48), targets] * (targets >= 0)
    soft = -(whole.flatten(0, 1) * spoken).sum(-1)
    expected = torch.where((targets < 0) | is_name[targets], text, 0.3 * text + 0.7 * soft)
    assert (expected == text).sum() in range(2, 10)  # what is no target, and a name or more
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    found = teachers.distil(losses, logits, targets, whole)
    torch.testing.assert_close(found, expected)


def test_a_student_starts_from_weights_and_learns_from_teachers(
    train, taught, stories, tmp_path, capsys
):
    import train_stories

    folders, _, _ = taught
    cased = stories["cased"]
    flat = folders[1].parent / "flat.pt"
    begun = torch.load(flat, weights_only=True)["model"]
    still = train(tmp_path / "still", 1, init_from=flat, lr=0)
    found = torch.load(still / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(found[name], begun[name]) for name in begun)

    def refusal(out, **options):
        with pytest.raises(SystemExit):
            train(tmp_path / out, 1, **options)
        return capsys.readouterr().err.splitlines()[-1]

    damaged = tmp_path / "damaged"
    shutil.copytree(folders[0], damaged)
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[:-4])
    for file in flat, tmp_path / "none.pt", folders[0] / "model.safetensors":
        error = refusal("wide", init_from=file, hidden_size=32)
        assert f"with the shape and tokenizer of this run but {file} is not" in error
    for folder in tmp_path, damaged:
        error = refusal("lone", teachers=folder)
        assert f"the folder hf of a run that has ended but {folder} is not" in error
    assert f"{folders[0]} has another" in refusal("other", teachers=folders[0], vocab_size=331)
    assert "between 0 and 1 but is 1.5" in refusal("more", teachers=folders[0], distill=1.5)
    with pytest.raises(SystemExit):
        train_stories.main([*map(str, ["--out", tmp_path, "--stories", cased, "--calibrate"])])
    assert "must have two held-out stories or more but has 1" in capsys.readouterr().err
    train(tmp_path / "first", 1, teachers=folders[0])
    assert "of a run with teachers = [" in refusal("first", teachers=folders[1])


def test_the_bundled_model_is_made_by_one_command(stories, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import bundle_stories

    kinds = ["dog", "cat", "bird", "fish", "frog", "bear", "cow", "pig", "fox", "mouse"]
    heroes = [f"{name} the {kind}" for name in ("Max", "Lily", "Tom", "Mia") for kind in kinds]
    many = (
        f"Once {hero} ran to the park.\n{hero} saw a ball and was very happy." for hero in heroes
    )
    stories["cased"].write_text("\n<|endoftext|>\n".join(many))
    words = ["--run", tmp_path / "run", "--mlx-path", tmp_path / "mlx", "--q-bits", 8]
    words += ["--replies", 2, "--stories", stories["cased"], "--no-names", "--vocab-size", 330]
    words += ["--hidden-size", 32, "--channels", 2, "--layers", 1, "--intermediate-size", 32]
    words += ["--batch", 2, "--length", 16, "--steps", 2, "--threads", 1, "--bf16"]
    monkeypatch.setattr(bundle_stories, "TEACHERS", bundle_stories.TEACHERS[1:])
    bundle_stories.main([*map(str, words)])
    for run, lr in ("run/teacher-1", 0.004), ("run/teacher-2", 0.004), ("run", 0.003):
        facts = json.loads((tmp_path / run / "facts.json").read_text())
        assert facts["options"]["lr"] == lr and facts["options"]["hidden_size"] == 32
    card = (tmp_path / "mlx" / "README.md").read_text()
    assert (
        "--stories cased.txt --no-names --vocab-size 330" in card
        and "in 8 bits a weight on MLX" in card
    )
    assert "1 CPU cores, in bfloat16 products" in card
    weights = [tmp_path / "run" / f"teacher-{n}" / "hf" / "model.safetensors" for n in (1, 2)]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]
    assert [teacher["sha256"] for teacher in facts["teachers"]] == digests
    assert all(digest in card for digest in digests) and "So were 2 teachers trained" in card
    assert facts["unseen"]["stories"] == 1 and facts["logit_scale"] != 1
    teacher = json.loads((tmp_path / "run" / "teacher-1" / "unseen.json").read_text())
    assert json.loads((tmp_path / "run" / "unseen.json").read_text()) == teacher[1:]
    assert f"multiplied by {facts['logit_scale']:.3f}, the number" in card
    assert facts["training_tokens_before"] == 32 and facts["training_tokens_seen"] == 96
    assert json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]["bits"] == 8


def test_logits_are_scaled_to_fit(taught, tmp_path):
    from stories_scores import bits_per_character, calibrate

    from mlx_mcsd.convert.reference.modeling_mcsd import MCSDForCausalLM

    folders, _, tokens = taught
    model = MCSDForCausalLM.from_pretrained(folders[0])
    with torch.no_grad():
        model.model.norm.weight *= 40
    torch.manual_seed(0)
    plain = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "eos_token_id": None}
    said = [*model.generate(tokens[:, :1], max_new_tokens=400, **plain).numpy()]
    with torch.no_grad():
        model.model.norm.weight *= 1.25  # surer than it was when it spoke
    assert calibrate(model, said) == pytest.approx(1 / 1.25, abs=0.03)
    best = bits_per_character(model, said, ["a"] * 2)
    for other in 0.98, 1.02:
        with torch.no_grad():
            model.model.norm.weight *= other
        assert bits_per_character(model, said, ["a"] * 2) > best
        with torch.no_grad():
            model.model.norm.weight /= other


def test_the_recipe_keeps_its_runs_apart(stories, tmp_path, capsys):
    import bundle_stories

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "checkpoint.pt").write_bytes(b"")
    for run, flags, wanted in (
        ("new", ["--init-from=flat.pt"], "--init-from are chosen by the recipe but one was given"),
        ("new", ["--out", "other"], "--init-from are chosen by the recipe but one was given"),
        ("old", [], f"{tmp_path / 'old'} holds another training"),
    ):
        words = ["--run", tmp_path / run, "--mlx-path", tmp_path / "mlx", "--stories", "a.txt"]
        words += flags
        with pytest.raises(SystemExit):
            bundle_stories.main([*map(str, words)])
        assert wanted in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


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


def test_a_run_that_was_killed_resumes_to_the_same_weights(train, tmp_path, monkeypatch, capsys):
    import train_stories

    teacher = train(tmp_path / "teacher", 2, seed=1)
    options = {"teachers": teacher / "hf", "init_from": teacher / "flat.pt", "checkpoint_every": 1}
    whole = train(tmp_path / "whole", 6, **options)

    class KilledError(Exception):
        pass

    def die(payload, path, real=train_stories.save_atomically):
        real(payload, path)
        if payload.get("step") == 3:  # in the middle of a deal, so that states go on
            raise KilledError

    monkeypatch.setattr(train_stories, "save_atomically", die)
    with pytest.raises(KilledError):
        train(tmp_path / "resumed", 6, **options)
    monkeypatch.undo()
    flat, killed = (
        torch.load(tmp_path / "resumed" / name, weights_only=True)
        for name in ("flat.pt", "checkpoint.pt")
    )
    assert all(torch.equal(flat["model"][name], killed["model"][name]) for name in flat["model"])
    assert flat["tokens_seen"] == 4 * 32 and killed["teacher_states"][0] is not None
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit):
        train(tmp_path / "resumed", 6, lr=0.1, **options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("with lr = 0.004, not 0.1; repeat its options, or name another --out.")
    resumed = train(tmp_path / "resumed", 6, **options)
    model = "hf/model.safetensors"
    assert (resumed / model).read_bytes() == (whole / model).read_bytes()
    assert (resumed / "facts.json").read_text() == (whole / "facts.json").read_text()
    alone = train(tmp_path / "alone", 6, init_from=teacher / "flat.pt")
    assert (alone / model).read_bytes() != (whole / model).read_bytes()


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
