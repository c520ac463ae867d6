"""The interface of a token mixer, and the registry of mixers by name.

Letters: B batch, N tokens, D hidden size. A mixer is built from the model's arguments and must hold
to what `tests/test_mixers.py` checks of every entry: outputs depend on no later token, N tokens at
once equal one by one, a padded row equals the row alone, gradients equal those of the plain form.
"""

import mlx.core as mx
import mlx.nn as nn

from ..errors import MCSDError

State = list[mx.array]

_REGISTRY: dict[str, type["Mixer"]] = {}


class Mixer(nn.Module):
    """Mixes tokens: ``y, state = mixer(x, state, mask, reset)`` for any N, prefill and decode.

    Attributes:
        fused: run-time matrix name -> the names a checkpoint stores its rows under, in order.
            `Model.sanitize` concatenates by it.
    """

    fused: dict[str, tuple[str, ...]] = {}  # noqa: RUF012 (a read-only default)

    def __call__(
        self,
        x: mx.array,
        state: State | None = None,
        mask: mx.array | None = None,
        reset: mx.array | None = None,
    ) -> tuple[mx.array, State]:
        """Mix.

        Args:
            x: (B, N, D), N >= 1.
            state: what an earlier call returned; None begins a sequence.
            mask: (B, N) bool, False where a token does not exist: it changes no state.
            reset: (B, N) bool, True where a document begins: it sees nothing before.

        Returns:
            y (B, N, D) in x's dtype, and the state after the last token.
        """
        raise NotImplementedError

    def shard(self, group: mx.distributed.Group) -> None:
        """Keep this rank's share of the parameters and of the state; outputs stay whole.

        Raises:
            MCSDError: if the mixer cannot be shared.
        """
        raise MCSDError(
            f"[shard] a mixer must be divisible among processes but {type(self).__name__} is not; "
            "use a pipeline."
        )

    def init_state(self, batch: int) -> State:
        """Return the state before any token: arrays whose first axis is the batch."""
        raise NotImplementedError

    def state_bytes(self, tokens: int) -> int:
        """Return the bytes of one sequence's state after this many tokens."""
        raise NotImplementedError


def register(name: str):
    """Class decorator: make a mixer available under this name in a config."""

    def add(cls: type[Mixer]) -> type[Mixer]:
        _REGISTRY[name] = cls
        return cls

    return add


def get(name: str) -> type[Mixer]:
    """Return the mixer class registered under this name.

    Raises:
        MCSDError: if there is none.
    """
    if name not in _REGISTRY:
        raise MCSDError(f"[ModelArgs] mixer must be one of {names()} but got {name!r}.")
    return _REGISTRY[name]


def names() -> list[str]:
    """Return every registered name."""
    return sorted(_REGISTRY)
