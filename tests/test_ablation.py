"""examples/ablation.py, small: what is compared is comparable, and the table says what came out."""

import json
import re

import pytest
import torch

from storybook import CASED, EXAMPLES, LOWER

OPTIONS = {
    **{"vocab-size": 330, "hidden-size": 16, "channels": 2, "layers": 1, "seeds": 2},
    **{"intermediate-size": 24, "batch": 2, "length": 16, "steps": 4, "threads": 1},
}


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    """Run the example in tmp_path / "out"; options replace those above."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import ablation

    (tmp_path / "cased.txt").write_text(CASED, encoding="utf-8")
    (tmp_path / "lower.txt").write_text(LOWER, encoding="utf-8")
    data = ["--stories", tmp_path / "cased.txt", "--lower", tmp_path / "lower.txt"]

    def run(**options):
        options = OPTIONS | options
        flags = [word for key, value in options.items() for word in (f"--{key}", value)]
        ablation.main([*map(str, ["--out", tmp_path / "out", *data, *flags])])
        return tmp_path / "out"

    threads = torch.get_num_threads()
    run.module = ablation
    yield run
    torch.set_num_threads(threads)


def test_killed_and_run_again_it_ends_in_the_same_table(ablation, monkeypatch, capsys):
    class KilledError(Exception):
        pass

    seen, train = [], ablation.module.train

    def watch(args, name, seed, batches, *rest):
        seen.append((seed, name, batches))
        if len(seen) == 4:
            raise KilledError
        return train(args, name, seed, batches, *rest)

    monkeypatch.setattr(ablation.module, "train", watch)
    with pytest.raises(KilledError):
        ablation()
    out = ablation()
    names = list(ablation.module.VARIANTS)
    order = [(seed, name) for seed in range(2) for name in names]
    assert [run[:2] for run in seen] == [*order[:4], *order[3:]]
    # The same tokens in the same order within a seed, others in another.
    for seed, _, batches in seen:
        assert torch.equal(batches, seen[0][2]) == (seed == 0)
    table = (out / "ablation.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    for name in names:
        runs = [
            json.loads((out / f"{s}-{name.replace(' ', '-')}.json").read_text()) for s in (0, 1)
        ]
        losses = [run["unseen"] for run in runs]
        row = re.search(rf"^\| {name} \| ([\d,]+) \| ([\d.]+) ± [\d.]+ \| (.*?) \|", table, re.M)
        assert int(row[1].replace(",", "")) == runs[0]["parameters"]
        assert float(row[2]) == pytest.approx(sum(losses) / 2, abs=1e-3)
        assert [*map(float, row[3].split(", "))] == pytest.approx(losses, abs=1e-3)
        assert all(run["losses"][-1] < run["losses"][0] for run in runs)
    with pytest.raises(SystemExit):
        ablation(steps=5)
    assert "of a run with other options" in capsys.readouterr().err


def test_variants_start_alike_where_they_share_tensors(ablation):
    args = ablation.module.parse_args(["--out", ".", "--stories", "x"])
    of = {
        name: dict(ablation.module.make_model(args, sections, 0, 1).named_parameters())
        for name, sections in ablation.module.VARIANTS.items()
    }
    for name, parameters in of.items():
        for key, value in parameters.items():
            if key in of["full"] and value.shape == of["full"][key].shape:
                assert torch.equal(value, of["full"][key]), (name, key)
    sizes = {name: sum(p.numel() for p in parameters.values()) for name, parameters in of.items()}
    assert sizes["without decay"] < sizes["full"] > sizes["without slope"]
    other = ablation.module.make_model(args, ["slope"], 1, 1).lm_head.weight
    assert not torch.equal(other, of["full"]["model.embed_tokens.weight"])


def test_the_order_is_read_from_pairs_of_the_same_seed(ablation):
    """Seeds differ by 0.5, far more than the variants, yet pairs separate what they can."""
    unseen = {
        "full": [3.0, 3.5, 4.0],
        "without decay": [3.1, 3.61, 4.09],
        "double slope": [3.12, 3.57, 4.11],
        "double decay": [3.0, 3.45, 3.99],
        "without slope": [3.2, 3.3, 4.1],
    }
    runs = {name: [{"unseen": v} for v in values] for name, values in unseen.items()}
    difference, margin = ablation.module.compare(runs, "full", "without decay")
    assert difference == pytest.approx(0.1)
    assert margin == pytest.approx(4.303 * 0.01 / 3**0.5)
    said = [line.strip(" |").split(" | ")[-1] for line in ablation.module.verdicts(runs)]
    assert said == ["shows", "equal within the margin", "reversed", "not separated"]
