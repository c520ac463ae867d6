"""Long inputs a piece at a time: where they are cut, what is evaluated when, and the gradients."""

import mlx.core as mx
import pytest

from mlx_mcsd import pieces
from mlx_mcsd.pieces import in_pieces
from mlx_mcsd.recurrence import chunked

LAM = (0.5, 0.9, 1 - 2.0**-14)


@pytest.fixture
def short(monkeypatch):
    """Pieces of 10 tokens."""
    monkeypatch.setattr(pieces, "DISPATCH_TOKENS", 10)


@pytest.fixture
def sent(monkeypatch):
    """What is sent off, in order; and so it is."""
    log, evaluate = [], mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *a: (log.append(a), evaluate(*a)))
    return log


def scan(state, x, mask, reset):
    return chunked(x, LAM, state, mask, reset)


def arrays(N, B=2):
    x = mx.random.normal((B, N, 3, 5), key=mx.random.key(N))
    return mx.ones((B, 3, 5)), x, mx.random.normal((B, N), key=mx.random.key(1)) > -1, None


@pytest.mark.parametrize(
    "B, N, D, want",
    [
        (1, 2048, 2560, 2048),  # a piece of mlx-lm's prefill, uncut
        (1, 100_000, 2560, 17_476),
        (8, 100_000, 2560, 2184),
        (1, 200_000, 60, 131_072),
        (1, 3, 1 << 30, 1),
    ],
)
def test_a_dispatch_is_bounded(B, N, D, want):
    """By bytes where features are many, by the chain of tokens where they are few."""
    lengths = []

    def run(state, x):
        lengths.append(x.shape[1])
        return mx.zeros((B, x.shape[1])), state

    y, _ = in_pieces(run, mx.array(0), mx.broadcast_to(mx.array(0.0), (B, N, 1, D)))
    assert lengths[0] == want == max(lengths) and sum(lengths) == N == y.shape[1]
    assert want * B * D * pieces.MOST_BYTES <= max(pieces.DISPATCH_BYTES, B * D * pieces.MOST_BYTES)


@pytest.mark.parametrize("N", [9, 10, 11, 35])
def test_pieces_make_the_whole(short, N):
    got, want = in_pieces(scan, *arrays(N)), scan(*arrays(N))
    assert all(mx.allclose(g, w, rtol=1e-5, atol=1e-5) for g, w in zip(got, want, strict=True))


def test_backwards(short):
    """The last piece first, the outputs in order all the same."""
    begins = []

    def run(state, x):
        begins.append(int(x[0, 0, 0, 0]))
        return x, state + x[:, 0].sum()

    x = mx.broadcast_to(mx.arange(25.0)[None, :, None, None], (1, 25, 1, 1))
    y, state = in_pieces(run, mx.array(0.0), x, backwards=True)
    assert begins == [20, 10, 0] and mx.array_equal(x, y) and state == 30


def test_each_piece_is_sent_off_before_the_next(short, sent):
    ran = []

    def run(state, x, *flags):
        ran.append(len(sent))
        return scan(state, x, *flags)

    last = in_pieces(run, *arrays(35))[1]
    assert ran == [0, 1, 2, 3] and len(sent) == 4
    assert [y.shape[1] for y, _ in sent] == [10, 10, 10, 5]
    assert sent[-1][1] is last  # the state as well as the output


def test_what_is_short_is_left_lazy(short, sent):
    in_pieces(scan, *arrays(10))
    assert sent == []


def test_in_a_trace_nothing_is_evaluated(short):
    """Compiled or exported, pieces make one graph; the refusal to evaluate is no error."""
    state, x, mask, _ = arrays(35)
    want = scan(state, x, mask, None)
    got = mx.compile(lambda *a: in_pieces(scan, *a, None))(state, x, mask)
    assert all(mx.allclose(g, w, rtol=1e-5, atol=1e-5) for g, w in zip(got, want, strict=True))
    mx.export_function([].append, lambda *a: in_pieces(scan, *a, None), state, x, mask)


def test_gradients_cross_pieces(short, sent):
    state, x, mask, _ = arrays(35)

    def grads(form):
        def loss(state, x):
            h, last = form(state, x)
            return (h * h).sum() + last.sum()

        return mx.grad(loss, argnums=(0, 1))(state, x)

    got = grads(lambda state, x: in_pieces(scan, state, x, mask, None))
    assert len(sent) == 4  # under a gradient there are values
    want = grads(lambda state, x: scan(state, x, mask, None))
    for g, w in zip(got, want, strict=True):
        assert mx.abs(g - w).max() <= 1e-5 * mx.abs(w).max()
