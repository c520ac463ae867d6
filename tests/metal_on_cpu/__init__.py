"""Run the kernels of metal/ on any machine with a C++ compiler.

    import metal_on_cpu
    h, h_last = metal_on_cpu.run(kernels.decay_scan, x, lam, order="random", seed=3)

    with metal_on_cpu.executed(mode="traced") as calls:
        model(tokens)
    calls[0].traffic["x"].read

Any Python function that calls kernels built with `mx.fast.metal_kernel` runs, gradients included.
At each call MLX itself generates the Metal source (`mx.export_function` shows it): its signature,
its order of arguments, its choice of `device` or `constant`, its template values. That text,
compiled as C++ through `shim/`, is what runs.

    source.py    what MLX would dispatch, and the same text as C++
    shim/        the Metal language as C++
    machine/     threads as fibers, barriers, simdgroup functions; the trace of memory accesses
    execute.py   compile and run, in a process of its own
    rules.py     what a C++ compiler lets pass and Metal does not
    mutations.py bugs planted in our kernels, and what catches each

**Modes.** "plain" compares guard zones round every buffer afterwards. "sanitized" adds the address
and undefined-behaviour sanitizers. "traced" sees each access: reads and writes outside a buffer or
between the elements of a strided one, reads of what nothing has written, outputs left unwritten,
and races, that is two threads on one item, one of them writing, and no barrier between that orders
that memory; and it counts the traffic. In each, outputs and threadgroup memory start as NaN, and
every local variable as a pattern. "captured" runs nothing, needs no compiler and gives zeros: it
is for reading what MLX would dispatch.

**Orders.** Lanes, simdgroups and threadgroups take turns in "ascending", "descending" or "random"
order (with `seed`).

**Stricter than Metal.** A simdgroup function must be reached by every lane of the simdgroup, and a
barrier by every thread: none may have returned before. A race counts even if both write one value.

**Not seen.** Fast math, contraction to fma, the hardware's order of reduction, spin-waits across
threadgroups; atomics, textures and simdgroup matrices do not compile.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import pytest

from mlx_mcsd import kernels

from . import execute, source
from .execute import KernelFault, Traffic

__all__ = ["Call", "KernelFault", "Traffic", "executed", "needs_compiler", "run"]

needs_compiler = pytest.mark.skipif(
    mx.metal.is_available() or execute.compiler() is None,
    reason="Metal itself runs the kernels here, or no C++ compiler knows _Float16 "
    "($CXX, g++ >= 12, clang++)",
)


@dataclass(frozen=True)
class Call:
    """One kernel call."""

    launch: source.Launch
    traffic: dict[str, Traffic]  # by array, in mode "traced"
    copied: int = 0  # bytes that MLX reads and writes before, to make inputs contiguous

    def bytes(self) -> int:
        """Return the bytes read, written and copied, over all arrays."""
        if not self.traffic:
            raise RuntimeError('traffic is counted in mode "traced"')
        return sum(t.bytes for t in self.traffic.values()) + self.copied


@contextmanager
def executed(
    *,
    mode: str = "plain",
    order: str = "ascending",
    seed: int = 0,
    edit: Callable[[str, str], str] = lambda name, body: body,
) -> Iterator[list[Call]]:
    """Execute, rather than dispatch, every `mx.fast.metal_kernel` built inside the context.

    Those of `mlx_mcsd.kernels` are built anew, and its dispatcher chooses them as on a GPU. What
    `edit` makes of a kernel's name and body is run in its stead.

    Yields:
        The calls, as they are made.
    """
    calls: list[Call] = []
    build = mx.fast.metal_kernel

    def metal_kernel(
        name, input_names, output_names, source, header="", ensure_row_contiguous=True, **options
    ):
        source = edit(name, source)
        real = build(
            name, input_names, output_names, source, header, ensure_row_contiguous, **options
        )
        how = {"mode": mode, "order": order, "seed": seed, "row_contiguous": ensure_row_contiguous}
        return functools.partial(_call, calls, real, name, input_names, output_names, source, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", metal_kernel)
        # The dispatcher asks for a GPU; here the machine stands for one.
        patch.setattr(kernels, "available", lambda dtype: dtype in kernels.DTYPES)
        kernels.kernel.cache_clear()
        try:
            yield calls
        finally:
            kernels.kernel.cache_clear()


def run(fn, *args, mode: str = "plain", order: str = "ascending", seed: int = 0, **keywords):
    """Return fn(*args, **keywords), its kernels executed as `executed` says."""
    with executed(mode=mode, order=order, seed=seed) as calls:
        result = fn(*args, **keywords)
        mx.eval(result)
    if not calls:
        raise RuntimeError(f"{fn} called no kernel")
    return result


def _call(calls, real, name, input_names, output_names, body, how, *, inputs, **keywords):
    """Do what a kernel does when it is called, but here and now."""
    arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
    mx.eval(arrays)
    launch = source.trace(name, body, real, arrays, keywords)
    outputs = list(zip(keywords["output_shapes"], keywords["output_dtypes"], strict=True))
    if how["mode"] == "captured":
        calls.append(Call(launch, {}))
        return [mx.zeros(*o) for o in outputs]
    results, *costs = execute.run(
        launch,
        dict(zip(input_names, arrays, strict=True)),
        dict(zip(output_names, outputs, strict=True)),
        init_value=keywords.get("init_value"),
        **how,
    )
    calls.append(Call(launch, *costs))
    return results
