"""A step is that of the whole batch, however it is cut up; its state goes on, its gradient not."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.training import checkpoint
from mlx_mcsd.training.config import TrainConfig
from mlx_mcsd.training.step import Stepper, drop, learning_rate, nats
from mlx_mcsd.training.streams import Segment
from models import mlx_model
from oracle import CONFIG, random_checkpoint, relative_error

B, N, K = 4, 12, CONFIG["vocab_size"]
TOLERANCE = 1e-5


def make(**settings):
    config = TrainConfig(**{"batch_size": B, "max_seq_length": N, "warmup": 0} | settings)
    model = mlx_model(*random_checkpoint(1, num_hidden_layers=2))
    return Stepper(model, config, mx.distributed.init())


def segments(count=3, seed=0):
    """Consecutive segments of streams with documents, some of whose targets are not learned."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, K, (B, count * N + 1)).astype(np.int32)
    reset = rng.random((B, count * N)) < 0.1
    reset[:, 0] = True
    scored = rng.random((B, count * N)) < 0.8
    scored[0] = False  # rows differ in how much is learned
    cuts = [slice(i * N, (i + 1) * N) for i in range(count)]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    return [Segment(inputs[:, c], targets[:, c], scored[:, c], reset[:, c]) for c in cuts]


def weights(stepper):
    return {k: np.array(v) for k, v in tree_flatten(stepper.model.parameters())}


def assert_close(a, b, tolerance=TOLERANCE):
    assert a.keys() == b.keys()
    errors = {name: relative_error(a[name], b[name]) for name in b}
    assert max(errors.values()) < tolerance, errors


def run(stepper, parts):
    return [stepper(i, part) for i, part in enumerate(parts)]


def test_states_go_on_from_segment_to_segment():
    """What three segments predict is what the whole text predicts, documents apart."""
    model = mlx_model(*random_checkpoint(1, num_hidden_layers=2))
    parts = segments()
    whole = Segment(*(np.concatenate(a, axis=1) for a in zip(*map(values, parts), strict=True)))
    stepper = make()
    states, logits = stepper.fresh(B), []
    for part in parts:
        got, states = stepper.logits(mx.array(part.inputs), states, mx.array(part.reset))
        logits.append(np.array(got))
    want = np.array(model(mx.array(whole.inputs), reset=mx.array(whole.reset)))
    assert relative_error(np.concatenate(logits, axis=1), want) < TOLERANCE


def values(segment):
    return segment.inputs, segment.targets, segment.scored, segment.reset


def test_the_loss_is_the_sum_over_what_is_learned():
    stepper, (part, *_) = make(learning_rate=1e-30), segments()
    model = mlx_model(*random_checkpoint(1, num_hidden_layers=2))
    logits = model(mx.array(part.inputs), reset=mx.array(part.reset))
    log_p = np.array(nn.log_softmax(logits, axis=-1))
    want = -np.take_along_axis(log_p, part.targets[..., None], -1)[..., 0][part.scored].sum()
    assert stepper(0, part).nats == pytest.approx(want, rel=TOLERANCE)


def test_gradients_are_those_of_the_mean_and_stop_at_the_segment():
    """Against autodiff of the model itself, its cache filled by the segment before."""
    first, second, _ = segments()
    model = mlx_model(*random_checkpoint(1, num_hidden_layers=2))
    stepper = make(max_grad_norm=1e9)
    stepper(0, first)
    model.update(stepper.model.parameters())
    before = [[mx.array(a) for a in state] for state in stepper.states[0]]

    def loss(model):
        cache = model.make_cache()
        for c, state in zip(cache, before, strict=True):
            c.cache = list(state)
        logits = model(mx.array(second.inputs), cache=cache, reset=mx.array(second.reset))
        losses = nn.losses.cross_entropy(logits, mx.array(second.targets))
        return (losses * mx.array(second.scored)).sum() / int(second.scored.sum())

    want = nn.value_and_grad(model, loss)(model)[1]
    norm = float(np.sqrt(sum(np.square(np.array(g)).sum() for _, g in tree_flatten(want))))
    assert stepper(1, second).norm == pytest.approx(norm, rel=TOLERANCE)
    assert norm > 1e-3


def test_the_update_is_adamw_with_decay_of_matrices_alone():
    """One step from gradients of our own, against the formula."""
    stepper = make(weight_decay=0.25, learning_rate=0.01, max_grad_norm=1e9)
    before, (part, *_) = weights(stepper), segments()
    stepper(0, part)
    for name, after in weights(stepper).items():
        decayed = "_proj" in name or "lm_head" in name
        # Adam's first step moves every weight that has a gradient by the rate, up or down.
        moved = after - before[name] * (1 - 0.01 * 0.25 * decayed)
        size = np.abs(moved[moved != 0])
        assert size.max() <= 0.01 * 1.001, name
        assert np.median(size) == pytest.approx(0.01, rel=1e-2), name


@pytest.mark.parametrize(
    "settings",
    [
        dict(batch_size=2, grad_accumulation_steps=2),
        dict(batch_size=1, grad_accumulation_steps=4),
        dict(grad_checkpoint=True),
    ],
    ids=["2 batches of 2", "4 batches of 1", "grad checkpoint"],
)
def test_what_changes_memory_changes_nothing_else(settings):
    plain, other, parts = make(), make(**settings), segments()
    want, got = run(plain, parts), run(other, parts)
    assert [g.nats for g in got] == pytest.approx([w.nats for w in want], rel=TOLERANCE)
    assert [g.norm for g in got] == pytest.approx([w.norm for w in want], rel=TOLERANCE)
    # Adam divides gradients by their size: of tiny ones rounding decides more than 1e-5.
    assert_close(weights(other), weights(plain), 1e-4)


def test_clipping():
    part = segments()[0]
    norm = make(max_grad_norm=1e9)(0, part).norm
    stepper = make(max_grad_norm=norm / 10, adam_beta1=0.0)
    assert stepper(0, part).norm == pytest.approx(norm, rel=TOLERANCE)
    moments = [v for k, v in tree_flatten(stepper.optimizer.state) if k.endswith(".m")]
    got = np.sqrt(sum(np.square(np.array(m)).sum() for m in moments))
    assert got == pytest.approx(norm / 10, rel=1e-4)


def test_dropout_follows_the_seed_and_the_step():
    part = segments()[0]

    def loss(number=0, **settings):
        return make(dropout=0.3, **settings)(number, part).nats

    assert loss() == loss()
    assert len({loss(), loss(1), loss(seed=1), make()(0, part).nats}) == 4
    again = loss(grad_checkpoint=True)
    assert again == pytest.approx(loss(), rel=TOLERANCE)


def test_layers_computed_again_drop_what_they_dropped():
    part = segments()[0]
    plain, again = make(dropout=0.3), make(dropout=0.3, grad_checkpoint=True)
    assert again(0, part).norm == pytest.approx(plain(0, part).norm, rel=TOLERANCE)


def test_dropout_keeps_the_mean():
    y = np.array(drop(mx.ones(40_000), 0.25, mx.random.key(0)))
    assert set(y.tolist()) == {0.0, np.float32(1 / 0.75)}
    assert y.mean() == pytest.approx(1, abs=0.02)


def test_bfloat16_computes_narrow_and_keeps_float32():
    wide, narrow, parts = make(), make(dtype="bfloat16"), segments()
    run(wide, parts)
    results = run(narrow, parts)
    dtypes = {v.dtype for _, v in tree_flatten(narrow.model.parameters())}
    states = {a.dtype for state in narrow.states[0] for a in state}
    assert dtypes == {mx.float32} and states == {mx.float32, mx.int32}
    for stepper in (wide, narrow):  # a bfloat16 has 8 bits
        assert all(np.isfinite(v).all() for v in weights(stepper).values())
    assert results[0].nats == pytest.approx(make()(0, parts[0]).nats, rel=5e-3)
    assert results[0].nats != make()(0, parts[0]).nats
    logits, _ = narrow.logits(mx.array(parts[0].inputs), narrow.fresh(B), mx.array(parts[0].reset))
    assert logits.dtype == mx.bfloat16


def test_small_updates_are_not_lost_in_bfloat16():
    stepper = make(dtype="bfloat16", learning_rate=1e-6)
    before = weights(stepper)
    run(stepper, segments())
    name = "model.norm.weight"  # about 1, where bfloat16 steps by 0.008
    assert (weights(stepper)[name] != before[name]).mean() > 0.9


def test_nothing_to_learn_is_no_division_by_zero():
    stepper, part = make(weight_decay=0.0), segments()[0]
    part.scored[:] = False
    before = weights(stepper)
    result = stepper(0, part)
    assert result.nats == 0 and result.norm == 0
    assert all((v == before[k]).all() for k, v in weights(stepper).items())


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(iters=110, warmup=10, learning_rate=2.0, final_lr=0.25)
    rates = [learning_rate(config, step) for step in range(110)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx((2.0 + 0.5) / 2)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(config, 110) == pytest.approx(0.5)
    assert learning_rate(TrainConfig(iters=1, warmup=0, learning_rate=2.0), 0) == 2.0


def test_mlx_agrees_on_nats():
    logits = mx.array(np.random.default_rng(0).normal(size=(1, 3, K)).astype(np.float32))
    targets = mx.array([[1, 2, 3]])
    want = nn.losses.cross_entropy(logits, targets)
    assert nats(logits, targets, mx.array([[True, False, True]])).item() == pytest.approx(
        (want[0, 0] + want[0, 2]).item()
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nobody_can_go_on_from_what_is_not_finite(bad):
    optimizer = optim.SGD(0.1)
    tree = {"model": {"a": mx.array([1.0, 2.0])}, "optimizer": optimizer.state}
    checkpoint.check(tree, 3)
    tree["model"]["a"][1] = bad
    with pytest.raises(MCSDError, match="not finite at step 3"):
        checkpoint.check(tree, 3)


def test_old_checkpoints_go(tmp_path):
    for step in (5, 10, 900):
        checkpoint.save(tmp_path / "c", step, {"a": mx.array([1.5])}, {"step": step}, keep=2)
    assert [p.stem for p in checkpoint.all_of(tmp_path / "c")] == ["00000010", "00000900"]
    tree, facts = checkpoint.load(checkpoint.all_of(tmp_path / "c")[-1])
    assert tree["a"].item() == 1.5 and facts == {"step": 900}


def test_a_damaged_checkpoint(tmp_path):
    path = checkpoint.save(tmp_path / "c", 1, {"a": mx.zeros(100)}, {}, keep=1)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(MCSDError, match="must be a whole safetensors file"):
        checkpoint.load(path)
    mx.save_safetensors(str(path), {"a": mx.zeros(1)})
    with pytest.raises(MCSDError, match="must be a checkpoint of this version"):
        checkpoint.load(path)


def test_a_compiled_step_learns_the_same(monkeypatch):
    """As on a GPU: its masks of dropout, states and rates are arguments, not constants."""
    settings = dict(dropout=0.2, grad_checkpoint=True, max_grad_norm=0.5, learning_rate=1e-2)
    parts, plain, compiled = segments(), make(**settings), make(**settings)
    want = run(plain, parts)
    monkeypatch.setattr("mlx_mcsd.training.step.compiles", lambda: True)
    mx.enable_compile()
    try:
        got = run(compiled, parts)
    finally:
        mx.disable_compile()
    assert np.allclose(got, want, rtol=TOLERANCE)
    assert_close(weights(compiled), weights(plain), tolerance=1e-4)
