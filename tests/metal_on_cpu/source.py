"""What MLX would send to the GPU for one kernel call, and the same text as C++."""

import re
from dataclasses import dataclass

import mlx.core as mx

# Attributes MLX may add to a signature; but for these, all are fields of Place in shim/machine.h.
ATTRIBUTES = {
    "threads_per_simdgroup": "32u",
    "thread_execution_width": "32u",
    "grid_size": "at->threads_per_grid",
    "dispatch_simdgroups_per_threadgroup": (
        "(at->dispatch_threads_per_threadgroup[0] * at->dispatch_threads_per_threadgroup[1]"
        " * at->dispatch_threads_per_threadgroup[2] + 31) / 32"
    ),
}


_ARGUMENT = r"\s*(.+?)\s+(\w+) \[\[(\w+)(?:\(\d+\))?\]\]"


@dataclass(frozen=True)
class Argument:
    """One argument of the kernel function, as MLX declares it."""

    name: str
    type: str  # with its address space: "const device float*"
    is_attribute: bool


@dataclass(frozen=True)
class Launch:
    """One kernel call as MLX would dispatch it."""

    name: str  # given to mx.fast.metal_kernel
    function: str  # with its template arguments
    text: str  # the whole Metal source
    body: str  # of it, what the kernel's file says
    arguments: tuple[Argument, ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]


def trace(name: str, body: str, kernel, arrays: list[mx.array], keywords: dict) -> Launch:
    """Call an mx.fast.metal_kernel under export, and return what MLX makes of the call.

    The exported inputs are placeholders: the text depends on shapes and dtypes only.
    """
    nodes = []
    placeholders = [mx.zeros(a.shape, a.dtype) for a in arrays]
    mx.export_function(nodes.append, lambda *xs: kernel(inputs=list(xs), **keywords), *placeholders)
    (node,) = [n for n in nodes if n.get("name") == "CustomKernel"]
    function, text, *sizes = node["arguments"][:8]
    grid, threadgroup = tuple(sizes[:3]), tuple(sizes[3:])
    signature = re.search(rf"\[\[kernel\]\] void {function}\((.*?)\) \{{\n", text, re.S)
    arguments = []
    for line in signature[1].split(",\n"):
        kind, argument, binding = re.fullmatch(_ARGUMENT, line).groups()
        arguments.append(Argument(argument, kind, binding != "buffer"))
    template = re.search(r"decltype\((.*?)\) ", text[signature.end() :], re.S)
    return Launch(
        name, template[1] if template else function, text, body, tuple(arguments), grid, threadgroup
    )


def to_cpp(launch: Launch) -> str:
    """Return the C++ that runs the launch: the text itself, with three changes.

    `threadgroup T a[n];` asks the machine for storage; the explicit instantiation of the template,
    whose form is Metal's own, goes; lines of the body count as they do in the kernel's file.
    """
    text = numbered(launch)
    text = re.sub(rf"{INSTANTIATION}.*?;", "", text, flags=re.S)
    values = []
    index = 0
    for a in launch.arguments:
        if a.is_attribute:
            value = ATTRIBUTES.get(a.name, f"at->{a.name}")
            if a.type == "uint3":
                value = f"uint3({value}[0], {value}[1], {value}[2])"
        else:
            pointer = f"({a.type.rstrip('&*')}*)buffers[{index}]"
            value = f"*{pointer}" if a.type.endswith("&") else pointer
            index += 1
        values.append(value)
    return (
        '#include "mlx/backend/metal/kernels/utils.h"\n'
        + store_threadgroup(text)
        # Its own accesses are not the kernel's.
        + '\nextern "C" __attribute__((no_sanitize("thread")))\n'
        + "void machine_kernel(void* const* buffers, const Place* at) {\n"
        + f"  {launch.function}(\n      " + ",\n      ".join(values) + ");\n}\n"
    )  # fmt: skip


INSTANTIATION = r"template \[\[host_name\(.*?\)\]\] \[\[kernel\]\]"


def numbered(launch: Launch) -> str:
    """Return the text with the lines of the body counted as in the kernel's file."""
    start = launch.text.index(launch.body, launch.text.index("[[kernel]]"))
    return f'{launch.text[:start]}#line 1 "{launch.name}.metal"\n{launch.text[start:]}'


_TOKEN = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|\bthreadgroup\b', re.S)
_DECLARATION = re.compile(
    r"\s+(?P<type>(?:const\s+)?[A-Za-z_][\w:]*(?:\s*<[^;>]*>)?)\s+"
    r"(?P<names>[A-Za-z_]\w*\s*(?:\[[^;\[\]]*\]\s*)*(?:,\s*[A-Za-z_]\w*\s*(?:\[[^;\[\]]*\]\s*)*)*);"
)
_DECLARED = r"(\w+)\s*((?:\[[^\[\]]*\]\s*)*)(?:,\s*|$)"


def store_threadgroup(text: str) -> str:
    """Rewrite each declaration of threadgroup memory as a reference to what the machine lends."""
    out, end, count = [], 0, 0
    for token in _TOKEN.finditer(text):
        declaration = token[0] == "threadgroup" and _DECLARATION.match(text, token.end())
        if not declaration:
            continue  # a comment, a string, or the qualifier of a pointer
        out.append(text[end : token.start()])
        for name, shape in re.findall(_DECLARED, declaration["names"]):
            kind = f"shared_{count}"
            out.append(
                f"using {kind} = {declaration['type']}{' '.join(shape.split())}; "
                f"threadgroup {kind}& {name} = *(threadgroup {kind}*)machine_threadgroup("
                f'{count}, "{name}", sizeof({kind}), sizeof(std::remove_all_extents_t<{kind}>)); '
            )
            count += 1
        end = declaration.end()
        out.append("\n" * text.count("\n", token.start(), end))  # keep the line numbers
    return "".join(out) + text[end:]
