"""The storyteller learns from teachers, resumes with them, and is made with them by one command."""

import hashlib
import json
import shutil

import pytest
import sentencepiece
import torch

from storybook import EXAMPLES


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


def test_names_are_left_to_the_text(stories, tmp_path, monkeypatch):
    import train_stories
    from stories_requests import NAME_PIECES

    class SeenError(Exception):
        pass

    def look(folders, tokenizer, is_name, weight):
        raise SeenError(tokenizer, is_name)

    monkeypatch.setattr(train_stories, "Teachers", look)
    words = ["--out", tmp_path / "run", "--stories", stories["cased"], "--vocab-size", 1320]
    words += ["--hidden-size", 16, "--channels", 2, "--layers", 1, "--threads", 1]
    with pytest.raises(SeenError) as seen:
        train_stories.main([*map(str, words)])
    tokenizer, is_name = seen.value.args
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    names = [processor.id_to_piece(i) for i in is_name.nonzero().flatten().tolist()]
    assert sorted(names) == sorted(NAME_PIECES)


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
    from stories_scores import calibrate

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
    calibrated = []
    monkeypatch.setattr(
        bundle_stories.train_stories,
        "calibrate",
        lambda model, encoded: calibrated.extend(encoded) or calibrate(model, encoded),
    )
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
    processor = sentencepiece.SentencePieceProcessor(str(tmp_path / "run" / "tokenizer.model"))
    assert [processor.decode(ids.tolist()) for ids in calibrated] == teacher[:1]
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
    short, long = said[0][:50], said[1]
    apart = [bits_per_character(model, [ids], ["a"]) for ids in (short, long)]
    assert bits_per_character(model, [short, long], ["a"] * 2) == pytest.approx(sum(apart) / 2)
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
