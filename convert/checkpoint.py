"""A checkpoint on disk: what it holds, without reading its weights or running its code."""

import json

import mlx.core as mx
import numpy as np
from safetensors import safe_open

from mlx_mcsd.config import ModelArgs
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import read_config, read_headers, resolve

# bfloat16 is unknown to NumPy: its bits travel as uint16.
NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Checkpoint:
    """`config.json` and safetensors weights, one file or shards with an index.

    Opening reads the headers only.

    Args:
        path: a directory, or a hub id.

    Attributes:
        directory: where it lies.
        config: the content of `config.json`.
        args: the same, checked.
        tensors: name -> (safetensors type, shape) of every tensor.

    Raises:
        MCSDError: a file that is missing, truncated or not what its name says, a config of no
            MCSD model, a shard of the index that is not there, or weights already quantized.
    """

    def __init__(self, path):
        self.directory = resolve(path)
        self.config = read_config(self.directory)
        self.args = ModelArgs.from_dict(self.config)
        self.tensors = read_headers(self.directory)
        if "quantization" in self.config or any(name.endswith(".scales") for name in self.tensors):
            raise MCSDError(
                f"[convert] {path} must hold float weights but is quantized; it runs as it is, and "
                "`mlx_lm.convert --dequantize` gives floats again."
            )

    def read(self):
        """Return every tensor by name, read from disk when it is evaluated; float64 as float32."""
        arrays = {}
        for file in sorted(self.directory.glob("model*.safetensors")):
            with safe_open(file, "numpy") as tensors:
                kinds = {self.tensors[name][0] for name in tensors.keys()}  # noqa: SIM118
            # MLX refuses a whole file for one float64 tensor.
            arrays |= read_at_offsets(file) if "F64" in kinds else mx.load(str(file))
        return arrays


def read_at_offsets(file):
    """Return every float tensor of a valid safetensors file, read now; float64 as float32."""
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    arrays = {}
    for name, info in header.items():
        start, stop = info["data_offsets"]
        dtype = np.dtype(NUMPY_DTYPES[info["dtype"]])
        count = (stop - start) // dtype.itemsize
        values = np.fromfile(file, dtype, count, offset=8 + size + start).reshape(info["shape"])
        if info["dtype"] == "BF16":
            arrays[name] = mx.array(values).view(mx.bfloat16)
        else:
            try:
                with np.errstate(over="raise"):
                    narrow = values.astype(np.float32) if dtype == np.float64 else values
            except FloatingPointError:
                raise MCSDError(
                    f"[convert] {name} must fit float32 but holds larger numbers."
                ) from None
            arrays[name] = mx.array(narrow)
    return arrays
