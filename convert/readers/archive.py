"""The zip archives that ``torch.save`` writes: where each member's bytes lie.

Members are stored as they are, one behind the other: anything else (compressed, encrypted,
overlapping, named twice) is refused, so nothing here can be larger than the file.
"""

import struct
import zlib
from typing import NamedTuple

from .files import read_at, refuse, shown

MAX_MEMBERS = 200_000
MAX_DIRECTORY = 64 * 2**20
END, END64, LOCATOR64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
ENTRY, LOCAL = b"PK\1\2", b"PK\3\4"
UNKNOWN16, UNKNOWN32 = 0xFFFF, 0xFFFFFFFF
# Speed of a compression that is not used; sizes behind the data; names in UTF-8.
KNOWN_FLAGS = 0b1000_0000_1110
BLOCK = 2**24


class Member(NamedTuple):
    """Where the bytes of a member lie in the file, and their checksum; 0 is one not computed."""

    start: int
    size: int
    crc: int

    def is_whole(self, stream):
        """Whether the bytes are those that were written."""
        stream.seek(self.start)
        left, crc = self.size, 0
        while self.crc and left and (block := stream.read(min(BLOCK, left))):
            left, crc = left - len(block), zlib.crc32(block, crc)
        return crc == self.crc


def members(stream, size, where):
    """Return name -> `Member` of an open archive.

    Args:
        stream: the file, opened for reading bytes.
        size: of the file.
        where: what the file is called in messages.

    Raises:
        MCSDError: for an archive that torch does not write, or that is damaged.
    """

    def damaged(reason):
        refuse(f"{where} must be a whole torch file but its zip archive is damaged: {reason}.")

    # The end record is the last thing in the file: torch writes no comment behind it.
    if size < 22 or (end := read_at(stream, size - 22, 22))[:4] != END:
        damaged("no end record, as where a download broke off")
    short = struct.unpack("<4xHHHHII2x", end)
    record, limit = short, size - 22
    # torch writes a 64-bit end record too, whatever the size; it must not tell another story.
    locator = read_at(stream, size - 42, 20) if size >= 42 else b""
    if locator[:4] == LOCATOR64:
        disk, limit, disks = struct.unpack("<4xIQI", locator)
        if disk or disks != 1 or limit + 56 != size - 42:
            damaged("no 64-bit end record")
        if (end := read_at(stream, limit, 56))[:4] != END64:
            damaged("no 64-bit end record")
        record = struct.unpack("<16xIIQQQQ", end)
    tops = (*[UNKNOWN16] * 4, UNKNOWN32, UNKNOWN32)
    for number, wide_number, top in zip(short, record, tops, strict=True):
        if number not in (wide_number, top):
            damaged("its end records differ")
    disk, first_disk, here, count, length, start = record
    if disk or first_disk or here != count or start + length != limit:
        damaged("its directory is not before the end record")
    if count > MAX_MEMBERS or length > MAX_DIRECTORY:
        refuse(f"{where} must be a file of tensors but has {count} members.")

    directory, position, found = read_at(stream, start, length), 0, {}
    for _ in range(count):
        fixed = directory[position : position + 46]
        if len(fixed) < 46 or fixed[:4] != ENTRY:
            damaged("an entry of its directory is cut")
        flags, method, crc, packed, full, n_name, n_extra, n_comment, disk, header = struct.unpack(
            "<8xHH4xIIIHHHH6xI", fixed
        )
        position += 46
        name = directory[position : position + n_name].decode("utf-8", "replace")
        extra = directory[position + n_name : position + n_name + n_extra]
        position += n_name + n_extra + n_comment
        packed, full, header = wide(extra, packed, full, header) or damaged("a zip64 field is cut")
        if disk:
            damaged("it is one of several")
        if name in found:
            damaged(f"two members are named {shown(name)}")
        if method or flags & ~KNOWN_FLAGS or packed != full:
            refuse(
                f"{where} must store its members as torch does but {shown(name)} is compressed or "
                "encrypted; load and save it with torch."
            )
        found[name] = Member(header, full, crc)
    if position != length:
        damaged("its directory is longer than its entries")

    reached = 0
    for name, (header, full, crc) in sorted(found.items(), key=lambda item: item[1]):
        if header < reached or header + 30 > start:
            damaged(f"{shown(name)} overlaps another member")
        local = read_at(stream, header, 30)
        n_name, n_extra = struct.unpack("<26xHH", local)
        begin = header + 30 + n_name + n_extra
        if local[:4] != LOCAL or begin + full > start:
            damaged(f"{shown(name)} is not where the directory says")
        if read_at(stream, header + 30, n_name).decode("utf-8", "replace") != name:
            damaged(f"{shown(name)} has another name in front of its bytes")
        found[name] = Member(begin, full, crc)
        reached = begin + full
    return found


def wide(extra, packed, full, header):
    """Take sizes and place from the zip64 field where they do not fit 32 bits; None if cut."""
    values = {"full": full, "packed": packed, "header": header}
    position = 0
    while position + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, position)
        body = extra[position + 4 : position + 4 + length]
        position += 4 + length
        if tag != 1:
            continue
        for key, value in values.items():
            if value == UNKNOWN32:
                if len(body) < 8:
                    return None
                values[key], body = int.from_bytes(body[:8], "little"), body[8:]
    return values["packed"], values["full"], values["header"]
