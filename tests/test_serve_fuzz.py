"""Malformed requests by the hundred: none is a mistake of the server's, and none leaves anything.

More of them: `MLX_MCSD_FUZZ=5000 python -m pytest tests/test_serve_fuzz.py`.
"""

import json
import os
import random
import socket

import serving
from test_serve_http import (  # noqa: F401 (fixtures)
    CHAT,
    FIELDS,
    GOOD,
    check_error,
    model,
    no_mistakes_of_the_servers,
    server,
    status,
    still_good,
)

FUZZ = int(os.environ.get("MLX_MCSD_FUZZ", "600"))


def mutated(rng):
    """A request with something wrong in it, most of the time."""
    body = bytearray(json.dumps(GOOD | {"stream": rng.random() < 0.5}).encode())
    path = rng.choice(["/v1/completions", CHAT, "/v1/sessions", "/v1/sessions/state", "/v1/models"])
    kind = rng.randrange(6)
    if kind == 0:  # another byte here and there
        for _ in range(rng.randint(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
    elif kind == 1:
        body = body[: rng.randrange(len(body))]
    elif kind == 2:
        body = rng.randbytes(rng.randrange(200))
    elif kind == 3:
        value = rng.choice([None, -1, 1e308, [], {}, "x", [[1]], True, "\u0000", 2**70, ""])
        content = GOOD | {rng.choice(list(FIELDS)): value}
        if path == CHAT:
            content["messages"] = [{"role": "user", "content": value}]
        body = json.dumps(content).encode()
    data = bytearray(serving.request(rng.choice(["POST", "POST", "GET", "PUT"]), path, bytes(body)))
    if kind == 4:
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 5:
        data = data[: rng.randrange(1, len(data))]
    return bytes(data)


def resident():
    """Bytes of memory this process holds; None where that cannot be told."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return None


def test_malformed_requests_leave_nothing_behind(server):  # noqa: F811 (the fixture)
    rng = random.Random(7)
    app = server.RequestHandlerClass.app
    counts, before = {}, None
    for i in range(FUZZ):
        if i == FUZZ // 5:
            before = resident()
        data = mutated(rng)
        if rng.random() < 0.1:  # and some do not wait for the answer
            with socket.create_connection(server.server_address[:2]) as connection:
                connection.sendall(data)
            continue
        answer = serving.exchange(server, data, then_close=True)
        if answer:
            counts[status(answer)] = counts.get(status(answer), 0) + 1
            assert status(answer) < 500 or status(answer) == 505, (data, answer)
            if status(answer) >= 400 and b"HEAD" not in data[:5]:
                check_error(answer)
    assert sum(counts.values()) > FUZZ // 2 and len(counts) > 3, counts
    assert serving.wait_until(lambda: app.engine.active == 0 and app.slots.taken == 0)
    assert serving.wait_until(lambda: server._free._value == server.policy.connections)
    assert still_good(server)
    if before is not None:
        assert resident() - before < 24 * 2**20
    print(FUZZ, "requests:", dict(sorted(counts.items())))
