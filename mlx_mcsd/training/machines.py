"""What several machines share besides gradients: the first one's decisions and checkpoints."""

import json
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..errors import MCSDError


def from_first(group: mx.distributed.Group, make: Callable[[], Any]) -> Any:
    """Return on every machine what ``make`` returns on the first, as JSON; the others wait.

    Raises:
        MCSDError: on the first machine, what ``make`` raises; the others exit.
    """
    if group.size() == 1:
        return make()
    result, problem = None, None
    if group.rank() == 0:
        try:
            result = make()
        except (MCSDError, OSError) as error:
            problem = error
    text = json.dumps({"result": result, "failed": problem is not None}).encode()
    size = int(broadcast(mx.array(len(text)), group).item())
    data = np.zeros(size, np.uint8)
    if group.rank() == 0:
        data[:] = np.frombuffer(text, np.uint8)
    shared = json.loads(bytes(np.array(broadcast(mx.array(data), group))))
    if problem is not None:
        raise problem
    if shared["failed"]:
        raise SystemExit(1)
    return shared["result"]


def broadcast(tree: Any, group: mx.distributed.Group) -> Any:
    """Return the first machine's arrays on every one; the others give arrays like them."""

    def share(a):
        return mx.distributed.all_sum(a if group.rank() == 0 else mx.zeros_like(a), group=group)

    return _one_by_one(share, tree, group)


def gather(tree: Any, group: mx.distributed.Group) -> Any:
    """Return all machines' arrays, joined along the first axis in the order of the machines."""
    return _one_by_one(lambda a: mx.distributed.all_gather(a, group=group), tree, group)


def _one_by_one(exchange, tree, group):
    """Exchange arrays in the order of their names: messages must leave alike on every machine."""
    if group.size() == 1:
        return tree
    exchanged = []
    for name, array in sorted(tree_flatten({"tree": tree}), key=itemgetter(0)):
        mx.eval(array)
        exchanged.append((name, exchange(array)))
        mx.eval(exchanged[-1][1])
    return tree_unflatten(exchanged)["tree"]


def part_of(tree: Any, group: mx.distributed.Group) -> Any:
    """Return this machine's part of what `gather` joined."""

    def take(a):
        rows = a.shape[0] // group.size()
        return mx.contiguous(a[group.rank() * rows : (group.rank() + 1) * rows])

    return tree if group.size() == 1 else tree_map(take, tree)
