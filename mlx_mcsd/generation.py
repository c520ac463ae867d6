"""The token loop: mlx-lm's, around a state that is right after every token.

mlx-lm's loop runs a step ahead of the text. It works on a copy here; the state given follows a step
behind, so that whoever leaves the loop, or is interrupted in it, leaves a state that has every
token of the text and none besides, the last one pending.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Generator, Sequence

import mlx.core as mx
from mlx_lm.generate import GenerationResponse, generation_stream, wired_limit
from mlx_lm.generate import stream_generate as their_stream_generate
from mlx_lm.sample_utils import greedy_sampler

from .errors import MCSDError
from .state import Snapshot, State
from .text import MOST_TOKENS, TextStream


def read(state: State, tokens: Sequence[int], step_size: int = 2048, progress=None) -> None:
    """Read tokens as :meth:`State.read` does, on mlx-lm's stream and with its memory limit."""
    with wired_limit(state.model, [generation_stream]), mx.stream(generation_stream):
        state.read(tokens, step_size, progress)


def stream_generate(
    model,
    tokenizer,
    prompt: str | mx.array | Sequence[int] = "",
    *,
    state: State | None = None,
    max_tokens: int = 256,
    sampler=None,
    stop: Sequence[str] = (),
    after_text: bool | None = None,
    prefill_step_size: int = 2048,
    **options,
) -> Generator[GenerationResponse, None, None]:
    """Generate text, as ``mlx_lm.stream_generate`` does, from a state and into it.

    Args:
        model: an MCSD model.
        tokenizer: mlx-lm's wrapper, from :func:`mlx_mcsd.load`.
        prompt: text or ids to read first; may be empty where the state has read something.
        state: what was read before, kept up to date with every token given out; None begins anew.
        max_tokens: tokens to generate at most, -1 for no limit.
        sampler: of log-probabilities (1, K), default greedy.
        stop: strings that end the text; the state is left before them.
        after_text: whether to keep a space that begins the text; default where text precedes it.
        prefill_step_size: prompt tokens read at a time.
        **options: further ones of mlx-lm's ``generate_step``.

    Yields:
        mlx-lm's responses, their text in whole characters, emoji with what joins them. A token that
        ends the text is in the last response but not in the state.

    Raises:
        MCSDError: if there is nothing to begin from.
    """
    state = State(model) if state is None else state
    if isinstance(prompt, str):
        new = not (state.tokens_seen or state.pending)
        special = new and not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))
        prompt = tokenizer.encode(prompt, add_special_tokens=special) if prompt or new else []
    tokens = prompt.tolist() if isinstance(prompt, mx.array) else list(prompt)
    if not (count := len(state.pending) + len(tokens)):
        raise MCSDError("[stream_generate] a prompt must begin the text but there is none.")

    start = time.perf_counter()
    read(state, tokens, prefill_step_size)
    if after_text is None:
        after_text = state.pending[-1] not in tokenizer.all_special_ids
    text = TextStream(tokenizer, stop, state.tail, after_text)
    # As many tokens back as a stop string can reach; see _stop_before.
    marks = deque(maxlen=max((len(s.encode()) for s in stop), default=0) + 2 * MOST_TOKENS)
    marks.append((0, state.snapshot()))
    work, sample, seen = state.fork().cache, sampler or greedy_sampler, deque(maxlen=2)

    def watch(logprobs):
        # Called between two steps: the cache has read all that these follow from.
        seen.append(([list(c.cache) for c in work], mx.random.state[0]))
        return sample(logprobs)

    prompt_time = None
    for response in their_stream_generate(
        model,
        tokenizer,
        list(state.pending),
        max_tokens=max_tokens,
        sampler=watch,
        prompt_cache=work,
        **options,
    ):
        prompt_time = prompt_time or time.perf_counter() - start
        piece, finish = "", response.finish_reason
        if finish != "stop":
            piece = text.add(response.token)
            (arrays, _), (_, state.random_key) = seen
            for c, layer in zip(state.cache, arrays, strict=True):
                c.cache = layer
            state.advance(state.pending, [response.token])
            state.tail = tuple(text.tail)
            place = (state.tokens_seen, state.hash, state.pending, state.tail)
            marks.append((text.length, Snapshot(arrays, *place)))
        if text.stopped or finish:
            piece += text.finish()
        if text.stopped:
            finish = "stop"
            _stop_before(state, tokenizer, text, marks)
        yield dataclasses.replace(
            response,
            text=piece,
            finish_reason=finish,
            prompt_tokens=count,
            prompt_tps=count / prompt_time,
        )
        if finish:
            break


def _stop_before(state: State, tokenizer, text: TextStream, marks) -> None:
    """Bring the state to the end of the text shown, before the stop string."""
    length, mark = next(
        (length, mark)
        for length, mark in reversed(marks)
        if length <= text.shown and not (mark.tail and length)
    )
    state.restore(mark)
    if rest := text.text[length : text.shown]:  # a stop string began inside a token
        state.pending += tuple(tokenizer.encode(rest, add_special_tokens=False))
