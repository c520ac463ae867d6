"""What a conversion does or did, for people and for scripts."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from .plan import Plan
from .verify import Verification
from .weights import n_bytes


@dataclass
class Report:
    """A conversion, planned or done.

    Attributes:
        source: what the source is called.
        target: the directory made, or to be made.
        tensors: source name -> (stored type, shape), of all its tensors.
        plan: what fills what.
        written: whether `target` was made.
        verification: how the result compares with the source, or None where it was not asked.
        uploaded: the repository it was uploaded to, or None.
    """

    source: str
    target: Path
    tensors: dict
    plan: Plan
    written: bool = False
    verification: Verification | None = None
    uploaded: str | None = None

    @property
    def bytes(self) -> int:
        """Of all weights as they are stored."""
        return sum(n_bytes(spec) for p in self.plan.parameters for spec in p.stored().values())

    def summary(self) -> str:
        """One line: how many tensors of the source become how many numbers and bytes."""
        used = len({part.source for p in self.plan.parameters for part in p.parts})
        size = self.plan.size
        return (
            f"{used} tensors fill {len(self.plan.parameters)} parameters, {size:,} numbers in "
            f"{self.bytes / 1e6:,.1f} MB, {8 * self.bytes / size:.3f} bits per weight"
        )

    def table(self) -> str:
        """A line for every tensor: from, its type and shape, to, its shape and type."""
        rows = [("from", "", "", "to", "", "")]
        for parameter in self.plan.parameters:
            to = (parameter.name, shown(parameter.shape), kind_of(parameter))
            for source, run in runs(parameter.parts):
                kind, shape = self.tensors[source]
                rows.append((source + run, shown(shape), kind, *to))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        lines += [f"{name}  ignored: {reason}" for name, reason in self.plan.ignored.items()]
        return "\n".join(line.rstrip() for line in lines)

    def json(self) -> dict:
        """The same for scripts, of plain types."""
        plan = self.plan
        return {
            "source": self.source,
            "target": str(self.target),
            "written": self.written,
            "verification": self.verification and self.verification.json(),
            "uploaded": self.uploaded,
            "parameters": plan.size,
            "bytes": self.bytes,
            "config": plan.config,
            "tensors": [
                {
                    "to": parameter.name,
                    "shape": list(parameter.shape),
                    "dtype": dtype_name(parameter.dtype),
                    "quantization": parameter.settings,
                    "from": [
                        {
                            "name": part.source,
                            "shape": list(self.tensors[part.source][1]),
                            "dtype": self.tensors[part.source][0],
                            "part": [part.index, part.count],
                        }
                        for part in parameter.parts
                    ],
                }
                for parameter in plan.parameters
            ],
            "ignored": plan.ignored,
            "notes": plan.notes,
        }


def runs(parts):
    """Yield (source, which of the matrices stacked there) of parts, neighbours together."""
    for source, run in groupby(parts, lambda part: part.source):
        run = list(run)
        stacked = [part.index + 1 for part in run]
        whole = stacked == list(range(1, run[0].count + 1))
        yield source, "" if whole else f" [{','.join(map(str, stacked))} of {run[0].count}]"


def shown(shape):
    """A shape as text."""
    return "x".join(map(str, shape))


def dtype_name(dtype):
    """float16, not mlx.core.float16."""
    return str(dtype).removeprefix("mlx.core.")


def kind_of(parameter):
    """How a parameter is stored: its dtype, or mode, bits and group size."""
    if parameter.settings is None:
        return dtype_name(parameter.dtype)
    mode, bits, group = (parameter.settings[k] for k in ("mode", "bits", "group_size"))
    return f"{mode} {bits} bits, groups of {group}" if mode == "affine" else mode
