"""Plant bugs in our kernels, one at a time, and show which check catches each.

    PYTHONPATH=tests python -m metal_on_cpu.mutations           the table of metal/README.md
    PYTHONPATH=tests python -m metal_on_cpu.mutations barrier   the bugs whose title has that word

The checks are those of the tests on fewer sizes: values and states against a float64 loop in three
orders of threads, the sanitizers, the trace, and the rules of Metal. Some 10 seconds a bug.
"""

import sys
from contextlib import suppress
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from metal_on_cpu import KernelFault, executed, rules
from metal_on_cpu.test_decay_scan import adjoint
from mlx_mcsd import kernels
from oracle import relative_error
from test_recurrence import loop

TOLERANCE = 2e-7  # of the maximum, as in test_decay_scan.py: the kernels compensate their roundings


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


BARRIER = "threadgroup_barrier(metal::mem_flags::mem_threadgroup);"
# In both kernels: title, text, what stands there instead.
SHARED = [
    ("no barrier between the passes", BARRIER, ""),
    ("the barrier orders no memory", BARRIER, "threadgroup_barrier(metal::mem_flags::mem_none);"),
    (
        "the barrier orders device memory only",
        BARRIER,
        BARRIER.replace("mem_thread", "mem_").replace("mem_group", "mem_device"),
    ),
    ("a barrier of the simdgroup", BARRIER, BARRIER.replace("threadgroup_b", "simdgroup_b")),
    (
        "idle lanes return before the barrier",
        "const int per_segment",
        "if (!on) return;\nconst int per_segment",
    ),
    ("idle lanes are not idle", "const bool on = f < D;", "const bool on = true;"),
    ("the tail is dropped", "(N + S - 1) / S;", "N / S;"),
    (
        "the tail is not clamped",
        "on ? metal::min(begin + per_segment, N) : begin",
        "on ? begin + per_segment : begin",
    ),
    (
        "threadgroup memory one lane short",
        "threadgroup float left[S][32];",
        "threadgroup float left[S][31];",
    ),
    ("a neighbour's carry", "left[k][lane] : metal::fma", "left[k][lane ^ 1] : metal::fma"),
    (
        "a neighbour's power of lambda",
        "const float part = kept[k][lane];",
        "const float part = kept[k][31 - lane];",
    ),
    (
        "lambda^T with the segment's length, masked or not",
        "count * decay[2 * C + c]",
        "per_segment * decay[2 * C + c]",
    ),
    ("lambda^(T+1)", "count * decay[2 * C + c]", "(count + 1) * decay[2 * C + c]"),
    (
        "a reset does not cut the carry",
        "kept[s][lane] = cut ? -1.0f : part;",
        "kept[s][lane] = part;",
    ),
    (
        "a cut scales by zero",
        "kept[s][lane] = cut ? -1.0f : part;",
        "kept[s][lane] = cut ? 0.0f : part;",
    ),
    (
        "lambda of another channel",
        "const float lambda = decay[c];",
        "const float lambda = decay[j % C];",
    ),
    ("the mask of row 0", "mask_at = b * mask_strides[0];", "mask_at = 0 * mask_strides[0];"),
    ("flags taken for contiguous", "* reset_strides[1]]", "]"),
    ("the mask is not read", "!HAS_MASK ||", "true ||"),
    ("a masked token may reset", "HAS_RESET && exists &&", "HAS_RESET &&"),
    ("the rounding's rest is dropped", "// what the sum lost", "; rest = 0.0f;"),
    ("a double", "const float gained", "const double gained"),
    (
        "a pointer with no address space",
        "constexpr int AHEAD = 8;",
        "const float* start = decay;\nconstexpr int AHEAD = 8;",
    ),
    (
        "40 KB of threadgroup memory",
        "threadgroup float kept[S][32];",
        "threadgroup float kept[S][32], more[9000]; more[0] = 0.0f;",
    ),
]
SCAN = [
    (
        "strides swapped",
        "c * x_strides[2] + j * x_strides[3]",
        "c * x_strides[3] + j * x_strides[2]",
    ),
    ("x taken for contiguous", "x_step = x_strides[1];", "x_step = D;"),
    ("the state starts uninitialised", "float state = 0.0f;", "float state;"),
    (
        "state in bfloat16",
        "          ++count;",
        "          state = bfloat16_t(state + rest), rest = 0.0f, ++count;",
    ),
    (
        "h in float16",
        "= state + rest;\n        }",
        "= static_cast<float>(half(state + rest));\n        }",
    ),
    ("h includes its own token", "= state + rest;\n        }", "= state + rest + v[k];\n        }"),
    ("h in the rows of 32 lanes", "int64_t(n + k) * D] =", "int64_t(n + k) * 32] ="),
    ("the prefix includes its own segment", "k < s;", "k <= s;"),
    ("the first segment's state is forgotten", "state = h0[", "state = s > 0 ? 0.0f : h0["),
    ("x read past the end", "v[k] = n + k < stop ?", "v[k] = true ?"),
    ("h written past the end", "if (n + k < stop) {", "if (true) {"),
    ("last written by the first segment", "s == S - 1) {\n    last", "s == 0) {\n    last"),
    ("last written by every segment", "} else if (on && s == S - 1) {", "} else if (on) {"),
    ("last of an idle lane", "} else if (on && s == S - 1) {", "} else if (s == S - 1) {"),
    (
        "masked by a product",
        "if (exists) {",
        "v[k] *= exists;\n        if (!exists) { state += v[k]; }\n        else {",
    ),
    (
        "a reset after the token is read",
        "          state = rest = 0.0f;\n          cut = true;",
        "          cut = true;",
    ),
]
GRAD = [
    (
        "strides swapped",
        "c * dh_strides[2] + j * dh_strides[3]",
        "c * dh_strides[3] + j * dh_strides[2]",
    ),
    ("dh taken for contiguous", "dh_step = dh_strides[1];", "dh_step = D;"),
    ("g starts uninitialised", "float g = 0.0f;", "float g;"),
    ("g in bfloat16", "g = scaled;", "g = static_cast<float>(bfloat16_t(scaled));"),
    ("dx with its own cotangent", "exists ? g + rest :", "exists ? g + rest + v[k] :"),
    ("dx under the mask is left", "exists ? g + rest : 0.0f", "g + rest"),
    ("the suffix includes its own segment", "k > s;", "k >= s;"),
    ("the segments in the wrong order", "int k = S - 1; k > s; --k", "int k = s + 1; k < S; ++k"),
    ("dh read before the start", "v[k] = n - k >= stop ?", "v[k] = true ?"),
    ("dx written before the start", "if (n - k >= stop) {", "if (true) {"),
    ("the first token is skipped", "n >= stop; n -= AHEAD", "n > stop; n -= AHEAD"),
    (
        "dh0 written by the last segment",
        "} else if (on && s == 0) {",
        "} else if (on && s == S - 1) {",
    ),
    ("dh0 of row 0", "dh0[b * D + f]", "dh0[f]"),
    (
        "a restart passes its own cotangent on",
        "g = rest = 0.0f;\n          cut = true;\n        } else {",
        "g = rest = 0.0f;\n          cut = true;\n        }\n        {",
    ),
]
BUGS = [
    *(Bug(t, k, *texts) for k in ("decay_scan", "decay_scan_grad") for t, *texts in SHARED),
    *(Bug(t, "decay_scan", *texts) for t, *texts in SCAN),
    *(Bug(t, "decay_scan_grad", *texts) for t, *texts in GRAD),
]
CHECKS = {
    "ascending": {"order": "ascending"},
    "descending": {"order": "descending"},
    "random": {"order": "random", "seed": 3},
    "sanitized": {"mode": "sanitized"},
    "traced": {"mode": "traced"},
}


def cases():
    """Yield (S, x, lam, state, mask, reset): strided, with and without flags, and a long sum."""
    rng = np.random.default_rng(0)
    lam, B, C, Dc = (0.57, 0.9, 1 - 2.0**-14), 2, 3, 11
    for S, N, flags in ((1, 21, False), (4, 66, True)):
        x = rng.standard_normal((B, N, C, 2 * Dc)).astype(np.float32)[..., ::2]
        state = rng.standard_normal((B, C, Dc)).astype(np.float32)
        mask = rng.random((B, N)) < [[0.8], [0.4]] if flags else None
        reset = rng.random((B, N)) < [[0.1], [0.0]] if flags else None
        if flags:  # a document that begins at token 40 of row 0, amid the third segment
            reset[0, 25:65] = False
            reset[0, 40] = mask[0, (30, 40, 60)] = True
            mask[1, 20], reset[1, 20] = False, True  # void
        yield S, x, lam, state, mask, reset
    x = np.full((1, 1025, 1, 1), 6, np.float32)
    yield 1, x, (0.9999,), np.zeros((1, 1, 1), np.float32), None, None


def wide(a):
    """An MLX array with the values of a in every other place of a larger one."""
    return None if a is None else mx.array(np.repeat(a, 2, axis=-1))[..., ::2]


def run(bug: Bug | None, kernel: str, **options) -> str:
    """Return what a check says of a kernel with a bug planted: a word, or nothing."""
    for S, x, lam, state, mask, reset in cases():
        x = x.copy()
        if mask is not None:  # infinite in another document, backwards in time after it
            x[0, 30 if kernel == "decay_scan" else 60] = np.inf
        read = x.copy()
        if mask is not None and kernel == "decay_scan":
            read[~mask] = np.nan
        form, reference = {
            "decay_scan": (kernels.decay_scan, loop),
            "decay_scan_grad": (kernels.decay_scan_grad, adjoint),
        }[kernel]
        plant = {"edit": bug.plant} if bug else {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "segments", lambda B, N, D, S=S: S)
            try:
                with executed(**options, **plant):
                    got = form(wide(read), lam, wide(state), wide(mask), wide(reset))
            except KernelFault as fault:
                return word(str(fault))
        for g, w in zip(got, reference(x, lam, state, mask, reset), strict=True):
            finite = np.isfinite(w)
            g, w = np.array(g)[finite], w[finite]
            if not np.isfinite(g).all():
                return "NaN"
            if relative_error(g, w) > TOLERANCE:
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
    "runtime error": "undefined",
    "does not compile": "compiler",
}


def word(message: str) -> str:
    """Return a fault in a word."""
    return next((w for sign, w in WORDS.items() if sign in message), message)


def look(bug: Bug) -> str:
    """Return what the rules of Metal say, read and, where there is clang, compiled."""
    with executed(mode="captured", edit=bug.plant) as calls:
        x = mx.zeros((1, 9, 3, 5))
        form = {"decay_scan": kernels.decay_scan, "decay_scan_grad": kernels.decay_scan_grad}
        form[bug.kernel](x, (0.5, 0.9, 0.99))
    if rules.read(calls[0].launch.body):
        return "read"
    return "clang" if rules.clang() and rules.check(calls[0].launch) else ""


def main() -> int:
    """Print the table; fail if a bug is caught by nothing, or a kernel without one by something."""
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    missed = []
    for kernel in ("decay_scan", "decay_scan_grad"):
        said = {name: run(None, kernel, **options) for name, options in CHECKS.items()}
        if any(said.values()):
            missed.append(f"{kernel} as it is: {said}")
    print(f"| kernel | planted bug | {' | '.join(CHECKS)} | rules |")
    print("| --- " * (len(CHECKS) + 3) + "|")
    for bug in BUGS:
        if pattern not in bug.title:
            continue
        said = [run(bug, bug.kernel, **options) for options in CHECKS.values()] + [look(bug)]
        print(
            f"| `{bug.kernel}` | {bug.title} | {' | '.join(s or '–' for s in said)} |", flush=True
        )
        if not any(said):
            missed.append(f"{bug.kernel}: {bug.title}")
    print(*missed, sep="\n", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
