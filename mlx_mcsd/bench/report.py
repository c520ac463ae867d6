"""The rows of the benchmarks as a table, and the machine they were measured on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

HEADS = {
    "decode": ("model", "tokens", "ms/token", "quartiles", "tokens/s", "error"),
    "constant": ("model", "tokens", "ms/token", "quartiles", "tokens/s", "error"),
    "batch": ("model", "batch", "ms/step", "quartiles", "tokens/s", "error"),
    "prefill": ("model", "tokens", "s", "quartiles", "tokens/s", "peak MiB", "error"),
    "memory": ("model", "tokens", "state KiB", "peak MiB", "error"),
    "training": (
        *("form", "tokens", "ms/step", "quartiles", "tokens/s", "of quadratic", "peak MiB"),
        "error",
    ),
    "profile": ("part of a step", "ms", "quartiles", "of whole products"),
}


def machine() -> dict:
    """Return what the figures depend on: processor, cores, system, BLAS, versions."""
    info = mx.device_info()
    name = info.get("device_name") if mx.default_device() == mx.gpu else _processor()
    preloaded = os.environ.get("LD_PRELOAD", "")
    return {
        "device": str(mx.default_device().type).removeprefix("DeviceType."),
        "processor": name,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "blas": "OpenBLAS" if "openblas" in preloaded else "MLX's own",
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "mlx-mcsd")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(rows: list[dict]) -> str:
    """Return the rows as text, a block for each benchmark; no figure where the gate failed."""
    blocks = []
    for bench, head in HEADS.items():
        lines = [_cells(row, head) for row in rows if row["bench"] == bench]
        if lines:
            blocks.append(f"{bench}\n{_aligned([head, *lines])}")
    return "\n\n".join(blocks)


def _cells(row: dict, head: tuple[str, ...]) -> tuple[str, ...]:
    """Return a row's cells under a head."""
    seconds = row.get("seconds")
    cells = {
        "model": row["model"],
        "form": row["model"],
        "part of a step": row.get("part", ""),
        "tokens": f"{row.get('tokens', 0):,}",
        "batch": str(row.get("batch", "")),
        "error": f"{row['error']:.1e}",
        "of whole products": f"{row.get('of_products', 0):.2f}",
    }
    if seconds:
        ms = {name: f"{1e3 * value:.2f}" for name, value in seconds.items()}
        cells |= dict.fromkeys(("ms/token", "ms/step", "ms"), ms["median"])
        cells["s"] = f"{seconds['median']:.2f}"
        cells["quartiles"] = f"{ms['low']}-{ms['high']}"
        if "s" in head:
            cells["quartiles"] = f"{seconds['low']:.2f}-{seconds['high']:.2f}"
    if "tokens_per_second" in row:
        cells["tokens/s"] = f"{row['tokens_per_second']:,.1f}"
    if "of_quadratic" in row:
        cells["of quadratic"] = f"{row['of_quadratic']:.1f}x"
    if "peak_bytes" in row:
        cells["peak MiB"] = f"{row['peak_bytes'] / 2**20:,.0f}"
    if "state_bytes" in row:
        cells["state KiB"] = f"{row['state_bytes'] / 2**10:,.0f}"
    if not row["ok"]:
        cells |= {head[2]: "FAILED"}
    elif "note" in row:
        cells |= {head[2]: row["note"]}
    return tuple(cells.get(name, "-") for name in head)


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
