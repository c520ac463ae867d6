"""Whatever a client sends, it gets an answer in OpenAI's form, and the next one is served."""

import json
import logging
import re
import socket
import time
from contextlib import suppress

import pytest

import serving
from mlx_mcsd.server.http import Policy

CHAT = "/v1/chat/completions"
GOOD = {"prompt": "ab", "max_tokens": 2, "temperature": 0}
HOST = b"Host: localhost\r\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    serving.write_model(directory)
    return directory


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serving.running(model, tmp_path_factory.mktemp("sessions")) as (server, _):
        yield server


@pytest.fixture(autouse=True)
def no_mistakes_of_the_servers(caplog):
    yield
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []


def still_good(server):
    status, answer = serving.ask(server, "POST", "/v1/completions", GOOD)
    return status == 200 and len(answer["choices"]) == 1


def status(answer):
    return int(answer.split(b" ", 2)[1])


def check_error(answer):
    """The body of an error: one line in OpenAI's form, and no trace of code."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Type: application/json\r\n" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    assert b"Traceback" not in answer and b".py" not in body
    return error


POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST
ODD = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    "no version": (b"GET /health\r\n\r\n", 505),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\n", 505),
    "version in words": (b"GET / HTTP/one\r\n\r\n", 400),
    "four words": (b"GET / / HTTP/1.1\r\n\r\n", 400),
    "no path": (b"GET health HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "absolute": (b"GET http://evil.example/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "path no ASCII": ("GET /é HTTP/1.1\r\n".encode() + HOST + b"\r\n", 400),
    "long path": (b"GET /" + b"a" * 40000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    "long header": (b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"a" * 70000 + b"\r\n\r\n", 431),
    "many headers": (b"GET / HTTP/1.1\r\n" + HOST + b"A: a\r\n" * 200 + b"\r\n", 431),
    "header without colon": (b"GET / HTTP/1.1\r\n" + HOST + b"Header\r\nA: a\r\n\r\n", 400),
    "space before colon": (b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length : 3\r\n\r\n", 400),
    "folded header": (b"GET / HTTP/1.1\r\n" + HOST + b"A: a\r\n b\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 403),
    "another host": (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
    "another host, our port": (b"GET / HTTP/1.1\r\nHost: evil.example:8080\r\n\r\n", 403),
    "host like ours": (b"GET / HTTP/1.1\r\nHost: localhost.evil.example\r\n\r\n", 403),
    "another origin": (b"GET / HTTP/1.1\r\n" + HOST + b"Origin: http://evil.example\r\n\r\n", 403),
    "no origin": (b"GET / HTTP/1.1\r\n" + HOST + b"Origin: null\r\n\r\n", 403),
    "nowhere": (b"GET /v2 HTTP/1.1\r\n" + HOST + b"\r\n", 404),
    "upwards": (b"GET /../../etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n", 404),
    "wrong method": (b"DELETE /v1/models HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "no such method": (b"FROB /v1/models HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "no length": (POST + b"\r\n{}", 411),
    "chunked": (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
    "two framings": (
        POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        411,
    ),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 9\r\n\r\n{}", 400),
    "negative length": (POST + b"Content-Length: -2\r\n\r\n{}", 400),
    "length with a sign": (POST + b"Content-Length: +2\r\n\r\n{}", 400),
    "length no number": (POST + b"Content-Length: two\r\n\r\n{}", 400),
    "length of other digits": (POST + "Content-Length: ²\r\n\r\n{}".encode(), 400),
    "list of lengths": (POST + b"Content-Length: 2, 2\r\n\r\n{}", 400),
    "huge body": (POST + b"Content-Length: 99999999999\r\n\r\n{}", 413),
    "longer number": (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}", 400),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_http_is_refused(server, name):
    data, expected = ODD[name]
    answer = serving.exchange(server, data, then_close=True)
    assert status(answer) == expected, answer
    if data.startswith(b"DELETE"):
        assert b"\r\nAllow: GET\r\n" in answer
    check_error(answer)
    assert still_good(server)


def test_an_empty_connection_is_just_closed(server):
    for data in (b"", b"\r\n", b"\r\n\r\n", b"GET /he"):
        answer = serving.exchange(server, data, then_close=True)
        assert answer == b""
    assert still_good(server)


BODIES = {
    "nothing": b"",
    "no JSON": b"{prompt: 1}",
    "half": b'{"prompt": "a"',
    "more": b'{"prompt": "a"} {}',
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "surrogate name": b'{"prompt": "a", "\\udfff": 1}',
    "list": b"[]",
    "number": b"5",
    "null": b"null",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "infinite exponent": b'{"prompt": "a", "temperature": 1e999}',
    "giant integer": b'{"prompt": "a", "seed": ' + b"9" * 10000 + b"}",
    "large integer": b'{"prompt": "a", "max_tokens": ' + b"9" * 400 + b"}",
    "deep list": b'{"prompt": ' + b"[" * 100000 + b"}",
    "deep object": b'{"prompt": "a", "x": ' + b'{"a":' * 50000 + b"1" + b"}" * 50001,
}


@pytest.mark.parametrize("name", BODIES)
def test_odd_bodies_are_refused(server, name):
    answer = serving.exchange(server, serving.request("POST", "/v1/completions", BODIES[name]))
    assert status(answer) == 400
    assert check_error(answer)["type"] == "invalid_request_error"


FIELDS = {
    "prompt": [None, "", [], [[]], [1.5], [-1], [2**31], [True], {}, 5, ["a", 1], [["a"]], [""]],
    "max_tokens": [0, -1, 1.0, "5", True, 10**9, [1]],
    "temperature": [-0.1, 2.1, "1", True, [], 10**400],
    "top_p": [0, 1.01, "x", -1],
    "min_p": [-0.1, 1.1],
    "top_k": [-1, 1.5, "1"],
    "n": [0, 17, "2", 1.5, True],
    "best_of": [2],
    "seed": ["1", 1.5, 2**64, -(2**63) - 1, True],
    "stop": [5, [""], ["a"] * 5, [None], {"a": 1}, "", "x" * 1001],
    "stream": ["yes", 1],
    "stream_options": ["x", [1]],
    "logprobs": [6, -1, True],
    "logit_bias": [[], {"a": 1}, {"1": "x"}, {"1": 101}, {"9999": 1}, {"-1": 1}, {"²": 1}],
    "presence_penalty": [2.1, "x"],
    "frequency_penalty": [-2.1],
    "repetition_penalty": [-1],
    "suffix": ["x"],
    "echo": [True],
    "session": [5, "x" * 65, "none", "0" * 16],
    "model": ["gpt-4o", 5, ["a"]],
    "response_format": [{"type": "json_object"}],
}


@pytest.mark.parametrize("field", FIELDS)
def test_odd_fields_are_named(server, field):
    for value in FIELDS[field]:
        code, answer = serving.ask(server, "POST", "/v1/completions", GOOD | {field: value})
        assert code in (400, 404), (value, answer)
        assert answer["error"]["param"] == field or field == "session", (value, answer)


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        {},
        "a",
        [None],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "tool", "content": "a"}],
        [{"role": ["user"], "content": "a"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": ["a"]}],
        [{"role": "assistant", "content": "a", "tool_calls": [{}]}],
    ],
)
def test_odd_messages_are_refused(server, messages):
    code, answer = serving.ask(server, "POST", CHAT, {"messages": messages})
    assert (code, answer["error"]["param"]) == (400, "messages")


def test_text_in_parts_is_joined(server):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    options = {"max_tokens": 5, "temperature": 0}
    answers = [
        serving.ask(server, "POST", CHAT, {"messages": [{"role": "user", "content": c}], **options})
        for c in (parts, "ab")
    ]
    assert answers[0][1]["choices"] == answers[1][1]["choices"]


def test_a_connection_serves_request_after_request(server):
    data = serving.request("GET", "/health", Connection="keep-alive")
    bad = serving.request("POST", "/v1/completions", b"{", Connection="keep-alive")
    with socket.create_connection(server.server_address[:2], timeout=10) as connection:
        connection.sendall(data + bad + data)  # all at once, too
        received = b""
        while received.count(b"HTTP/1.1 ") < 3 or not received.endswith(b"}"):
            received += connection.recv(65536)
        assert re.findall(rb"HTTP/1.1 (\d+) ", received) == [b"200", b"400", b"200"]


def test_head_and_options(server):
    head = serving.exchange(server, serving.request("HEAD", "/"))
    assert (status(head), head.partition(b"\r\n\r\n")[2]) == (200, b"")
    options = serving.exchange(server, serving.request("OPTIONS", "/v1/sessions"))
    assert status(options) == 204
    assert b"\r\nAllow: GET, POST\r\n" in options
    assert b"Access-Control" not in options


def test_the_page_may_run_only_its_own_code(server):
    answer = serving.exchange(server, serving.request("GET", "/"))
    head, _, body = answer.partition(b"\r\n\r\n")
    (policy,) = [line for line in head.split(b"\r\n") if b"Content-Security-Policy" in line]
    assert b"default-src 'none'" in policy and b"'sha256-" in policy
    assert b"unsafe" not in policy and b"http" not in policy
    for header in (b"X-Frame-Options: DENY", b"X-Content-Type-Options: nosniff"):
        assert header in head
    assert b"innerHTML" not in body and b"eval(" not in body


def test_other_origins_are_let_in_by_name(model, tmp_path):
    with serving.running(model, tmp_path, "--allowed-origins", "https://a.example") as (server, _):
        data = serving.request("OPTIONS", CHAT, Origin="https://a.example")
        answer = serving.exchange(server, data)
        assert status(answer) == 204
        assert b"\r\nAccess-Control-Allow-Origin: https://a.example\r\n" in answer
        assert b"\r\nVary: Origin\r\n" in answer
        data = serving.request("OPTIONS", CHAT, Origin="https://b.example")
        answer = serving.exchange(server, data)
        assert (status(answer), b"Access-Control" in answer) == (403, False)


def test_names_are_let_in_by_flag(model, tmp_path):
    with serving.running(model, tmp_path, "--allowed-hosts", "mac.local") as (server, _):
        for host, expected in [
            ("mac.local", 200),
            ("MAC.local:8080", 200),
            ("127.0.0.1:1", 200),
            ("[::1]:5", 200),
            ("localhost", 200),
            ("mac.local.evil.example", 403),
            ("1.2.3.4.evil.example", 403),
        ]:
            assert serving.ask(server, "GET", "/health", Host=host)[0] == expected, host


def test_a_key_is_asked_of_everything_but_the_page(model, tmp_path):
    with serving.running(model, tmp_path, "--api-key", "s3cret") as (server, _):
        assert serving.ask(server, "GET", "/health")[0] == 200
        assert status(serving.exchange(server, serving.request("GET", "/"))) == 200
        for key in (None, "", "Bearer", "Bearer ", "Bearer s3cre", "s3cret", "Bearer é"):
            headers = {} if key is None else {"Authorization": key}
            for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("GET", "/v1/sessions")):
                body = {} if method == "POST" else None
                data = serving.request(method, path, body, **headers)
                answer = serving.exchange(server, data)
                assert status(answer) == 401
                assert check_error(answer)["code"] == "invalid_api_key"
                assert b"s3cret" not in answer
        assert serving.ask(server, "GET", "/v1/models", Authorization="Bearer s3cret")[0] == 200


@pytest.fixture
def hasty(model, tmp_path):
    """A server that waits for nobody."""
    with serving.running(model, tmp_path) as (server, app):
        server.policy = Policy(header_timeout=0.3, body_timeout=0.3, write_timeout=0.3)
        yield server, app


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: ",
        POST + b"Content-Length: 100\r\n\r\n{",
    ],
    ids=["headers", "body"],
)
def test_who_sends_drop_by_drop_is_cut_off(hasty, data):
    server, _ = hasty
    begun = time.monotonic()
    with socket.create_connection(server.server_address[:2], timeout=5) as connection:
        connection.sendall(data)
        received = b""
        try:
            while b"\r\n\r\n" not in received:
                connection.sendall(b"a")
                connection.settimeout(0.05)
                with suppress(TimeoutError):
                    received += connection.recv(4096)
                assert time.monotonic() - begun < 4
        except ConnectionError:
            pass
    assert status(received) == 408
    assert still_good(server)


def test_who_does_not_take_the_answer_is_left(hasty):
    server, app = hasty
    body = json.dumps(GOOD | {"max_tokens": 30000, "stream": True, "n": 8}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.server_address[:2])
        connection.sendall(serving.request("POST", "/v1/completions", body))
        assert serving.wait_until(lambda: app.engine.active == 8)
        assert serving.wait_until(lambda: app.engine.active == 0, 30)
    assert serving.wait_until(lambda: app.slots.taken == 0)
    assert still_good(server)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_ends_the_writing(server, stream):
    app = server.RequestHandlerClass.app
    body = GOOD | {"max_tokens": 30000, "stream": stream}
    for _ in range(3):
        with socket.create_connection(server.server_address[:2]) as connection:
            connection.sendall(serving.request("POST", "/v1/completions", body))
            assert serving.wait_until(lambda: app.engine.active > 0)
        assert serving.wait_until(lambda: app.engine.active == 0 and app.slots.taken == 0)
