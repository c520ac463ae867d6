"""One model on several machines, each running a process, a rank: shares of a layer, or of layers.

Tensor parallel: a rank holds whole channels, with their projections, decays and states, and some of
the MLP's F features; shares need not be equal. Two exchanges a layer make the parts a whole again:
after the mixer and after the MLP. Pipeline: a rank holds whole layers and passes x on.

Letters: B batch, N tokens, D hidden size, C channels, F MLP width, R ranks.
"""

from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import sum_gradients
from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.pipeline import PipelineMixin
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .errors import MCSDError
from .linear import Linear

__all__ = ["Pipeline", "gather", "group_size", "shares", "sum_gradients", "take"]

LAYERS = (Linear, nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)

Span = tuple[int, int]


def shares(name: str, total: int, ranks: int, unit: int = 1) -> list[Span]:
    """Cut ``range(total)`` into one span a rank, in units, none more than one unit longer.

    Args:
        name: of what is cut, as the config has it.
        total: how much of it there is, a multiple of the unit.
        ranks: R.
        unit: what must stay together.

    Returns:
        R pairs (start, stop), in the order of the ranks.

    Raises:
        MCSDError: if there are fewer units than ranks.
    """
    if total // unit < ranks:
        why = "" if unit == 1 else f" (its quantization groups hold {unit} together)"
        raise MCSDError(
            f"[shard] {name} must be at least {ranks * unit} for {ranks} processes but is "
            f"{total}{why}; use {total // unit} at most, or a pipeline."
        )
    cuts = [total // unit * r // ranks * unit for r in range(ranks + 1)]
    return list(pairwise(cuts))


def group_size(layer: nn.Module) -> int:
    """How many inputs of a layer are quantized together: 1 if it is not quantized."""
    return getattr(layer, "group_size", 1)


def take(layer: nn.Module, axis: int, total: int, *spans: Span) -> None:
    """Keep, of a layer's weight and its quantization, these spans of an axis, one after another.

    Args:
        layer: linear or switch, quantized or not; changed in place.
        axis: of the weight, -1 inputs, -2 outputs, 0 channels.
        total: features or channels on that axis; quantized inputs are packed into fewer words.
        spans: (start, stop) each, in features or channels.

    Raises:
        MCSDError: if the layer is of another kind, such as a LoRA adapter's.
    """
    if not isinstance(layer, LAYERS):
        raise MCSDError(
            f"[shard] layers must be linear or quantized but one is a {type(layer).__name__}; "
            "fuse adapters into the model before it is shared out."
        )

    def cut(value):
        words = value.shape[axis]
        parts = [
            mx.split(value, [start * words // total, stop * words // total], axis=axis)[1]
            for start, stop in spans
        ]
        return mx.contiguous(mx.concatenate(parts, axis=axis))

    layer.update({name: cut(value) for name, value in layer.parameters().items()})


def gather(x: mx.array, widths: Sequence[int], group: mx.distributed.Group) -> mx.array:
    """Put the ranks' features side by side: (B, N, widths[r]) of rank r -> (B, N, sum) on all."""
    most = max(widths)
    x = mx.pad(x, [(0, 0), (0, 0), (0, most - x.shape[-1])])  # ranks exchange equal shapes only
    x = mx.distributed.all_gather(x[None], group=group)  # (R, B, N, most)
    return mx.concatenate([x[r, ..., :width] for r, width in enumerate(widths)], axis=-1)


class Pipeline(PipelineMixin):
    """Blocks in a pipeline, as mlx-lm has it: the last rank holds the first layers."""

    def pipeline(self, group: mx.distributed.Group, split: Sequence[int] | None = None) -> None:
        """Keep this rank's layers; the others become None, so that numbers stay as they are.

        Args:
            group: the ranks.
            split: layers of each rank; None is as equal as can be.

        Raises:
            MCSDError: if there are fewer layers than ranks.
        """
        if len(self.layers) < group.size():
            raise MCSDError(
                f"[pipeline] num_hidden_layers must be at least the number of processes but got "
                f"{len(self.layers)} and {group.size()}."
            )
        super().pipeline(group, split)
        self.pipeline_group = group

    def receive(self, x: mx.array) -> mx.array:
        """Return what the rank before this one made, in place of x; x itself on the first."""
        if self.pipeline_rank == self.pipeline_size - 1:
            return x
        return mx.distributed.recv_like(x, self.pipeline_rank + 1, group=self.pipeline_group)

    def pass_on(self, x: mx.array, cache: list[ArraysCache | None]) -> mx.array:
        """Send x to the next rank; return, on every rank, what the final one has made."""
        if self.pipeline_size == 1:
            return x
        if self.pipeline_rank:
            x = mx.distributed.send(x, self.pipeline_rank - 1, group=self.pipeline_group)
            if cache[-1] is not None:  # a prefill evaluates the states alone: they must bring this
                cache[-1][0] = mx.depends(cache[-1][0], x)
        return mx.distributed.all_gather(x, group=self.pipeline_group)[: x.shape[0]]
