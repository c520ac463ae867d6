"""Streams hold every token of every document once an epoch, and say where documents begin."""

from types import SimpleNamespace

import numpy as np
import pytest

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.training.streams import Streams


class Documents:
    """Documents whose every token is another number: 1000 times the document plus the place."""

    def __init__(self, lengths, prompts=None):
        self.lengths = np.array(lengths, np.int64)
        self.prompts = np.array(prompts or [0] * len(lengths), np.int64)
        self.tokens = np.zeros(sum(lengths), np.int32)

    def __len__(self):
        return len(self.lengths)

    def read(self, document, place, count):
        start = 1000 * (document + 1) + place
        assert place + count <= self.lengths[document]
        return np.arange(start, start + count)


def read(streams, segments):
    """All inputs, targets, scored and reset of the first segments, (B, n N) each."""
    found = [vars(streams.segment(i)) for i in range(segments)]
    return SimpleNamespace(**{k: np.concatenate([f[k] for f in found], axis=1) for k in found[0]})


LENGTHS = [7, 1, 30, 2, 12, 64, 5]  # 121 tokens


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("N", [1, 5, 40, 300])
def test_an_epoch_reads_every_token_once(rows, N):
    streams = Streams(Documents(LENGTHS), rows, N, seed=3)
    width = sum(LENGTHS) // rows
    tokens = read(streams, -(-3 * width // N)).inputs
    for epoch in range(3):
        seen = tokens[:, epoch * width : (epoch + 1) * width].ravel()
        assert len(set(seen)) == rows * width
        whole = {1000 * (d + 1) + i for d, n in enumerate(LENGTHS) for i in range(n)}
        assert set(seen) <= whole and len(whole) - len(seen) < rows


def test_epochs_differ_and_the_seed_decides():
    def first_of_epochs(seed):
        tokens = read(Streams(Documents(LENGTHS), 1, 121, seed), 3).inputs[0]
        return [tuple(tokens[i * 121 : (i + 1) * 121]) for i in range(3)]

    assert len(set(first_of_epochs(1))) == 3
    assert first_of_epochs(1) == first_of_epochs(1) != first_of_epochs(2)
    assert first_of_epochs(None)[0] == first_of_epochs(None)[1]
    assert first_of_epochs(None)[0][:8] == (*range(1000, 1007), 2000)


@pytest.mark.parametrize("pack", [False, True], ids=["stream", "pack"])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("N", [4, 13, 64])
def test_what_is_reset_and_scored(rows, N, pack):
    """By the tokens alone: a jump is a reset, and no target behind one is learned."""
    prompts = [3, 0, 10, 2, 0, 63, 1]
    streams = Streams(Documents(LENGTHS, prompts), rows, N, seed=0, pack=pack)
    r = read(streams, 40)
    before = np.pad(r.inputs, [(0, 0), (1, 0)], constant_values=-5)[:, :-1]
    goes_on = r.inputs == before + 1
    # Where a new epoch begins too, even if its first token is by chance the next of a document.
    borders = np.cumsum([0, *(streams._width(epoch) for epoch in range(100))])
    goes_on[:, borders[borders < goes_on.shape[1]]] = False
    exists = r.inputs > 0
    assert exists.all() or pack
    np.testing.assert_array_equal(r.reset, exists & ~goes_on)
    np.testing.assert_array_equal(r.inputs[:, 1:], r.targets[:, :-1])
    place, document = r.targets % 1000, r.targets // 1000 - 1
    learned = goes_on[:, 1:] & (place >= np.array([*prompts, 0])[document])[:, :-1]
    np.testing.assert_array_equal(r.scored[:, :-1], learned & (r.targets[:, :-1] > 0))


@pytest.mark.parametrize("rows", [1, 3])
def test_pack_cuts_no_document_that_fits(rows, N=30):
    documents = Documents(LENGTHS)
    streams = Streams(documents, rows, N, seed=5, pack=True)
    segments = [streams.segment(i).inputs for i in range(12)]
    width = streams._width(0)
    for document, length in enumerate(LENGTHS):
        wanted = set(range(1000 * (document + 1), 1000 * (document + 1) + length))
        homes = [
            (i, row)
            for i in range(width // N)
            for row in range(rows)
            if wanted & set(segments[i][row])
        ]
        read = set().union(*(set(segments[i][row]) for i, row in homes))
        assert wanted <= read, "in the first epoch"
        assert len(homes) == 1 or length > N


@pytest.mark.parametrize("forget", [0.25, 1.0])
def test_some_segments_begin_anew(forget, N=8):
    """In the middle of a document, whose tokens are learned all the same."""
    plain, other = (Streams(Documents([40_000]), 4, N, 0, forget=f) for f in (0.0, forget))
    begun = []
    for number in range(200):
        a, b = plain.segment(number), other.segment(number)
        np.testing.assert_array_equal(a.inputs, b.inputs)
        np.testing.assert_array_equal(a.scored, b.scored)
        assert (not b.reset[:, 1:].any() and not a.reset.any()) or number == 0
        begun.append(b.reset[:, 0])
    begun = np.array(begun)
    assert begun.mean() == pytest.approx(forget, abs=0.05)
    assert forget == 1.0 or len({row.tobytes() for row in begun.T}) == 4, "each row by itself"
    np.testing.assert_array_equal(other.segment(7).reset, other.segment(7).reset)


def test_named():
    streams = Streams(Documents(LENGTHS), 2, 16, seed=0)
    for number in range(10):
        seen = set((streams.segment(number).inputs // 1000 - 1).ravel().tolist())
        assert streams.named(number) == sorted(seen)


def test_too_few_tokens():
    with pytest.raises(MCSDError, match=r"batch_size must be at most half of the 7 tokens .* is 4"):
        Streams(Documents([3, 4]), 4, 8, seed=0)
