"""The decode step: compiled and packed it says what the plain model says, whatever changes."""

import copy
import gc
import io
import re
import weakref
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

import oracle
from mlx_mcsd import kernels, linear, step
from models import mlx_model, random_tokens, run
from oracle import VARIANTS, random_checkpoint, relative_error

TOLERANCE = 1e-5  # float32, relative to the largest logit
packs = pytest.mark.skipif(mx.metal.is_available(), reason="nothing is packed where Metal is")
SIZES = dict(hidden_size=64, num_channels=4, intermediate_size=96, vocab_size=128)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """The compiled step from the first token on."""
    monkeypatch.setattr(step, "PLAIN_TOKENS", 0)


@pytest.fixture
def compiler():
    """Compilation, which the suite does without, costs a run of g++ for each new kernel."""
    mx.enable_compile()
    yield
    mx.disable_compile()


def make(seed=0, **settings):
    return mlx_model(*random_checkpoint(seed, **SIZES | settings)).eval()


def both(model, tokens, read=3):
    """Logits and states of the tokens after the first `read`, by the step and by the plain form."""

    def steps(call):
        cache = model.make_cache()
        model(mx.array(tokens[:, :read]), cache=cache)
        parts = [call(mx.array(tokens[:, [i]]), cache) for i in range(read, tokens.shape[1])]
        states = [a for c in cache for a in c.cache]
        return [np.array(mx.concatenate(parts, axis=1)), *map(np.array, states)]

    return steps(lambda x, cache: model(x, cache=cache)), steps(model.logits)


def agree(model, tokens):
    return max(map(relative_error, *both(model, tokens)))


@pytest.mark.parametrize("batch", [1, 2, 5], ids="B={}".format)
def test_compiled_is_plain(compiler, batch):
    model = make(projection="dense", tie_word_embeddings=True)
    assert agree(model, random_tokens(1, batch, 12)) < TOLERANCE
    assert "_step" in model.__dict__


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_plain(variant):
    config, tensors = random_checkpoint(2, **SIZES | variant)
    model = mlx_model(config, tensors).eval()
    tokens = random_tokens(3, 2, 9)
    got, plain = both(model, tokens)
    assert max(map(relative_error, got, plain)) < TOLERANCE
    assert relative_error(got[0], oracle.logits(config, tensors, tokens)[:, 3:]) < TOLERANCE


def change_a_weight(model):
    model.layers[0].mlp.down_proj.weight = model.layers[0].mlp.down_proj.weight * 3


def change_all_weights(model):
    model.update(tree_map(lambda value: value * 1.5, model.parameters()))


def replace_a_layer(model):
    model.layers[1].mlp.down_proj = nn.Linear(96, 64, bias=False)


def add_lora(model):
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape)


def quantize(model):
    nn.quantize(model, group_size=32, bits=8)


@pytest.mark.parametrize(
    "change", [change_a_weight, change_all_weights, replace_a_layer, add_lora, quantize]
)
def test_a_change_takes_effect_at_the_next_token(compiler, change):
    model = make(projection="dense", tie_word_embeddings=True)
    tokens = random_tokens(4, 1, 8)
    before, _ = both(model, tokens)
    change(model)
    after, plain = both(model, tokens)
    assert max(map(relative_error, after, plain)) < TOLERANCE
    assert relative_error(before[0], after[0]) > 1e-3


def test_a_copy_has_its_own_step():
    model = make(projection="dense")
    tokens = random_tokens(5, 1, 6)
    want, _ = both(model, tokens)
    other = copy.deepcopy(model)
    change_all_weights(other)
    assert agree(other, tokens) < TOLERANCE
    got, _ = both(model, tokens)
    assert relative_error(got[0], want[0]) == 0


def test_a_model_that_stepped_can_be_freed():
    model = make(projection="dense")
    both(model, random_tokens(6, 1, 6))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@packs
def test_the_first_tokens_compile_nothing(monkeypatch):
    monkeypatch.setattr(step, "PLAIN_TOKENS", 3)
    model = make(projection="dense")
    both(model, random_tokens(7, 1, 6))
    assert not any("_packed" in module for module in model.modules())
    both(model, random_tokens(7, 1, 6))
    assert "_packed" in model.layers[0].mlp.down_proj


def test_padding_and_training_take_the_plain_form():
    model = make(projection="dense")
    tokens = random_tokens(8, 2, 7)
    cache = model.make_cache()
    model(mx.array(tokens[:, :4]), cache=cache)
    assert step.can_read(model, cache)
    for c in cache:
        c.prepare(lengths=[1, 0])
    assert not step.can_read(model, cache)
    got = np.array(model(mx.array(tokens[:, 4:5]), cache=cache))
    assert relative_error(got[:1], run(model, tokens[:1, :5])[:, 4:]) < TOLERANCE
    assert cache[0].cache[-1].tolist() == [5, 4]
    for c in cache:
        c.finalize()
    assert step.can_read(model, cache)
    cache[0].left_padding = mx.array([1, 0])
    assert not step.can_read(model, cache)
    assert "_step" not in model.__dict__
    model.train()
    run(model, tokens, [(0, 3), (3, 4)])
    assert "_step" not in model.__dict__


@packs
def test_packed_matrices_are_no_parameters():
    model = make(projection="dense", tie_word_embeddings=True)
    before = {name: value.shape for name, value in tree_flatten(model.parameters())}
    both(model, random_tokens(9, 1, 5))
    assert "_packed" in model.model.embed_tokens
    assert {name: value.shape for name, value in tree_flatten(model.parameters())} == before


@pytest.mark.parametrize("R", [31, 32, 61, 67, 96, 111], ids="R={}".format)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (5, 1)], ids="{0[0]}x{0[1]}".format)
def test_packed_product(R, shape):
    layer = linear.Linear(40, R)
    x = mx.random.normal((*shape, 40))
    want = np.array(x, np.float64) @ np.array(layer.weight, np.float64).T
    layer.pack()
    assert ("_packed" in layer) == (R not in (31, 67))
    with linear.packed():
        assert relative_error(np.array(layer(x)), want) < TOLERANCE
    assert relative_error(np.array(layer(x)), want) < TOLERANCE


@packs
def test_a_narrow_or_large_matrix_is_not_packed(monkeypatch):
    model = make(projection="dense")
    assert len(linear.packable(model)) > 4
    monkeypatch.setattr(linear, "LIMIT", 10_000)
    assert linear.packable(model) == []
    layer = linear.Linear(40, 64)
    layer.pack()
    layer.set_dtype(mx.bfloat16)
    layer.pack()
    assert "_packed" not in layer


def operations(model):
    """How many operations of each kind the reading of one more token takes."""
    cache = model.make_cache()
    model(mx.array([[1, 2]]), cache=cache)
    model(mx.array([[3]]), cache=cache)
    mx.eval([c.state for c in cache])
    logits = model(mx.array([[4]]), cache=cache)
    graph = io.StringIO()
    mx.export_to_dot(graph, logits, *(a for c in cache for a in c.cache))
    return Counter(re.findall(r'label ?= ?"(\w+)", shape=rectangle', graph.getvalue()))


@pytest.mark.parametrize("compiled, bound", [(True, 48), (False, 143)], ids=["compiled", "plain"])
def test_operations_of_a_layer(request, compiled, bound):
    """What a token costs beside its products, held where no clock can be trusted."""
    if compiled:
        request.getfixturevalue("compiler")
    few, more = (
        operations(make(projection="dense", tie_word_embeddings=True, num_hidden_layers=L))
        for L in (2, 4)
    )
    layer = {kind: (more[kind] - few[kind]) / 2 for kind in more}
    assert layer["Matmul"] == 3
    assert layer.get("Concatenate", 0) == layer.get("Contiguous", 0) == 0
    assert sum(layer.values()) <= bound


@packs
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
def test_matrices_are_packed_once(request, compiled):
    if compiled:
        request.getfixturevalue("compiler")
    model = make(projection="dense")
    cache = model.make_cache()
    model(mx.array([[1, 2]]), cache=cache)
    places = []
    for token in range(4):
        mx.eval(model(mx.array([[token]]), cache=cache))
        places.append(np.asarray(model.lm_head["_packed"]).__array_interface__["data"][0])
    assert len(set(places)) == 1


def test_reading_a_prompt_makes_no_logits():
    """mlx-lm evaluates the states alone between the pieces of a prompt."""
    model = make(projection="dense")
    cache = model.make_cache()
    model(mx.array([[1, 2, 3]]), cache=cache)
    graph = io.StringIO()
    mx.export_to_dot(graph, *(a for c in cache for a in c.cache))
    blocks = len(model.layers)
    # Three products a block and, but for the kernels, two scans; the last block needs no MLP.
    scans = 0 if kernels.available(mx.float32) else 2
    assert graph.getvalue().count('"Matmul"') == (3 + scans) * blocks - 2


def test_a_token_leaves_no_memory_behind():
    model = make(projection="dense")
    cache = model.make_cache()
    model(mx.array([[1, 2]]), cache=cache)
    used = []
    for token in range(60):
        mx.eval(model(mx.array([[token]]), cache=cache), [c.state for c in cache])
        used.append(mx.get_active_memory())
    assert used[20] == used[59]
