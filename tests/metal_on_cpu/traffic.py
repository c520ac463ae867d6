"""Count the memory traffic of every kernel, by executing it, against the least it could be.

PYTHONPATH=tests python -m metal_on_cpu.traffic       the table of metal/README.md
"""

import mlx.core as mx
import pytest

from metal_on_cpu import executed
from mlx_mcsd import kernels
from mlx_mcsd.bench.kernels import case

SHAPE = (1, 512, 1, 64)  # of the scans
BLOCK = (1, 64, 2, 256)  # of the block's kernels, whose norm runs over Dc


def counted(name: str, dtype: mx.Dtype, S: int = 1, concat: bool = False) -> tuple[float, ...]:
    """Return bytes per feature and token, the least bytes, and 128-byte lines over the fewest."""
    shape = SHAPE if name.startswith("decay") else BLOCK
    if name == "mcsd_step":
        shape = (1, 1, *BLOCK[2:])
    size = shape[0] * shape[1] * shape[2] * shape[3]
    make = case(name, shape, dtype, concat=concat)
    with pytest.MonkeyPatch.context() as patch, executed(mode="traced") as calls:
        patch.setattr(kernels, "segments", lambda B, N, D: S)
        mx.eval(make.kernel())
    (call,) = [c for c in calls if c.launch.name == f"mlx_mcsd_{name}"]
    costs = call.traffic.values()
    lines = sum(t.read_lines + t.written_lines for t in costs)
    fewest = sum(t.read_least_lines + t.written_least_lines for t in costs)
    return call.bytes() / size, make.bytes / size, lines / fewest


def main() -> None:
    """Print the table."""
    print("| kernel | float32 | least | | float16 | least | |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = [
        (f"`{n}`, {S} segments", n, S) for n in list(kernels.SIGNATURES)[:2] for S in (1, 4, 16)
    ]
    for title, name, S in rows + [(f"`{n}`", n, 1) for n in list(kernels.SIGNATURES)[2:]]:
        cells = []
        for dtype in (mx.float32, mx.float16):
            moved, least, _ = counted(name, dtype, S)
            cells += [f"{moved:.1f}", f"{least:.0f}", f"{moved / least:.2f}"]
        title = title.replace("1 segments", "one segment")
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
