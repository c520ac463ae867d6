"""Rows of unequal length in one batch, and documents packed in one row, against each alone."""

import mlx.core as mx
import numpy as np
import pytest

import oracle
from models import mlx_model, one_by_one, random_splits, random_tokens, run
from oracle import VARIANTS, random_checkpoint, relative_error

TOLERANCE = 1e-5  # float32, relative to the largest logit

# --- unequal prompts in one batch --------------------------------------------------------------

PROMPTS = (5, 0, 64, 1, 90)  # lengths; a row of none begins with its first decoded token
DECODED = 3


@pytest.fixture(scope="module", params=VARIANTS[:1] + VARIANTS[3:5] + VARIANTS[-3:])
def batch(request):
    """A model, prompts and continuations of unequal length, and the oracle's logits of each."""
    config, tensors = random_checkpoint(10, hidden_size=15, num_channels=3, **request.param)
    rows = [random_tokens(11 + i, 1, N + DECODED)[0] for i, N in enumerate(PROMPTS)]
    want = [oracle.logits(config, tensors, row[None])[0] for row in rows]
    return mlx_model(config, tensors), rows, want


def pad(rows, side):
    """Prompts padded with random ids, so that a leak shows: (B, max length)."""
    width = max(PROMPTS)
    tokens = random_tokens(99, len(rows), width)
    for i, (row, N) in enumerate(zip(rows, PROMPTS, strict=True)):
        at = slice(width - N, width) if side == "left" else slice(0, N)
        tokens[i, at] = row[:N]
    return tokens


def decode(model, rows, cache):
    """The rows' last tokens, one at a time: logits (B, DECODED, K)."""
    last = np.stack([row[-DECODED:] for row in rows])
    return run(model, last, one_by_one(DECODED), cache)


def check_batch(prompt_logits, decoded_logits, want, side):
    for i, N in enumerate(PROMPTS):
        at = slice(max(PROMPTS) - N, None) if side == "left" else slice(0, N)
        if N:
            assert relative_error(prompt_logits[i, at], want[i][:N]) < TOLERANCE, N
        assert relative_error(decoded_logits[i], want[i][N:]) < TOLERANCE, N


@pytest.mark.parametrize("pieces", [1, 3], ids=["at once", "in pieces"])
def test_right_padding(batch, pieces):
    """As mlx-lm batches prompts: prepare(lengths), prefill in pieces, finalize(), decode."""
    model, rows, want = batch
    cache = model.make_cache()
    for c in cache:
        c.prepare(lengths=list(PROMPTS))
    splits = random_splits(12, max(PROMPTS), pieces)
    prompt = run(model, pad(rows, "right"), splits, cache)
    for c in cache:
        c.finalize()
        assert c.cache[-1].tolist() == list(PROMPTS)  # tokens seen, per row
    check_batch(prompt, decode(model, rows, cache), want, "right")


@pytest.mark.parametrize("pieces", [1, 3], ids=["at once", "in pieces"])
def test_left_padding(batch, pieces):
    """As mlx-lm's caches with left_padding, which is never finalized before decoding."""
    model, rows, want = batch
    cache = model.make_cache()
    for c in cache:
        c.left_padding = mx.array([max(PROMPTS) - N for N in PROMPTS])
    splits = random_splits(13, max(PROMPTS), pieces)
    prompt = run(model, pad(rows, "left"), splits, cache)
    for c in cache:
        assert c.cache[-1].tolist() == list(PROMPTS)
    check_batch(prompt, decode(model, rows, cache), want, "left")


@pytest.mark.parametrize("side", ["left", "right"])
def test_mask_argument(batch, side):
    """A mask given by the caller does what the cache's own does, with a cache and without."""
    model, rows, want = batch
    tokens, at = mx.array(pad(rows, side)), np.arange(max(PROMPTS))
    length = np.array(PROMPTS)[:, None]
    mask = mx.array(at >= max(PROMPTS) - length if side == "left" else at < length)
    cache = model.make_cache()
    prompt = np.array(model(tokens, cache=cache, mask=mask))
    decoded = decode(model, rows, cache)
    check_batch(prompt, decoded, want, side)
    check_batch(np.array(model(tokens, mask=mask)), decoded, want, side)


def test_mask_joins_the_caches(batch):
    """A token is real only if both masks say so; padding may lie between real tokens."""
    model, _, _ = batch
    tokens, lengths = random_tokens(50, 3, 70), np.array([70, 12, 65])
    mask = np.random.default_rng(51).random((3, 70)) < 0.6
    cache = model.make_cache()
    for c in cache:
        c.prepare(lengths=lengths.tolist())
    got = np.array(model(mx.array(tokens), cache=cache, mask=mx.array(mask)))
    for i, real in enumerate(mask & (np.arange(70) < lengths[:, None])):
        want = run(model, tokens[i : i + 1, real])[0]
        assert relative_error(got[i, real], want) < TOLERANCE
        assert all(c.cache[-1][i].item() == real.sum() for c in cache)


def test_masked_step_is_a_no_op(batch):
    """A step in which a row is masked leaves that row's state bit for bit."""
    model, rows, _ = batch
    cache = model.make_cache()
    run(model, np.stack([row[:3] for row in rows]), cache=cache)
    before = [[np.array(a) for a in c.cache] for c in cache]
    mask = mx.array([[True], [False], [True], [False], [True]])
    model(mx.array(random_tokens(14, 5, 1)), cache=cache, mask=mask)
    for c, arrays in zip(cache, before, strict=True):
        for got, was in zip(c.cache, arrays, strict=True):
            same = (np.array(got) == was).reshape(5, -1).all(axis=1)
            assert same.tolist() == [False, True, False, True, False]


def test_rows_come_and_go(batch):
    """Rows dropped, split off and joined between steps keep their own state."""
    model, rows, want = batch
    cache, late = model.make_cache(), model.make_cache()
    for c in cache:
        c.prepare(lengths=list(PROMPTS))
    run(model, pad(rows, "right"), cache=cache)
    run(model, rows[3][None, :1], cache=late)
    for c, other in zip(cache, late, strict=True):
        c.finalize()
        c.filter(mx.array([4, 0]))
        c.extend(other)
    order = [4, 0, 3]
    decoded = decode(model, [rows[i] for i in order], cache)
    for got, i in zip(decoded, order, strict=True):
        assert relative_error(got, want[i][-DECODED:]) < TOLERANCE
    single = [c.extract(1) for c in cache]
    merged = [type(c).merge([s, s]) for c, s in zip(cache, single, strict=True)]
    token = rows[0][:1]
    alone = afresh(batch, rows[0], token)
    assert relative_error(run(model, token[None], cache=single)[0, 0], alone) < TOLERANCE
    both = run(model, np.stack([token, token]), cache=merged)
    assert relative_error(both[:, 0], np.stack([alone, alone])) < TOLERANCE


def afresh(batch, row, token):
    """The last logits of a row followed by one more token, without any cache."""
    model = batch[0]
    return run(model, np.concatenate([row, token])[None])[0, -1]


# --- packed documents --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS[:1] + VARIANTS[3:5])
def test_packed_documents(variant):
    """Documents packed with `reset` equal the documents alone: at once, in runs, step by step."""
    config, tensors = random_checkpoint(15, hidden_size=15, num_channels=3, **variant)
    model = mlx_model(config, tensors)
    tokens, resets = random_tokens(16, 2, 150), np.zeros((2, 150), bool)
    resets[0, [0, 1, 2, 63, 64, 65, 128]] = True  # documents of one token, ends of chunks
    resets[1, [70, 149]] = True
    want = oracle.logits(config, tensors, tokens, resets)
    assert relative_error(run(model, tokens, reset=resets), want) < TOLERANCE
    splits = random_splits(17, 150)
    assert relative_error(run(model, tokens, splits, reset=resets), want) < TOLERANCE
    steps = run(model, tokens[:, :70], one_by_one(70), reset=resets)
    assert relative_error(steps, want[:, :70]) < TOLERANCE


def test_packed_and_padded():
    """Both at once: padding between documents and inside them; a reset on padding is void."""
    config, tensors = random_checkpoint(18)
    model = mlx_model(config, tensors)
    tokens, rng = random_tokens(19, 3, 150), np.random.default_rng(19)
    mask, resets = rng.random((3, 150)) < 0.7, rng.random((3, 150)) < 0.1
    want = [
        oracle.logits(config, tensors, *(a[None, real] for a in (row, reset)))[0]
        for row, reset, real in zip(tokens, resets, mask, strict=True)
    ]
    for N, splits in ((150, None), (150, random_splits(19, 150)), (60, one_by_one(60))):
        got = run(model, tokens[:, :N], splits, reset=resets[:, :N], mask=mask[:, :N])
        for row, real, alone in zip(got, mask[:, :N], want, strict=True):
            assert relative_error(row[real], alone[: real.sum()]) < TOLERANCE, splits
