"""The tensors of an MLX model on the disk, under the names of the checkpoint layout."""

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mcsd.loading import read_config
from mlx_mcsd.model import Model

# The largest error of one packed number, as a part of its group's largest (half the widest gap
# between two values, and what a coarse scale adds), and alone: scales come of float16 weights with
# the last digit that type has, and in nvfp4 have eight bits. Affine modes have a step instead.
PACKED = {
    "mxfp4": (0.3, 6 * 2.0**-24),
    "mxfp8": (0.15, 448 * 2.0**-25),
    "nvfp4": (0.3, 6 * 2.0**-10),
}


ROWS = 256
"""Of a matrix that are worked on at a time: an embedding may be the largest part of a model."""


class Result:
    """What a directory holds, stacked or packed or as it is; read one tensor at a time.

    Args:
        directory: of the model.
        args: its config, checked.

    Attributes:
        places: name in the layout -> (name on the disk, index, count): the index-th of so many
            matrices stacked there.
        size: how many numbers the model has.
    """

    def __init__(self, directory, args):
        self.homes, self.dtypes, self.size = {}, {}, 0
        for file in sorted(directory.glob("model*.safetensors")):
            for name, array in mx.load(str(file)).items():
                self.homes[name], self.dtypes[name] = file, array.dtype
        self.settings = read_config(directory).get("quantization", {})
        model = Model(args)  # of shapes: nothing is evaluated
        shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
        self.size = sum(array.size for _, array in tree_flatten(model.parameters()))
        self.places = {name: (name, 0, 1) for name in shapes}
        for path, module in model.named_modules():
            for whole, parts in getattr(module, "fused", {}).items():
                stacked = f"{path}.{whole}.weight"
                del self.places[stacked]
                for index, part in enumerate(parts):
                    name = f"{path}.{part}.weight"
                    alone = name in self.homes
                    self.places[name] = (name, 0, 1) if alone else (stacked, index, len(parts))

    def dtype(self, name):
        """The type a tensor is stored in; None if it is packed."""
        dtype = self.dtypes[self.places[name][0]]
        return None if dtype == mx.uint32 else dtype

    def read(self, name):
        """A tensor as it is stored, or unpacked to float32."""
        if self.dtype(name) is None:
            return mx.concatenate([weight for weight, _ in self.unpacked(name)])
        stored, index, count = self.places[name]
        tensor = mx.load(str(self.homes[stored]))[stored]  # anew, to let go of what is read
        return mx.split(tensor, count, axis=-2)[index] if count > 1 else tensor

    def unpacked(self, name):
        """Yield a packed tensor's numbers and the largest errors that packing may have made.

        Both float32, `ROWS` of its rows at a time.
        """
        stored, index, count = self.places[name]
        path = stored.removesuffix(".weight")
        entry = self.settings.get(path)
        settings = entry if isinstance(entry, dict) else self.settings
        mode = settings.get("mode", "affine")
        group = settings["group_size"]
        arrays = mx.load(str(self.homes[stored]))
        arrays = [arrays.get(f"{path}.{kind}") for kind in ("weight", "scales", "biases")]
        n = arrays[0].shape[-2] // count
        part = [x if x is None else x[..., index * n : (index + 1) * n, :] for x in arrays]
        for start in range(0, part[0].shape[0], ROWS):
            block = [x if x is None else x[start : start + ROWS] for x in part]
            yield unpack(*block, group, settings["bits"], mode)


def unpack(weight, scales, biases, group, bits, mode):
    """Return packed numbers and the largest errors that packing may have made, both float32."""
    half = scales.dtype == mx.float16
    if mode == "affine":  # in float32, or the sum of bias and step would be rounded once more
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    options = {"group_size": group, "bits": bits, "mode": mode}
    weight = mx.dequantize(weight, scales, biases, **options).astype(mx.float32)
    grouped = mx.unflatten(weight, -1, (-1, group))
    largest = mx.abs(grouped).max(axis=-1, keepdims=True)
    if mode == "affine":
        # A whole step, since the end of a group may be cut off, and what rounding its scale and
        # bias to half precision adds.
        digit = 2.0 ** (bits - 24)
        allowed = mx.abs(scales)[..., None] + largest * 2.0**-6 + digit * half
    else:
        part, alone = PACKED[mode]
        allowed = largest * part + alone
    allowed = mx.flatten(mx.broadcast_to(allowed, grouped.shape), -2)
    return weight, allowed
