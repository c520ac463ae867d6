"""What a C++ compiler lets pass and Metal's does not.

`read` looks at the text alone, on any machine. `check` has clang, where there is one, compile the
text as C++ for OpenCL, which knows address spaces, and has neither double nor function pointers.
Threadgroups over 1,024 threads, over 32 KB of memory and over 31 buffers are faults of the run.
"""

import functools
import os
import re
import shutil
import subprocess

import pytest

from .execute import HERE
from .source import INSTANTIATION, Launch, numbered, store_threadgroup

_WORDS = {
    "double": "Metal has no double",
    "long long": "Metal has no long long; long has 64 bits",
    "long double": "Metal has no double",
    "std": "Metal has no std::; use metal::",
    "virtual": "Metal has no virtual functions",
    "dynamic_cast": "Metal has no run-time types",
    "typeid": "Metal has no run-time types",
    "new": "Metal has no heap",
    "delete": "Metal has no heap",
    "malloc": "Metal has no heap",
    "try": "Metal has no exceptions",
    "throw": "Metal has no exceptions",
    "goto": "Metal has no goto",
    "thread_local": "Metal has no thread_local",
    "asm": "Metal has no asm",
    "printf": "Metal has no printf",
}
_SPACES = r"\b(?:device|constant|threadgroup|thread)\b"
_POINTER = re.compile(
    r"(?:const\s+)?[A-Za-z_][\w:]*(?:\s*<[^<>]*>)?(?:\s+const)?\s*[*&]+\s*\w+\s*(?:=(?!=)|$)"
)
_LITERAL = re.compile(r"(?<![\w.])(?:(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)(?![\w.])")
_FUNCTION = re.compile(r"\b(\w+)\s*\([^;{}()]*\)\s*(?:const\s*)?\{")


def read(text: str) -> list[str]:
    """Return a line for each thing in a kernel's text that Metal refuses.

    Textual, so it errs on both sides in code that tries: a pointer without an address space is seen
    where a statement declares it, recursion where a function names itself.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    text = re.sub(r'"(?:\\.|[^"\\])*"', '""', text)
    found = []

    def note(place: int, what: str) -> None:
        found.append(f"line {text.count(chr(10), 0, place) + 1}: {what}")

    for word, why in _WORDS.items():
        for m in re.finditer(rf"\b{word}\b", text):
            note(m.start(), why)
    for m in _LITERAL.finditer(text):
        note(m.start(), f"{m[0]} has no suffix: a double in C++, a float in Metal")
    for m in re.finditer(r"\(\s*\*\s*\w+\s*\)\s*\(", text):
        note(m.start(), "Metal has no function pointers")
    for m in re.finditer(r"(?:^|(?<=[;{}]))\s*([^;{}()]+)", text):
        if _POINTER.match(m[1]) and not re.search(_SPACES, m[1]):
            note(m.start(1), "a pointer or reference without an address space")
    for m in _FUNCTION.finditer(text):
        if m[1] in ("if", "for", "while", "switch"):
            continue
        end, depth = m.end(), 1
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if re.search(rf"\b{m[1]}\s*\(", text[m.end() : end]):
            note(m.start(), f"{m[1]} calls itself; Metal has no recursion")
    return sorted(found)


def _compile(name: str, text: str) -> subprocess.CompletedProcess:
    command = [name, "-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64-unknown-unknown"]
    # Without extensions there is no double, and a pointer without an address space is private.
    command += ["-Xclang", "-cl-ext=-all,+cl_khr_fp16", "-fsyntax-only", "-Werror"]
    command += [
        f"-Wno-{w}" for w in ("unknown-attributes", "undefined-inline", "undefined-internal")
    ]
    command += [f"-I{HERE / 'shim'}", "-include", "check.h", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True)


@functools.cache
def clang() -> str | None:
    """Return a clang that knows C++ for OpenCL 2021: $METAL_ON_CPU_CLANG, clang, clang-14 ..."""
    versions = [f"clang-{v}" for v in range(22, 13, -1)]
    for name in [os.environ.get("METAL_ON_CPU_CLANG"), "clang", *versions]:
        if name and shutil.which(name) and _compile(name, "").returncode == 0:
            return name
    return None


needs_clang = pytest.mark.skipif(clang() is None, reason="no clang >= 14 with C++ for OpenCL")


def check(*launches: Launch) -> str:
    """Return what clang has against the launches' texts; empty if nothing."""
    # An explicit instantiation in the form of C++, so that the template's body is checked.
    texts = [re.sub(INSTANTIATION, "template", numbered(x), flags=re.S) for x in launches]
    return _compile(clang(), "\n".join(map(store_threadgroup, texts))).stderr
