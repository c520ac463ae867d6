"""Compile a launch and run it, in a process of its own: a wild store must not take pytest down."""

import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from .source import Launch, to_cpp

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / ".pytest_cache" / "d" / "metal_on_cpu"
ORDERS = ("ascending", "descending", "random")

_COMMON = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-w",
    # No contraction: a product and a sum round apart, as the plain forms do.
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-ftrivial-auto-var-init=pattern",
]
# What is added when a mode compiles the kernel, when it compiles the machine, and when it links.
_SANITIZERS = [
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize=vptr",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
]
MODES = {
    "plain": ([], [], []),
    "sanitized": (_SANITIZERS, ["-DSANITIZED"], _SANITIZERS),
    "traced": (["-fsanitize=thread"], [], []),
}


class KernelFault(Exception):
    """The kernel did what Metal forbids, or what no kernel should do; the message says what."""


@dataclass(frozen=True)
class Traffic:
    """Memory one array cost: bytes, 128-byte lines touched, and the fewest lines those bytes fill.

    Lanes of a simdgroup that run one instruction together make one access, in which a line or an
    address counts once; nothing is cached between accesses.
    """

    read: int = 0
    read_lines: int = 0
    read_least_lines: int = 0
    written: int = 0
    written_lines: int = 0
    written_least_lines: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


@functools.cache
def compiler() -> str | None:
    """Return the C++ compiler: $CXX, g++ or clang++, or None if none knows half and C++17."""
    probe = "_Float16 f(_Float16 x) { return x + x; }"
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name.split()[0]):
            command = [*name.split(), *_COMMON, "-fsyntax-only", "-x", "c++", "-"]
            if subprocess.run(command, input=probe, capture_output=True, text=True).returncode == 0:
                return name
    return None


def mlx_headers() -> Path:
    """Return the folder of Metal headers that MLX puts before every kernel."""
    return Path(mx.__file__).parent / "include"


def build(launch: Launch, mode: str) -> Path:
    """Return the program that runs a launch; compiled once, then kept in CACHE."""
    kernel_flags, machine_flags, link_flags = MODES[mode]
    includes = [f"-I{HERE / 'machine'}", f"-I{HERE / 'shim'}", f"-I{mlx_headers()}"]
    objects = [_compiled(to_cpp(launch), ".o", ["-c", *kernel_flags, *includes])]
    for part in ["engine.cpp"] + ["trace.cpp"] * (mode == "traced"):
        text = (HERE / "machine" / part).read_text()
        objects.append(_compiled(text, ".o", ["-c", *machine_flags, *includes]))
    return _compiled("", "", [*link_flags, *map(str, objects)])


@functools.cache
def _included() -> str:
    """Return what compiled texts include, which the names of the products depend on."""
    return "".join(
        p.read_text()
        for d in ("shim", "machine")
        for p in sorted((HERE / d).glob("*"))
        if p.is_file()
    )


def _compiled(text: str, suffix: str, flags: list[str]) -> Path:
    """Compile a text, or link where there is none; the product is named by all it is made of."""
    command = [*compiler().split(), *_COMMON, *flags]
    key = "\0".join([text, *command, _included()])
    product = CACHE / (hashlib.sha256(key.encode()).hexdigest()[:24] + suffix)
    if product.exists():
        return product
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        made = Path(folder) / "made"
        if text:
            source = Path(folder) / "kernel.cpp"
            source.write_text(text)
            command += [str(source)]
        else:
            command += ["-ldl"] if os.uname().sysname == "Linux" else []
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise KernelFault("does not compile:\n" + done.stderr[:4000])
        os.replace(made, product)  # another process may be making the same
    return product


def run(
    launch: Launch,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    *,
    row_contiguous: bool = True,
    init_value: float | None = None,
    mode: str = "plain",
    order: str = "ascending",
    seed: int = 0,
) -> tuple[list[mx.array], dict[str, Traffic], int]:
    """Run a launch and return its outputs, in mode "traced" what each array cost, and bytes copied.

    Those are what MLX reads and writes before the dispatch to make inputs contiguous.

    Raises:
        KernelFault: whatever the machine or a sanitizer finds.
    """
    if launch.threadgroup[0] * launch.threadgroup[1] * launch.threadgroup[2] > 1024:
        raise KernelFault(f"a threadgroup of {launch.threadgroup} threads; 1024 is the most")
    bound = sum(not a.is_attribute for a in launch.arguments)
    if bound > 31:
        raise KernelFault(f"{bound} buffers; 31 is the most")
    program = build(launch, mode)
    buffers, copied = _buffers(launch, inputs, outputs, row_contiguous, init_value)
    request = struct.pack(
        "<9Q", *launch.grid, *launch.threadgroup, ORDERS.index(order), seed, len(buffers)
    )
    # The address sanitizer must be the first library, before a BLAS that is preloaded for MLX.
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    env["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
    done = subprocess.run(
        [program], input=request + b"".join(buffers.values()), capture_output=True, env=env
    )
    if done.returncode:
        raise KernelFault(f"[{launch.name}] " + _explain(program, done))
    answer, traffic = done.stdout, {}
    if mode == "traced":
        figures = struct.iter_unpack("<6Q", answer[: 48 * len(buffers)])
        answer = answer[48 * len(buffers) :]
        traffic = {
            name: Traffic(*f)
            for name, f in zip(buffers, figures, strict=True)
            if name in inputs or name in outputs
        }
    arrays = []
    for shape, dtype in outputs.values():
        size = int(np.prod(shape)) * dtype.size
        flat = np.frombuffer(answer[:size], _numpy_type(dtype)).reshape(shape)
        answer = answer[size:]
        arrays.append(mx.array(flat).view(dtype) if dtype == mx.bfloat16 else mx.array(flat))
    return arrays, traffic, copied


def _numpy_type(dtype: mx.Dtype) -> np.dtype:
    """Return NumPy's name of a dtype; bfloat16 travels as its bits."""
    name = str(dtype).removeprefix("mlx.core.")
    return np.dtype("uint16" if name == "bfloat16" else name.rstrip("_"))


def _buffers(launch, inputs, outputs, row_contiguous, init_value) -> tuple[dict[str, bytes], int]:
    """Return the buffers in the order of the kernel's arguments, and bytes MLX copies before."""
    made, lying, copied = {}, {}, 0
    for name, a in inputs.items():
        lies_in_rows = memoryview(a).c_contiguous
        lying[name] = _Lying.rows(a) if row_contiguous or lies_in_rows else _Lying.strided(a)
        if row_contiguous and not lies_in_rows:
            copied += 2 * a.nbytes
    for argument in launch.arguments:
        name = argument.name
        if argument.is_attribute:
            continue
        if name in lying:
            a = lying[name]
            made[name] = _packed(name, 0, a.item, a.memory, a.start, a.view)
        elif name in outputs:
            shape, dtype = outputs[name]
            size = int(np.prod(shape)) * dtype.size
            if init_value is None:
                made[name] = _packed(name, 1, dtype.size, size)
            else:
                filled = _values(mx.full(shape, init_value, dtype))
                made[name] = _packed(name, 2, dtype.size, filled.tobytes())
        else:
            array, what = name.rsplit("_", 1)
            fact = {
                "shape": np.array(inputs[array].shape, np.int32),
                "strides": np.array(lying[array].strides, np.int64),
                "ndim": np.array(inputs[array].ndim, np.int32),
            }[what]
            made[name] = _packed(name, 0, fact.itemsize, fact.tobytes())
    return made, copied


def _packed(
    name: str, kind: int, item: int, memory: bytes | int, start: int = 0, view: bytes = b""
) -> bytes:
    """Return a buffer as machine/engine.cpp reads it; `memory` is a size if it has no content."""
    size, memory = (memory, b"") if isinstance(memory, int) else (len(memory), memory)
    label = name.encode()
    head = struct.pack("<Q", len(label)) + label
    return head + struct.pack("<5Q", kind, item, size, start, len(view)) + view + memory


def _values(a: mx.array) -> np.ndarray:
    """Return an array's values in rows; of bfloat16, the bits."""
    return np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a, order="C")


@dataclass(frozen=True)
class _Lying:
    """An array as it lies in memory."""

    memory: bytes
    strides: list[int]  # in items
    item: int  # bytes
    start: int = 0  # where the first element is, in bytes
    view: bytes = b""  # 1 for each item that is an element; empty: all are

    @classmethod
    def rows(cls, a: mx.array) -> "_Lying":
        """Without gaps, the last axis first."""
        values = _values(a)
        strides = [int(np.prod(a.shape[k + 1 :])) for k in range(a.ndim)]
        return cls(values.tobytes(), strides, values.itemsize)

    @classmethod
    def strided(cls, a: mx.array) -> "_Lying":
        """As MLX has it, in the buffer of a larger array; what lies between is NaN."""
        values = _values(a)
        item = values.itemsize
        strides = [s // item for s in memoryview(a).strides]
        reach = [(n - 1) * s for n, s in zip(a.shape, strides, strict=True)]
        start = -sum(r for r in reach if r < 0)
        memory = np.full((sum(map(abs, reach)) + 1, item), 0xFF, np.uint8).view(values.dtype)[:, 0]
        view = np.zeros(memory.size, np.uint8)
        as_strided = np.lib.stride_tricks.as_strided
        as_strided(memory[start:], a.shape, [s * item for s in strides])[...] = values
        as_strided(view[start:], a.shape, strides)[...] = 1
        return cls(memory.tobytes(), strides, item, start * item, view.tobytes())


def _explain(program: Path, done: subprocess.CompletedProcess) -> str:
    """Say in a line or two what ended the process."""
    text = done.stderr.decode(errors="replace")
    if "fault: " in text:
        line = text[text.index("fault: ") + 7 :].strip()
        counter = re.match(r"pc ([0-9a-f]+): ", line)
        if counter:
            line = f"{_line_of(program, counter[1])}: " + line[counter.end() :]
        return line
    for sign in ("runtime error: ", "ERROR: AddressSanitizer: "):
        if sign in text:
            where = re.search(r"\S+\.metal:\d+", text)
            found = text[text.index(sign) :].splitlines()[0].removeprefix("ERROR: ")
            return f"{where[0] if where else '?'}: {found}"
    return f"ended with signal {-done.returncode}\n{text[:2000]}"


def _line_of(program: Path, counter: str) -> str:
    if not shutil.which("addr2line"):
        return "?"
    found = subprocess.run(
        ["addr2line", "-e", program, counter], capture_output=True, text=True
    ).stdout.strip()
    return Path(found.split(" ")[0]).name
