"""Small checkpoints of every format, and random damage to them.

The same kind and seed give the same damage, so that a failure can be had again.
"""

import io
import json
import pickletools
import random
import shutil
import struct
import warnings
import zipfile
from contextlib import suppress

import torch
from safetensors.torch import load_file, save_file

import tiny

TINY = {"hidden_size": 4, "intermediate_size": 6, "num_channels": 2, "num_hidden_layers": 1}
SAFE = "model.safetensors"
INTERESTING = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)
INTERESTING += (2**62, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = (None, True, -1, 0, 2**31, 2**63, 2**64, 10**30, 1.5, float("nan"), "", "x", "F64", [], {})


def save(source, state, file, **options):
    """Replace the weights by a file that torch saves."""
    torch.save(state, source / file, **options)
    (source / SAFE).unlink()


def save_shards(source, state, write, stem, suffix):
    """Replace the weights by two shards and an index; names what may be damaged."""
    names = sorted(state)
    shards = {f"{stem}-{i + 1:05}-of-00002{suffix}": names[i::2] for i in range(2)}
    for file, part in shards.items():
        write({name: state[name] for name in part}, source / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (source / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    if write is torch.save:
        (source / SAFE).unlink()
    else:
        (source / SAFE).rename(source / "unused")
        (source / "unused").unlink()


def strided(state):
    """The same values in views: transposed, shared, expanded."""
    base = torch.cat([value.reshape(-1) for value in state.values()])
    views, start = {}, 0
    for name, value in state.items():
        view = base[start : start + value.numel()].view(value.shape)
        views[name] = view.mT.contiguous().mT if view.ndim > 1 else view
        start += value.numel()
    return views


def wrapped(state):
    """A trainer's checkpoint."""
    named = {f"module._orig_mod.{name}": torch.nn.Parameter(v) for name, v in state.items()}
    return {"state_dict": named, "epoch": 3, "optimizer": {"state": {0: {"avg": torch.ones(3)}}}}


def double(state):
    """Wide types, and narrow ones."""
    types = (torch.float64, torch.float16, torch.bfloat16)
    return {name: v.to(types[i % 3]) for i, (name, v) in enumerate(state.items())}


LEGACY = {"_use_new_zipfile_serialization": False}
# Kind -> (function that lays the weights out, the files that are damaged).
KINDS = {
    "safetensors": (lambda s, w: None, [SAFE]),
    "safetensors, types": (lambda s, w: save_file(double(w), s / SAFE), [SAFE]),
    "zip": (lambda s, w: save(s, w, "pytorch_model.bin"), ["pytorch_model.bin"]),
    "zip, strided": (lambda s, w: save(s, strided(w), "x.pt"), ["x.pt"]),
    "zip, wrapped": (lambda s, w: save(s, wrapped(w), "x.pt"), ["x.pt"]),
    "zip, protocol 3": (lambda s, w: save(s, double(w), "x.pt", pickle_protocol=3), ["x.pt"]),
    "legacy": (lambda s, w: save(s, w, "x.pth", **LEGACY), ["x.pth"]),
    "legacy, wrapped": (lambda s, w: save(s, wrapped(strided(w)), "x.pth", **LEGACY), ["x.pth"]),
    "shards": (
        lambda s, w: save_shards(s, w, save_file, "model", ".safetensors"),
        ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
    ),
    "bin shards": (
        lambda s, w: save_shards(s, w, torch.save, "pytorch_model", ".bin"),
        ["pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"],
    ),
    "config": (lambda s, w: None, ["config.json"]),
    "tokenizer": (lambda s, w: None, ["tokenizer.json", "tokenizer_config.json"]),
}


def write_source(directory, kind):
    """Write an undamaged checkpoint; one with a tokenizer only where that is to be damaged."""
    tiny.write_model(directory, **TINY)
    if kind != "tokenizer":
        (directory / "tokenizer.json").unlink()
        (directory / "tokenizer_config.json").unlink()
    KINDS[kind][0](directory, load_file(directory / SAFE))
    return directory


def damage(source, directory, kind, seed):
    """Copy a checkpoint with one to three random changes to its files; returns what was done."""
    rng = random.Random(f"{kind} {seed}")
    shutil.copytree(source, directory)
    file = directory / rng.choice(KINDS[kind][1])
    content, done = file.read_bytes(), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        ways = [flip, flip, overwrite, insert, remove, cut, move]
        if file.suffix == ".json":
            ways += [change_json] * 10
        elif file.suffix == ".safetensors":
            ways += [change_header] * 10
        elif content[:2] == b"PK":
            ways += [change_member] * 10 + [swap_members]
        else:
            ways += [change_pickle] * 10
        way = rng.choice(ways)
        content = way(rng, content)
        done.append(way.__name__)
    file.write_bytes(content)
    return f"{file.name}: {', '.join(done)}"


def place(rng, content):
    """A position, more often near either end, where the formats keep their structure."""
    near = min(len(content), 400)
    spot = rng.randrange(3)
    if spot == 0:
        return rng.randrange(near + 1)
    return len(content) - rng.randrange(near + 1) if spot == 1 else rng.randrange(len(content) + 1)


def flip(rng, content):
    """Change one bit."""
    content = content or b"\0"
    at = min(place(rng, content), len(content) - 1)
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def overwrite(rng, content):
    """Write a number that programs get wrong."""
    at, size = place(rng, content), rng.choice((1, 2, 4, 8))
    number = rng.choice(INTERESTING) % 256**size
    return content[:at] + number.to_bytes(size, "little") + content[at + size :]


def insert(rng, content):
    """Put bytes in."""
    at = place(rng, content)
    return content[:at] + rng.randbytes(rng.choice((1, 2, 8, 64))) + content[at:]


def remove(rng, content):
    """Take bytes out."""
    at = place(rng, content)
    return content[:at] + content[at + rng.choice((1, 2, 8, 64)) :]


def cut(rng, content):
    """End early."""
    return content[: place(rng, content)]


def move(rng, content):
    """Copy a piece elsewhere, over what was there."""
    size = rng.choice((1, 4, 16, 100))
    start, at = place(rng, content), place(rng, content)
    return content[:at] + content[start : start + size] + content[at + size :]


def change_json(rng, content):
    """Change one value or key anywhere in a JSON file."""
    try:
        value = json.loads(content)
    except ValueError:
        return flip(rng, content)
    return json.dumps(change_value(rng, value)).encode()


def change_value(rng, value):
    """Change one value or key anywhere below."""
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return rng.choice(WORDS)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], change_value(rng, value[at]), *value[at + 1 :]]
    key = rng.choice(list(value))
    what = rng.randrange(5)
    if what == 0:
        return {k: v for k, v in value.items() if k != key}
    if what == 1:
        return {
            k if k != key else rng.choice(["", "x", f"{key}x", *value]): v for k, v in value.items()
        }
    return {**value, key: change_value(rng, value[key])}


def change_header(rng, content):
    """Change one value of a safetensors header, its length told right."""
    size = int.from_bytes(content[:8], "little")
    header = change_json(rng, content[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def change_pickle(rng, content, start=0):
    """Change one opcode, or a number or a text of one, in a pickle that starts there."""
    spots = []
    with suppress(ValueError, IndexError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd text, which is nothing of ours
        while True:
            for opcode, argument, at in pickletools.genops(content[start:]):
                spots.append((start + at, opcode, argument))
            start = spots[-1][0] + 1
    if not spots:
        return flip(rng, content)
    at, opcode, argument = rng.choice(spots)
    what = rng.randrange(4)
    if what == 0:
        return (
            content[:at] + rng.choice(pickletools.opcodes).code.encode("latin1") + content[at + 1 :]
        )
    numbers = [spot for spot in spots if spot[1].name in ("BININT1", "BININT2", "BININT")]
    if what == 1 and numbers:
        at, opcode, argument = rng.choice(numbers)
        size = {"BININT1": 1, "BININT2": 2, "BININT": 4}[opcode.name]
        number = rng.choice((*INTERESTING, argument + 1, argument - 1, argument * 2)) % 256**size
        return content[: at + 1] + number.to_bytes(size, "little") + content[at + 1 + size :]
    if what == 2:
        other = rng.choice(spots)[0]
        return content[:at] + content[other : other + 4] + content[at + 4 :]
    return content[: at + 1] + bytes([rng.randrange(256)]) + content[at + 2 :]


def change_member(rng, content):
    """Change the pickle, or another member, of a zip archive that stays in order."""

    def change(name, data):
        if name.endswith(".pkl"):
            return change_pickle(rng, data) if rng.random() < 0.8 else flip(rng, data)
        return rng.choice((flip, overwrite, remove, insert))(rng, data) if data else data

    return rewrite(rng, content, change)


def swap_members(rng, content):
    """Rename, copy or drop members."""

    def change(name, data):
        return data if rng.random() < 0.9 else None

    return rewrite(rng, content, change)


def rewrite(rng, content, change):
    """Write a zip archive anew, one of its members changed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, struct.error):
        return flip(rng, content)
    if not members:
        return flip(rng, content)
    chosen = rng.choice(list(members))
    if rng.random() < 0.6:
        chosen = next((name for name in members if name.endswith(".pkl")), chosen)
    members[chosen] = change(chosen, members[chosen])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            if data is not None:
                archive.writestr(name, data)
    return out.getvalue()
