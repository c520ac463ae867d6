"""A model's whole memory of a text: of fixed size, kept, copied, written to a file and read back.

    state = State(model)
    state.read(tokenizer.encode("Once upon a time"))
    before = state.snapshot()
    for response in stream_generate(model, tokenizer, state=state): ...
    state.restore(before)
    state.save("story.state")
    state = State.load("story.state", model)

A state never holds the last token it was told of: that one is *pending*, read when the next token
is wanted, because only reading it says what may follow. So a state that is saved, loaded by another
process and continued goes through the very steps it would have gone through without the break.
Nothing here knows which mixer it serves.
"""

import hashlib
import json
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import safetensors
import safetensors.numpy
from mlx.utils import tree_flatten

from .errors import MCSDError
from .files import write_atomically

FORMAT, VERSION = "mlx_mcsd.state", "1"
HEADER_BYTES = 2**20
"""A state file is its arrays and a header, which is far smaller than this."""

PIECE = 2**24
"""Bytes of weights that one thread hashes at a time."""

_fingerprints: dict[int, tuple[weakref.ref, list[weakref.ref], str]] = {}


@dataclass(frozen=True)
class Snapshot:
    """A moment of a :class:`State`: a few references, for arrays never change.

    Attributes:
        arrays: of each layer, its mixer's state.
        tokens_seen: tokens that the arrays have read.
        hash: of those tokens, in order.
        pending: tokens known but not read.
        tail: tokens at the end whose text is not whole yet; see :mod:`mlx_mcsd.text`.
    """

    arrays: tuple[tuple[mx.array, ...], ...]
    tokens_seen: int
    hash: str
    pending: tuple[int, ...]
    tail: tuple[int, ...]


class State:
    """What a model remembers of one sequence of tokens; empty to begin with.

    Attributes:
        model: whose state it is.
        cache: what ``model`` and mlx-lm's token loop take, and update in place.
        tokens_seen: tokens that the cache has read.
        hash: of those tokens, in order (128 bits in hexadecimal).
        pending: tokens known but not read yet, at most one after :meth:`read`; feed them first.
        tail: tokens at the end whose text is not whole yet; see :mod:`mlx_mcsd.text`.
        random_key: where sampling stood, (2,) uint32 of ``mx.random.state``; or None.
        command: of a loaded state, the command that made it.
    """

    def __init__(self, model):
        self.model = model
        self.cache = model.make_cache()
        self.tokens_seen, self.hash = 0, chain_hash("", ())
        self.pending: tuple[int, ...] = ()
        self.tail: tuple[int, ...] = ()
        self.random_key: mx.array | None = None
        self.command = ""
        self._fill(layer.mixer.init_state(1) for layer in model.layers)

    @classmethod
    def make(cls, model) -> "State":
        """Return an empty state, as the constructor does."""
        return cls(model)

    @property
    def nbytes(self) -> int:
        """Bytes of the state: what :func:`state_bytes` promises."""
        return sum(a.nbytes for c in self.cache for a in c.cache)

    def advance(self, tokens: Iterable[int], pending: Iterable[int] = ()) -> None:
        """Note that the cache has read ``tokens``, and which are known but wait."""
        tokens = list(tokens)
        self.hash = chain_hash(self.hash, tokens)
        self.tokens_seen += len(tokens)
        self.pending = tuple(pending)
        self.tail = ()

    def read(
        self,
        tokens: Sequence[int],
        step_size: int = 2048,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Read what is pending and ``tokens``, except the last, which is pending then.

        Args:
            tokens: ids.
            step_size: tokens read at a time.
            progress: called after each step with the tokens it read.

        Raises:
            MCSDError: if an id is outside the vocabulary.
        """
        K = self.model.args.vocab_size
        if bad := [t for t in tokens if not 0 <= t < K]:
            _fail(f"token ids must be from 0 to {K - 1} but got {bad[0]}.")
        queue = [*self.pending, *tokens]
        done = 0
        while (left := len(queue) - done) > 1:
            step = queue[done : done + min(step_size, left - 1)]
            self._run(step)
            done += len(step)
            self.advance(step, queue[done:])
            mx.clear_cache()
            if progress is not None:
                progress(len(step))
        self.pending = tuple(queue[done:])
        if tokens:
            self.tail = ()

    def snapshot(self) -> Snapshot:
        """Return this moment; what the cache goes through later does not change it."""
        # Copies of references: a later write to a cache's array makes that array another one.
        # Contiguous, or a slice would keep alive the whole array that it was cut from.
        arrays = tuple(tuple(mx.contiguous(a) for a in c.cache) for c in self.cache)
        mx.eval(arrays)
        return Snapshot(arrays, self.tokens_seen, self.hash, self.pending, self.tail)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back, or forth, to a snapshot.

        Raises:
            MCSDError: if the snapshot is another model's.
        """
        if _shapes(snapshot.arrays) != _shapes(c.cache for c in self.cache):
            _fail("a snapshot must be of the same model but its arrays have other shapes.")
        self._fill(snapshot.arrays)
        self.tokens_seen, self.hash = snapshot.tokens_seen, snapshot.hash
        self.pending, self.tail = snapshot.pending, snapshot.tail

    def fork(self) -> "State":
        """Return a state that goes on from here by itself."""
        state = State(self.model)
        state.restore(self.snapshot())
        state.random_key, state.command = self.random_key, self.command
        return state

    def save(self, path: str | Path, command: str = "") -> None:
        """Write the state to a file, whole or not at all: see :meth:`to_bytes`.

        Raises:
            MCSDError: if the state holds a number that is not finite, or the file is refused.
        """
        write_atomically(path, self.to_bytes(command))

    @classmethod
    def load(cls, path: str | Path, model) -> "State":
        """Read a state of this model from a file.

        Raises:
            MCSDError: if the file is another model's, of another version, damaged, cut short or
                edited; nothing in it is ever executed.
        """
        try:
            with open(path, "rb") as file:  # a pipe or a device may have no end
                data = file.read(_most_bytes(model) + 1)
        except OSError as error:
            _fail(f"cannot read {path}: {error.strerror}.", error)
        return cls.from_bytes(data, model, str(path))

    def to_bytes(self, command: str = "") -> bytes:
        """Return the state as a safetensors file.

        The metadata tell the format and its version, the fingerprint of the model, the dtype, the
        count and hash of the tokens seen, the pending tokens, where sampling stood, the command
        that made it, and a checksum over all of these and the arrays.
        """
        tensors = _named((np.array(a) for a in c.cache) for c in self.cache)
        if bad := [name for name, a in tensors.items() if not np.isfinite(a).all()]:
            _fail(f"the state must be finite to be saved but {bad[0]} is not.")
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": fingerprint(self.model),
            "dtype": "float32",
            "tokens_seen": str(self.tokens_seen),
            "tokens_hash": self.hash,
            "pending": json.dumps(self.pending),
            "tail": json.dumps(self.tail),
            "random_key": json.dumps(None if self.random_key is None else self.random_key.tolist()),
            "command": command or self.command,
        }
        metadata["checksum"] = _checksum(metadata, tensors)
        return safetensors.numpy.save(tensors, metadata)

    @classmethod
    def from_bytes(cls, data: bytes, model, name: str = "the state") -> "State":
        """Read what :meth:`to_bytes` wrote; ``name`` is what errors call it; see :meth:`load`."""
        _check_size(len(data), model, name)
        metadata, tensors = _parse(data, name)
        state = cls(model)
        _check_metadata(metadata, tensors, model, name)
        expected = _named((np.array(a) for a in c.cache) for c in state.cache)
        if _layout(tensors) != _layout(expected):
            _fail(f"{name} must hold the arrays of this model's state but holds others.")
        if bad := [key for key, a in tensors.items() if not np.isfinite(a).all()]:
            _fail(f"{name} must hold finite numbers but {bad[0]} does not.")
        seen = int(metadata["tokens_seen"])
        for key, a in ((key, tensors[key]) for key in expected):
            if a.dtype.kind == "i" and (a != seen).any():
                _fail(f"{name} says {seen} tokens were read but {key} says {a.flat[0]}.")
        arrays = iter(tensors[key] for key in expected)
        state._fill([[mx.array(next(arrays)) for _ in c.cache] for c in state.cache])
        state.tokens_seen, state.hash = seen, metadata["tokens_hash"]
        K = model.args.vocab_size
        state.pending = _numbers(metadata, "pending", K, name)
        state.tail = _numbers(metadata, "tail", K, name)
        if metadata.get("random_key") != "null":
            key = _numbers(metadata, "random_key", 2**32, name)
            if len(key) != 2:
                _fail(f"{name} must have two numbers for random_key.")
            state.random_key = mx.array(key, mx.uint32)
        state.command = metadata.get("command", "")
        return state

    def _run(self, tokens: list[int]) -> None:
        before = [c.cache for c in self.cache]
        try:
            self.model(mx.array([tokens]), cache=self.cache)
            mx.eval([c.cache for c in self.cache])
        except BaseException:  # an interrupt: these tokens were not read
            self._fill(before)
            raise

    def _fill(self, arrays) -> None:
        for c, layer in zip(self.cache, arrays, strict=True):
            c.cache = [mx.array(a) for a in layer]
            c.left_padding = c.lengths = None


def state_bytes(model, tokens: int = 0) -> int:
    """Return the bytes of one sequence's state after this many tokens, known from the config."""
    return sum(layer.mixer.state_bytes(tokens) for layer in model.layers)


def fingerprint(model) -> str:
    """Return a hash of the model's config and of the value of every parameter (hexadecimal).

    The dtype of a float does not count, only its value: a checkpoint in float16 has the same
    fingerprint where it is loaded as float32. Quantized, it has another. Computed once a model, and
    again when a parameter was replaced.
    """
    parameters = dict(tree_flatten(model.parameters()))
    owner, known, value = _fingerprints.get(key := id(model), (None, [], ""))
    if owner is not None and owner() is model:
        current = list(parameters.values())
        if len(known) == len(current) and all(
            ref() is p for ref, p in zip(known, current, strict=True)
        ):
            return value
    digest = hashlib.sha256(json.dumps(asdict(model.args), sort_keys=True).encode())
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        for name, p in sorted(parameters.items()):
            floats = mx.issubdtype(p.dtype, mx.floating)
            p = mx.contiguous(p.astype(mx.float32) if floats else p)
            digest.update(json.dumps([name, p.shape, "float" if floats else str(p.dtype)]).encode())
            data = memoryview(p).cast("B")
            pieces = (data[i : i + PIECE] for i in range(0, len(data), PIECE))
            for piece in pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces):
                digest.update(piece)
    value = digest.hexdigest()[:32]
    refs = [weakref.ref(p) for p in parameters.values()]
    owner = weakref.ref(model, lambda _: _fingerprints.pop(key, None))
    _fingerprints[key] = (owner, refs, value)
    return value


def chain_hash(start: str, tokens: Iterable[int]) -> str:
    """Return the hash of what ``start`` is the hash of ("" of nothing), and ``tokens`` after it."""
    digest = bytes.fromhex(start) or bytes(16)
    for token in tokens:
        digest = hashlib.blake2b(digest + token.to_bytes(4, "little"), digest_size=16).digest()
    return digest.hex()


def _named(layers) -> dict:
    return {f"layers.{i}.{j}": a for i, layer in enumerate(layers) for j, a in enumerate(layer)}


def _shapes(layers):
    return [[(a.shape, a.dtype) for a in layer] for layer in layers]


def _layout(tensors: dict[str, np.ndarray]):
    return {name: (a.shape, a.dtype) for name, a in tensors.items()}


def _checksum(metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> str:
    layout = [[name, str(a.dtype), list(a.shape)] for name, a in sorted(tensors.items())]
    facts = {key: value for key, value in metadata.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps([facts, layout], sort_keys=True).encode())
    for _, a in sorted(tensors.items()):
        digest.update(np.ascontiguousarray(a))
    return digest.hexdigest()


def _most_bytes(model) -> int:
    return state_bytes(model) + HEADER_BYTES


def _check_size(size: int, model, name: str) -> None:
    if size > _most_bytes(model):
        _fail(
            f"{name} must be a state of this model, {state_bytes(model)} bytes and a header, but "
            "is larger."
        )


def _parse(data: bytes, name: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and arrays of a safetensors file, its header and sizes checked by the library."""
    kinds = {"F32": np.float32, "I32": np.int32}
    try:
        tensors = dict(safetensors.deserialize(data))
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        _fail(f"{name} must be a whole state file but is cut short, damaged or none.", error)
    metadata = header.get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        _fail(f"{name} must be a state file but is another kind of safetensors file.")
    if metadata.get("version") != VERSION:
        _fail(
            f"{name} must be of version {VERSION} but is of version "
            f"{metadata.get('version', '')[:20]!r}; make it anew, or update mlx_mcsd."
        )
    if other := [t["dtype"] for t in tensors.values() if t["dtype"] not in kinds]:
        _fail(f"{name} must hold float32 and int32 arrays but holds {other[0]}.")
    return metadata, {
        key: np.frombuffer(t["data"], kinds[t["dtype"]]).reshape(t["shape"])
        for key, t in tensors.items()
    }


def _check_metadata(metadata, tensors, model, name: str) -> None:
    if metadata.get("checksum") != _checksum(metadata, tensors):
        _fail(f"{name} was damaged or edited: its checksum does not fit its content.")
    if metadata.get("fingerprint") != fingerprint(model):
        _fail(
            f"{name} must be a state of this model, {fingerprint(model)[:8]}, but was saved by "
            f"another, {metadata.get('fingerprint', '')[:8]!r}: config or weights differ."
        )
    if metadata.get("dtype") != "float32":
        _fail(f"{name} must be in float32 but says {metadata.get('dtype', '')[:20]!r}.")
    count, digest = metadata.get("tokens_seen", ""), metadata.get("tokens_hash", "")
    if not (count.isascii() and count.isdecimal() and len(count) <= 18):
        _fail(f"{name} must say how many tokens were read but says {count[:20]!r}.")
    if len(digest) != 32 or not set(digest) <= set("0123456789abcdef"):
        _fail(f"{name} must have a hash of the tokens read but has {digest[:40]!r}.")


def _numbers(metadata: dict[str, str], key: str, limit: int, name: str) -> tuple[int, ...]:
    try:
        numbers = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        numbers = None
    if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < limit for n in numbers):
        _fail(f"{name} must have numbers from 0 to {limit - 1} for {key} but has others.")
    return tuple(numbers)


def _fail(message: str, cause: BaseException | None = None):
    raise MCSDError(f"[State] {message}") from cause
