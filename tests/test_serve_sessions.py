"""What was read once is not read again, and sessions bring back what they remember."""

import json

import mlx.core as mx
import pytest

import serving
import tiny
from mlx_mcsd.conversation import render
from mlx_mcsd.model import Model
from mlx_mcsd.server.prefixes import Entry, Prefixes
from mlx_mcsd.state import Snapshot, State

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    model = tmp_path_factory.mktemp("model")
    serving.write_model(model)
    return model


@pytest.fixture
def running(directory, tmp_path):
    with serving.running(directory, tmp_path) as pair:
        yield pair


@pytest.fixture
def read(monkeypatch):
    """Counts the tokens that models read, one row at a time: call it for the count since."""
    count = 0
    call = Model.__call__

    def counted(self, inputs, *args, **kwargs):
        nonlocal count
        count += inputs.size
        return call(self, inputs, *args, **kwargs)

    def since():
        nonlocal count
        found, count = count, 0
        return found

    monkeypatch.setattr(Model, "__call__", counted)
    return since


def chat(server, messages, **options):
    """(text, usage, ids) of a greedy reply."""
    options = {"max_tokens": 8, "temperature": 0, "logprobs": True} | options
    status, answer = serving.ask(server, "POST", CHAT, {"messages": messages, **options})
    assert status == 200, answer
    choice = answer["choices"][0]
    return choice["message"]["content"], answer["usage"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def ids(app, text, first=False):
    return app.engine.tokenizer.encode(text, add_special_tokens=first)


def written(app, ids, n=8):
    """The text that the model writes alone after these ids, and its ids."""
    found, _, _ = serving.greedy(app, ids, n)
    return app.engine.tokenizer.decode(found, skip_special_tokens=True), found


def test_a_second_turn_reads_only_what_is_new(running, read):
    server, app = running
    question = "the abba was an abbey " * 20
    first, usage = chat(server, [user(question)])
    prompt = ids(app, question, first=True)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert usage["prompt_tokens"] == len(prompt)
    assert read() == len(prompt) + 8  # the prompt, then each token that was written
    expected, reply = written(app, prompt)
    assert first == expected
    read()

    second, usage = chat(server, [user(question), assistant(first), user("then he")])
    new = ids(app, "\nthen he")
    # The reply's last token was never read: the text had its length before.
    assert read() == 1 + len(new) + 8
    assert usage["prompt_tokens"] == len(prompt) + len(reply) + len(new)
    assert usage["prompt_tokens_details"] == {"cached_tokens": len(prompt) + len(reply) - 1}
    assert second == written(app, prompt + reply + new)[0]


def test_the_same_request_reads_one_token(running, read):
    server, _ = running
    talk = [user("the abba "), assistant("was"), user("an abbey")]
    first, _ = chat(server, talk)
    read()
    again, usage = chat(server, talk)
    assert again == first
    assert read() == 1 + 8
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_an_edited_message_reads_from_before_it(running, read):
    server, app = running
    begun = [user("the abba " * 9), assistant("was")]
    chat(server, [*begun, user("an abbey")])
    read()
    edited, _ = chat(server, [*begun, user("then")])
    assert read() == len(ids(app, "\nthen")) + 8
    text = render(app.engine.tokenizer, [("user", "the abba " * 9), ("assistant", "was")])
    assert edited == written(app, ids(app, text, first=True) + ids(app, "\nthen"))[0]


def test_a_system_message_is_read_once_for_all(running, read):
    server, app = running
    system = {"role": "system", "content": "be an abbey " * 20}
    chat(server, [system, user("the")])
    read()
    chat(server, [system, user("an")])
    assert read() == len(ids(app, "\nan")) + 8


TEMPLATE = (
    "<s>{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize("ending", ["length", "stop", "token"])
def test_with_a_chat_template_too_only_what_is_new_is_read(tmp_path, read, ending):
    serving.write_model(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    with serving.running(tmp_path / "model", tmp_path) as (server, app):
        question = "the abba was an abbey " * 9
        prompt = ids(app, f"<s>[user] {question.strip()}</s>\n[assistant] ")
        whole, found = written(app, prompt, 12)
        options = {"max_tokens": len(found)}
        if ending == "stop":
            options = {"max_tokens": 12, "stop": whole[5:7]}
        if ending == "token":
            (end,) = app.engine.tokenizer.eos_token_ids
            options = {"max_tokens": 12, "logit_bias": {str(end): 100}}
        first, usage = chat(server, [user(question)], **options)
        assert usage["prompt_tokens"] == len(prompt)
        reply = ids(app, first)
        read()
        second, usage = chat(server, [user(question), assistant(first), user("then")])
        new = ids(app, "</s>\n[user] then</s>\n[assistant] ")
        assert read() <= len(new) + 1 + 8
        assert usage["prompt_tokens_details"]["cached_tokens"] >= len(prompt) + len(reply) - 1
        assert second == written(app, prompt + reply + new)[0]


def test_other_texts_share_nothing(running, read):
    server, app = running
    chat(server, [user("the abba")])
    read()
    _, usage = chat(server, [user("the abb")])
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert read() == len(ids(app, "the abb", first=True)) + 8


def test_several_texts_read_their_prompt_once(running, read):
    server, app = running
    prompt = "the abba was an abbey " * 9
    chat(server, [user(prompt)], n=4)
    assert read() == len(ids(app, prompt, first=True)) + 3 + 4 * 8


@pytest.mark.parametrize("cut", range(2, 6))
def test_after_a_stop_string_the_state_is_of_the_text_before_it(running, cut):
    server, app = running
    prompt = ids(app, "the abba", first=True)
    whole, found = written(app, prompt, 20)
    stop = whole[cut : cut + 3]
    first, _ = chat(server, [user("the abba")], max_tokens=20, stop=stop)
    assert first == whole[: whole.index(stop)]
    second, usage = chat(server, [user("the abba"), assistant(first), user("then")])
    reply = ids(app, first)
    assert reply == found[: len(reply)]  # or reading it anew would be no comparison
    assert second == written(app, prompt + reply + ids(app, "\nthen"))[0]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= len(prompt)


def test_the_token_that_ends_a_reply_is_not_remembered(running, read):
    server, app = running
    (end,) = app.engine.tokenizer.eos_token_ids
    first, usage = chat(server, [user("the")], logit_bias={str(end): 100})
    assert (first, usage["completion_tokens"]) == ("", 1)
    first, _ = chat(server, [user("the")], max_tokens=4)
    read()
    second, _ = chat(server, [user("the"), assistant(""), user("an")])
    assert second == written(app, ids(app, "the", first=True) + ids(app, "\nan"))[0]


def test_the_states_kept_stay_within_their_budget(directory, tmp_path, read):
    one = 2 * 4 * (2 * 24 + 1)
    flags = ["--prompt-cache-bytes", str(3 * one + 5)]
    with serving.running(directory, tmp_path, *flags) as (server, app):
        first, _ = chat(server, [user("the abba")])  # its prompt and its reply
        for text in ("an", "abbey"):
            chat(server, [user(text)])
            assert len(app.engine.prefixes) <= 3
            assert app.engine.prefixes.nbytes == one * len(app.engine.prefixes)
        read()
        _, usage = chat(server, [user("the abba"), assistant(first), user("an")])
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    with serving.running(directory, tmp_path, "--prompt-cache-bytes", "0") as (server, app):
        again, _ = chat(server, [user("the abba")], n=2)
        assert again == first
        assert (len(app.engine.prefixes), app.engine.prefixes.nbytes) == (0, 0)


def test_the_state_used_last_is_dropped_last():
    arrays = ((mx.zeros((1, 5)),),)
    entry = Entry(Snapshot(arrays, 0, "", (), ()))
    prefixes = Prefixes(2 * entry.nbytes)
    prefixes.add(b"a", entry)
    prefixes.add(b"b", entry)
    assert prefixes.get(b"a") is entry
    prefixes.add(b"c", entry)
    assert [prefixes.get(name) is entry for name in (b"a", b"b", b"c")] == [True, False, True]
    prefixes.add(b"c", entry)
    assert (len(prefixes), prefixes.nbytes) == (2, 2 * 20)


def test_a_text_that_was_read_to_its_end_can_be_asked_for_whole(running):
    server, app = running
    prompt = ids(app, "the abba", first=True)
    whole, found = written(app, prompt, 20)
    first, _ = chat(server, [user("the abba")], max_tokens=20, stop=whole[4:7])
    reply = ids(app, first)
    assert reply == found[: len(reply)]
    again, _ = chat(server, [user("the abba" + first)])
    assert again == written(app, prompt + reply)[0]


def test_a_token_that_ends_a_text_is_no_part_of_it_even_if_it_spells_something(tmp_path):
    end = len(tiny.SPECIAL) + serving.LETTERS.index(".")
    serving.write_model(tmp_path / "model", eos_token_id=end)
    with serving.running(tmp_path / "model", tmp_path) as (server, _):
        first, usage = chat(server, [user("the")], logit_bias={str(end): 100})
    assert (first, usage["completion_tokens"]) == ("", 1)


def test_sessions_are_made_changed_listed_and_deleted(running):
    server, _ = running

    def ask(method, path="", body=None):
        return serving.ask(server, method, f"/v1/sessions{path}", body)

    assert ask("GET") == (200, {"object": "list", "data": []})
    status, made = ask("POST", body={"title": "Abbey", "messages": [user("the <b>&amp;")]})
    assert status == 201
    path = f"/{made['id']}"
    assert ask("GET", path) == (200, made)
    assert (made["title"], made["messages"]) == ("Abbey", [user("the <b>&amp;")])
    status, changed = ask("POST", path, {"messages": [user("an")]})
    assert (status, changed["title"], changed["messages"]) == (200, "Abbey", [user("an")])
    assert [(s["id"], s["messages"]) for s in ask("GET")[1]["data"]] == [(made["id"], 1)]
    assert ask("DELETE", path)[1]["deleted"] is True
    assert ask("GET", path)[0] == ask("DELETE", path)[0] == ask("POST", path, {})[0] == 404
    assert ask("GET", path + "/state")[0] == 404
    assert ask("GET")[1]["data"] == []


@pytest.mark.parametrize("name", ["../etc/passwd", "%2e%2e", "0" * 15, "A" * 16, "0" * 17])
def test_a_session_has_no_other_names(running, name):
    assert serving.ask(running[0], "GET", f"/v1/sessions/{name}")[0] == 404


def download(server, name):
    data = serving.request("GET", f"/v1/sessions/{name}/state")
    head, _, body = serving.exchange(server, data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    return body


def test_a_downloaded_state_is_the_conversations(running, tmp_path):
    server, app = running
    messages = [user("the abba "), assistant("was an"), user("abbey")]
    _, session = serving.ask(server, "POST", "/v1/sessions", {"messages": messages})
    (tmp_path / "it.state").write_bytes(download(server, session["id"]))

    def check():
        state = State.load(tmp_path / "it.state", app.engine.model)
        text = ids(app, "the abba was an", first=True) + ids(app, "\nabbey")
        expected = State(app.engine.model)
        expected.read(text)
        assert (state.tokens_seen, state.hash) == (expected.tokens_seen, expected.hash)
        assert state.pending == expected.pending
        for ours, theirs in zip(state.cache, expected.cache, strict=True):
            for a, b in zip(ours.cache, theirs.cache, strict=True):
                assert mx.allclose(a, b, rtol=0, atol=1e-5 * max(1.0, mx.abs(b).max().item()))

    app.engine.call(check)


def test_an_uploaded_state_goes_before_every_message(running, read):
    server, app = running
    _, session = serving.ask(server, "POST", "/v1/sessions", {"messages": [user("the abba")]})
    data = download(server, session["id"])
    status, made = serving.ask(server, "POST", "/v1/sessions/state?title=A%20book", data)
    before = ids(app, "the abba", first=True)
    assert (status, made["title"], made["base_tokens"]) == (201, "A book", len(before))
    read()
    text, usage = chat(server, [user(" was")], session=made["id"])
    new = ids(app, " was")
    assert read() == 1 + len(new) + 8  # one was pending in the state
    assert text == written(app, before + new)[0]
    assert usage["prompt_tokens"] == len(new)

    _, fork = serving.ask(server, "POST", "/v1/sessions", {"base": made["id"]})
    assert fork["base_tokens"] == len(before)
    serving.ask(server, "DELETE", f"/v1/sessions/{made['id']}")
    assert chat(server, [user(" was")], session=fork["id"])[0] == text


def test_only_states_of_this_model_are_taken(running, tmp_path):
    server, _ = running
    _, session = serving.ask(server, "POST", "/v1/sessions", {"messages": [user("the abba")]})
    data = download(server, session["id"])
    serving.write_model(tmp_path / "other", seed=4)
    with serving.running(tmp_path / "other", tmp_path / "elsewhere") as (other, _):
        status, answer = serving.ask(other, "POST", "/v1/sessions/state", data)
    assert (status, answer["error"]["code"]) == (400, "invalid_state")
    edited = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    for wrong in (b"PK\x03\x04", data[:-1], edited, b"\x80\x04\x95", data + b"x", b"x"):
        status, answer = serving.ask(server, "POST", "/v1/sessions/state", wrong)
        assert (status, answer["error"]["code"]) == (400, "invalid_state"), wrong[:20]
    assert len(serving.ask(server, "GET", "/v1/sessions")[1]["data"]) == 1


def test_a_session_remembers_over_a_restart(directory, tmp_path, read):
    with serving.running(directory, tmp_path) as (server, app):
        first, _ = chat(server, [user("the abba " * 20)])
        talk = [user("the abba " * 20), assistant(first)]
        _, session = serving.ask(server, "POST", "/v1/sessions", {})
        serving.ask(server, "POST", f"/v1/sessions/{session['id']}", {"messages": talk})
        expected, _ = chat(server, [*talk, user("an")])
        new = len(ids(app, "\nan"))
    read()
    with serving.running(directory, tmp_path) as (server, app):
        again, _ = chat(server, [*talk, user("an")], session=session["id"])
        assert again == expected
        assert read() == 1 + new + 8


def test_after_a_crash_between_its_files_a_session_believes_its_messages(directory, tmp_path):
    with serving.running(directory, tmp_path) as (server, app):
        _, session = serving.ask(server, "POST", "/v1/sessions", {})
        states = []
        for text in ("the abba", "abbey"):
            talk = [user(text), assistant(chat(server, [user(text)])[0])]
            serving.ask(server, "POST", f"/v1/sessions/{session['id']}", {"messages": talk})
            (file,) = tmp_path.glob("*/*.state")
            states.append(file.read_bytes())
    assert states[0] != states[1]
    file.write_bytes(states[0])
    with serving.running(directory, tmp_path) as (server, app):
        text, usage = chat(server, [*talk, user("an")], session=session["id"])
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
        before = ids(app, "abbey" + talk[1]["content"], first=True)
        assert text == written(app, before + ids(app, "\nan"))[0]


def test_a_damaged_session_is_left_out(running, tmp_path):
    server, _ = running
    _, one = serving.ask(server, "POST", "/v1/sessions", {"title": "whole"})
    (file,) = tmp_path.glob("*/*.json")
    for i, text in enumerate(["{", "[]", '{"messages": [1]}', '{"title": 5}']):
        file.with_name(f"{i:016x}.json").write_text(text)
    assert [s["id"] for s in serving.ask(server, "GET", "/v1/sessions")[1]["data"]] == [one["id"]]
    assert serving.ask(server, "GET", f"/v1/sessions/{0:016x}")[0] >= 400


def test_every_conversation_begins_with_the_servers_state(directory, tmp_path, read):
    with serving.running(directory, tmp_path) as (server, app):
        _, session = serving.ask(server, "POST", "/v1/sessions", {"messages": [user("the abba")]})
        (tmp_path / "book.state").write_bytes(download(server, session["id"]))
        before = ids(app, "the abba", first=True)
    flags = ["--state", str(tmp_path / "book.state")]
    with serving.running(directory, tmp_path, *flags) as (server, app):
        read()
        text, usage = chat(server, [user(" was")])
        new = ids(app, " was")
        assert read() == 1 + len(new) + 8
        assert usage["prompt_tokens"] == len(new)
        assert text == written(app, before + new)[0]
        body = {"prompt": " was", "max_tokens": 8, "temperature": 0}
        _, answer = serving.ask(server, "POST", "/v1/completions", body)
        assert answer["choices"][0]["text"] == text


def test_what_the_disk_refuses_is_told(running, tmp_path, caplog):
    server, app = running
    app.sessions.directory.write_text("a file where the folder should be")
    assert serving.ask(server, "GET", "/v1/sessions")[0] == 200
    status, answer = serving.ask(server, "POST", "/v1/sessions", {"title": "a"})
    assert (status, answer["error"]["type"]) == (507, "server_error")
    assert str(tmp_path) not in answer["error"]["message"]
    app.sessions.directory.unlink()

    _, session = serving.ask(server, "POST", "/v1/sessions", {"messages": [user("ab")]})
    file = app.sessions.directory / f"{session['id']}.state"
    file.mkdir()
    path = f"/v1/sessions/{session['id']}"
    assert chat(server, [user("ab")])
    download(server, session["id"])
    status, answer = serving.ask(server, "POST", path, {"title": "b"})
    assert (status, answer["error"]["type"]) == (507, "server_error")
    assert serving.ask(server, "DELETE", path)[0] == 507
    assert f"{file}" in caplog.text
    assert "Traceback" not in caplog.text
