"""Pickles put together opcode by opcode, and the torch files around them."""

import struct
import zipfile

PROTO2, STOP = b"\x80\x02", b"."
MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"


def text(value):
    """A string."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    """A whole number of any size."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module, attribute):
    """A global."""
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*items):
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def table(items):
    """A dict of text and anything."""
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def call(function, *arguments):
    """A call of a global."""
    return function + tuple_of(*arguments) + b"R"


def storage(kind="FloatStorage", key="0", numel=4, *rest, module="torch"):
    """A persistent id."""
    saved = (text("storage"), name(module, kind), text(key), text("cpu"), number(numel), *rest)
    return tuple_of(*saved) + b"Q"


def sizes(values):
    """A tuple of numbers."""
    return tuple_of(*map(number, values))


ORDERED = name("collections", "OrderedDict") + b")R"


def tensor(of=None, offset=0, shape=(4,), strides=(1,), *rest):
    """A tensor of a storage."""
    of = storage() if of is None else of
    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        *(of, number(offset), sizes(shape), sizes(strides), b"\x89", ORDERED, *rest),
    )


def zip_file(file, body, data=None, *, root="archive", more=None, pickled=None):
    """Write a file of the zip format, of a pickle's body and storages by key."""
    members = {"data.pkl": PROTO2 + body + STOP if pickled is None else pickled}
    members |= {"byteorder": b"little"} | (more or {})
    data = {"0": bytes(range(16))} if data is None else data
    members = {"version": b"3\n"} | members
    members |= {f"data/{key}": value for key, value in data.items()}
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in members.items():
            archive.writestr(f"{root}/{member}", content)


def legacy_file(file, body, data=None, *, pickled=None):
    """Write a file of the older format, of a pickle's body and (numel, bytes) by key."""
    data = {"0": (4, bytes(range(16)))} if data is None else data
    keys = b"](" + b"".join(text(key) for key in data) + b"e"
    with open(file, "wb") as stream:
        stream.write(PROTO2 + MAGIC + STOP + PROTO2 + b"M\xe9\x03" + STOP)
        stream.write(PROTO2 + table({"little_endian": b"\x88"}) + STOP)
        stream.write(PROTO2 + body + STOP if pickled is None else pickled)
        stream.write(PROTO2 + keys + STOP)
        for numel, content in data.values():
            stream.write(struct.pack("<q", numel) + content)
