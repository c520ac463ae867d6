"""lm_eval's tasks: mlx-lm's adapter on our models says what the oracle says of one text alone."""

import json
import sys
from functools import partial

import numpy as np
import pytest

import oracle
import tiny
from mlx_mcsd import evaluate, load
from mlx_mcsd.errors import MCSDError

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install '.[evaluate]'")

import mlx_lm.evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from mlx_lm import generate

from mlx_mcsd import harness
from mlx_mcsd.harness import Adapter

EOS = tiny.PIECES.index("</s>")
PAIRS = [
    *[("", "a b"), ("", "b"), ("a b ab", " a"), ("a b ab", " b\n漢"), ("漢字", "a")],
    *[("b" * 70, " a b b"), ("a", " "), ("a b" * 9, " b"), ("a b" * 9, " a b a b b")],
]
TEXTS = ["a b ab", "b", "漢字 a\n\nb" * 3, "a", "ab" * 30]


@pytest.fixture
def without_bos(checkpoint, tmp_path):
    """The same model; its tokenizer begins texts with no token: loads it with these settings."""

    def make(**config):
        oracle.write_checkpoint(tmp_path, *checkpoint[1:])
        tiny.write_tokenizer(tmp_path, "$A", **config)
        return load(tmp_path)

    return make


def ask(adapter, kind, arguments):
    requests = [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]
    return getattr(adapter, kind)(requests)


def nats(checkpoint, ids):
    """Log-probability of every token but the first, and whether it is the likeliest."""
    log_p = oracle.log_softmax(oracle.logits(*checkpoint[1:], [ids])[0])  # (N, K)
    return log_p[np.arange(len(ids) - 1), ids[1:]], log_p.argmax(axis=-1)[:-1] == ids[1:]


def pair_by_oracle(checkpoint, begin, encode, pair):
    ids, known = begin + encode("".join(pair)), len(begin + encode(pair[0]))
    log_p, likeliest = nats(checkpoint, ids)
    return log_p[known - 1 :].sum(), likeliest[known - 1 :].all()


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_likelihoods_are_the_oracles(checkpoint, loaded, batch):
    adapter, encode = Adapter(*loaded, batch_size=batch), loaded[1].encode
    # What greedy decoding gives must be told as well.
    greedy = generate(*loaded, "a b ab", max_tokens=1)
    for pair, got in zip(
        [*PAIRS, ("a b ab", greedy)],
        ask(adapter, "loglikelihood", [*PAIRS, ("a b ab", greedy)]),
        strict=True,
    ):
        want, likeliest = pair_by_oracle(checkpoint, [], encode, pair)
        assert got == (pytest.approx(want, rel=1e-5), likeliest)
    assert got[1]
    rolling = ask(adapter, "loglikelihood_rolling", [(text,) for text in TEXTS])
    assert rolling == pytest.approx([nats(checkpoint, encode(t))[0].sum() for t in TEXTS], rel=1e-5)


def test_a_tokenizer_without_a_first_token_gets_the_last(checkpoint, without_bos):
    model, tokenizer = without_bos(eos_token="</s>")
    adapter = Adapter(model, tokenizer)
    got = ask(adapter, "loglikelihood", PAIRS)
    wanted = [pair_by_oracle(checkpoint, [EOS], tokenizer.encode, pair) for pair in PAIRS]
    assert [g[0] for g in got] == pytest.approx([w[0] for w in wanted], rel=1e-5)
    (rolling,) = ask(adapter, "loglikelihood_rolling", [("ab",)])
    wanted = nats(checkpoint, [EOS, *tokenizer.encode("ab")])[0].sum()
    assert rolling == pytest.approx(wanted, rel=1e-5)


def test_a_tokenizer_without_first_and_last_token_is_refused(without_bos):
    with pytest.raises(MCSDError, match="a token that begins or ends a text"):
        ask(Adapter(*without_bos()), "loglikelihood", [("", "a")])


def test_contexts_are_never_cut(checkpoint, loaded, monkeypatch):
    monkeypatch.setattr(mlx_lm.evaluate, "DEFAULT_MAX_TOKENS", 5)
    for max_tokens in (None, 5):
        adapter = Adapter(*loaded, max_tokens=max_tokens)
        ((got, _),) = ask(adapter, "loglikelihood", [("b" * 70, " a b b")])
        want, _ = pair_by_oracle(checkpoint, [], loaded[1].encode, ("b" * 70, " a b b"))
        assert got == pytest.approx(want, rel=1e-5)
        assert adapter._max_tokens == max_tokens  # of texts to generate


def test_texts_are_generated_as_one_by_one():
    bundled, prompts = load(), ["Once upon a time", "Tom had a red ball. He", "One day"]
    settings = {"until": ["."], "do_sample": False}
    adapter = Adapter(*bundled, max_tokens=8, batch_size=2)
    got = ask(adapter, "generate_until", [(prompt, settings) for prompt in prompts])
    assert got == [generate(*bundled, p, max_tokens=8).partition(".")[0] for p in prompts]
    assert all(got)


GOOD, BAD = ["a b", "b ab\n", "漢", " a a", "ab"], ["b a", "b", "字", "a", "ab ab"]


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task file: five pairs, the first of each right."""
    rows = [{"good": good, "bad": bad} for good, bad in zip(GOOD, BAD, strict=True)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "local.py").write_text(
        "import json\nfrom pathlib import Path\nfrom datasets import Dataset\n\n\n"
        "def pairs(**_):\n"
        "    lines = Path(__file__).with_name('pairs.jsonl').read_text().splitlines()\n"
        "    return {'test': Dataset.from_list([json.loads(line) for line in lines])}\n"
    )
    (tmp_path / "pairs.yaml").write_text(
        "task: pairs\ncustom_dataset: !function local.pairs\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: ''\ndoc_to_target: 0\ntarget_delimiter: ''\n"
        "doc_to_choice: '{{[good, bad]}}'\nmetric_list:\n  - metric: acc\n"
    )
    return str(tmp_path / "pairs.yaml")


@pytest.fixture
def run(command, checkpoint):
    return partial(command, evaluate.main, "--model", checkpoint[0])


def test_a_local_task_is_scored(run, checkpoint, loaded, task):
    def worth(text):
        return nats(checkpoint, loaded[1].encode(text))[0].sum()

    right = [worth(good) > worth(bad) for good, bad in zip(GOOD, BAD, strict=True)]
    assert 0 < sum(right) < 5
    code, out, _ = run("--tasks", task, "--json")
    found = json.loads(out)
    assert code == 0 and found["model"] == str(checkpoint[0])
    assert found["tasks"]["pairs"]["acc,none"] == pytest.approx(np.mean(right))
    code, out, _ = run("--tasks", task, "--limit", "3", "--seed", "1")
    cells = out.splitlines()[2].replace(" ", "").split("|")
    assert code == 0 and cells[1] == "pairs"
    assert float(cells[7]) == pytest.approx(np.mean(right[:3]), abs=1e-3)


def write_telling(task, request, reply):
    """Make a task of telling a reply."""
    with open(task, "w") as file:
        file.write(
            "task: told\ncustom_dataset: !function local.pairs\ntest_split: test\n"
            f"output_type: generate_until\ndoc_to_text: {json.dumps(request)}\n"
            f"doc_to_target: {json.dumps(reply)}\ngeneration_kwargs:\n  until: ['\\0']\n"
            "metric_list:\n  - metric: exact_match\n"
        )


def test_a_chat_template_is_put_around_what_is_asked(command, task):
    model, tokenizer = load()
    asked = [{"role": "user", "content": "Hello!"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    reply = generate(model, tokenizer, prompt, max_tokens=5)
    write_telling(task, "Hello!", reply)
    for flag, right in (([], 0.0), (["--apply-chat-template"], 1.0)):
        words = ["--tasks", task, "--limit", "2", "--max-tokens", "5", "--json", *flag]
        code, out, _ = command(evaluate.main, *words)
        assert code == 0
        assert json.loads(out)["tasks"]["told"]["exact_match,none"] == right


def test_what_mlx_lm_prints_is_no_part_of_the_json(run, loaded, task):
    write_telling(task, "ab", generate(*loaded, "ab", max_tokens=1))
    code, out, err = run("--tasks", task, "--limit", "2", "--max-tokens", "1", "--json")
    assert code == 0 and "tokens-per-sec" in err
    assert json.loads(out)["tasks"]["told"]["exact_match,none"] == 1.0


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], "name files to score, or --tasks, one of the two"),
        (["a.txt", "--tasks", "piqa"], "name files to score, or --tasks, one of the two"),
        (["--tasks", "nonsense.yaml"], "no task nonsense.yaml: there is no such file."),
        (["--tasks", "bad.yaml"], "a file of --tasks is no task: while parsing a flow"),
        (["--tasks", "other.yaml"], "a file of --tasks is no task: Unknown config shape"),
        (["--tasks", "nonsense"], "no task nonsense: name one that lm_eval knows, or a YAML file."),
        (["--tasks", "a", "--apply-chat-template"], "--apply-chat-template needs a chat template"),
        (["--tasks", "a", "--limit", "0"], "--limit: must be an integer of at least 1"),
    ],
    ids=" ".join,
)
def test_mistake_is_one_line(run, tmp_path, monkeypatch, argv, wanted):
    monkeypatch.chdir(tmp_path)
    # lm_eval's own tasks take a while to look through, and none of these is one.
    monkeypatch.setattr(harness, "TaskManager", lambda **_: TaskManager(include_defaults=False))
    (tmp_path / "bad.yaml").write_text("a: [\n")
    (tmp_path / "other.yaml").write_text("a: 3\n")
    code, out, err = run(*argv)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and wanted in err and err.count("\n") == 1


def test_without_lm_eval_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = run("--tasks", "piqa")
    assert (code, out) == (1, "")
    assert err == "error: --tasks needs lm_eval: pip install 'mlx-mcsd[evaluate]'.\n"


@pytest.fixture
def local_data(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "examples" / "tasks"))
    import local_data

    return local_data


def test_chat_instructions_become_questions(local_data):
    def row(text, answer):
        return {"instruction": f"Please choose: {text}\n\nAnswer format: x", "answer": answer}

    two = row("question: Why?\n\nAnswer1: So. It is. Answer2: Not Answer 1", "answer2")
    assert local_data.question(two) == {
        **{"question": "Why?", "choices": ["So. It is.", "Not Answer 1"], "label": 1},
    }
    many = row("question: A: b\n\nSolution1: c \n\nSolution2: d\n\nSolution3: e", "solution1")
    assert local_data.question(many) == {
        **{"question": "A: b", "choices": ["c", "d", "e"], "label": 0},
    }
    assert local_data.question(row("question: is it?", "true")) == {
        **{"question": "is it?", "choices": ["no", "yes"], "label": 1},
    }


def test_tasks_of_the_sample_data(local_data, data_dir, monkeypatch):
    monkeypatch.setenv("MLX_MCSD_DATA", str(data_dir))
    for file in ("anaphor_number_agreement", "determiner_noun_agreement_1"):
        assert len(local_data.minimal_pairs(f"blimp/{file}.jsonl")["test"]) == 1000
    sizes = {"ARC-Easy": {3, 4, 5}, "piqa": {2}, "boolq": {2}}
    for file, wanted in sizes.items():
        rows = local_data.questions(f"commonsense/{file}.test.json")["test"]
        assert {len(row["choices"]) for row in rows} == wanted
        assert all(row["question"].strip() and all(row["choices"]) for row in rows)
        assert all(row["label"] < len(row["choices"]) for row in rows)


def test_the_bundled_model_knows_some_grammar(root, data_dir, monkeypatch, capsys):
    monkeypatch.setenv("MLX_MCSD_DATA", str(data_dir))
    found = {}
    for limit, names in (
        ("20", ["blimp_anaphor_number_agreement"]),
        ("2", ["piqa", "boolq_no_passage", "arc_easy", "blimp_determiner_noun_agreement_1"]),
    ):
        tasks = [str(root / f"examples/tasks/{name}.yaml") for name in names]
        evaluate.main(["--tasks", *tasks, "--limit", limit, "--json"])
        found |= json.loads(capsys.readouterr().out)["tasks"]
    assert found.keys() == {f.stem for f in (root / "examples/tasks").glob("[a-z]*.yaml")}
    assert found["blimp_anaphor_number_agreement"]["acc,none"] >= 0.65


def test_missing_data_is_one_line(root, run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_MCSD_DATA", str(tmp_path))
    code, out, err = run("--tasks", str(root / "examples/tasks/piqa.yaml"))
    assert (code, out) == (1, "")
    assert err.endswith(
        "piqa.test.json: set MLX_MCSD_DATA to the folder of commonsense/piqa.test.json.\n"
    )
    assert err.startswith("error: no ")
