"""OpenAI's own client, as it comes, against the server."""

import math

import openai
import pytest

import serving

TALK = [{"role": "user", "content": "a b a"}]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    model = tmp_path_factory.mktemp("model")
    serving.write_model(model)
    with serving.running(model, tmp_path_factory.mktemp("sessions")) as (server, app):
        yield server, app


@pytest.fixture
def app(running):
    return running[1]


@pytest.fixture
def client(running):
    url = f"{serving.address(running[0])}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def name(app):
    return app.name


def test_models_are_listed(client, name):
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve(name).id) == (name, name)
    assert model.state_bytes == 2 * 4 * (2 * 24 + 1)
    assert model.state_is_constant is True


def test_chat_gives_the_models_own_text(client, app, name):
    answer = client.chat.completions.create(
        model=name, messages=TALK, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3
    )
    prompt = app.engine.tokenizer.encode("a b a")
    ids, logprobs, _ = serving.greedy(app, prompt, 12)
    (choice,) = answer.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content == app.engine.tokenizer.decode(ids)
    given = choice.logprobs.content
    assert [t.logprob for t in given] == pytest.approx(logprobs[: len(given)], abs=1e-5)
    for token in given:
        assert len(token.top_logprobs) == 3
        best = [other.logprob for other in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert token.top_logprobs[0].token == token.token  # greedy
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 12)
    assert usage.total_tokens == len(prompt) + 12


def test_a_stream_is_the_same_text_in_pieces(client, name):
    options = dict(model=name, messages=TALK, max_tokens=12, temperature=0)
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    *chunks, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == 12
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)
    assert len(chunks) > 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_wherever_tokens_begin(client, name, stream):
    options = dict(model=name, prompt="a b", max_tokens=30, temperature=0)
    whole = client.completions.create(**options).choices[0].text
    for start in range(4, len(whole) - 3):
        stop = whole[start : start + 3]
        answer = client.completions.create(**options, stop=["never", stop], stream=stream)
        choices = [c.choices[0] for c in answer] if stream else answer.choices
        assert "".join(c.text for c in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_a_seed_gives_the_same_again_whoever_else_asks(client, name):
    options = dict(model=name, messages=TALK, max_tokens=20, temperature=1.2)

    def texts(**more):
        answer = client.chat.completions.create(**options, **more)
        return [choice.message.content for choice in answer.choices]

    (first,) = texts(seed=7)
    assert texts(seed=7) == [first]
    assert texts(seed=7, n=4)[0] == first
    assert len({*texts(seed=7, n=4)}) == 4
    assert texts(seed=8) != [first]
    assert texts() != texts()


def test_texts_of_several_prompts_come_in_order(client, name):
    options = dict(model=name, max_tokens=10, temperature=0)
    alone = {p: client.completions.create(prompt=p, **options).choices[0].text for p in ("a", "bb")}
    answer = client.completions.create(prompt=["a", "bb"], n=2, **options)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [c.text for c in answer.choices] == [alone["a"], alone["a"], alone["bb"], alone["bb"]]
    assert answer.usage.completion_tokens == 40


def test_a_prompt_may_be_ids(client, app, name):
    options = dict(model=name, max_tokens=10, temperature=0)
    ids = app.engine.tokenizer.encode("a b")
    text = client.completions.create(prompt="a b", **options).choices[0].text
    assert client.completions.create(prompt=ids, **options).choices[0].text == text
    answer = client.completions.create(prompt=[ids, ids[:1]], **options)
    assert answer.choices[0].text == text


def test_log_probabilities_of_completions(client, app, name):
    answer = client.completions.create(
        model=name, prompt="a b", max_tokens=8, temperature=0, logprobs=2
    )
    given = answer.choices[0].logprobs
    _, expected, _ = serving.greedy(app, app.engine.tokenizer.encode("a b"), 8)
    n = len(given.tokens)
    assert 0 < n <= 8
    assert given.token_logprobs == pytest.approx(expected[:n], abs=1e-5)
    assert given.text_offset[0] == 0
    assert all(len(best) == 2 for best in given.top_logprobs)


def test_a_bias_and_penalties_change_the_text(client, app, name):
    options = dict(model=name, prompt="a b", max_tokens=10, temperature=0)
    text = client.completions.create(**options).choices[0].text
    a = app.engine.tokenizer.encode("a", add_special_tokens=False)[-1]
    biased = client.completions.create(**options, logit_bias={str(a): 100}).choices[0].text
    assert biased == app.engine.tokenizer.decode([a] * 10)
    penalised = client.completions.create(
        **options, logit_bias={str(a): 50}, presence_penalty=2, frequency_penalty=2
    )
    assert penalised.choices[0].text != text


def test_mistakes_are_the_clients_exceptions(client, name):
    create = client.chat.completions.create
    for error, options in [
        (openai.NotFoundError, dict(model="gpt-4o", messages=TALK)),
        (openai.BadRequestError, dict(model=name, messages=[])),
        (openai.BadRequestError, dict(model=name, messages=TALK, max_tokens=0)),
        (openai.BadRequestError, dict(model=name, messages=TALK, temperature=-1)),
        (openai.BadRequestError, dict(model=name, messages=TALK, n=99)),
        (openai.BadRequestError, dict(model=name, messages=TALK, stop=[""])),
        (openai.BadRequestError, dict(model=name, messages=TALK, logit_bias={"9999": 1})),
        (openai.BadRequestError, dict(model=name, messages=TALK, top_logprobs=2)),
        (openai.BadRequestError, dict(model=name, messages=[{"role": "cat", "content": "a"}])),
        (openai.BadRequestError, dict(model=name, messages=TALK, tools=[{"type": "function"}])),
    ]:
        with pytest.raises(error) as caught:
            create(**options)
        body = caught.value.body
        assert body["type"] == "invalid_request_error"
        assert body["message"] and "\n" not in body["message"]
    assert create(model=name, messages=TALK, max_tokens=1).choices


def test_probabilities_are_probabilities(client, name):
    answer = client.chat.completions.create(
        model=name, messages=TALK, max_tokens=1, logprobs=True, top_logprobs=20
    )
    total = sum(math.exp(t.logprob) for t in answer.choices[0].logprobs.content[0].top_logprobs)
    assert 0.05 < total <= 1
