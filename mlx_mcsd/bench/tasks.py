"""The benchmarks decode, prefill, memory and batch, as rows for the table, the JSON and the plots.

A row says which model was measured at what size, by how much its decoding differed from reading at
once (`error`), and its figures; one that fails that gate (`ok`) has none. Where a model would pass
the memory or the time limit its row says so (`note`), and it is not measured further.

Letters: B batch.
"""

import math
import time
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from .measure import TOLERANCE, Decoder, gate, interleaved, peak, read, timing
from .peers import NAMES, SIZES, build, cache_after, count
from .profile import profile

EARLY, LATE = 100, 100_000


class Settings(NamedTuple):
    """What is measured, and where it stops."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    models: tuple[str, ...] = NAMES
    size: str = "28m"
    repeats: int = 15
    steps: int = 8
    memory_limit: float = 4 * 2**30
    time_limit: float = 60.0


class Entry(NamedTuple):
    """A model, and what its rows begin with."""

    model: nn.Module
    row: dict


def entries(settings: Settings) -> list[Entry]:
    """Build the models and pass each through the gate."""
    found = []
    for name in tqdm(settings.models, desc="models", leave=False):
        model = build(name, settings.size)
        row = {"model": name, "parameters": count(model)}
        found.append(Entry(model, row | _gated(settings, model, 1)))
    return found


def decode(settings: Settings, models: list[Entry]) -> list[dict]:
    """Time a step after each number of tokens; MCSD's also late against early, and by part."""
    rows = []
    for tokens in settings.contexts:
        rows += _steps(settings, models, "decode", tokens, 1)
    for model, row in models:
        if row["model"] == "mcsd" and row["ok"]:
            decoders = {n: Decoder(model, cache_after(model, n)).warm() for n in (EARLY, LATE)}
            repeats = settings.repeats * settings.steps
            times = interleaved({n: lambda d=d: d.run(1) for n, d in decoders.items()}, repeats, "")
            rows += [row | _step_row("constant", n, 1, t) for n, t in times.items()]
            rows += [row | {"bench": "profile"} | r for r in profile(model, settings.repeats)]
    return rows


def batch(settings: Settings, models: list[Entry]) -> list[dict]:
    """Time a step of several sequences at once, each after the first of the contexts."""
    rows = []
    for B in settings.batches:
        again = [Entry(m, row | _gated(settings, m, B)) for m, row in models]
        rows += _steps(settings, again, "batch", settings.contexts[0], B)
    return rows


def memory(settings: Settings, models: list[Entry]) -> list[dict]:
    """Take the bytes of the state, and the peak of memory in decoding, after so many tokens."""
    rows = []
    for tokens in tqdm(settings.contexts, desc="memory", leave=False):
        for model, row in models:
            found = row | {"bench": "memory", "tokens": tokens, "batch": 1}
            if note := _too_large(settings, model, tokens, 1):
                found["note"] = note
            elif row["ok"]:
                decoder = Decoder(model, cache_after(model, tokens))
                found["state_bytes"] = _state_bytes(decoder.cache)
                found["peak_bytes"] = peak(lambda d=decoder: d.run(4)) - _others(models, model)
            rows.append(found)
    return rows


def prefill(settings: Settings, models: list[Entry]) -> list[dict]:
    """Time the reading of whole prompts, and take the peak of memory meanwhile."""
    rows = []
    past = {row["model"]: [] for _, row in models}  # name -> [(tokens, seconds, bytes), ...]
    for tokens in settings.contexts:
        prompt = mx.zeros((1, tokens), mx.int32)
        running, times, peaks = [], {}, {}
        for model, row in models:
            found = row | {"bench": "prefill", "tokens": tokens, "batch": 1}
            if note := _too_long(settings, past[row["model"]], tokens):
                found["note"] = note
            elif row["ok"]:
                running.append((model, row["model"]))
            rows.append(found)
        for _ in tqdm(range(settings.repeats), desc=f"prefill {tokens}", leave=False):
            for model, name in running:
                spent = times.setdefault(name, [])
                if sum(spent) > settings.time_limit:  # the rest would repeat what is slow
                    continue
                start = time.perf_counter()
                peaks[name] = peak(lambda m=model, p=prompt: read(m, p)) - _others(models, model)
                spent.append(time.perf_counter() - start)
        for found in rows[-len(models) :]:
            if spent := times.get(found["model"]):
                t = timing(spent)
                past[found["model"]].append((tokens, t.median, peaks[found["model"]]))
                found |= {
                    "seconds": t._asdict(),
                    "tokens_per_second": tokens / t.median,
                    "peak_bytes": peaks[found["model"]],
                }
    return rows


def _gated(settings: Settings, model: nn.Module, B: int) -> dict:
    error = gate(model, SIZES[settings.size]["vocab_size"], B)
    return {"error": error, "ok": error <= TOLERANCE}


def _steps(settings, models, bench, tokens, B) -> list[dict]:
    """Time the models' steps in turn, at one number of tokens and one batch size."""
    rows, runs = [], {}
    for model, row in models:
        if note := _too_large(settings, model, tokens, B):
            rows.append(row | {"bench": bench, "tokens": tokens, "batch": B, "note": note})
        elif row["ok"]:
            decoder = Decoder(model, cache_after(model, tokens, B), B).warm()
            runs[row["model"]] = lambda d=decoder: d.run(settings.steps)
        else:
            rows.append(row | {"bench": bench, "tokens": tokens, "batch": B})
    times = interleaved(runs, settings.repeats, f"{bench} {tokens} x {B}")
    return rows + [
        row | _step_row(bench, tokens, B, times[row["model"]])
        for _, row in models
        if row["model"] in times
    ]


def _step_row(bench, tokens, B, t) -> dict:
    found = {"bench": bench, "tokens": tokens, "batch": B, "seconds": t._asdict()}
    return found | {"tokens_per_second": B / t.median}


def _too_large(settings, model, tokens, B) -> str | None:
    """What a row says if the state would not fit; what grows, grows with every token alike."""
    short, long = (_state_bytes(cache_after(model, n, B)) for n in (256, 512))
    needed = long + (long - short) / 256 * (tokens - 512)
    if needed > settings.memory_limit:
        return f"over {settings.memory_limit / 2**30:g} GiB"


def _too_long(settings, past, tokens) -> str | None:
    """What a row says if reading would pass a limit, going by the lengths read so far."""
    if not past:
        return None
    (n, seconds, size), before = past[-1], past[-2:-1]
    power = 1.0
    if before:
        grown = math.log(seconds / before[0][1]) / math.log(n / before[0][0])
        power = min(max(grown, 1.0), 2.0)
    if seconds * (tokens / n) ** power > settings.time_limit:
        return f"over {settings.time_limit:g} s"
    slope = (size - before[0][2]) / (n - before[0][0]) if before else 0
    if size + slope * (tokens - n) > settings.memory_limit:
        return f"over {settings.memory_limit / 2**30:g} GiB"


def _state_bytes(cache: list) -> int:
    return sum(c.nbytes for c in cache)


def _others(models: list[Entry], model: nn.Module) -> int:
    """The bytes of what is in memory beside a model: the weights of the others."""
    return sum(_weight_bytes(m) for m, _ in models if m is not model)


def _weight_bytes(model: nn.Module) -> int:
    arrays = [a for module in model.modules() for a in module.values() if isinstance(a, mx.array)]
    return sum({id(a): a.nbytes for a in arrays}.values())
