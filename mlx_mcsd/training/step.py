"""One step of the optimiser: gradients through segments that carry on from a state.

The state of every row goes into a segment as a constant and comes out for the next one, so that
gradients reach back to the beginning of a segment (truncated backpropagation) and what the model
sees reaches back to the beginning of a document.

Letters: B rows, N tokens, D features, K vocabulary.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from .config import TrainConfig
from .streams import Segment

States = list[list[mx.array]]
"""Of each layer, its mixer's state."""


def forward(
    model, inputs: mx.array, states: States, reset: mx.array, *, key=None, dropout=0.0, again=False
) -> tuple[mx.array, States]:
    """Logits of a segment, and the states behind it.

    Args:
        model: a `Model`.
        inputs: (B, N) tokens.
        states: before them.
        reset: (B, N) bool, where a document begins.
        key: of the randomness of dropout.
        dropout: of what each mixer and MLP adds.
        again: compute each layer again for its gradient, instead of keeping what it computed.

    Returns:
        (B, N, K), and states.
    """
    x, after = model.model.embed_tokens(inputs), {}  # (B, N, D)
    keys = mx.random.split(key, 2 * len(model.layers)) if dropout else None

    def read(layer, i):
        def run(parameters, x):
            layer.update(parameters)
            masks = iter(keys[2 * i : 2 * i + 2] if dropout else ())
            thinned = (lambda y: drop(y, dropout, next(masks))) if dropout else lambda y: y
            x, state = layer.read(x, states[i], None, reset, thinned)
            # Only what has a gradient may pass through a checkpoint; this is its first computation.
            after.setdefault(i, state)
            return x

        return mx.checkpoint(run) if again else run

    for i, layer in enumerate(model.layers):
        x = read(layer, i)(layer.parameters(), x)
    return model.head(model.model.norm(x)), [after[i] for i in range(len(model.layers))]


def drop(y: mx.array, rate: float, key: mx.array) -> mx.array:
    """Dropout: zero a part of the numbers, and scale up the rest to the same mean."""
    kept = mx.random.bernoulli(1 - rate, y.shape, key)
    return mx.where(kept, y / (1 - rate), 0).astype(y.dtype)


def nats(logits: mx.array, targets: mx.array, scored: mx.array) -> mx.array:
    """The sum of -log p over the targets that count, in float32."""
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), targets)  # (B, N)
    return mx.where(scored, losses, 0.0).sum()


def make_optimizer(config: TrainConfig) -> optim.MultiOptimizer:
    """AdamW that decays matrices, and neither norms nor the embedding."""
    options = dict(betas=[config.adam_beta1, config.adam_beta2], bias_correction=True)
    groups = [
        optim.AdamW(config.learning_rate, weight_decay=decay, **options)
        for decay in (config.weight_decay, 0.0)
    ]
    return optim.MultiOptimizer(groups, [lambda name, w: w.ndim > 1 and "embed_tokens" not in name])


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step, from 0 on: up in a line, and down to a part of it in half a cosine."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.iters - config.warmup, 1)
    cosine = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return config.learning_rate * (config.final_lr + (1 - config.final_lr) * cosine)


class Result(NamedTuple):
    """What a step found.

    Attributes:
        nats: the sum of -log p over all rows of all machines.
        norm: of the gradient, before it was clipped.
        asked: whether some machine asks to stop.
    """

    nats: float
    norm: float
    asked: bool


class Stepper:
    """A model in training with its optimiser and the states of its rows.

    The rows of a segment are those of `grad_accumulation_steps` batches, one after the other; a
    machine reads its share of each batch.

    Args:
        model: float32; its weights are updated in place.
        config: the settings.
        group: the machines.

    Attributes:
        states: of each batch, the states of this machine's rows.
    """

    def __init__(self, model, config: TrainConfig, group: mx.distributed.Group):
        self.model, self.config, self.group = model, config, group
        self.optimizer = make_optimizer(config)
        self.optimizer.init(model.trainable_parameters())
        self._rows = config.batch_size // group.size()
        self._dtype = getattr(mx, config.dtype)
        self.states: list[States] = [
            self.fresh(self._rows) for _ in range(config.grad_accumulation_steps)
        ]
        self._gradients = self._update = None

    def fresh(self, rows: int) -> States:
        """The states of rows that have read nothing."""
        return [layer.mixer.init_state(rows) for layer in self.model.layers]

    def __call__(
        self, number: int, segment: Segment, asked: Callable[[], bool] = lambda: False
    ) -> Result:
        """Learn the segment of a step; ``asked`` tells whether this machine asks to stop."""
        if self._gradients is None:  # not earlier: a checkpoint replaces what is compiled in
            self._compile()
        ranks, rank = self.group.size(), self.group.rank()
        # The mean is over all rows of all machines, whatever share of what is scored is here.
        weight = mx.array(ranks / max(int(segment.scored.sum()), 1))
        total, loss = None, mx.array(0.0)
        for i, states in enumerate(self.states):
            first = i * self.config.batch_size + rank * self._rows
            rows = slice(first, first + self._rows)
            arrays = [
                mx.array(a[rows])
                for a in (segment.inputs, segment.targets, segment.scored, segment.reset)
            ]
            seed = np.random.SeedSequence([self.config.seed, number, i, rank])
            key = mx.array(seed.generate_state(2))
            parameters = self.model.trainable_parameters()
            (_, part, self.states[i]), gradients = self._gradients(
                parameters, states, *arrays, key, weight
            )
            self.model.update(parameters)
            total = gradients if total is None else tree_map(mx.add, total, gradients)
            loss = loss + part
            mx.eval(total, loss, self.states[i])
        total = nn.average_gradients(total, self.group)
        rate = mx.array(learning_rate(self.config, number))
        norm = self._update(total, rate)
        mx.eval(self.model.parameters(), self.optimizer.state, norm)
        sums = mx.stack([loss, mx.array(float(asked()))])
        loss, asking = mx.distributed.all_sum(sums, group=self.group).tolist()
        return Result(loss, norm.item(), asking > 0)

    def logits(self, inputs: mx.array, states: States, reset: mx.array):
        """`forward` without dropout, in the dtype of the computation."""
        parameters = self.model.trainable_parameters()
        self.model.update(self._cast(parameters))
        result = forward(self.model, inputs, states, reset)
        self.model.update(parameters)
        return result

    def _cast(self, parameters):
        return tree_map(lambda p: p.astype(self._dtype), parameters)

    def _compile(self):
        config, model, optimizer = self.config, self.model, self.optimizer

        def loss(parameters, states, inputs, targets, scored, reset, key, weight):
            model.update(self._cast(parameters))
            logits, states = forward(
                model,
                inputs,
                states,
                reset,
                key=key,
                dropout=config.dropout,
                again=config.grad_checkpoint,
            )
            found = nats(logits, targets, scored)
            return found * weight, found, states

        def update(gradients, rate):
            gradients, norm = optim.clip_grad_norm(gradients, config.max_grad_norm)
            optimizer.learning_rate = rate
            optimizer.update(model, gradients)
            return norm

        self._gradients, self._update = mx.value_and_grad(loss), update
        if compiles():
            state = [model.state, optimizer.state]
            self._gradients = mx.compile(self._gradients)
            self._update = mx.compile(update, inputs=state, outputs=state)


def compiles() -> bool:
    """Whether a step is compiled."""
    return mx.default_device() == mx.gpu
