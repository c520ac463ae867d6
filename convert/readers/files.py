"""What every reader shares: files that may be opened, exact reads, types, lines of refusal."""

import math
import stat
from pathlib import Path

import numpy as np

from mlx_mcsd.errors import MCSDError

# Stored type -> NumPy's, little-endian. NumPy has no bfloat16 and no float8: their bits travel.
NUMPY_TYPES = {
    "BOOL": "?",
    "U8": "<u1",
    "I8": "<i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F8_E4M3": "<u1",
    "F8_E5M2": "<u1",
    "F16": "<f2",
    "BF16": "<u2",
    "F32": "<f4",
    "F64": "<f8",
    "C64": "<c8",
}
ITEM_SIZE = {kind: np.dtype(name).itemsize for kind, name in NUMPY_TYPES.items()}

MAX_DIMENSIONS = 16
MAX_NAME = 512
# From here on a file that is mostly holes is no file of weights.
LARGE = 2**30


def refuse(message):
    """Raise the one line that a user sees."""
    raise MCSDError(f"[convert] {message}")


def shown(text, limit=80):
    """Text from a checkpoint, fit for one line."""
    text = str(text)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= limit else f"{text[:limit]}..."


def check_name(name, file):
    """Refuse a tensor's name that no line of text can hold."""
    if not name.isprintable() or len(name) > MAX_NAME:
        refuse(
            f"names of tensors must be printable and of at most {MAX_NAME} characters but "
            f"{shown(file)} has {shown(ascii(name), 40)}."
        )


def size_of(file):
    """The size in bytes of a regular file that is there as a whole.

    Raises:
        MCSDError: it is missing, a directory, pipe or device, or large and mostly holes, as what
            an interrupted download may leave.
    """
    try:
        status = Path(file).stat()
    except (OSError, ValueError) as error:
        refuse(f"{shown(file, 300)} cannot be read: {getattr(error, 'strerror', None) or error}.")
    if not stat.S_ISREG(status.st_mode):
        refuse(f"{shown(file, 300)} must be a file but is none.")
    # In units of 512 bytes; 0 where a file system does not count.
    held = status.st_blocks * 512
    if status.st_size > LARGE and 0 < held < status.st_size // 8:
        refuse(
            f"{shown(file, 300)} must be whole but of its {status.st_size} bytes only {held} are "
            "on the disk; download it again."
        )
    return status.st_size


def read_at(stream, start, size):
    """Exactly `size` bytes from position `start` of an open file."""
    stream.seek(start)
    data = stream.read(size)
    if len(data) != size:
        refuse(f"{shown(stream.name, 300)} ended while it was being read.")
    return data


def number_of_bytes(kind, shape):
    """Bytes of a dense tensor."""
    return math.prod(shape) * ITEM_SIZE[kind]
