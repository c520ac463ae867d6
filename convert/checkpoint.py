"""A checkpoint on disk: what it holds, without reading its weights or running its code."""

import mlx.core as mx
import numpy as np

from mlx_mcsd.loading import read_config, some

from .locate import locate
from .readers.files import refuse, shown
from .readers.safetensors_file import SafetensorsFile
from .readers.torch_file import TorchFile
from .readers.unwrap import unwrap


class Checkpoint:
    """The weights of a model, and its `config.json`: safetensors or what `torch.save` wrote.

    Opening reads headers and indexes only.

    Args:
        path: a directory, a hub id, or a file of weights (.safetensors, .pt, .pth, .bin).

    Attributes:
        directory: where it lies.
        config: the content of `config.json`, or None where there is none.
        files: the files the weights are read from.
        tensors: name -> (type, shape) of every tensor of the model. Types are those of
            safetensors ("F32", "BF16", ...); names are without what trainers wrap around them
            (`state_dict`, `module.`, `_orig_mod.`).
        ignored: name -> reason, of everything else that lies in the files.

    Raises:
        MCSDError: a file that is missing, truncated, malformed or more than data, or weights
            already quantized.
    """

    def __init__(self, path):
        self.directory, self.files, listed = locate(path)
        has_config = (self.directory / "config.json").exists()
        self.config = read_config(self.directory) if has_config else None
        self.tensors, self.ignored, self._homes = {}, {}, {}
        for file in self.files:
            reader = (SafetensorsFile if file.suffix == ".safetensors" else TorchFile)(file)
            if listed is not None:
                check_listed(file, {".".join(p) for p in reader.tensors}, listed[file.name])
            names, beside = unwrap(reader.tensors, shown(file, 300))
            for key, name in names.items():
                if name in self.tensors:
                    refuse(f"{name} of {file} is stored twice; remove the stale file.")
                self.tensors[name] = reader.tensors[key]
                self._homes[name] = (reader, key)
            self.ignored |= {".".join(key): reason for key, reason in beside.items()}
            for key, kind in reader.others.items():
                self.ignored[shown(".".join(key))] = f"no tensor: {kind}"
        quantized = self.config is not None and "quantization" in self.config
        if quantized or any(name.endswith(".scales") for name in self.tensors):
            refuse(
                f"{path} must hold float weights but is quantized; it runs as it is, and "
                "`mlx_lm.convert --dequantize` gives floats again."
            )
        if not self.tensors:
            refuse(f"{shown(path, 300)} must hold tensors but has none.")

    def load(self, name):
        """Read one tensor, now; float64 as float32.

        Args:
            name: one of `tensors`.

        Returns:
            An `mx.array` of the shape in `tensors`.

        Raises:
            MCSDError: float64 beyond float32, or a type that MLX does not have.
        """
        return self.arrive(name, self.values(name))

    def values(self, name):
        """Read one tensor as a NumPy array in the stored type, bfloat16 as its bits."""
        reader, path = self._homes[name]
        if self.tensors[name][0].startswith("F8"):
            refuse(f"{name} must be of a type that MLX has but is {self.tensors[name][0]}.")
        return reader.read(path)

    def arrive(self, name, values):
        """Return what `load` gives of `values`, or of a part of them."""
        if self.tensors[name][0] == "BF16":
            return mx.array(values).view(mx.bfloat16)
        if self.tensors[name][0] == "F64":
            try:
                with np.errstate(over="raise", invalid="ignore"):  # a NaN may be of any kind
                    values = values.astype(np.float32)
            except FloatingPointError:
                refuse(f"{name} must fit float32 but holds larger numbers.")
        return mx.array(values)


def check_listed(file, found, listed):
    """Refuse a shard that holds other tensors than its index says."""
    if missing := sorted(listed - found):
        refuse(f"{file} must hold {some(missing)}, says its index, but does not.")
    if unlisted := sorted(found - listed):
        refuse(f"{file} holds {some(unlisted)}, which its index does not list; write it anew.")
