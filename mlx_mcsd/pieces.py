"""Long inputs a piece at a time: bounded work for each dispatch to the GPU.

Letters: B batch, N tokens, C channels, Dc features per channel.
"""

import mlx.core as mx

# Of one dispatch, so that it takes some 40 ms on the slowest M1 and stays far from the watchdog,
# which allows seconds: the memory it moves, and its longest chain of tokens.
DISPATCH_BYTES = 2 << 30
DISPATCH_TOKENS = 1 << 17
MOST_BYTES = 48  # of a feature and token in the hungriest kernel, mcsd_mix_grad in float32


def in_pieces(run, state, x: mx.array, *others: mx.array | None, backwards: bool = False):
    """Return ``run(state, x, *others) -> (y, state)``, a piece of the tokens at a time if need be.

    Pieces are as long as one dispatch may be. Each is sent off before the next, state included, so
    that its dispatches have command buffers of their own and what only it needs is freed.

    Args:
        run: gives y (B, N, ...) and the next state, or with backwards the one before.
        state: any tree of arrays.
        x: (B, N, C, Dc).
        others: (B, N, ...) or None.
        backwards: begin with the last piece.
    """
    B, N, C, Dc = x.shape
    n = min(DISPATCH_TOKENS, DISPATCH_BYTES // (MOST_BYTES * B * C * Dc or 1)) or 1
    if n >= N:
        return run(state, x, *others)
    cuts = list(range(n, N, n))
    # Split, not sliced: the gradient of many slices would be as many arrays of the whole length.
    parts = [[a] * (len(cuts) + 1) if a is None else mx.split(a, cuts, 1) for a in (x, *others)]
    outputs = []
    for piece in list(zip(*parts, strict=True))[:: -1 if backwards else 1]:
        y, state = run(state, *piece)
        send(y, state)
        outputs.append(y)
    return mx.concatenate(outputs[:: -1 if backwards else 1], axis=1), state


def send(*arrays) -> bool:
    """Have arrays evaluated, and tell whether they can be: in a trace nothing has a value.

    MLX traces what it compiles, vmaps and exports, and has no call that says so. What else it may
    refuse to evaluate, it refuses once more where the values are needed.
    """
    try:
        mx.async_eval(*arrays)
    except ValueError:
        return False
    return True
