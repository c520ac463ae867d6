"""One thread that owns the model and reads and writes for every request at once.

MLX's streams belong to threads, so all work on arrays happens in this one. mlx-lm's
``BatchGenerator`` batches prompts and steps; round it are kept the states at the ends of messages,
the seeds of each text, and what ends a text before its length does.
"""

import secrets
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from queue import Empty, SimpleQueue
from threading import Thread
from types import SimpleNamespace
from typing import NamedTuple

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, StopSequences
from mlx_lm.models.cache import ArraysCache
from mlx_lm.sample_utils import make_logits_processors

from ..errors import MCSDError
from ..sampling import make_sampler
from ..state import Snapshot, State
from .prefixes import Entry, Prefixes
from .protocol import APIError, Sampling
from .text import Text


class Part(NamedTuple):
    """A stretch of one text of a job, as its queue receives it.

    Attributes:
        index: the number of the text.
        text: whole characters.
        tokens: the tokens that begin in it: (id, log probability, [(id, log probability), ...]).
        count: tokens generated so far.
        finish: None, "stop" or "length".
        end: with finish, the state after ``begun``; None if it cannot be known.
        begun: with finish, how much of the text (in characters) that state has read.
    """

    index: int
    text: str
    tokens: list
    count: int
    finish: str | None = None
    end: Snapshot | None = None
    begun: int = 0


@dataclass(eq=False)
class Job:
    """A text to go on with, ``n`` times.

    Args:
        start: where to go on from.
        segments: (name, ids) to read: the state after each is kept under its name.
        logprobs: how many alternatives to report; None reports no probabilities.
        after_text: whether it goes on with a text, so that a space which begins it is kept.
        first: number of its first text.
        parts: receives each :class:`Part`; an :class:`APIError` says that there will be no more.
    """

    start: Entry
    segments: list[tuple[bytes, list[int]]]
    n: int = 1
    max_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    after_text: bool = False
    first: int = 0
    parts: SimpleQueue = field(default_factory=SimpleQueue)


class Row:
    """One text of a job, while it is in the batch.

    Attributes:
        entry: the last state that was kept.
        marks: (name, ids) of each further state to keep.
        last: the last token of the prompt.
        written: the tokens generated so far.
        settled: the last moment whose text is known: how many were written, their characters, the
            arrays of the batch and the row in them.
    """

    def __init__(self, job: Job, index: int, entry: Entry, last: int, text: Text):
        self.job, self.index, self.entry, self.last, self.text = job, index, entry, last, text
        self.marks: list[tuple[bytes, list[int]]] = []
        self.written: list[int] = []
        self.settled = None


class Engine:
    """The thread, ready once the model is loaded.

    Args:
        load: called in the thread; returns (model, tokenizer, base state or None).
        prefixes: where states are kept.
        decode_concurrency: texts generated at a time.
        prompt_concurrency: prompts read at a time.
        prefill_step_size: prompt tokens read in one step.

    Attributes:
        base: the state every text begins with.
        known: ids that the tokenizer can spell.
        tokens_read: prompt tokens read so far, for whoever counts.
    """

    def __init__(
        self,
        load: Callable,
        prefixes: Prefixes,
        *,
        decode_concurrency: int = 32,
        prompt_concurrency: int = 8,
        prefill_step_size: int = 2048,
    ):
        self.prefixes = prefixes
        self._options = dict(
            completion_batch_size=decode_concurrency,
            prefill_batch_size=prompt_concurrency,
            prefill_step_size=prefill_step_size,
        )
        self._load = load
        self._commands: SimpleQueue = SimpleQueue()
        self._rows: dict[int, Row] = {}
        self._samplers: dict = {}
        self.tokens_read = 0
        self.alive = True
        self._closing = False
        loaded = Future()
        self._thread = Thread(target=self._run, args=(loaded,), name="engine", daemon=True)
        self._thread.start()
        self.model, self.tokenizer, self.base = loaded.result()
        self.known = len(self.tokenizer)

    @property
    def active(self) -> int:
        """Texts being read or written."""
        return len(self._rows)

    def submit(self, job: Job) -> None:
        """Begin a job; its parts come to its queue."""
        self._commands.put(lambda: self._insert(job))
        if not self.alive:
            job.parts.put(_stopped())

    def cancel(self, job: Job) -> None:
        """End a job, silently; it may have ended already."""
        self._commands.put(lambda: self._remove(job))

    def call(self, function: Callable):
        """Run a function in the thread, between two steps, and return what it returns."""
        future = Future()
        self._commands.put(lambda: _fulfil(future, function))
        if not self.alive:
            raise _stopped()
        return future.result()

    def close(self) -> None:
        """End every job, and the thread."""
        self._commands.put(self._close)
        self._thread.join()

    def _run(self, loaded: Future) -> None:
        self._stream = mx.default_stream(mx.default_device())
        try:
            _fulfil(loaded, self._begin)
            if loaded.exception() is not None:
                return
            while not self._closing:
                self._obey()
                if self._rows:
                    self._step()
        finally:
            # Also after a bug, which Python reports: nobody is left waiting.
            self._closing, self.alive = True, False
            for row in self._rows.values():
                row.job.parts.put(_stopped())
            self._rows.clear()
            while not self._commands.empty():
                self._commands.get()()
            # The step ahead that nobody wants any more: MLX takes no end of a thread in its midst.
            mx.synchronize(self._stream)

    def _begin(self):
        model, tokenizer, base = self._load()
        self._generator = BatchGenerator(model, stream=self._stream, **self._options)
        self._eos = StopSequences([(token,) for token in tokenizer.eos_token_ids])
        return model, tokenizer, Entry((base or State(model)).snapshot())

    def _obey(self) -> None:
        """Do what was asked for; with no text in the batch, wait for something."""
        wait = not self._rows
        try:
            while not self._closing:
                self._commands.get(block=wait)()
                wait = False
        except Empty:
            pass

    def _close(self) -> None:
        self._closing = True

    def _insert(self, job: Job) -> None:
        """Put a job into the batch: one text, the others once the prompt they share is read."""
        if self._closing:
            job.parts.put(_stopped())
            return
        pending = list(job.start.snapshot.pending)
        segments = [(name, list(ids)) for name, ids in job.segments if ids] or [(None, [])]
        segments[0] = (segments[0][0], pending + segments[0][1])
        *before, (name, ids) = segments
        row = self._row(job, 0, job.start, ids[-1])
        if ids[1:]:
            before.append((name, ids[:-1]))
        else:  # nothing to read before the last token
            snapshot = replace(job.start.snapshot, pending=tuple(ids))
            row.entry = Entry(snapshot, job.start.tokens + len(ids) - len(pending))
        row.marks = before
        self._add(row, [ids for _, ids in before])
        if not before:
            self._insert_rest(row)

    def _insert_rest(self, first: Row) -> None:
        """Put a job's other texts into the batch, their prompt read but for its last token."""
        for index in range(1, first.job.n):
            self._add(self._row(first.job, index, first.entry, first.last), [])

    def _row(self, job: Job, index: int, entry: Entry, last: int) -> Row:
        after_text = job.after_text and last not in self.tokenizer.all_special_ids
        return Row(job, index, entry, last, Text(self.tokenizer, job.stop, after_text))

    def _add(self, row: Row, segments: list[list[int]]) -> None:
        """Put a row into the batch, to read these segments and its last token."""
        segments = [*segments, [row.last]]
        size = sum(map(len, segments))
        self.tokens_read += size
        (uid,) = self._generator.insert_segments(
            [segments],
            [row.job.max_tokens],
            [_caches(row.entry.snapshot)],
            None,
            [self._sampler(row)],
            [_processors(row.job, size)],
            [self._eos],
        )
        self._rows[uid] = row

    def _remove(self, job: Job) -> None:
        job.n = 0  # texts that wait for the prompt never come
        uids = [uid for uid, row in self._rows.items() if row.job is job]
        self._generator.remove(uids)
        for uid in uids:
            del self._rows[uid]

    def _sampler(self, row: Row):
        """mlx-lm's sampler; one for all rows that may share it, which are sampled in one call."""
        sampling, seed = row.job.sampling, row.job.seed
        if seed is None and sampling in self._samplers:
            return self._samplers[sampling]
        options = asdict(sampling) | {
            "min_tokens_to_keep": 1,
            "xtc_probability": 0.0,
            "xtc_threshold": 0.1,
        }
        sampler = make_sampler(SimpleNamespace(**options), self.tokenizer)
        if seed is not None:
            return _seeded(sampler, seed + row.job.first + row.index)
        if len(self._samplers) > 100:
            self._samplers.clear()
        return self._samplers.setdefault(sampling, _seeded(sampler, secrets.randbits(63)))

    def _step(self) -> None:
        """Read a piece of the prompts, and write a token of each text."""
        batch = self._generator._generation_batch
        # References, not copies: the state of every row before it reads the token that comes now.
        arrays = [list(c.cache) for c in batch.prompt_cache]
        places = {uid: i for i, uid in enumerate(batch.uids)}
        prompts, responses = self._generator.next()
        for response in prompts:
            if response.end_of_segment and not response.end_of_prompt:
                self._keep(response.uid)
        for response in responses:
            self._write(response, arrays, places[response.uid])

    def _keep(self, uid: int) -> None:
        """Keep the state at the end of a segment; after the last one, the job's other texts."""
        row = self._rows[uid]
        name, ids = row.marks.pop(0)
        ((caches, _),) = self._generator.extract_cache([uid]).values()
        arrays = [c.cache for c in caches]
        row.entry = self._entry(row.entry, arrays, 0, ids, () if row.marks else (row.last,))
        if name is not None:
            self.prefixes.add(name, row.entry)
        if not row.marks:
            self._insert_rest(row)

    def _write(self, response, arrays, place: int) -> None:
        """Send what a token adds to its text, and at the end the state to go on from."""
        row = self._rows[response.uid]
        text, finish = row.text, response.finish_reason
        if text.settled is not None:
            row.settled = (len(row.written), text.settled, arrays, place)
        row.written.append(response.token)
        if finish != "stop":  # the token that ends a text is not part of it
            text.add(response.token, self._probabilities(row.job, response))
        if text.stopped:
            if finish is None:
                self._generator.remove([response.uid])
            finish = "stop"
        if finish is not None:
            text.finish()
        stretch, tokens = text.take()
        part = Part(row.job.first + row.index, stretch, tokens, len(row.written), finish)
        if finish is not None:
            del self._rows[response.uid]
            end, begun = self._end(row, finish, arrays, place)
            part = part._replace(end=end, begun=begun)
        row.job.parts.put(part)

    def _end(self, row: Row, finish: str, arrays, place: int) -> tuple[Snapshot, int]:
        """The last state whose text is known and part of the answer, and that text's length."""
        if finish == "length" and row.text.settled is not None:
            pending = (row.written[-1],)
            ids, begun = row.written[:-1], row.text.settled
        else:
            (n, begun, arrays, place), pending = row.settled, ()
            ids = row.written[:n]
        ids = [row.last, *ids]
        return self._entry(row.entry, arrays, place, ids, pending).snapshot, begun

    def _entry(self, start: Entry, arrays, place: int, ids: list[int], pending) -> Entry:
        """The entry that follows another: ``ids`` were read, which began with its pending ones."""
        row = mx.array([place])
        # Taken, which copies: a slice would keep the whole batch alive.
        arrays = tuple(tuple(mx.take(a, row, axis=0) for a in layer) for layer in arrays)
        mx.eval(arrays)
        state = State(self.model)
        state.restore(replace(start.snapshot, arrays=arrays))
        state.advance(ids, pending)
        tokens = start.tokens - len(start.snapshot.pending) + len(ids) + len(pending)
        return Entry(state.snapshot(), tokens)

    def _probabilities(self, job: Job, response) -> tuple:
        """(id, log probability, alternatives) of a token."""
        if job.logprobs is None:
            return (response.token, None, [])
        logprobs = response.logprobs[: self.known].astype(mx.float32)
        best = mx.argsort(-logprobs)[: job.logprobs]
        values = logprobs[mx.concatenate([mx.array([response.token]), best])].tolist()
        return (response.token, values[0], list(zip(best.tolist(), values[1:], strict=True)))


def _fulfil(future: Future, function: Callable) -> None:
    """Run a function for a future: a user's mistake is raised by whoever waits, a bug here."""
    try:
        future.set_result(function())
    except (MCSDError, OSError) as error:
        future.set_exception(error)
    finally:
        if not future.done():
            future.set_exception(_stopped())


def _stopped() -> APIError:
    return APIError(503, "the server is shutting down.", headers={"Retry-After": "5"})


def _caches(snapshot: Snapshot) -> list[ArraysCache]:
    caches = [ArraysCache(len(layer)) for layer in snapshot.arrays]
    for c, layer in zip(caches, snapshot.arrays, strict=True):
        c.cache = [mx.array(a) for a in layer]
    return caches


def _seeded(sampler, seed: int):
    """The sampler with random numbers of its own, whoever else is in the batch."""
    # Seeds that follow each other begin far apart, so that they share no number.
    numbers = count(seed * 0x9E3779B97F4A7C15)

    def sample(logprobs):
        mx.random.seed(next(numbers) % 2**64)
        return sampler(logprobs)

    return sample


def _processors(job: Job, prompt: int) -> list:
    """mlx-lm's logits processors; what it has generated, not what it was asked, is penalised."""
    s, size = job.sampling, job.max_tokens
    penalties = (s.repetition_penalty, size, s.presence_penalty, size, s.frequency_penalty, size)
    made = make_logits_processors(dict(s.logit_bias), *penalties)
    return [lambda tokens, logits, p=p: p(tokens[prompt:], logits) for p in made]
