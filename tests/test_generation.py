"""The token loop: the state it leaves is the text's, wherever and however it was left."""

from itertools import islice

import mlx.core as mx
import numpy as np
import pytest

import tiny
from mlx_mcsd import load, sampling
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.generation import stream_generate
from mlx_mcsd.state import State

PROMPT = "a b ab"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A random model and its tokenizer; nothing in the tests changes them."""
    directory = tmp_path_factory.mktemp("generation")
    tiny.write_model(directory)
    return load(directory)


@pytest.fixture
def run(loaded):
    """Generates; returns tokens, text and the last response."""

    def run(prompt="", state=None, stop_after=None, **options):
        stream = stream_generate(*loaded, prompt, state=state, **options)
        responses = list(islice(stream, stop_after))
        stream.close()
        return [r.token for r in responses], "".join(r.text for r in responses), responses[-1]

    return run


def forced(ids):
    """A sampler that chooses these ids whatever the model, and then the first of all."""
    ids = iter(ids)
    return lambda _: mx.array([next(ids, 0)])


def sampled(logprobs):
    return mx.random.categorical(logprobs)


def numbers(state):
    return [np.array(a) for c in state.cache for a in c.cache]


def same(state, other, tolerance=0.0):
    """Whether two states hold the same, their arrays up to rounding."""
    return (
        (state.tokens_seen, state.hash, state.pending, state.tail)
        == (other.tokens_seen, other.hash, other.pending, other.tail)
    ) and all(
        np.allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))
        for a, b in zip(numbers(state), numbers(other), strict=True)
    )


def test_text_and_figures(run, loaded):
    model, tokenizer = loaded
    tokens, _, last = run(PROMPT, max_tokens=9)
    want = tokenizer.encode(PROMPT)
    for _ in range(9):
        want.append(int(mx.argmax(model(mx.array([want]))[0, -1])))
    assert tokens == want[-9:]
    assert (last.prompt_tokens, last.generation_tokens, last.finish_reason) == (5, 9, "length")
    assert last.prompt_tps > 0
    assert run(mx.array(want[:5]), max_tokens=9)[0] == run(want[:5], max_tokens=9)[0] == tokens


@pytest.mark.parametrize("stop_after", [1, 2, 7, None])
def test_whoever_leaves_leaves_the_state_of_the_text(run, loaded, stop_after):
    model, tokenizer = loaded
    state, whole = State(model), State(model)
    tokens, _, _ = run(PROMPT, state, stop_after, max_tokens=12)
    whole.read([*tokenizer.encode(PROMPT), *tokens])
    assert len(tokens) == (stop_after or 12)
    assert state.tail == tuple(loaded_tail(loaded, tokens))
    whole.tail = state.tail
    assert same(state, whole, 1e-5)  # float32: read at once, and one by one


def loaded_tail(loaded, tokens):
    detokenizer = loaded[1].detokenizer
    detokenizer.resume()
    for token in tokens:
        detokenizer.add_token(token)
    return detokenizer.tail


@pytest.mark.parametrize("sampler", [None, sampled], ids=["greedy", "sampled"])
def test_continued_anywhere_it_is_as_if_never_stopped(run, loaded, sampler):
    model, _ = loaded
    mx.random.seed(3)
    whole = State(model)
    want, text, _ = run(PROMPT, whole, max_tokens=24, sampler=sampler)
    assert len(set(want)) > 3
    for cut in (1, 2, 11, 23):
        mx.random.seed(3)
        state = State(model)
        first, begun, _ = run(PROMPT, state, max_tokens=cut, sampler=sampler)
        mx.random.seed(99)
        state = State.from_bytes(state.to_bytes(), model)
        sampling.begin(None, state)
        rest, ended, last = run(state=state, max_tokens=24 - cut, sampler=sampler)
        assert first + rest == want
        assert begun + ended == text
        assert last.prompt_tokens == 1
        assert same(state, whole)


def test_an_interrupt_inside_a_step_leaves_the_state_of_the_text(run, loaded):
    model, _ = loaded
    calls = []

    def interrupted(logprobs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return mx.argmax(logprobs, axis=-1)

    state, tokens = State(model), []
    with pytest.raises(KeyboardInterrupt):
        for response in stream_generate(*loaded, PROMPT, state=state, sampler=interrupted):
            tokens.append(response.token)
    want = State(model)
    assert run(PROMPT, want, max_tokens=len(tokens))[0] == tokens
    assert len(tokens) == 4 and same(state, want)


def test_a_token_that_ends_the_text_is_in_no_state(run, loaded):
    tokenizer = loaded[1]
    ids = tokenizer.encode("ab", add_special_tokens=False)
    end = tiny.SPECIAL.index("</s>")
    tokenizer.add_eos_token("</s>")
    state, want = State(loaded[0]), State(loaded[0])
    tokens, text, last = run(PROMPT, state, sampler=forced([*ids, end, *ids]))
    assert (tokens, text, last.finish_reason) == ([*ids, end], "ab", "stop")
    run(PROMPT, want, sampler=forced(ids), max_tokens=len(ids))
    assert same(state, want)
    tokens, text, last = run(PROMPT, state := State(loaded[0]), sampler=forced([end]))
    want = State(loaded[0])
    want.read(tokenizer.encode(PROMPT))
    assert (text, last.finish_reason) == ("", "stop") and same(state, want)


@pytest.mark.parametrize(
    ("text", "stop", "shown", "kept"),
    [
        ("ab 漢\nUser: a", ["\nUser:"], "ab 漢", "ab 漢"),
        ("a b", ["b"], "a ", "a "),  # " b" is one token, cut in two
        ("a\n\nb", ["\n"], "a", "a"),
        ("\n\na\nb", ["\n"], "\n\na", "\n\na"),
        ("ab 😀!", ["😀!"], "ab ", "ab "),
        (" ba", [" b"], "", ""),
        ("abab" * 9 + "stop", ["abstop"], "abab" * 8 + "ab", "abab" * 8 + "ab"),
    ],
)
def test_a_stop_string_leaves_the_state_before_it(run, loaded, text, stop, shown, kept):
    model, tokenizer = loaded

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    state = State(model)
    tokens, got, last = run(PROMPT, state, stop=stop, sampler=forced(encode(text)))
    assert (got, last.finish_reason) == (shown, "stop")
    assert len(tokens) <= len(encode(text))
    # What comes next follows the text shown, and nothing of the stop string.
    state.read(encode("ab"))
    want = State(model)
    prompt = tokenizer.encode(PROMPT)
    whole = encode(text)
    n = max(n for n in range(len(whole) + 1) if shown.startswith(tokenizer.decode(whole[:n])))
    rest = shown[len(tokenizer.decode(whole[:n])) :]
    want.read([*prompt, *whole[:n], *encode(rest), *encode("ab")])
    assert same(state, want, 1e-5)  # float32


def test_a_text_may_not_begin_from_nothing(loaded):
    with pytest.raises(MCSDError, match="a prompt must begin the text"):
        next(stream_generate(*loaded, []))


def test_a_prompt_begins_a_text_once(run, loaded):
    model, tokenizer = loaded
    for prompts in (["a", " b"], ["<s>a", " b"]):
        state, want = State(model), State(model)
        tokens = []
        for prompt in prompts:
            tokens += run(prompt, state, max_tokens=2)[0]
        a, b = (tokenizer.encode(p, add_special_tokens=False) for p in ("a", " b"))
        want.read([1, *a, *tokens[:2], *b, *tokens[2:]])
        want.tail = state.tail
        assert same(state, want, 1e-5)  # float32
