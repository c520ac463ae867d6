"""The state: what it holds, what a snapshot costs and is worth, and which files it refuses."""

import json
import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from mlx_mcsd import state as states
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.state import State, fingerprint, state_bytes
from models import mlx_model, random_tokens
from oracle import VARIANTS, random_checkpoint, relative_error

TOKENS = random_tokens(3, 70).tolist()


def make_model(seed=0, **config):
    return mlx_model(*random_checkpoint(seed, **config))


@pytest.fixture(scope="module")
def model():
    """A random model; nothing in the tests changes it."""
    return make_model()


@pytest.fixture
def state(model):
    """A state that read something and waits at its last token."""
    state = State(model)
    state.read(TOKENS[:31])
    return state


def greedy(state, count):
    """The likeliest tokens from here on, and the logits behind them; moves the state."""
    tokens, logits = [], []
    for _ in range(count):
        logits.append(state.model(mx.array([state.pending]), cache=state.cache)[0, -1])
        tokens.append(int(mx.argmax(logits[-1])))
        state.advance(state.pending, tokens[-1:])
    return tokens, np.array(mx.stack(logits))


def numbers(state):
    """Every number the state holds, exactly."""
    return [np.array(a).tobytes() for c in state.cache for a in c.cache]


def described(state):
    return numbers(state), state.tokens_seen, state.hash, state.pending, state.tail


# --- what it holds -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_size_is_what_the_config_promises(variant):
    model = make_model(num_channels=3, **variant)
    promised = state_bytes(model)
    slots = len(variant["sections"])
    assert promised == 2 * 4 * (slots * 24 + 1)  # L layers of slots x D floats and a count
    state = State.make(model)
    assert state.nbytes == promised
    state.read(TOKENS)
    assert state.nbytes == promised
    assert len(state.to_bytes()) < promised + 2000
    assert State.from_bytes(state.to_bytes(), model).nbytes == promised


@pytest.mark.parametrize("splits", [(70,), (1,) * 70, (0, 3, 64, 3), (69, 1)], ids=str)
@pytest.mark.parametrize("step_size", [1, 7, 2048])
def test_reading_in_pieces_is_reading_at_once(model, splits, step_size):
    want = model(mx.array([TOKENS]))[0, -1]
    state, rest, steps = State(model), list(TOKENS), []
    for n in splits:
        state.read(rest[:n], step_size, steps.append)
        del rest[:n]
    assert (state.tokens_seen, state.pending) == (69, (TOKENS[-1],))
    assert sum(steps) == 69 and max(steps) <= step_size
    whole = State(model)
    whole.advance(TOKENS[:-1])
    assert state.hash == whole.hash
    assert relative_error(greedy(state, 1)[1][0], want) < 1e-5  # float32


def test_hash_tells_order_and_value_and_length(model):
    def hashed(*tokens):
        state = State(model)
        state.advance(tokens)
        return state.hash

    hashes = [hashed(), hashed(0), hashed(0, 0), hashed(1, 2), hashed(2, 1), hashed(1, 2, 0)]
    assert len(set(hashes)) == len(hashes)
    assert hashed(1, 2) == hashed(1, 2)


def test_ids_outside_the_vocabulary_are_refused(model, state):
    before = described(state)
    for bad in (-1, 48):
        with pytest.raises(MCSDError, match=f"token ids must be from 0 to 47 but got {bad}"):
            state.read([1, bad])
    assert described(state) == before


# --- snapshots ---------------------------------------------------------------------------------


def test_snapshot_restores_the_very_bits(state):
    before, snapshot = described(state), state.snapshot()
    first = greedy(state, 20)
    assert described(state) != before
    for _ in range(3):
        state.restore(snapshot)
        assert described(state) == before
        tokens, logits = greedy(state, 20)
        assert tokens == first[0] and np.array_equal(logits, first[1])


def test_writes_into_the_cache_reach_no_snapshot_and_no_fork(state):
    before, snapshot, fork = described(state), state.snapshot(), state.fork()
    for c in state.cache:
        c.cache[0][...] = 7.0
        c.cache[0] += 1
    assert described(fork) == before
    state.restore(snapshot)
    assert described(state) == before
    state.cache[0].cache[0][...] = 7.0  # nor through what restore handed out
    state.restore(snapshot)
    assert described(state) == before


def test_forks_go_their_own_ways(state):
    fork = state.fork()
    want = greedy(state.fork(), 5)[0]
    state.read([1, 2, 3])
    assert greedy(fork, 5)[0] == want
    assert fork.hash != state.hash


def test_restore_ends_what_padding_a_batch_left(state):
    snapshot = state.snapshot()
    state.cache[0].prepare(lengths=[1])
    state.restore(snapshot)
    assert state.cache[0].lengths is None


def test_a_snapshot_of_another_shape_is_refused(state):
    other = State(make_model(hidden_size=20))
    with pytest.raises(MCSDError, match="of the same model"):
        state.restore(other.snapshot())


def test_snapshots_keep_nothing_else_alive(model):
    def after(n):
        """Bytes held by n snapshots along a text read in large pieces."""
        state, kept = State(model), []
        mx.clear_cache()
        start = mx.get_active_memory()
        for _ in range(n):
            state.read(TOKENS * 8)
            kept.append(state.snapshot())
        return mx.get_active_memory() - start

    after(1)
    each = (after(24) - after(4)) / 20
    # An array takes at least 64 bytes of its own; a layer's activations would be 560 x D x 4.
    assert each <= state_bytes(model) + 64 * 6


# --- the fingerprint ---------------------------------------------------------------------------


def test_fingerprint_is_of_every_value_and_of_the_config(model):
    config, tensors = random_checkpoint(0)
    same = fingerprint(mlx_model(config, tensors))
    assert same == fingerprint(model) and len(same) == 32
    seen = {same}
    for name in tensors:
        changed = tensors | {name: tensors[name].copy()}
        changed[name].flat[-1] += np.float32(1e-6)
        seen.add(fingerprint(mlx_model(config, changed)))
    assert len(seen) == len(tensors) + 1
    seen.add(fingerprint(mlx_model(config | {"rms_norm_eps": 1e-5}, tensors)))
    assert len(seen) == len(tensors) + 2


def test_fingerprint_follows_a_model_that_changes():
    model = make_model(hidden_size=64, num_channels=2, intermediate_size=64)
    first = fingerprint(model)
    model.set_dtype(mx.float16)
    half = fingerprint(model)
    assert half != first
    model.set_dtype(mx.float32)
    assert fingerprint(model) == half  # the same values, in another dtype
    nn.quantize(model, group_size=32, bits=8)
    quantized = fingerprint(model)
    assert quantized not in (first, half)


def test_fingerprint_is_computed_once(model, monkeypatch):
    want = fingerprint(model)
    monkeypatch.delattr(states.hashlib, "sha256")
    assert fingerprint(model) == want


def test_large_weights_are_hashed_whole(monkeypatch):
    whole = fingerprint(make_model())
    monkeypatch.setattr(states, "PIECE", 64)
    config, tensors = random_checkpoint(0)
    pieces = fingerprint(mlx_model(config, tensors))
    tensors["lm_head.weight"][0, 0] += 1
    assert fingerprint(mlx_model(config, tensors)) != pieces
    assert pieces != whole  # what a piece is belongs to the format


# --- files -------------------------------------------------------------------------------------


def test_a_state_comes_back_from_a_file(model, state, tmp_path):
    state.tail, state.random_key = (5, 6), mx.array([7, 2**32 - 1], mx.uint32)
    state.save(tmp_path / "a.state", "mlx_mcsd.read a.txt")
    loaded = State.load(tmp_path / "a.state", make_model())
    assert described(loaded) == described(state)
    assert (loaded.random_key.tolist(), loaded.command) == ([7, 2**32 - 1], "mlx_mcsd.read a.txt")
    assert greedy(loaded, 20)[0] == greedy(state, 20)[0]
    with safe_open(tmp_path / "a.state", "numpy") as file:
        metadata = file.metadata()
    assert metadata | {"checksum": ""} == {
        "format": "mlx_mcsd.state",
        "version": "1",
        "fingerprint": fingerprint(model),
        "dtype": "float32",
        "tokens_seen": "30",
        "tokens_hash": metadata["tokens_hash"],
        "pending": f"[{TOKENS[30]}]",
        "tail": "[5, 6]",
        "random_key": "[7, 4294967295]",
        "command": "mlx_mcsd.read a.txt",
        "checksum": "",
    }


def test_an_empty_state_comes_back(model):
    loaded = State.from_bytes(State(model).to_bytes(), model)
    assert described(loaded) == described(State(model))
    assert loaded.random_key is None


def test_saving_is_all_or_nothing(state, tmp_path, monkeypatch):
    file = tmp_path / "a.state"
    state.save(file)
    whole = file.read_bytes()
    state.read([1, 2])

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(MCSDError, match=r"cannot write .*a\.state: No space left on device"):
            state.save(file)
    assert file.read_bytes() == whole
    link = tmp_path / "link.state"
    link.symlink_to(file)
    state.save(link)
    assert link.is_symlink() and file.read_bytes() != whole
    assert described(State.load(file, state.model)) == described(state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.state", "link.state"]
    with pytest.raises(MCSDError, match=r"cannot write .*none/a\.state: No such file"):
        state.save(tmp_path / "none" / "a.state")


def test_a_state_that_is_not_finite_is_not_saved(state, tmp_path):
    state.cache[1].cache[0][0, 0, 0] = float("nan")
    with pytest.raises(MCSDError, match=r"must be finite to be saved but layers\.1\.0 is not"):
        state.save(tmp_path / "a.state")
    assert not any(tmp_path.iterdir())


def edited(state, sign=True, drop=(), arrays=None, **metadata):
    """The file of a state with changes, its checksum made to fit or not."""
    data = state.to_bytes()
    tensors = safetensors.numpy.load(data) | (arrays or {})
    facts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"] | metadata
    tensors = {key: a for key, a in tensors.items() if key not in drop}
    facts = {key: a for key, a in facts.items() if key not in drop}
    if sign:
        facts["checksum"] = states._checksum(facts, tensors)
    return safetensors.numpy.save(tensors, facts)


ZEROS = np.zeros((1, 2, 12), np.float32)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sign": False, "tokens_seen": "29"}, "damaged or edited"),
        ({"sign": False, "command": "x"}, "damaged or edited"),
        ({"sign": False, "arrays": {"layers.0.0": ZEROS}}, "damaged or edited"),
        ({"sign": False, "drop": ["checksum"]}, "damaged or edited"),
        ({"format": "pt"}, "another kind of safetensors file"),
        ({"drop": ["format"]}, "another kind of safetensors file"),
        ({"version": "2"}, "of version 1 but is of version '2'"),
        ({"drop": ["version"]}, "of version ''"),
        ({"fingerprint": "0" * 32}, "was saved by another, '00000000': config or weights differ"),
        ({"drop": ["fingerprint"]}, "saved by another, ''"),
        ({"dtype": "bfloat16"}, "in float32 but says 'bfloat16'"),
        ({"drop": ["dtype"]}, "in float32"),
        ({"arrays": {"layers.0.0": ZEROS.astype(np.float16)}}, "float32 and int32 .* holds F16"),
        ({"arrays": {"layers.0.0": ZEROS[..., :-1]}}, "arrays of this model's state"),
        ({"arrays": {"layers.0.2": ZEROS[0, 0, :1]}}, "arrays of this model's state"),
        ({"arrays": {"layers.9.0": ZEROS}}, "arrays of this model's state"),
        ({"drop": ["layers.1.1"]}, "arrays of this model's state"),
        ({"arrays": {"layers.0.1": ZEROS + np.float32("nan")}}, "finite .* layers.0.1"),
        ({"arrays": {"layers.0.1": ZEROS + np.float32("inf")}}, "finite .* layers.0.1"),
        ({"tokens_seen": "29"}, "says 29 tokens were read but layers.0.2 says 30"),
        ({"tokens_seen": "-1"}, "how many tokens were read but says '-1'"),
        ({"tokens_seen": "٣"}, "how many tokens were read"),
        ({"tokens_seen": "9" * 5000}, "how many tokens were read"),
        ({"drop": ["tokens_seen"]}, "how many tokens were read"),
        ({"arrays": {"layers.1.2": np.full(1, 31, np.int32)}}, "30 tokens .* layers.1.2 says 31"),
        ({"tokens_hash": "xyz"}, "hash of the tokens"),
        ({"drop": ["tokens_hash"]}, "hash of the tokens"),
        ({"pending": "[48]"}, "numbers from 0 to 47 for pending"),
        ({"pending": "[-1]"}, "for pending"),
        ({"pending": "[true]"}, "for pending"),
        ({"pending": "{}"}, "for pending"),
        ({"pending": "[" * 10**5}, "for pending"),
        ({"drop": ["pending"]}, "for pending"),
        ({"tail": '["a"]'}, "for tail"),
        ({"random_key": "[1]"}, "two numbers for random_key"),
        ({"random_key": "[1, 4294967296]"}, "for random_key"),
        ({"drop": ["random_key"]}, "for random_key"),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_is_not_a_state_of_this_model_is_refused(model, state, changes, expected):
    with pytest.raises(MCSDError, match=f"^\\[State\\] it .*{expected}") as caught:
        State.from_bytes(edited(state, **changes), model, "it")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_an_edit_that_changes_nothing_is_no_edit(model, state):
    assert described(State.from_bytes(edited(state), model)) == described(state)


def test_every_cut_and_every_flipped_byte_is_noticed(model, state):
    data = state.to_bytes()
    rng = np.random.default_rng(0)
    damaged = [data[:n] for n in (0, 1, 7, 8, 9, 100, len(data) - 1)] + [data + b"\0"]
    for i in [*range(12), *rng.integers(0, len(data), 300)]:
        damaged.append(data[:i] + bytes([data[i] ^ (1 << int(rng.integers(8)))]) + data[i + 1 :])
    for case in damaged:
        with pytest.raises(MCSDError) as caught:
            State.from_bytes(case, model)
        assert "\n" not in str(caught.value)


def test_files_that_are_no_states_are_refused(model, tmp_path):
    file = tmp_path / "a.state"
    with pytest.raises(MCSDError, match=r"cannot read .*a\.state: No such file"):
        State.load(file, model)
    with pytest.raises(MCSDError, match=r"cannot read .*: Is a directory"):
        State.load(tmp_path, model)
    with open(file, "wb") as large:
        large.truncate(2**40)  # a hole: never read
    with pytest.raises(MCSDError, match="392 bytes and a header, but is larger"):
        State.load(file, model)
    with pytest.raises(MCSDError, match="392 bytes and a header, but is larger"):
        State.from_bytes(bytes(392 + 2**20 + 1), model)
    if Path("/dev/zero").exists():
        with pytest.raises(MCSDError, match="but is larger"):
            State.load("/dev/zero", model)


def test_a_state_of_another_model_is_refused(state):
    for other in (make_model(seed=1), make_model(rms_norm_eps=1e-5)):
        with pytest.raises(MCSDError, match="config or weights differ"):
            State.from_bytes(state.to_bytes(), other)


def test_a_reader_of_the_old_file_keeps_it_while_a_new_one_is_saved(state, tmp_path):
    file, old = tmp_path / "a.state", tmp_path / "old.state"
    state.save(file)
    os.link(file, old)  # as whoever has it open sees it
    state.save(file, "another command")
    assert State.load(old, state.model).command == ""
    assert State.load(file, state.model).command == "another command"
