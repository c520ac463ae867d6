"""Torch files read without torch: what torch saved comes out bit for bit, and nothing else."""

import hashlib
import json
import zipfile

import numpy as np
import pytest
import torch

import pickles
from bitwise import bits, every_type, held_by, kind_of
from mlx_mcsd.convert.readers import gather, torch_file, unpickle
from mlx_mcsd.convert.readers.torch_file import TorchFile
from mlx_mcsd.errors import MCSDError
from pickles import call, legacy_file, name, number, sizes, storage, table, tensor, text, zip_file

CONTAINERS = {
    "zip": {},
    "zip, protocol 3": {"pickle_protocol": 3},
    "zip, protocol 4": {"pickle_protocol": 4},
    "zip, protocol 5": {"pickle_protocol": 5},
    "legacy": {"_use_new_zipfile_serialization": False},
    "legacy, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}


def held(file):
    """What the reader makes of every tensor."""
    return held_by(TorchFile(file))


def message(file):
    """The line with which a file is refused."""
    with pytest.raises(MCSDError) as caught:
        TorchFile(file)
    line = str(caught.value)
    assert line.startswith("[convert] ") and len(line.splitlines()) == 1 and len(line) < 700
    return line


def test_real_files(data_dir):
    """Files of many hands and years hold what torch finds in them, or are refused as it does."""
    listing = json.loads((data_dir / "torch_formats" / "expected.json").read_text())
    present = {data_dir / f: content for f, content in listing.items() if (data_dir / f).exists()}
    assert present
    for file, expected in present.items():
        if not expected["ok"]:
            message(file)
            continue
        tensors = {n: item for n, item in expected["items"].items() if "shape" in item}
        found = {
            n: (list(shape), kind, hashlib.sha256(data).hexdigest()[:16])
            for n, (kind, shape, data) in held(file).items()
        }
        assert found == {
            n: (t["shape"], kind_of(t["dtype"]), t["sha256"]) for n, t in tensors.items()
        }
        others = {".".join(path) for path in TorchFile(file).others}
        assert others == expected["items"].keys() - tensors.keys()


@pytest.mark.parametrize("options", CONTAINERS.values(), ids=CONTAINERS)
def test_every_type(tmp_path, options):
    """Random bytes as each type that a model may have."""
    torch.save(every_type(), tmp_path / "x.pt", **options)
    assert held(tmp_path / "x.pt") == {key: bits(value) for key, value in every_type().items()}


def layouts():
    """Tensors that do not own the storage they lie in, or not all of it, or not in order."""
    base = torch.arange(600, dtype=torch.float32).reshape(20, 30)
    parameter, attributed = torch.nn.Parameter(base[:2].clone()), base[3].clone()
    parameter.note, attributed.note = "kept out", {"a": 1}
    return {
        "whole": base,
        "transposed": base.t(),
        "columns": base[:, 3:7],
        "rows": base[5:9],
        "stepped": base[::3, 1::4],
        "last": base[19, 29:],
        "one": base[7, 7],
        "empty": base[:0],
        "permuted": base.view(4, 5, 30).permute(2, 0, 1),
        "windows": torch.arange(9.0).as_strided((4, 3), (1, 2)),
        "expanded": torch.tensor(2.5).expand(3, 4),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "tied": base,
        "parameter": parameter,
        "frozen": torch.nn.Parameter(base[:1].clone(), requires_grad=False),
        "attributed": attributed,
        "channels last": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("piece", [2**26, 64], ids=["at once", "in pieces"])
@pytest.mark.parametrize("options", CONTAINERS.values(), ids=CONTAINERS)
def test_every_layout(tmp_path, options, piece, monkeypatch):
    """Views of all kinds come out dense, also where they are gathered in small pieces."""
    monkeypatch.setattr(gather, "PIECE", piece)
    torch.save(layouts(), tmp_path / "x.pt", **options)
    assert held(tmp_path / "x.pt") == {key: bits(value) for key, value in layouts().items()}


def test_reading_is_small(tmp_path, monkeypatch):
    """A thin view is gathered without reading all that lies between."""
    largest = 0
    read_at = gather.read_at

    def watched(stream, start, size):
        nonlocal largest
        largest = max(largest, size)
        return read_at(stream, start, size)

    base = torch.arange(40_000, dtype=torch.float32).view(200, 200)
    torch.save({"x": base.t()[5:8]}, tmp_path / "x.pt")
    monkeypatch.setattr(gather, "PIECE", 4096)
    monkeypatch.setattr(gather, "read_at", watched)
    assert held(tmp_path / "x.pt")["x"] == bits(base.t()[5:8])
    assert 0 < largest <= 4096


def test_modules_and_trainers(tmp_path):
    """What stands beside the tensors is named with its kind; `_metadata` is not a value."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "names": ["a", b"b", None],
        "odd": {"size": torch.Size([1]), "set": {1}, "complex": 1j, "type": torch.float16},
        "device": torch.device("cpu"),
        "large": 2**70,
    }
    for options in CONTAINERS.values():
        torch.save(saved, tmp_path / "x.pt", **options)
        found = TorchFile(tmp_path / "x.pt")
        assert {"model.weight", "model.bias", "optimizer.state.0.exp_avg"} < {
            ".".join(path) for path in found.tensors
        }
        others = {".".join(path): kind for path, kind in found.others.items()}
        assert (
            others.items()
            >= {
                "epoch": "int",
                "names.0": "str",
                "names.1": "bytes",
                "names.2": "NoneType",
                "odd.set": "set",
                "odd.complex": "complex",
                "odd.type": "torch.float16",
                "device": "torch.device",
                "large": "int",
            }.items()
        )
        assert not any(key.startswith("model") for key in others)


@pytest.mark.parametrize("location", ["cuda:0", "mps", "xpu:3", "meta-like nonsense"])
@pytest.mark.parametrize("options", CONTAINERS.values(), ids=CONTAINERS)
def test_location_is_of_no_matter(tmp_path, location, options):
    """Tensors saved on a device are read where there is none."""
    state = {"w": torch.arange(6.0).view(2, 3)}
    torch.save(state, tmp_path / "x.pt", **options)
    short, long = (b"\x8c\x03cpu", b"\x8c" + bytes([len(location)]) + location.encode())
    old, new = text("cpu"), text(location)
    if "_use_new_zipfile_serialization" in options:
        content = (tmp_path / "x.pt").read_bytes()
        changed = content.replace(old, new).replace(short, long)
        # Frames of protocol 4 say how long they are; readers need not care, and ours does not.
        assert changed != content
        (tmp_path / "x.pt").write_bytes(changed)
    else:
        with zipfile.ZipFile(tmp_path / "x.pt") as archive:
            pickled = archive.read("x/data.pkl")
            data = archive.read("x/data/0")
        changed = pickled.replace(old, new).replace(short, long)
        assert changed != pickled
        zip_file(tmp_path / "x.pt", b"", {"0": data}, pickled=changed)
    assert held(tmp_path / "x.pt") == {"w": bits(state["w"])}


def test_big_endian(tmp_path):
    """A file from a big-endian machine, as torch reads it too."""
    state = {"f": torch.arange(6.0), "h": torch.arange(4.0).bfloat16(), "l": torch.arange(3)}
    body = table(
        {
            "f": tensor(storage("FloatStorage", "0", 6), 0, (2, 3), (1, 2)),
            "h": tensor(storage("BFloat16Storage", "1", 4)),
            "l": tensor(storage("LongStorage", "2", 3), 1, (2,)),
        }
    )
    data = {
        "0": state["f"].numpy().byteswap().tobytes(),
        "1": state["h"].view(torch.int16).numpy().byteswap().tobytes(),
        "2": state["l"].numpy().byteswap().tobytes(),
    }
    zip_file(tmp_path / "x.pt", body, data, more={"byteorder": b"big"})
    torch_reads = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch_reads["f"].equal(state["f"].view(3, 2).t())
    assert held(tmp_path / "x.pt") == {key: bits(value) for key, value in torch_reads.items()}
    zip_file(tmp_path / "x.pt", body, data, more={"byteorder": b"middle"})
    assert "byte order" in message(tmp_path / "x.pt")


def test_parts_of_storages(tmp_path):
    """The older format can name a part of a storage, and a shape counts from where it starts."""
    data = {"0": (8, np.arange(8, dtype=np.float32).tobytes())}
    part = storage("FloatStorage", "0", 8, pickles.tuple_of(text("part"), number(3), number(4)))
    legacy_file(tmp_path / "x.pt", table({"w": tensor(part, 1, (3,))}), data)
    assert held(tmp_path / "x.pt") == {"w": bits(torch.tensor([4.0, 5, 6]))}
    assert torch.load(tmp_path / "x.pt", weights_only=True)["w"].tolist() == [4, 5, 6]
    legacy_file(tmp_path / "x.pt", table({"w": tensor(part, 2, (3,))}), data)
    assert "ends beyond" in message(tmp_path / "x.pt")


def test_python_2(tmp_path):
    """Names as Python 2 wrote them."""
    zip_file(tmp_path / "x.pt", b"}U\x01w" + tensor() + b"s")
    assert held(tmp_path / "x.pt") == {"w": ("F32", (4,), bytes(range(16)))}


ADAPTED = {
    "offset": (tensor(offset=1), "ends beyond"),
    "shape": (tensor(shape=(5,)), "ends beyond"),
    "stride": (tensor(shape=(2, 2), strides=(3, 1)), "ends beyond"),
    "giant shape": (tensor(shape=(2**61, 2**61), strides=(0, 0)), "expanded"),
    "shape beyond integers": (tensor(shape=(2**62,)), "a shape is none"),
    "negative shape": (tensor(shape=(-4,)), "a shape is none"),
    "negative stride": (tensor(strides=(-1,)), "a shape is none"),
    "negative offset": (tensor(offset=-1), "a shape is none"),
    "strides missing": (tensor(shape=(2, 2)), "a shape is none"),
    "too many axes": (tensor(shape=(1,) * 17, strides=(1,) * 17), "a shape is none"),
    "shape of text": (
        call(name("torch._utils", "_rebuild_tensor_v2"), storage(), number(0), text("4"), b")"),
        "a shape is none",
    ),
    "expanded": (tensor(shape=(2**17, 4), strides=(0, 1)), "expanded"),
    "no storage": (tensor(of=b"N"), "no storage"),
    "storage of nothing": (tensor(storage(key="7")), "must hold the data of w"),
    "storage too long": (tensor(storage(numel=5)), "must lie in 20 bytes"),
    "storage too short": (
        tensor(storage(numel=3), shape=(3,)),
        "must lie in 12 bytes",
    ),
    "storage negative": (tensor(storage(numel=-4)), "storage in it is malformed"),
    "storage giant": (tensor(storage(numel=2**62)), "storage in it is malformed"),
    "storage of no type": (tensor(storage("Size")), "storage in it is malformed"),
    "storage of two types": (
        tensor() + text("v") + tensor(storage("IntStorage")),
        "storage in it is malformed",
    ),
    "quantized": (tensor(storage("QInt8Storage")), "wants torch.QInt8Storage"),
    "id of a module": (pickles.tuple_of(text("module"), b"NNN") + b"Q", "storage in it"),
    "id of text": (text("storage") + b"Q", "damaged"),
    "conjugate": (tensor(None, 0, (4,), (1,), table({"conj": b"\x88"})), "conjugate"),
    "v3 without a type": (
        call(
            name("torch._utils", "_rebuild_tensor_v3"),
            *(storage(), number(0), sizes([4]), sizes([1]), b"\x89", b"N", text("f")),
        ),
        "no storage or type",
    ),
    "gradient of a number": (
        call(name("torch._utils", "_rebuild_tensor_v2"), storage(), number(0), sizes([4]))[:-2]
        + sizes([1])
        + number(1)
        + b"NtR",
        "requires_grad",
    ),
    "parameter without a gradient": (
        call(name("torch._utils", "_rebuild_parameter"), tensor(), b"N"),
        "no tensor",
    ),
    "parameter of text": (call(name("torch._utils", "_rebuild_parameter"), text("a")), "no tensor"),
    "sparse": (call(name("torch._utils", "_rebuild_sparse_tensor"), b"N"), "_rebuild_sparse"),
    "size of text": (call(name("torch", "Size"), text("a")), "a size is none"),
    "dict of text": (call(name("collections", "OrderedDict"), text("a")), "no pairs"),
    "type called": (call(name("torch", "FloatStorage"), number(4)), "calls torch.FloatStorage"),
    "name of two lines": (tensor() + text("a\nb") + tensor(), "printable"),
    "name half a character": (tensor() + text("\ud800") + tensor(), "printable"),
    "name without end": (tensor() + text("a" * 600) + tensor(), "at most 512"),
    "name twice": (tensor() + text("w") + tensor(), "w twice"),
    "key of None": (tensor() + b"N" + tensor(), "has a NoneType as key"),
    "key of a table": (tensor() + b"}" + tensor(), "has a Table as key"),
    "itself": (b"}q\x00" + text("a") + b"h\x00s" + text("t") + tensor(), "nested without end"),
    "each other": (
        b"(]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(30)) + tensor() + b"t",
        "nested without end",
    ),
}


@pytest.mark.parametrize("write", [zip_file, legacy_file])
@pytest.mark.parametrize("value, complaint", ADAPTED.values(), ids=ADAPTED)
def test_refused_descriptions(tmp_path, value, complaint, write):
    """A pickle whose numbers, names or kinds are not those of tensors in this file."""
    write(tmp_path / "x.pt", b"}(" + text("w") + value + b"u")
    if write is legacy_file and complaint.startswith(("must lie", "must hold the data")):
        complaint = ""  # the older format says the sizes twice, and the two differ
    assert complaint in message(tmp_path / "x.pt")


def test_small_expansion_is_read(tmp_path):
    """A vector may be one number, told once."""
    zip_file(tmp_path / "x.pt", table({"w": tensor(shape=(2**16,), strides=(0,))}))
    assert held(tmp_path / "x.pt")["w"] == ("F32", (2**16,), bytes([0, 1, 2, 3]) * 2**16)


def test_many_tensors_of_one_storage(tmp_path):
    """Tensors that share their bytes may not grow to many times the file."""
    of = storage(numel=2**22)
    body = table({f"w{i}": tensor(of, 0, (2**22,)) for i in range(100)})
    zip_file(tmp_path / "x.pt", body, {"0": bytes(2**24)})
    assert "times as much" in message(tmp_path / "x.pt")


@pytest.mark.parametrize("root", [tensor(), b"N", number(1), text("a")], ids=repr)
def test_no_state_dict(tmp_path, root):
    """A tensor alone, or no tensor."""
    zip_file(tmp_path / "x.pt", root)
    assert "must hold a state dict but holds" in message(tmp_path / "x.pt")


@pytest.mark.parametrize("options", CONTAINERS.values(), ids=CONTAINERS)
def test_every_truncation(tmp_path, options):
    """A file that ends early anywhere is refused in one line."""
    torch.save({"w": torch.arange(6.0), "v": torch.arange(3)}, tmp_path / "x.pt", **options)
    content = (tmp_path / "x.pt").read_bytes()
    for size in [*range(0, len(content), 37), len(content) - 1]:
        (tmp_path / "x.pt").write_bytes(content[:size])
        message(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(content + b"\0")
    message(tmp_path / "x.pt")


def test_work_is_bounded(tmp_path, monkeypatch):
    """Pickles of more opcodes or bytes than any honest one are not read to the end."""
    monkeypatch.setattr(unpickle, "MAX_OPCODES", 1000)
    zip_file(tmp_path / "x.pt", b"](" + b"N" * 990 + b"e")
    assert len(TorchFile(tmp_path / "x.pt").others) == 990
    zip_file(tmp_path / "x.pt", b"](" + b"N" * 1000 + b"e")
    assert "far too long" in message(tmp_path / "x.pt")
    monkeypatch.setattr(torch_file, "MAX_PICKLE", 100)
    assert "its pickle has" in message(tmp_path / "x.pt")


def test_other_files(tmp_path):
    """What is no torch file of today, and what it may be instead."""
    file = tmp_path / "x.pt"
    zip_file(file, b"N", more={"constants.pkl": b"", "code/model.py": b""})
    assert "TorchScript" in message(file)
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    assert "another zip archive" in message(tmp_path / "x.npz")
    file.write_bytes(b"\x80\x02}.")
    assert "another pickle" in message(file)
    file.write_bytes(b"")
    message(file)
    tar = bytearray(1024)
    tar[:8], tar[257:262] = b"storages", b"ustar"
    file.write_bytes(tar)
    assert "tar format" in message(file)
    message(tmp_path)


def test_checksums(tmp_path):
    """A bit that turned over on the way is found; a file without checksums is read."""
    state = {"w": torch.arange(6.0), "v": torch.arange(3)}
    torch.save(state, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    at = content.index(state["w"].numpy().tobytes()) + 9
    changed = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    (tmp_path / "x.pt").write_bytes(changed)
    reader = TorchFile(tmp_path / "x.pt")
    assert reader.read(("v",)).tolist() == [0, 1, 2]
    with pytest.raises(MCSDError, match=r"data/0 in .* has another checksum"):
        reader.read(("w",))
    at = content.index(b"FloatStorage")
    (tmp_path / "x.pt").write_bytes(content[:at] + b"X" + content[at + 1 :])
    assert "data.pkl" in message(tmp_path / "x.pt")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert held(tmp_path / "x.pt") == {key: bits(value) for key, value in state.items()}


@pytest.mark.parametrize("member", torch_file.NUMBERS)
def test_numbers_of_the_format(tmp_path, member):
    """What torch reads as a number has to be one."""
    zip_file(tmp_path / "x.pt", table({"w": tensor()}), more={member: b"64"})
    assert held(tmp_path / "x.pt")["w"][1] == (4,)
    for wrong in (b"", b"6x", b"-1", b"9" * 65):
        zip_file(tmp_path / "x.pt", table({"w": tensor()}), more={member: wrong})
        assert "must have a number" in message(tmp_path / "x.pt")
