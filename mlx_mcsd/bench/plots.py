"""The plots, laid out as the paper's Figs. 5-8: memory, latency, throughput by batch, by length."""

import io
from pathlib import Path

from ..files import write_atomically

COLOURS = {
    "mcsd": "#2b8a3e",
    "llama": "#868e96",
    "mamba2": "#1971c2",
    "rwkv7": "#d9480f",
    "recurrent_gemma": "#9c36b5",
    "kernels": "#2b8a3e",
    "chunked": "#1971c2",
    "quadratic": "#868e96",
}


def plot(rows: list[dict], title: str, path: Path) -> list[Path]:
    """Draw what rows there are; write path with .png and .svg, and return both.

    A model that stopped at a limit or failed its gate has no point there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    panels = [
        ("memory", "tokens", "context length, tokens", _mib, "peak memory while decoding, MiB"),
        ("batch", "batch", "batch size", _ms, "latency of a step, ms"),
        ("batch", "batch", "batch size", _throughput, "tokens per second, by batch size"),
        ("decode", "tokens", "context length, tokens", _throughput, "tokens per second, by length"),
        ("training", "tokens", "tokens", _throughput, "tokens per second, forwards and backwards"),
        ("training", "tokens", "tokens", _mib, "peak memory of a training step, MiB"),
    ]
    panels = [p for p in panels if any(p[3](r) for r in rows if r["bench"] == p[0])]
    if not panels:
        return []
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 3.4 * lines), dpi=110, squeeze=False
    )
    for a, (bench, key, xlabel, value, heading) in zip(axes.flat, panels, strict=False):
        chosen = [row for row in rows if row["bench"] == bench]
        for name, colour in COLOURS.items():
            points = [(r[key], value(r)) for r in chosen if r["model"] == name and value(r)]
            if points:
                ours = name == "mcsd"
                a.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=4 if ours else 3,
                    lw=2.2 if ours else 1.2,
                    color=colour,
                    label=name.replace("mcsd", "MCSD"),
                    zorder=3 if ours else 2,
                )
        a.set(xscale="log", yscale="log", xlabel=xlabel)
        ticks = sorted({r[key] for r in chosen})
        a.set_xticks(ticks, [_short(n) for n in ticks], fontsize=8)
        a.xaxis.set_minor_locator(ticker.NullLocator())
        a.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        a.yaxis.set_minor_locator(ticker.NullLocator())
        a.yaxis.set_major_formatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}")
        a.set_title(heading, fontsize=9, loc="left")
        a.grid(alpha=0.25)
        a.spines[["top", "right"]].set_visible(False)
    for a in list(axes.flat)[len(panels) :]:
        a.set_visible(False)
    axes.flat[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in written:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=file.suffix[1:])
        write_atomically(file, buffer.getvalue())
    pyplot.close(figure)
    return written


def _short(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def _mib(row):
    return row.get("peak_bytes", 0) / 2**20


def _ms(row):
    return 1e3 * row["seconds"]["median"] if "seconds" in row else 0


def _throughput(row):
    return row.get("tokens_per_second", 0)
