"""The example of what a memory of fixed decays recalls: its questions, its learning, its files."""

import json

import numpy as np
import pytest


@pytest.fixture
def recall(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "examples"))
    import recall

    return recall


@pytest.mark.parametrize("P", [1, 2, 7, 32])
def test_every_key_is_asked_once_and_its_value_wanted(recall, P):
    tokens, targets = recall.pairs_batch(np.random.default_rng(P), 5, P)
    assert tokens.shape == targets.shape == (5, 4 * P)
    orders = set()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        told = dict(zip(row[: 2 * P : 2], row[1 : 2 * P : 2], strict=True))
        assert len(told) == P and max(told) < recall.KEYS <= min(told.values())
        asked = row[2 * P :: 2]
        assert sorted(asked) == sorted(told)
        assert [told[key] for key in asked] == wanted[2 * P :: 2] == row[2 * P + 1 :: 2]
        assert set(wanted[: 2 * P] + wanted[2 * P + 1 :: 2]) == {-1}
        orders.add(tuple(list(told).index(key) for key in asked))
    assert len(orders) == (1 if P == 1 else 2 if P == 2 else 5)


@pytest.mark.parametrize("own_kind", [False, True])
def test_the_needle_is_marked_and_wanted_ever_after(recall, own_kind):
    tokens, targets = recall.needle_batch(np.random.default_rng(0), 40, 30, own_kind)
    assert (tokens[:, 0] == recall.MARK).all() and (targets[:, 0] == -1).all()
    assert (targets[:, 1:] == tokens[:, 1:2]).all()
    assert len(set(tokens[:, 1].tolist())) > 15
    assert ((tokens[:, 2:] < recall.VALUES) == own_kind).all()
    assert (tokens[:, 1:] < recall.MARK).all() and tokens[:, 1].max() < recall.VALUES


def test_a_model_learns_and_a_run_goes_on(recall, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recall, "PAIRS", (2, 4))
    monkeypatch.setattr(recall, "LENGTHS", (8, 12))
    monkeypatch.setattr(recall, "DISTANCES", [2, 4, 8])
    monkeypatch.setattr(recall, "TOKENS", 384)
    names = ["D = 16, C = 8", "C = 2, other noise"]
    argv = ["--out", str(tmp_path), "--steps", "120"]
    recall.main([*argv, "--only", names[1]])
    found = json.loads((tmp_path / f"{names[1]}.json").read_text())["right"]
    assert [*found] == ["2", "4", "8"]
    assert found["2"] > 0.5  # by chance 1 / 32

    recall.main([*argv, "--only", names[0]])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        recall.main([*argv, "--seed", "1"])
    assert "is of a run with other options" in capsys.readouterr().err
    monkeypatch.setattr(recall, "train", None)  # both are there: nothing is left to learn
    recall.main([*argv, "--only", *names])
    out = capsys.readouterr().out
    pairs, needle = (part.splitlines() for part in out.strip().split("\n\n"))
    assert pairs[0] == "| pairs | 2 | 4 |" and pairs[2].startswith(f"| {names[0]} | ")
    cells = [f"{y:.0%}" for y in found.values()]
    assert needle[2] == f"| {names[1]} | {' | '.join(cells)} |"
    assert (tmp_path / "recall.md").read_text() == out
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(TypeError):
        recall.main([*argv, "--only", "D = 32, C = 8"])


def test_a_seed_makes_the_same_model_and_questions(recall, monkeypatch):
    monkeypatch.setattr(recall, "PAIRS", (2,))
    results = [
        recall.learn_pairs("", lambda: recall.make_model(16, 2), 3, seed) for seed in (1, 1, 2)
    ]
    assert results[0] == results[1] != results[2]
