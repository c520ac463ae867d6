"""What the benchmarks share: timings taken in turn, decoding and reading as mlx-lm does it, a gate.

Letters: B batch, N tokens.
"""

import time
from collections.abc import Callable, Hashable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache, make_prompt_cache
from tqdm import tqdm

from .. import step

TOLERANCE = 1e-5
PREFILL_STEP = 2048  # mlx-lm's


class Timing(NamedTuple):
    """Seconds: the median of the runs, and their lower and upper quartile."""

    median: float
    low: float
    high: float


def interleaved(
    runs: dict[Hashable, Callable[[], float]], repeats: int, label: str
) -> dict[Hashable, Timing]:
    """Run everything once unmeasured, then in turn `repeats` times, so that a noisy spell hits all.

    Args:
        runs: each does its work and returns the seconds it took.
        repeats: timings of each.
        label: what the progress bar says.
    """
    times = {name: [] for name in runs}
    for turn in tqdm(range(repeats + 1), desc=label, leave=False):
        for name, run in runs.items():
            seconds = run()
            if turn:
                times[name].append(seconds)
    return {name: timing(values) for name, values in times.items()}


def timing(seconds: list[float]) -> Timing:
    """Return the median and the quartiles."""
    return Timing(*map(float, np.quantile(seconds, (0.5, 0.25, 0.75))))


class Decoder:
    """Decodes greedily after a given state: seconds per step, each step fed with the last."""

    def __init__(self, model: nn.Module, cache: list, batch: int = 1):
        self.model, self.cache = model, cache
        self.tokens = mx.zeros((batch, 1), mx.int32)

    def step(self) -> None:
        """Read a token; as in mlx-lm the next is under way before the last one is waited for."""
        following = self.model(self.tokens, cache=self.cache)[:, -1:].argmax(axis=-1)
        mx.async_eval(following)
        mx.eval(self.tokens)
        self.tokens = following

    def run(self, steps: int) -> float:
        """Take so many steps and return the mean seconds of one; what grew is cut back."""
        mx.eval(self.tokens)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        mx.eval(self.tokens)
        seconds = (time.perf_counter() - start) / steps
        for c in self.cache:
            if not isinstance(c, ArraysCache) and c.is_trimmable():
                c.trim(steps)
        return seconds

    def warm(self) -> "Decoder":
        """Take the steps before which nothing is compiled."""
        for _ in range(step.PLAIN_TOKENS + 1):
            self.step()
        return self


def read(model: nn.Module, tokens: mx.array, cache: list | None = None) -> list:
    """Read tokens (B, N) as mlx-lm does, a piece at a time without the head; return the cache."""
    cache = make_prompt_cache(model) if cache is None else cache
    for start in range(0, tokens.shape[1], PREFILL_STEP):
        model(tokens[:, start : start + PREFILL_STEP], cache=cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
    return cache


def gate(model: nn.Module, vocabulary: int, batch: int = 1) -> float:
    """Return by how much decoding differs from reading all at once, relative to the largest logit.

    The same random tokens are read at once, and as a prompt and then one by one, past the step from
    which ours is compiled.
    """
    prompt, N = 24, 24 + step.PLAIN_TOKENS + 8
    tokens = mx.random.randint(0, vocabulary, (batch, N), key=mx.random.key(1))
    whole = model(tokens, cache=make_prompt_cache(model))[:, prompt:]
    cache = read(model, tokens[:, :prompt])
    steps = [model(tokens[:, [i]], cache=cache) for i in range(prompt, N)]
    return distance(mx.concatenate(steps, axis=1), whole)


def distance(got: mx.array, want: mx.array) -> float:
    """Return the largest difference, relative to the largest number wanted; infinite for NaN."""
    got, want = (np.array(a, np.float64) for a in (got, want))
    error = np.abs(got - want).max() / np.abs(want).max()
    return float(error) if np.isfinite(error) else float("inf")


def peak(run: Callable[[], object]) -> int:
    """Return the bytes that were in use at most while it ran, weights included."""
    mx.clear_cache()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory()
