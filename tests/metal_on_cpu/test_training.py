"""Training runs the kernels and their gradients: mlx-lm's own loop, its checkpointing, mx.compile.

A kernel passes no gradient on: only what its own `vjp` asks for arrives.
"""

import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx import optimizers
from mlx.utils import tree_flatten
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers

from metal_on_cpu import executed, needs_compiler
from mlx_mcsd import kernels
from mlx_mcsd.model import Block
from models import mlx_model, random_tokens
from oracle import random_checkpoint

KERNELS = ["decay_scan", "decay_scan_grad", "mcsd_mix", "mcsd_mix_grad"]
STEPS = 2


@pytest.fixture
def unpatched(monkeypatch):
    """mlx-lm checkpoints by replacing the method of the class, for good."""
    monkeypatch.setattr(Block, "__call__", Block.__call__)


def trainable(kind, projection, seed=0):
    """A model with what mlx-lm would train of it left free."""
    model = mlx_model(*random_checkpoint(seed, projection=projection))
    model.freeze()
    if kind == "full":
        for layer in model.layers:
            layer.unfreeze()
    else:
        mx.random.seed(seed)
        linear_to_lora_layers(model, 2, {"rank": 3, "scale": 2.0, "dropout": 0.0}, kind == "dora")
        for name, value in tree_flatten(model.trainable_parameters()):
            if name.endswith("lora_b"):  # zeros at first, through which no gradient comes
                model.load_weights([(name, mx.random.normal(value.shape))], strict=False)
    return model.train()


def rows(lengths=(41, 23)):
    """A batch as mlx-lm pads it, and the lengths."""
    batch = np.zeros((len(lengths), 64), np.int32)
    for i, length in enumerate(lengths):
        batch[i, :length] = random_tokens(i, length)
    return mx.array(batch), mx.array([(0, length) for length in lengths])


def fit(tmp_path, kind, projection, checkpoint):
    """What some steps of mlx-lm's loop train, by name."""
    model, file = trainable(kind, projection), tmp_path / "adapters.safetensors"
    options = dict(batch_size=2, iters=STEPS, val_batches=1, adapter_file=file)
    trainer.train(
        model,
        optimizers.SGD(0.3),
        range(2),
        args=trainer.TrainingArgs(**options, grad_checkpoint=checkpoint),
        iterate_batches=lambda **_: iter([rows()] * STEPS),
    )
    return {name: np.array(value) for name, value in mx.load(str(file)).items()}


def launches(steps, checkpoint):
    """How often each kernel runs: L layers, two scans to a mix, checkpointed once more forwards."""
    forwards = 2 * steps * (1 + checkpoint)
    counts = (2 * forwards, 4 * steps, forwards, 2 * steps)
    return dict(zip(KERNELS, counts, strict=True))


def assert_alike(got, want, before, tolerance=3e-5):
    """Compare what the steps changed, known to the rounding of the numbers that they changed.

    The second step's gradient is of weights that the first has rounded: hence three times 1e-5.
    """
    before = {name: np.array(value) for name, value in tree_flatten(before.trainable_parameters())}
    assert got.keys() == want.keys() == before.keys()
    for name, value in want.items():
        moved = value - before[name]
        assert np.abs(moved).max() > 1e-3, name
        rounding = STEPS * np.spacing(np.abs(value).max())
        error = np.abs(got[name] - value).max()
        assert error <= tolerance * np.abs(moved).max() + rounding, name


@needs_compiler
@pytest.mark.parametrize(
    "kind, projection, checkpoint",
    [
        ("lora", "channel", False),
        ("lora", "dense", True),
        ("dora", "dense", False),
        ("full", "channel", True),
    ],
)
def test_steps_of_mlx_lm(tmp_path, capsys, unpatched, kind, projection, checkpoint):
    with executed() as calls:
        got = fit(tmp_path, kind, projection, checkpoint)
    ran = [call.launch.name.removeprefix("mlx_mcsd_") for call in calls]
    assert {name: ran.count(name) for name in KERNELS} == launches(STEPS, checkpoint)
    want = fit(tmp_path, kind, projection, checkpoint)
    assert_alike(got, want, trainable(kind, projection))


@pytest.mark.skipif(
    not (mx.metal.is_available() or shutil.which("g++")), reason="MLX compiles with g++ here"
)
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_compiled_step_traces_them(monkeypatch, unpatched, kind, checkpoint):
    """As on a Mac, mlx-lm's step is one compiled function; a checkpoint lies inside it.

    What is compiled is traced here, not run: kernels execute numbers, and a trace has none.
    """
    ran = []

    def kernel(name):
        ran.append(name)
        return lambda output_shapes, output_dtypes, **_: map(mx.zeros, output_shapes, output_dtypes)

    model = trainable(kind, "dense")
    if checkpoint:
        trainer.grad_checkpoint(model.layers[0])
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "available", lambda dtype: True)
    monkeypatch.setattr(kernels, "kernel", kernel)
    loss_and_grad = nn.value_and_grad(model, trainer.default_loss)

    def step(*rows):
        assert not kernels.send(rows[0])
        return loss_and_grad(model, *rows)

    state = [model.state, mx.random.state]
    mx.enable_compile()
    try:
        mx.compile(step, inputs=state, outputs=state)(*rows())
    finally:
        mx.disable_compile()
    assert {name: ran.count(name) for name in KERNELS} == launches(1, checkpoint)


@pytest.mark.metal
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("projection", ["channel", "dense"])
def test_on_the_gpu(tmp_path, monkeypatch, unpatched, projection, checkpoint):
    """The whole of it, compiled, with kernels and without."""
    found = {}
    mx.enable_compile()
    try:
        for setting in ("on", "off"):
            monkeypatch.setenv("MLX_MCSD_KERNELS", setting)
            found[setting] = fit(tmp_path, "full", projection, checkpoint)
    finally:
        mx.disable_compile()
    # The GPU sums its products in another order, in every layer of every step.
    assert_alike(found["on"], found["off"], trainable("full", projection), 1e-3)
