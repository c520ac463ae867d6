"""Safetensors read by ourselves: as the library reads them, and refused where anything is amiss."""

import json
import os
import struct

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bitwise import bits, every_type, held_by
from converting import refused
from mlx_mcsd.convert.readers.safetensors_file import SafetensorsFile
from mlx_mcsd.errors import MCSDError

DATA = bytes(range(24))


def write(file, header, data=DATA):
    """A file of a header, as text, bytes or what JSON makes of it, and data."""
    header = header if isinstance(header, str | bytes) else json.dumps(header)
    header = header.encode() if isinstance(header, str) else header
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(kind="F32", shape=(2, 3), offsets=(0, 24)):
    """What a header says of one tensor."""
    return {"dtype": kind, "shape": list(shape), "data_offsets": list(offsets)}


def held(file):
    """What the reader makes of every tensor."""
    return held_by(SafetensorsFile(file))


def test_every_type(tmp_path):
    """Random bytes as each type, in what the library wrote."""
    state = every_type() | {"empty": torch.zeros(0, 3), "one": torch.tensor(2.5)}
    save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert held(tmp_path / "x.safetensors") == {key: bits(value) for key, value in state.items()}


def test_forms_of_a_header(tmp_path):
    """Padding, order, metadata of null: what the format allows."""
    header = {"b": entry("U8", (8,), (16, 24)), "a": entry("I32", (2, 2), (0, 16))}
    write(tmp_path / "x", json.dumps(header | {"__metadata__": None}) + "   ")
    assert held(tmp_path / "x") == {"a": ("I32", (2, 2), DATA[:16]), "b": ("U8", (8,), DATA[16:])}


def deep(n):
    """Nested lists."""
    return '{"w": ' + "[" * n + "]" * n + "}"


LIES = {
    "empty file": b"",
    "no header": struct.pack("<Q", 0),
    "giant header": struct.pack("<Q", 2**63) + b"{}",
    "header longer than the file": struct.pack("<Q", 100) + b"{}",
    "offset beyond": {"w": entry(shape=(2, 4), offsets=(0, 32))},
    "offset before": {"w": entry(offsets=(-24, 0))},
    "offsets in turn": {"w": entry(offsets=(24, 0))},
    "offset giant": {"w": entry(shape=(2**60,), offsets=(0, 2**62))},
    "offset beyond integers": {"w": entry(offsets=(0, 2**64 + 24))},
    "offset a float": {"w": entry(offsets=(0.0, 24.0))},
    "offset true": {"w": entry("U8", (1,), (False, True))},
    "three offsets": {"w": entry(offsets=(0, 24, 24))},
    "size too small": {"w": entry(shape=(2, 2))},
    "shape negative": {"w": entry(shape=(-2, -3))},
    "shape giant": {"w": entry(shape=(2**61, 2**61, 2**61))},
    "shape that wraps around": {"w": entry(shape=(2**32, 2**32), offsets=(0, 0))},
    "shape of text": {"w": entry() | {"shape": "23"}},
    "shape of text in a list": {"w": entry(shape=("2", "3"))},
    "shape of a hundred": {"w": entry(shape=[1] * 100 + [6])},
    "overlap": {"w": entry(), "v": entry("F32", (1,), (0, 4))},
    "hole": {"w": entry("F32", (1,), (0, 4)), "v": entry("F32", (1,), (20, 24))},
    "rest": {"w": entry("F32", (1,), (0, 4))},
    "beginning left out": {"w": entry("F32", (1,), (20, 24))},
    "type unknown": {"w": entry("F31")},
    "type of bits": {"w": entry("F4", (48,))},
    "type a list": {"w": entry(["F32"])},
    "type missing": {"w": {"shape": [6], "data_offsets": [0, 24]}},
    "type too many": {"w": entry() | {"strides": [3, 1]}},
    "entry a list": {"w": []},
    "entry null": {"w": None},
    "header a list": [],
    "header a number": "7",
    "metadata a list": {"w": entry(), "__metadata__": []},
    "metadata of numbers": {"w": entry(), "__metadata__": {"a": 1}},
    "name twice": '{"w": %s, "w": %s}' % ((json.dumps(entry()),) * 2),
    "dtype twice": '{"w": {"dtype": "U8", ' + json.dumps(entry())[1:] + "}",
    "not a number": '{"w": NaN}',
    "infinite": '{"w": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 24]}}',
    "a number of digits": '{"w": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 24]}}'
    % ("9" * 9999),
    "nested without end": deep(100_000),
    "no UTF-8": b'{"\xff": {}}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "text behind": json.dumps({"w": entry()}) + "x",
    "cut": json.dumps({"w": entry()})[:-3],
    "name of two lines": {"a\nb": entry()},
    "name that rings": {"a\x1b[31m": entry()},
    "name half a character": '{"\\ud800": ' + json.dumps(entry()) + "}",
    "name without end": {"a" * 100_000: entry()},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_lies(tmp_path, lie, capsys):
    """Every header that is not exact, in one line; most of them the library refuses as well."""
    if isinstance(lie, bytes) and lie[:1] not in (b"{", b"\xef"):
        (tmp_path / "x.safetensors").write_bytes(lie)
    else:
        write(tmp_path / "x.safetensors", lie)
    line = refused(capsys, "--hf-path", tmp_path / "x.safetensors", "--mlx-path", tmp_path / "new")
    assert "x.safetensors" in line and len(line) < 700 and line.isprintable()
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_no_stricter_than_needed(tmp_path):
    """Of the lies the library lets only these pass: names that mislead, what no one writes."""
    let_pass = set()
    for key, lie in LIES.items():
        if isinstance(lie, bytes) and lie[:1] not in (b"{", b"\xef"):
            continue
        write(tmp_path / "x", lie)
        try:
            with safe_open(tmp_path / "x", "numpy") as opened:
                if list(opened.keys()):
                    let_pass.add(key)
        except SafetensorError:
            pass
    assert let_pass == {
        "name twice",
        "name of two lines",
        "name that rings",
        "name without end",
        "shape of a hundred",
        "type of bits",
        "type too many",
    }


def test_every_truncation(tmp_path):
    """A file that ends early anywhere, or goes on."""
    save_file({"w": torch.arange(6.0), "v": torch.arange(3)}, tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    for size in range(len(content)):
        (tmp_path / "x").write_bytes(content[:size])
        with pytest.raises(MCSDError, match="whole safetensors file"):
            SafetensorsFile(tmp_path / "x")
    (tmp_path / "x").write_bytes(content + b"\0")
    with pytest.raises(MCSDError, match="whole safetensors file"):
        SafetensorsFile(tmp_path / "x")


def test_holes(tmp_path):
    """A terabyte that is not there, as an interrupted download leaves it."""
    n = 2**38
    write(tmp_path / "x", {"w": entry(shape=(n,), offsets=(0, 4 * n))}, b"")
    os.truncate(tmp_path / "x", (tmp_path / "x").stat().st_size + 4 * n)
    with pytest.raises(MCSDError, match="on the disk; download it again"):
        SafetensorsFile(tmp_path / "x")


def test_reads_one_tensor(tmp_path):
    """Arrays own their memory, and may be written to."""
    write(tmp_path / "x", {"w": entry(), "v": entry("U8", (0,), (24, 24))})
    array = SafetensorsFile(tmp_path / "x").read(("w",))
    assert array.flags.owndata and array.flags.writeable and array.shape == (2, 3)
    assert np.array_equal(array.view(np.uint8).ravel(), np.arange(24))
