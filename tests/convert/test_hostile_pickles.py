"""Pickles that try to run code: none does, whichever way in, and each is refused in one line."""

import copyreg
import io
import pickle
import struct
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

import pickles
from converting import refused
from mlx_mcsd.convert.readers import unpickle
from mlx_mcsd.convert.readers.torch_file import TorchFile
from mlx_mcsd.convert.readers.unpickle import OPCODES
from mlx_mcsd.errors import MCSDError
from pickles import (
    ORDERED,
    call,
    legacy_file,
    name,
    number,
    table,
    tensor,
    text,
    tuple_of,
    zip_file,
)

CANARY = "canary"
TOUCH = f"touch {CANARY}"
SYSTEM = name("posix", "system")
BINARY = b"\x80\x02"
NESTED = pickle.dumps("x")[:-1] + b"0" + SYSTEM + tuple_of(text(TOUCH)) + b"R."


def short(value):
    """A string of protocol 4."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def stacked(module, attribute):
    """A global of protocol 4."""
    return short(module) + short(attribute) + b"\x93"


def bytes_of(value):
    """Bytes of protocol 3."""
    return b"C" + bytes([len(value)]) + value


# Pickles of Python's own language: each makes the canary where pickle.load reads it.
ALIVE = {
    "frame": b"\x80\x04\x95"
    + struct.pack("<Q", 100)
    + stacked("posix", "system")
    + tuple_of(text(TOUCH))
    + b"R."
    + bytes(100),
    "dotted in an allowed module": b"\x80\x04"
    + stacked("collections", "_sys.modules.get")
    + tuple_of(text("os"))
    + b"R0"
    + stacked("posix", "system")
    + tuple_of(text(TOUCH))
    + b"R.",
    "compiled": BINARY
    + call(
        *(name("builtins", "exec"), text(f"open({CANARY!r}, 'w').close()"), b"}"),
    )
    + b".",
    "GLOBAL": BINARY + call(SYSTEM, text(TOUCH)) + b".",
    "GLOBAL of Python 2": BINARY
    + call(name("__builtin__", "eval"), text(f"open({CANARY!r}, 'w').close()"))
    + b".",
    "GLOBAL getattr": BINARY
    + call(
        call(
            name("builtins", "getattr"),
            call(name("builtins", "__import__"), text("os")),
            text("system"),
        ),
        text(TOUCH),
    )
    + b".",
    "STACK_GLOBAL": b"\x80\x04" + stacked("posix", "system") + tuple_of(text(TOUCH)) + b"R.",
    "STACK_GLOBAL dotted": b"\x80\x04"
    + stacked("subprocess", "os.system")
    + tuple_of(text(TOUCH))
    + b"R.",
    "STACK_GLOBAL from the memo": b"\x80\x04"
    + short("posix")
    + b"\x94"
    + short("system")
    + b"\x94"
    + b"00h\x00h\x01\x93"
    + tuple_of(text(TOUCH))
    + b"R.",
    "INST": b"(S'" + TOUCH.encode() + b"'\niposix\nsystem\n.",
    "OBJ": b"(" + SYSTEM + text(TOUCH) + b"o.",
    "text": b"cposix\nsystem\n(S'" + TOUCH.encode() + b"'\ntR.",
    "UNICODE": b"cposix\nsystem\n(V" + TOUCH.encode() + b"\ntR.",
    "put and get": b"cposix\nsystem\np0\n0g0\n(S'" + TOUCH.encode() + b"'\ntR.",
    "REDUCE in a table": BINARY + table({"w": call(SYSTEM, text(TOUCH))}) + b".",
    "REDUCE before the tensors": BINARY + call(SYSTEM, text(TOUCH)) + b"0" + b"}.",
    "broken behind": BINARY + call(SYSTEM, text(TOUCH)) + b"\xff\xff\xff",
    "without end": BINARY + call(SYSTEM, text(TOUCH)),
    "BUILD with __setstate__": BINARY
    + ORDERED
    + table({"__setstate__": SYSTEM})
    + b"b"
    + text(TOUCH)
    + b"b.",
    "BUILD of slots": BINARY
    + call(name("types", "SimpleNamespace"))
    + table({"a": call(SYSTEM, text(TOUCH))})
    + b"b.",
    "NEWOBJ": b"\x80\x02"
    + name("builtins", "map")
    + tuple_of(SYSTEM, b"](" + text(TOUCH) + b"e")
    + b"\x81q\x00"
    + b"0"
    + call(name("builtins", "list"), b"h\x00")
    + b".",
    "NEWOBJ_EX": b"\x80\x04"
    + name("builtins", "map")
    + tuple_of(SYSTEM, b"](" + text(TOUCH) + b"e")
    + b"}\x92q\x00"
    + b"0"
    + call(name("builtins", "list"), b"h\x00")
    + b".",
    "EXT1": b"\x80\x02\x82\xf0" + tuple_of(text(TOUCH)) + b"R.",
    "EXT2": b"\x80\x02\x83\xf0\x00" + tuple_of(text(TOUCH)) + b"R.",
    "EXT4": b"\x80\x02\x84\xf0\x00\x00\x00" + tuple_of(text(TOUCH)) + b"R.",
    "nested pickle": b"\x80\x03" + call(name("_pickle", "loads"), bytes_of(NESTED)) + b".",
    "partial": BINARY + call(call(name("functools", "partial"), SYSTEM, text(TOUCH))) + b".",
    "defaultdict": BINARY
    + call(
        name("collections", "defaultdict"), call(name("functools", "partial"), SYSTEM, text(TOUCH))
    )
    + b"q\x000"
    + call(name("operator", "getitem"), b"h\x00", text("a"))
    + b".",
    "tensor of a type": b"\x80\x02"
    + call(
        name("torch._tensor", "_rebuild_from_type"),
        SYSTEM,
        name("builtins", "int"),
        tuple_of(text(TOUCH)),
        b"}",
    )
    + b".",
    "tensor of a type, again": b"\x80\x02"
    + call(
        name("torch._tensor", "_rebuild_from_type_v2"),
        SYSTEM,
        name("builtins", "int"),
        tuple_of(text(TOUCH)),
        b"}",
    )
    + b".",
    "DUP and POP_MARK": b"\x80\x02" + SYSTEM + b"20(K\x011" + tuple_of(text(TOUCH)) + b"R.",
}

# What only torch's readers would run, or what other readers were seen to let through.
OTHERS = {
    "persistent id of code": tuple_of(text("storage"), SYSTEM, text("0"), text("cpu"), number(4))
    + b"Q",
    "persistent id of a call": tuple_of(call(SYSTEM, text(TOUCH))) + b"Q",
    "persistent id of a module": tuple_of(text("module"), SYSTEM, text("a.py"), text("import os"))
    + b"Q",
    "persistent id of text": b"Pposix.system\n",
    "nested torch file": call(name("torch.storage", "_load_from_bytes"), text("x")),
    "torch.load": call(name("torch", "load"), text("other.pt")),
    "torch.hub": call(name("torch.hub", "load"), text("evil/repo"), text("model")),
    "compiled code": call(name("torch.jit._script", "unpackage_script_module"), text("x")),
    "module": name("torch.nn.modules.linear", "Linear") + b")\x81}b",
    "dotted name": call(name("torch", "os.system"), text(TOUCH)),
    "dotted module": call(name("torch.serialization.os", "system"), text(TOUCH)),
    "dotted builder": call(name("torch._utils", "_rebuild_tensor_v2.__globals__"), text("a")),
    "attribute of a dict": call(name("collections", "OrderedDict.__init_subclass__")),
    "empty module": call(name("", "system"), text(TOUCH)),
    "name with a blank": call(name("posix ", "system"), text(TOUCH)),
    "name in other letters": call(name("poſix", "system"), text(TOUCH)),
    "type that is a function": call(
        *(name("torch._tensor", "_rebuild_from_type_v2"), name("torch._utils", "_rebuild_tensor")),
        *(name("posix", "system"), tuple_of(text(TOUCH)), b"}"),
    ),
    "builder that is none": call(
        *(name("torch._tensor", "_rebuild_from_type_v2"), name("collections", "OrderedDict")),
        *(name("torch", "Tensor"), tuple_of(text(TOUCH)), b"}"),
    ),
    "state of a parameter": call(
        *(name("torch._utils", "_rebuild_parameter_with_state"), tensor(), b"\x88", ORDERED),
        table({"__setstate__": SYSTEM}),
    ),
    "array of objects": call(
        name("numpy.core.multiarray", "_reconstruct"),
        *(name("numpy", "ndarray"), tuple_of(number(0)), text("b")),
    ),
    "array type": call(name("numpy", "dtype"), text("O8"), b"\x89", b"\x88"),
    "array file": call(name("numpy", "load"), text("x.npy"), b"N", b"\x88"),
    "decoder": call(name("_codecs", "decode"), text("x"), text("zip")),
    "set that calls": call(name("builtins", "set"), tuple_of(call(SYSTEM, text(TOUCH)))),
    "copy_reg": call(name("copy_reg", "_reconstructor"), name("builtins", "object"), b"NN"),
    "type in a state": ORDERED + table({"a": SYSTEM}) + b"b",
    "state of a tensor": tensor() + table({"a": b"N"}) + b"b",
    "new dict": name("collections", "OrderedDict") + b")\x81",
    "called type": call(name("torch", "Tensor"), text("a")),
    "called tensor": tensor() + tuple_of(text("a")) + b"R",
    "called text": text("posix.system") + tuple_of(text(TOUCH)) + b"R",
    "arguments that are none": name("torch", "device") + b"]R",
    "memo that is empty": b"h\x07",
    "stack that is empty": b"0",
    "mark that is missing": b"t",
    "append to a tuple": b")" + b"Na",
    "pairs of three": b"}(NNNu",
    "protocol of tomorrow": b"\x80\x09N",
    "buffers": b"\x97",
    "long text": b"\x8d" + struct.pack("<Q", 2**40),
    "long bytes": b"B" + struct.pack("<I", 2**32 - 1),
    "long number": b"\x8b" + struct.pack("<I", 2**31 - 1),
    "text number": b"I01\n",
    "name without end": b"c" + b"a" * 10_000,
}


@pytest.fixture
def extension():
    """The canary's function behind an extension code, as a program may register one."""
    copyreg.add_extension("posix", "system", 0xF0)
    yield
    copyreg.remove_extension("posix", "system", 0xF0)


@pytest.mark.parametrize("pickled", ALIVE.values(), ids=ALIVE)
def test_they_are_alive(tmp_path, pickled, extension, monkeypatch):
    """Read by Python's pickle, each of them runs: what is refused below is no straw man."""
    monkeypatch.chdir(tmp_path)
    with suppress(Exception):  # some are broken behind the call
        pickle.loads(pickled)
    assert Path(CANARY).exists()


def containers(file, pickled):
    """The same pickle in every place where a reader of torch files starts one."""
    yield zip_file(file, b"", pickled=pickled)
    yield legacy_file(file, b"", pickled=pickled)
    yield file.write_bytes(pickled)  # where the magic number should be
    start = pickles.PROTO2 + pickles.MAGIC + pickles.STOP
    yield file.write_bytes(start + pickled)  # the version
    yield file.write_bytes(start + pickles.PROTO2 + b"M\xe9\x03." + pickled)  # the sizes of types


@pytest.mark.parametrize(
    "pickled",
    [*ALIVE.values(), *(BINARY + table({"w": value}) + b"." for value in OTHERS.values())],
    ids=[*ALIVE, *OTHERS],
)
def test_none_runs(tmp_path, pickled, extension, monkeypatch):
    """Refused in one line, wherever in a file it stands; and nothing ran."""
    monkeypatch.chdir(tmp_path)
    for _ in containers(tmp_path / "x.pt", pickled):
        with pytest.raises(MCSDError) as caught:
            TorchFile(tmp_path / "x.pt")
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500
        assert not Path(CANARY).exists()


@pytest.mark.parametrize("kind", ["GLOBAL", "STACK_GLOBAL", "OBJ", "INST"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "x.pt", "x.pth"])
def test_none_runs_in_a_conversion(source, target, kind, file, capsys, monkeypatch):
    """The command ends with one line that names what the file wanted, and makes nothing."""
    monkeypatch.chdir(source.parent)
    (source / "model.safetensors").unlink()
    zip_file(source / file, b"", pickled=ALIVE[kind])
    wanted = "is STRING" if kind == "INST" else "wants posix.system"
    for path in (source, source / file):
        line = refused(capsys, "--hf-path", path, "--mlx-path", target)
        assert wanted in line and "nothing of it was run" in line
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_every_other_opcode(tmp_path):
    """Each opcode of Python's pickle that torch.save does not need is refused by its name."""
    named = {
        getattr(pickle, op): op
        for op in dir(pickle)
        if op.isupper() and isinstance(getattr(pickle, op), bytes) and len(getattr(pickle, op)) == 1
    }
    refused_ops = named.keys() - OPCODES.keys() - {pickle.STOP}
    must = "INST OBJ NEWOBJ NEWOBJ_EX EXT1 EXT2 EXT4 PERSID GET PUT INT LONG LONG4 FLOAT STRING"
    assert {named[op] for op in refused_ops} >= set(must.split())
    for op in refused_ops:
        zip_file(tmp_path / "x.pt", op + b"\0" * 20)
        with pytest.raises(MCSDError, match=rf"is {named[op]}, which torch.save never"):
            TorchFile(tmp_path / "x.pt")


def test_opcodes_of_a_later_version(tmp_path):
    """A pickle that says it is of protocol 2 has none of protocol 4."""
    zip_file(tmp_path / "x.pt", b"", pickled=b"\x80\x04" + table({"w": tensor()}) + b"\x94.")
    assert TorchFile(tmp_path / "x.pt").tensors
    zip_file(tmp_path / "x.pt", b"", pickled=b"\x80\x02" + table({"w": tensor()}) + b"\x94.")
    with pytest.raises(MCSDError, match="is MEMOIZE"):
        TorchFile(tmp_path / "x.pt")


BOMBS = {
    "memo": b"N" + b"".join(b"r" + struct.pack("<I", 2**32 - 1 - i) for i in range(30_000)),
    "lists": b"](" + b"]" * 30_000 + b"e",
    "tables": b"](" + b"}" * 30_000 + b"e",
    "marks": b"(" * 30_000,
    "tuples": b")" + b"\x85" * 30_000,
    "triples": b")NN" + b"\x87NN" * 10_000,
    "text": b"X" + struct.pack("<I", 2**32 - 1) + b"a",
    "doubling": b")" + b"q\x00h\x00\x86" * 10_000,
    "copies": b"]q\x00(" + b"h\x00" * 30_000 + b"e",
    "names": name("torch", "Size") * 30_000,
    "numbers": (b"\x8a\xff" + b"\1" * 255) * 30_000,
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_memory_is_bounded(tmp_path, bomb, monkeypatch):
    """An opcode takes no more than some hundred bytes beside its own, and they are counted."""
    monkeypatch.setattr(unpickle, "MAX_OPCODES", 20_000)
    zip_file(tmp_path / "x.pt", bomb)
    tracemalloc.start()
    try:
        with pytest.raises(MCSDError):
            TorchFile(tmp_path / "x.pt")
        assert tracemalloc.get_traced_memory()[1] < 300 * 20_000 + 3 * len(bomb) + 2**20
    finally:
        tracemalloc.stop()


def rewritten(file, change):
    """Write a file of one tensor and change its archive by hand."""
    zip_file(file, table({"w": tensor()}))
    file.write_bytes(change(file.read_bytes()))


def second_pickle(where):
    """Another data.pkl, which a scanner may take for the one that is read."""

    def write(file):
        zip_file(file, table({"w": tensor()}))
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(where, ALIVE["GLOBAL"])

    return write


def deflated(file):
    """Members that are compressed."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickles.PROTO2 + table({"w": tensor()}) + b".")
        archive.writestr("a/data/0", bytes(2**24))


def members_twice(file):
    """One name, two members: which of them is read?"""
    with pytest.warns(UserWarning, match="Duplicate"):
        second_pickle("archive/data.pkl")(file)


def prefix(file):
    """An archive behind something else, as self-extracting ones are."""
    buffer = io.BytesIO()
    zip_file(buffer, table({"w": tensor()}))
    file.write_bytes(b"PK\3\4" + bytes(100) + buffer.getvalue())


def nested(file):
    """An archive in the comment of another."""
    zip_file(file, table({"w": tensor()}))
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = b"PK\5\6" + bytes(18)


CIPHER = b"PK\1\2\x14\x03\x14\0\1"
ARCHIVES = {
    "second pickle beside": (second_pickle("other/data.pkl"), "another zip archive"),
    "second pickle below": (second_pickle("archive/more/data.pkl"), "another zip archive"),
    "member twice": (members_twice, "two members are named"),
    "compressed": (deflated, "compressed"),
    "prefix": (prefix, "damaged"),
    "comment": (nested, "damaged"),
    "encrypted": (
        lambda f: rewritten(f, lambda b: b.replace(b"PK\1\2\x14\x03\x14\0\0", CIPHER)),
        "encrypted",
    ),
    "local name differs": (
        lambda f: rewritten(f, lambda b: b.replace(b"archive/data.pkl", b"archive/data.pkx", 1)),
        "another name in front",
    ),
    "overlap": (
        lambda f: rewritten(f, lambda b: overlapping(b)),
        "overlaps",
    ),
    "member beyond": (
        lambda f: rewritten(f, lambda b: resized(b, 2**30)),
        "not where the directory says",
    ),
    "compressed sizes differ": (
        lambda f: rewritten(f, lambda b: resized(b, 8, both=False)),
        "compressed",
    ),
    "size of the storage": (
        lambda f: rewritten(f, lambda b: resized(b, 8)),
        "must lie in 16 bytes of data but has 8",
    ),
    "many members": (
        lambda f: rewritten(f, lambda b: b[:-14] + struct.pack("<HH", 65000, 65000) + b[-10:]),
        "entry of its directory is cut",
    ),
    "directory elsewhere": (
        lambda f: rewritten(f, lambda b: b[:-6] + struct.pack("<I", 7) + b[-2:]),
        "not before the end record",
    ),
    "several disks": (
        lambda f: rewritten(f, lambda b: b[:-18] + b"\1\0" + b[-16:]),
        "damaged",
    ),
}


def entry(content, member=b"archive/data/0"):
    """Where a member's entry lies in the directory."""
    return content.rindex(b"PK\1\2", 0, content.rindex(member))


def resized(content, size, both=True):
    """The directory says another size of the storage."""
    at = entry(content)
    packed = struct.pack("<I", size) if both else content[at + 20 : at + 24]
    return content[: at + 20] + packed + struct.pack("<I", size) + content[at + 28 :]


def overlapping(content):
    """Two members in one place."""
    at, other = entry(content), entry(content, b"archive/version")
    place = content[other + 42 : other + 46]
    return content[: at + 42] + place + content[at + 46 :]


@pytest.mark.parametrize("write, complaint", ARCHIVES.values(), ids=ARCHIVES)
def test_refused_archives(tmp_path, write, complaint):
    """Archives that two readers may read in two ways, and those that are larger inside."""
    write(tmp_path / "x.pt")
    with pytest.raises(MCSDError, match=complaint):
        TorchFile(tmp_path / "x.pt")
