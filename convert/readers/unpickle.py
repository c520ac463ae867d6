"""A pickle as plain data: an interpreter of the few opcodes that ``torch.save`` emits.

A pickle is a program. This one can build numbers, strings, tuples, lists and tables, and call the
constructors that its caller lists by their full names; it imports nothing, and every other opcode
and every other name is refused. Python's own `pickle` is not used: its memo alone can be told to
allocate gigabytes.
"""

import pickle
import pickletools
import struct
from dataclasses import dataclass, field
from functools import cache

from .files import refuse, shown

# A tensor takes some forty opcodes: enough for twenty thousand of them, and for a second of work.
MAX_OPCODES = 1_000_000
MAX_PICKLE = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Global:
    """A name that a pickle may mention, such as a class; never imported."""

    module: str
    name: str

    def __str__(self):
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value of no interest; only its kind is kept."""

    kind: str


@dataclass(frozen=True, slots=True)
class Table:
    """A dict, as the pairs it was filled with: the pickle chooses the keys, so none is hashed."""

    pairs: list = field(default_factory=list)


class Malformed(ValueError):
    """What a constructor cannot make anything of."""


class Unpickler:
    """Reads one or more pickles that follow each other.

    Args:
        data: the bytes.
        constructors: (module, name) -> function of the arguments, which may raise `Malformed`, or
            None for a name that may only be mentioned.
        persistent: function of a persistent id, which stands for data outside the pickle.
        where: what the file is called in messages.
    """

    def __init__(self, data, constructors, persistent, where):
        self.data = data
        self.constructors = constructors
        self.persistent = persistent
        self.where = where
        self.position = 0
        self.count = 0

    def load(self):
        """Return the object that the pickle at `position` describes; `position` moves behind it.

        Raises:
            MCSDError: an opcode or a name that is not allowed, damage, or more opcodes than any
                honest file has.
        """
        self.stack, self.marks, self.memo = [], [], {}
        self.opcodes = opcodes_of(2)
        while True:
            self.count += 1
            if self.count > MAX_OPCODES:
                refuse(f"{self.where} must be a file of tensors but its pickle is far too long.")
            opcode = self.take(1)
            if opcode == pickle.STOP:
                return self.pop()
            if opcode not in self.opcodes:
                known = pickletools.code2op.get(opcode.decode("latin1"))
                refuse(
                    f"{self.where} must be a file of tensors alone but at byte {self.position - 1} "
                    f"of its pickle is {known.name if known else opcode}, which torch.save never "
                    "writes for one; nothing of it was run."
                )
            self.opcodes[opcode](self)

    def damaged(self):
        """Refuse what no pickler wrote."""
        refuse(f"{self.where} must be a whole torch file but is damaged or truncated.")

    def take(self, size):
        """The next `size` bytes."""
        taken = self.data[self.position : self.position + size]
        if len(taken) != size:
            self.damaged()
        self.position += size
        return taken

    def unsigned(self, size):
        """The next `size` bytes as a number."""
        return int.from_bytes(self.take(size), "little")

    def text(self, size):
        """The next `size` bytes as text."""
        try:
            return str(self.take(size), "utf-8", "surrogatepass")
        except UnicodeDecodeError:
            self.damaged()

    def line(self):
        """Text up to the end of the line."""
        end = self.data.find(b"\n", self.position, self.position + 512)
        if end < 0:
            self.damaged()
        text = self.text(end - self.position)
        self.position += 1
        return text

    def push(self, value):
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self, kind=object):
        """Take the topmost value, of the kind that its use asks for, above the last mark."""
        if not self.stack or not isinstance(self.stack[-1], kind):
            self.damaged()
        return self.stack.pop()

    def top(self, kind):
        """The topmost value, which stays."""
        if not self.stack or not isinstance(self.stack[-1], kind):
            self.damaged()
        return self.stack[-1]

    def pop_mark(self):
        """Take every value above the last mark, and the mark."""
        if not self.marks:
            self.damaged()
        values, self.stack = self.stack, self.marks.pop()
        return values

    def recall(self, index):
        """Push a value of the memo."""
        if index not in self.memo:
            self.damaged()
        self.push(self.memo[index])

    def memoize(self, index):
        """Keep the topmost value."""
        self.memo[index] = self.top(object)

    def mark(self):
        """Start a list of values."""
        self.marks.append(self.stack)
        self.stack = []

    def mention(self, module, name):
        """Push a name, if it is allowed."""
        # Python 2's names, which pickles of protocol 2 use to this day.
        module = "builtins" if module == "__builtin__" else module
        if (module, name) not in self.constructors:
            refuse(
                f"{self.where} must be a file of tensors alone but wants "
                f"{shown(module)}.{shown(name)}; nothing of it was run. Save the state_dict() "
                "alone."
            )
        self.push(Global(module, name))

    def stack_global(self):
        """Push the name whose parts are on the stack."""
        name = self.pop(str)
        self.mention(self.pop(str), name)

    def call(self):
        """Call a constructor."""
        arguments = self.pop(tuple)
        name = self.pop(Global)
        constructor = self.constructors[name.module, name.name]
        if constructor is None:
            refuse(f"{self.where} must be a file of tensors alone but calls {name}.")
        try:
            self.push(constructor(*arguments))
        except Malformed as error:
            refuse(f"{self.where} must describe tensors as torch does but {error}.")

    def build(self):
        """Drop the attributes of a table, such as the versions that state_dict() leaves there."""
        self.pop()
        self.top(Table)

    def set_pairs(self, values):
        """Fill a table."""
        if len(values) % 2:
            self.damaged()
        self.top(Table).pairs.extend(zip(values[::2], values[1::2], strict=True))

    def tuple_of(self, size):
        """Make a tuple of the topmost values."""
        values = [self.pop() for _ in range(size)]
        self.push(tuple(reversed(values)))

    def set_item(self):
        """Put one pair into a table."""
        value = self.pop()
        self.set_pairs([self.pop(), value])

    def append(self):
        """Put one value into a list."""
        value = self.pop()
        self.top(list).append(value)

    def extend(self):
        """Put values into a list."""
        values = self.pop_mark()
        self.top(list).extend(values)

    def skip(self, size, kind):
        """Push a value whose bytes are of no interest."""
        self.take(size)
        self.push(Opaque(kind))

    def protocol(self):
        """Know the opcodes of one version of the format, and no later ones."""
        version = self.unsigned(1)
        if version > pickle.HIGHEST_PROTOCOL:
            self.damaged()
        self.opcodes = opcodes_of(version)

    def add_items(self):
        """Fill a set."""
        self.pop_mark()
        self.top(Opaque)

    def frozen_set(self):
        """Make a set."""
        self.pop_mark()
        self.push(Opaque("frozenset"))


OPCODES = {
    pickle.PROTO: Unpickler.protocol,
    pickle.FRAME: lambda u: u.take(8) and None,
    pickle.MARK: Unpickler.mark,
    pickle.NONE: lambda u: u.push(None),
    pickle.NEWTRUE: lambda u: u.push(True),
    pickle.NEWFALSE: lambda u: u.push(False),
    pickle.BININT: lambda u: u.push(int.from_bytes(u.take(4), "little", signed=True)),
    pickle.BININT1: lambda u: u.push(u.unsigned(1)),
    pickle.BININT2: lambda u: u.push(u.unsigned(2)),
    pickle.LONG1: lambda u: u.push(int.from_bytes(u.take(u.unsigned(1)), "little", signed=True)),
    pickle.BINFLOAT: lambda u: u.push(struct.unpack(">d", u.take(8))[0]),
    pickle.BINUNICODE: lambda u: u.push(u.text(u.unsigned(4))),
    pickle.SHORT_BINUNICODE: lambda u: u.push(u.text(u.unsigned(1))),
    # Text that Python 2 wrote.
    pickle.BINSTRING: lambda u: u.push(u.text(u.unsigned(4))),
    pickle.SHORT_BINSTRING: lambda u: u.push(u.text(u.unsigned(1))),
    pickle.BINBYTES: lambda u: u.skip(u.unsigned(4), "bytes"),
    pickle.SHORT_BINBYTES: lambda u: u.skip(u.unsigned(1), "bytes"),
    pickle.EMPTY_TUPLE: lambda u: u.push(()),
    pickle.TUPLE1: lambda u: u.tuple_of(1),
    pickle.TUPLE2: lambda u: u.tuple_of(2),
    pickle.TUPLE3: lambda u: u.tuple_of(3),
    pickle.TUPLE: lambda u: u.push(tuple(u.pop_mark())),
    pickle.EMPTY_LIST: lambda u: u.push([]),
    pickle.APPEND: Unpickler.append,
    pickle.APPENDS: Unpickler.extend,
    pickle.EMPTY_DICT: lambda u: u.push(Table()),
    pickle.SETITEM: Unpickler.set_item,
    pickle.SETITEMS: lambda u: u.set_pairs(u.pop_mark()),
    pickle.EMPTY_SET: lambda u: u.push(Opaque("set")),
    pickle.ADDITEMS: Unpickler.add_items,
    pickle.FROZENSET: Unpickler.frozen_set,
    pickle.BINPUT: lambda u: u.memoize(u.unsigned(1)),
    pickle.LONG_BINPUT: lambda u: u.memoize(u.unsigned(4)),
    pickle.MEMOIZE: lambda u: u.memoize(len(u.memo)),
    pickle.BINGET: lambda u: u.recall(u.unsigned(1)),
    pickle.LONG_BINGET: lambda u: u.recall(u.unsigned(4)),
    pickle.GLOBAL: lambda u: u.mention(u.line(), u.line()),
    pickle.STACK_GLOBAL: Unpickler.stack_global,
    pickle.BINPERSID: lambda u: u.push(u.persistent(u.pop(tuple))),
    pickle.REDUCE: Unpickler.call,
    pickle.BUILD: Unpickler.build,
}


@cache
def opcodes_of(version):
    """The opcodes that a version of the format has, of those above."""
    since = {code.encode("latin1"): opcode.proto for code, opcode in pickletools.code2op.items()}
    return {code: act for code, act in OPCODES.items() if since[code] <= version}
