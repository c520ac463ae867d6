"""Draw what the README shows: how far each channel looks back, and what a long text costs to keep.

    python examples/memory_picture.py docs/memory.png

Both panels are computed, not measured: the weights from Eqs. 2 and 8, the bytes from the shapes of
the published 1.6B model and of a Transformer of the same width and depth with a float16 KV cache.
"""

import sys

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from mlx_mcsd.errors import MCSDError, exits_cleanly
from mlx_mcsd.mixers.mcsd import decays, slopes

HIDDEN, CHANNELS, LAYERS = 2560, 10, 12


@exits_cleanly
def main(argv=None):
    """Write the picture to the path that is named."""
    paths = sys.argv[1:] if argv is None else argv
    if len(paths) != 1:
        raise MCSDError("expected the picture's path; try: memory_picture.py docs/memory.png")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), dpi=110)
    ago = np.unique(np.geomspace(1, 200_000, 400).astype(int))
    sections = (
        ("slope", np.exp(-np.array(slopes(CHANNELS))), "#d9480f"),
        ("decay", np.array(decays(CHANNELS)), "#1971c2"),
    )
    for name, rates, color in sections:
        for i, rate in enumerate(rates):
            label = f"{name} section, {CHANNELS} channels" if i == CHANNELS - 1 else None
            left.plot(ago, rate**ago, color=color, lw=1, alpha=0.3 + 0.07 * i, label=label)
    left.set(
        xscale="log",
        xlabel="tokens ago",
        ylabel="weight of that token",
        ylim=(0, 1.3),
        title="How far each channel looks back",
    )
    left.legend(frameon=False, fontsize=8)

    tokens = np.geomspace(256, 1_048_576, 200)
    cache = 2 * LAYERS * HIDDEN * 2 * tokens
    state = np.full_like(tokens, 2 * LAYERS * HIDDEN * 4)
    right.plot(tokens, cache / 2**20, color="#868e96", label="Transformer, KV cache")
    right.plot(tokens, state / 2**20, color="#2b8a3e", lw=2, label="MCSD, state: 240 KiB")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="tokens read",
        ylabel="memory of the text, MiB",
        title="What a conversation costs to keep (1.6B)",
    )
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(paths[0])
    pyplot.close(figure)


if __name__ == "__main__":
    main()
