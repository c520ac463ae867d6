"""Plant bugs in our kernels, one at a time, and show which check catches each.

    PYTHONPATH=tests python -m metal_on_cpu.mutations           the tables of metal/README.md
    PYTHONPATH=tests python -m metal_on_cpu.mutations barrier   the bugs whose title has that word

The bugs are in `planted/`. The checks are those of the tests on fewer sizes: values, states and
gradients against float64 in three orders of threads, the sanitizers, the trace, and the rules of
Metal. The first to catch a bug is named. Some 2 seconds a bug.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from tqdm import tqdm

from metal_on_cpu import KernelFault, executed, references, rules
from metal_on_cpu.planted import blocks, scans
from mlx_mcsd import kernels
from mlx_mcsd.mixers.mcsd import decays, slopes


@dataclass(frozen=True)
class Bug:
    """A text of a kernel, found once in it, and what stands there instead."""

    title: str
    kernel: str
    text: str
    instead: str

    def plant(self, name: str, body: str) -> str:
        """Return the body with the bug, if it is of that kernel."""
        if name != f"mlx_mcsd_{self.kernel}":
            return body
        if body.count(self.text) != 1:
            raise ValueError(f"{self.title}: {self.text!r} is {body.count(self.text)} times there")
        return body.replace(self.text, self.instead)


BUGS = [Bug(t, k, *texts) for k, bugs in (scans.BUGS | blocks.BUGS).items() for t, *texts in bugs]
CHECKS = {
    "ascending": {"order": "ascending"},
    "descending": {"order": "descending"},
    "random": {"order": "random", "seed": 3},
    "sanitized": {"mode": "sanitized"},
    "traced": {"mode": "traced"},
}


@dataclass(frozen=True)
class Trial:
    """One call of a kernel, and what it should return."""

    call: object  # () -> arrays
    want: list[np.ndarray]  # where not finite, anything will do
    tolerance: float  # of the maximum, as in the tests
    S: int = 1


def lying(a, i: int = 0):
    """Return an MLX array with the values of a, in strides of a larger one that depend on i."""
    if a is None:
        return None
    step = 2 + i % 2
    wider = [n + (i + k) % 3 for k, n in enumerate(a.shape)]
    wide = np.zeros((*wider[:-1], step * a.shape[-1]), a.dtype)
    here = (*(slice(n) for n in a.shape[:-1]), slice(None, None, step))
    wide[here] = a
    return mx.array(wide)[here]


def scan_trials(kernel: str) -> Iterator[Trial]:
    """Yield trials of a scan: strided, with and without flags, and a long sum."""
    rng = np.random.default_rng(0)
    lam, B, C, Dc = (0.57, 0.9, 1 - 2.0**-14), 2, 3, 11
    form, reference = {
        "decay_scan": (kernels.decay_scan, references.loop),
        "decay_scan_grad": (kernels.decay_scan_grad, references.adjoint),
    }[kernel]

    def trial(S, x, lam, state, mask, reset):
        read = x.copy()
        if mask is not None and kernel == "decay_scan":
            read[~mask] = np.nan
        arrays = [lying(a, i) for i, a in enumerate((read, state, mask, reset))]
        want = list(reference(x, lam, state, mask, reset))
        # The kernels compensate their roundings: ten times stricter than the plain form is held to.
        return Trial(lambda: form(arrays[0], lam, *arrays[1:]), want, 2e-7, S)

    for S, N, flags in ((1, 21, False), (4, 66, True)):
        x = rng.standard_normal((B, N, C, Dc)).astype(np.float32)
        state = rng.standard_normal((B, C, Dc)).astype(np.float32)
        mask = rng.random((B, N)) < [[0.8], [0.4]] if flags else None
        reset = rng.random((B, N)) < [[0.1], [0.0]] if flags else None
        if flags:  # a document that begins at token 40 of row 0, amid the third segment
            reset[0, 25:65] = False
            reset[0, 40] = mask[0, (30, 40, 60)] = True
            mask[1, 20], reset[1, 20] = False, True  # void
            # Infinite in another document, backwards in time after it.
            x[0, 30 if kernel == "decay_scan" else 60] = np.inf
        yield trial(S, x, lam, state, mask, reset)
    x = np.full((1, 1025, 1, 1), 6, np.float32)
    for S in (1, 4):
        yield trial(S, x, (0.9999,), np.ones((1, 1, 1), np.float32), None, None)


def mix_trials(kernel: str) -> Iterator[Trial]:
    """Yield trials of a sequence: two blocks of tokens, a restart, small histories."""
    for B, N, C, Dc, concat in ((2, 18, 3, 40, False), (1, 5, 2, 11, True), (2, 2, 20, 1, False)):
        rng = np.random.default_rng(N)
        arrays = [rng.standard_normal((B, N, C, Dc)).astype(np.float32) for _ in "UVEFAH"]
        n = np.arange(N, dtype=np.int32) + np.array([[0], [5000]], np.int32)[:B]
        n[-1, N // 2 :] = np.arange(N - N // 2)
        later = n > 0
        for a in arrays[1:3]:  # V and E are read only at a row's first token, A and H after it
            a[later] = np.nan
        for a in arrays[4:]:
            a[~later] = np.nan
        arrays[5][:, 1::3] *= 1e-3  # where eps counts
        arrays[3] += 9 if Dc == 1 else 0  # sigmoids near 1
        gain = rng.uniform(0.5, 2, C * Dc).astype(np.float32)
        g = rng.standard_normal((B, N, C * Dc * (1 + concat))).astype(np.float32)
        inputs = [lying(a, i) for i, a in enumerate((*arrays, n, gain))]
        options = dict(beta=slopes(C), eps=references.EPS, concat=concat)
        numbers = [np.nan_to_num(a) for a in arrays]
        if kernel == "mcsd_mix":
            want = [references.mix(*numbers, n, gain, concat)]
            yield Trial(lambda i=inputs, o=options: [kernels.mcsd_mix(*i, **o)], want, 2e-6)
        else:
            want = references.mix_grad(g, *numbers, n, gain, concat)
            g = lying(g, 1)
            yield Trial(lambda i=inputs, g=g, o=options: _gradients(i, g, o), want, 2e-6)


def _gradients(inputs, g, options) -> list[mx.array]:
    def mix(*arrays):
        return kernels.mcsd_mix(*arrays[:6], inputs[6], arrays[6], **options)

    return mx.vjp(mix, [*inputs[:6], inputs[7]], [g])[1]


def step_trials(kernel: str) -> Iterator[Trial]:
    """Yield trials of one token: two simdgroups a channel with flags, and less than one without."""
    for B, C, Dc, concat, flags in ((4, 3, 150, True, True), (2, 2, 11, False, False)):
        rng = np.random.default_rng(Dc)
        tokens = [rng.standard_normal((B, 1, C, Dc)).astype(np.float32) for _ in "UVEF"]
        states = [rng.standard_normal((B, C, Dc)).astype(np.float32) for _ in "AH"]
        states[1][:, 1] *= 1e-3  # where eps counts
        count = np.array([1, 9, 0, 5000], np.int32)[-B:]
        gain = rng.uniform(0.5, 2, C * Dc).astype(np.float32)
        mask = np.array([[True], [False], [True], [True]]) if flags else None
        reset = np.array([[False], [True], [False], [True]]) if flags else None
        if flags:
            for t in tokens:
                t[1] = np.nan
        want = references.block(tokens, states, count, gain, concat, mask, reset)
        inputs = [lying(a, i) for i, a in enumerate((*tokens, *states, count, gain))]
        options = dict(beta=slopes(C), alpha=decays(C), eps=references.EPS, concat=concat)
        options |= dict(mask=lying(mask), reset=lying(reset, 1))
        yield Trial(lambda i=inputs, o=options: kernels.mcsd_step(*i, **o), list(want), 1e-6)


def trials(kernel: str) -> Iterator[Trial]:
    """Yield the trials of a kernel."""
    if kernel.startswith("decay"):
        return scan_trials(kernel)
    return step_trials(kernel) if kernel == "mcsd_step" else mix_trials(kernel)


def run(bug: Bug | None, kernel: str, **options) -> str:
    """Return what a check says of a kernel with a bug planted: a word, or nothing."""
    plant = {"edit": bug.plant} if bug else {}
    for trial in trials(kernel):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "segments", lambda B, N, D, S=trial.S: S)
            try:
                with executed(**options, **plant):
                    got = trial.call()
                    mx.eval(got)
            except KernelFault as fault:
                return word(str(fault))
        for g, w in zip(got, trial.want, strict=True):
            finite = np.isfinite(w)
            g, w = np.array(g)[finite], w[finite]
            if not np.isfinite(g).all():
                return "NaN"
            if np.abs(g - w).max(initial=0) > trial.tolerance * np.abs(w).max(initial=0):
                return "values"
    return ""


WORDS = {
    "waits for thread": "divergence",
    "race on": "race",
    "between the elements": "bounds",
    "which has": "bounds",
    "writes outside": "bounds",
    "outside every buffer": "bounds",
    "buffer-overflow": "bounds",
    "out of bounds": "bounds",
    "ended with signal": "bounds",
    "SEGV": "bounds",
    "which nothing has written": "not written",
    "never written": "not written",
    "threadgroup memory over": "32 KB",
    "a lane that does not take part": "divergence",
    "runtime error": "undefined",
    "does not compile": "compiler",
}


def word(message: str) -> str:
    """Return a fault in a word."""
    return next((w for sign, w in WORDS.items() if sign in message), message)


def look(bug: Bug) -> str:
    """Return what the rules of Metal say, read and, where there is clang, compiled."""
    with executed(mode="captured", edit=bug.plant) as calls:
        mx.eval(next(trials(bug.kernel)).call())
    (call,) = [c for c in calls if c.launch.name == f"mlx_mcsd_{bug.kernel}"]
    if rules.read(call.launch.body):
        return "read"
    return "clang" if rules.clang() and rules.check(call.launch) else ""


def catch(bug: Bug) -> str:
    """Return what catches a bug first, the checks in the order of CHECKS and then the rules."""
    for name, options in CHECKS.items():
        if said := run(bug, bug.kernel, **options):
            return said if name == "ascending" else f"{name}: {said}"
    return f"rules: {said}" if (said := look(bug)) else ""


def main() -> int:
    """Print the tables; fail if nothing catches a bug, or something a kernel as it is."""
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    missed = []
    for kernel in kernels.SIGNATURES:
        said = {name: run(None, kernel, **options) for name, options in CHECKS.items()}
        if any(said.values()):
            missed.append(f"{kernel} as it is: {said}")
    caught = {}
    for bug in tqdm([b for b in BUGS if pattern in b.title], unit="bug"):
        caught[bug.title, bug.kernel] = catch(bug) or "**missed**"
        if "missed" in caught[bug.title, bug.kernel]:
            missed.append(f"{bug.kernel}: {bug.title}")
    for columns in (scans.BUGS, blocks.BUGS):
        print(f"| planted bug | {' | '.join(f'`{k}`' for k in columns)} |")
        print("| --- " * (len(columns) + 1) + "|")
        for title in dict.fromkeys(t for t, k in caught if k in columns):
            print(f"| {title} | {' | '.join(caught.get((title, k), '') for k in columns)} |")
        print()
    print(*missed, sep="\n", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
