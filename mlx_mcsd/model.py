"""The language model around the mixers, under mlx-lm's contract for a model file.

    x = Embedding(tokens)                                            (B, N, D)
    L times:  x = x + Mixer(RMSNorm(x));  x = x + GeGLU(RMSNorm(x))
    logits = Head(RMSNorm(x))                                        (B, N, K)

No positional encoding: the mixers carry order. Letters: B batch, N tokens, D hidden size, F MLP
width, K vocabulary.
"""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_ssm_mask
from mlx_lm.models.cache import ArraysCache

from . import mixers, sharding, step
from .activations import gated
from .config import ModelArgs
from .errors import MCSDError
from .linear import Embedding, Linear

__all__ = ["Model", "ModelArgs"]  # mlx-lm looks both up here

# mlx-lm imports the model from this file of its directory, where a user allows it with
# --trust-remote-code.
MODEL_FILE = "mcsd.py"
SHIM = "from mlx_mcsd.model import Model, ModelArgs  # noqa: F401\n"


class MLP(nn.Module):
    """GeGLU: ``down(gelu(gate(x)) * up(x))``, gate and up in one matrix."""

    fused = {"gate_up_proj": ("gate_proj", "up_proj")}  # noqa: RUF012 (a constant)

    def __init__(self, args: ModelArgs):
        super().__init__()
        D, F = args.hidden_size, args.intermediate_size
        self.hidden_act = args.hidden_act  # a name: mlx-lm copies models, and functions cannot be
        self.F = F
        self.gate_up_proj = Linear(D, 2 * F)
        self.down_proj = Linear(F, D)
        self.sharding_group = None

    def __call__(self, x: mx.array) -> mx.array:
        """(B, N, D) -> (B, N, D)."""
        if self.sharding_group is not None:
            x = sharding.sum_gradients(self.sharding_group)(x)
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)  # (B, N, F) each
        y = self.down_proj(gated(self.hidden_act)(gate, up))
        if self.sharding_group is not None:
            y = mx.distributed.all_sum(y, group=self.sharding_group)
        return y

    def shard(self, group: mx.distributed.Group) -> None:
        """Keep this rank's share of the F features: rows of gate and up, columns of down."""
        F, ranks = self.F, group.size()
        unit = sharding.group_size(self.down_proj)
        if unit == 1 and 64 * ranks <= F:
            unit = math.gcd(F, 64)  # whole tiles for the GPU
        start, stop = sharding.shares("intermediate_size", F, ranks, unit)[group.rank()]
        sharding.take(self.gate_up_proj, -2, 2 * F, (start, stop), (F + start, F + stop))
        sharding.take(self.down_proj, -1, F, (start, stop))
        self.sharding_group = group


class Block(nn.Module):
    """A mixer and an MLP, each behind its norm and added to the residual stream."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.mixer = mixers.get(args.mixer)(args)
        self.mlp_norm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.mlp = MLP(args)

    def __call__(
        self,
        x: mx.array,
        cache: ArraysCache | None = None,
        mask: mx.array | None = None,
        reset: mx.array | None = None,
    ) -> mx.array:
        """(B, N, D) -> (B, N, D); reads the mixer's state from the cache and leaves the new one."""
        state = None if cache is None or cache.empty() else cache.cache
        x, state = self.read(x, state, mask, reset)
        if cache is not None:
            cache.cache = state
            cache.advance(x.shape[1])
        return x

    def read(
        self,
        x: mx.array,
        state: mixers.State | None = None,
        mask: mx.array | None = None,
        reset: mx.array | None = None,
        drop: Callable[[mx.array], mx.array] = lambda y: y,
    ) -> tuple[mx.array, mixers.State]:
        """(B, N, D) and a state -> (B, N, D) and the new state; `drop` is done to what is added."""
        y, state = self.mixer(self.mixer_norm(x), state, mask, reset)
        x = x + drop(y)
        return x + drop(self.mlp(self.mlp_norm(x))), state


class Backbone(sharding.Pipeline, nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)

    def __call__(
        self,
        inputs: mx.array | None,
        cache: list[ArraysCache] | None = None,
        input_embeddings: mx.array | None = None,
        mask: mx.array | None = None,
        reset: mx.array | None = None,
    ) -> mx.array:
        """(B, N) tokens, or (B, N, D) embeddings in their place, -> (B, N, D)."""
        x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        layers = self.pipeline_layers
        cache = cache or [None] * len(layers)
        padding = create_ssm_mask(x, cache[0])
        mask = padding if mask is None else mask if padding is None else mask & padding
        x = self.receive(x)
        for layer, c in zip(layers, cache, strict=True):
            x = layer(x, c, mask, reset)
        return self.norm(self.pass_on(x, cache))


class Model(nn.Module):
    """An MCSD language model.

    Args:
        args: shape and variant.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Backbone(args)
        if not args.tie_word_embeddings:
            self.lm_head = Linear(args.hidden_size, args.vocab_size)

    def __call__(
        self,
        inputs: mx.array | None,
        cache: list[ArraysCache] | None = None,
        input_embeddings: mx.array | None = None,
        mask: mx.array | None = None,
        reset: mx.array | None = None,
    ) -> mx.array:
        """Predict the token after each token.

        Args:
            inputs: (B, N) token ids; ignored where input_embeddings are given.
            cache: from `make_cache`, read and updated; None begins a sequence and keeps nothing.
            input_embeddings: (B, N, D) in place of the embedded tokens.
            mask: (B, N) bool, False at padding, on whichever side; joined with the cache's own.
            reset: (B, N) bool, True at the first token of each document packed into a row.

        Returns:
            Logits (B, N, K).
        """
        plain = input_embeddings is None and mask is None and reset is None
        if plain and inputs.shape[1] == 1 and step.can_read(self, cache):
            if "_step" not in self.__dict__:
                self._step = step.make(self)
            return self._step(inputs, cache)
        return self.logits(inputs, cache, input_embeddings, mask, reset)

    def logits(self, *args) -> mx.array:
        """Do what a call does, without the compiled step."""
        return self.head(self.model(*args))

    def head(self, x: mx.array) -> mx.array:
        """(B, N, D) -> logits (B, N, K)."""
        return self.model.embed_tokens.as_linear(x) if self._tied else self.lm_head(x)

    def __getstate__(self):
        # A compiled function cannot be copied: a copy of the model makes its own.
        return {name: value for name, value in self.__dict__.items() if name != "_step"}

    @property
    def _tied(self) -> bool:
        return self.args.tie_word_embeddings

    @property
    def layers(self) -> list[Block]:
        """The blocks, of a pipeline this rank's."""
        return self.model.pipeline_layers

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Keep this rank's share of every block, its channels and its part of the MLP.

        Embedding, norms and head stay whole, as in mlx-lm; a cache made afterwards holds the state
        of the rank's channels. To be called on every rank, once, before the model runs.

        Args:
            group: the ranks; None is all there are.

        Raises:
            MCSDError: if there is too little to share, the blocks hold adapters, or it was done.
        """
        group = group or mx.distributed.init()
        if any(layer.mlp.sharding_group is not None for layer in self.layers):
            raise MCSDError("[shard] the model must be whole but is shared out; load it anew.")
        if group.size() > 1:
            for layer in self.layers:
                layer.mixer.shard(group)
                layer.mlp.shard(group)

    def make_cache(self) -> list[ArraysCache]:
        """Return an empty cache a layer, with a slot for each array of the mixer's state."""
        # mlx-lm reloads a saved cache by its class name, so this is its own class, not a subclass.
        return [ArraysCache(len(layer.mixer.init_state(1))) for layer in self.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Bring a checkpoint's tensors under the run-time names.

        Matrices a checkpoint stores apart and the model holds as one (`fused`) are concatenated
        along their rows, quantized or not; those already one are left alone, and so is a set with a
        part missing, which strict loading then reports by name. A tied head is dropped.

        Raises:
            MCSDError: if a tied head differs from the embedding.
        """
        weights = dict(weights)
        for path, module in self.named_modules():
            for whole, parts in getattr(module, "fused", {}).items():
                for kind in ("weight", "scales", "biases"):
                    names = [f"{path}.{part}.{kind}" for part in parts]
                    if all(name in weights for name in names):
                        # Rows are the last but one axis: (out, in) or, per channel, (C, out, in).
                        rows = [weights.pop(name) for name in names]
                        weights[f"{path}.{whole}.{kind}"] = mx.concatenate(rows, axis=-2)
        if self._tied:
            for kind in ("weight", "scales", "biases"):
                head = weights.pop(f"lm_head.{kind}", None)
                tied_to = weights.get(f"model.embed_tokens.{kind}")
                if head is not None and (
                    tied_to is None or not mx.array_equal(head, tied_to, equal_nan=True)
                ):
                    raise MCSDError(
                        f"[Model] lm_head.{kind} must equal model.embed_tokens.{kind} with "
                        "tie_word_embeddings true but differs; set it to false in config.json if "
                        "the head is meant."
                    )
        return weights
