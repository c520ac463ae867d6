"""Tensors of torch, and what a reader finds in a file, in one form that can be compared."""

import re

import torch

NAMES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64", "complex64"),
)
ODD = {"bool": "BOOL", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


def kind_of(name):
    """What safetensors calls a type of torch."""
    return ODD.get(name) or re.sub("[a-z]+", lambda word: word[0][0].upper(), name)


def bits(value):
    """Type, shape and every byte of a torch tensor."""
    value = value.detach().contiguous()
    kind = kind_of(str(value.dtype).removeprefix("torch."))
    return kind, tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()


def held_by(reader):
    """Name -> the same, of what a reader of a file finds."""
    return {
        ".".join(path): (*reader.tensors[path], reader.read(path).tobytes())
        for path in reader.tensors
    }


def every_type():
    """Random bytes as each type that a model may have."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name in NAMES:
        raw = torch.randint(0, 2 if name == "bool" else 256, (48,), generator=generator)
        state[name] = raw.to(torch.uint8).view(getattr(torch, name)).reshape(2, -1)
    return state
