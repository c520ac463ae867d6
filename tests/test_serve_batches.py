"""Many at once: each gets what it would get alone, and who leaves makes room."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

import serving

CLOSE = 1e-4
"""Two logits this near may change places when a batch adds in another order (float32)."""


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    model = tmp_path_factory.mktemp("model")
    serving.write_model(model)
    with serving.running(model, tmp_path_factory.mktemp("sessions")) as (server, app):
        yield server, app


def prompts(count, longest, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices("abth en.", k=rng.randint(1, longest))) for _ in range(count)]


def first_difference(text, app, prompt, n):
    """The step after which a text leaves what the model writes alone, and whether it may."""
    ids, _, margins = serving.greedy(app, app.engine.tokenizer.encode(prompt), n)

    def decode(ids):
        return app.engine.tokenizer.decode(ids, skip_special_tokens=True)

    expected = decode(ids)
    if text == expected:
        return None
    same = sum(text.startswith(decode(ids[: i + 1])) for i in range(len(ids)))
    return same, min(margins[: same + 1]) < CLOSE


def test_64_streams_give_what_each_gives_alone(running):
    server, app = running
    most = 0

    def write(prompt):
        nonlocal most
        text = ""
        for event in serving.stream(server, {"prompt": prompt, "max_tokens": 24, "temperature": 0}):
            text += event["choices"][0]["text"]
            most = max(most, app.engine.active)
        return text

    asked = prompts(64, 70)
    assert len({len(prompt) for prompt in asked}) > 30
    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(write, asked))
    differences = [
        first_difference(text, app, prompt, 24) for text, prompt in zip(texts, asked, strict=True)
    ]
    assert [d for d in differences if d is not None and not d[1]] == []
    assert sum(d is not None for d in differences) <= 3
    assert most > 32


def test_who_leaves_makes_room_and_disturbs_nobody(running):
    server, app = running
    options = {"max_tokens": 300, "temperature": 0}

    def leave(prompt):
        events = serving.stream(server, {"prompt": prompt, **options})
        next(events)
        events.close()

    def stay(prompt):
        events = serving.stream(server, {"prompt": prompt, **options, "max_tokens": 40})
        return "".join(event["choices"][0]["text"] for event in events)

    asked = prompts(24, 30, seed=1)
    with ThreadPoolExecutor(24) as pool:
        left = [pool.submit(leave, prompt) for prompt in asked[::2]]
        stayed = [pool.submit(stay, prompt) for prompt in asked[1::2]]
        for future in left:
            future.result()
        texts = [future.result() for future in stayed]
    for prompt, text in zip(asked[1::2], texts, strict=True):
        difference = first_difference(text, app, prompt, 40)
        assert difference is None or difference[1]
    assert serving.wait_until(lambda: app.engine.active == 0 and app.slots.taken == 0)


def test_one_too_many_is_told_to_wait(tmp_path):
    serving.write_model(tmp_path / "model")
    flags = ["--max-requests", "2", "--request-timeout", "60"]
    with serving.running(tmp_path / "model", tmp_path, *flags) as (server, app):
        body = {"prompt": "ab", "max_tokens": 20000, "temperature": 0}
        first, second = serving.stream(server, body), serving.stream(server, body)
        next(first), next(second)
        data = serving.request("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})
        refused = serving.exchange(server, data)
        assert refused.startswith(b"HTTP/1.1 429 ")
        assert b"Retry-After: 1\r\n" in refused
        assert b'"type": "rate_limit_error"' in refused
        first.close()
        assert serving.wait_until(lambda: app.slots.taken == 1)
        assert serving.ask(server, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})
        second.close()


def test_an_answer_that_takes_too_long_is_ended(tmp_path):
    serving.write_model(tmp_path / "model")
    flags = ["--request-timeout", "0.3"]
    with serving.running(tmp_path / "model", tmp_path, *flags) as (server, app):
        body = {"prompt": "ab", "max_tokens": 20000, "temperature": 0}
        status, content = serving.ask(server, "POST", "/v1/completions", body)
        assert (status, content["error"]["type"]) == (504, "server_error")
        *_, last = serving.stream(server, body)
        assert last["error"]["message"] == "the answer took more than 0.3 seconds."
        assert serving.wait_until(lambda: app.engine.active == 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_model_ends_everything_and_leaves_nobody_waiting(tmp_path, monkeypatch):
    serving.write_model(tmp_path / "model")
    with serving.running(tmp_path / "model", tmp_path) as (server, app):
        events = serving.stream(server, {"prompt": "ab", "max_tokens": 20000, "temperature": 0})
        next(events)
        monkeypatch.setattr(type(app.engine.model), "__call__", lambda *_, **__: 1 / 0)
        *_, last = events
        assert last["error"]["type"] == "server_error"
        assert serving.wait_until(lambda: not app.engine.alive)
        assert serving.ask(server, "GET", "/health")[0] == 503
        status, answer = serving.ask(server, "POST", "/v1/completions", {"prompt": "a"})
        assert (status, answer["error"]["type"]) == (503, "server_error")
        assert serving.ask(server, "POST", "/v1/sessions/state", b"x")[0] == 503
        assert serving.wait_until(lambda: app.slots.taken == 0)
