"""A server of a tiny model, in this process, and raw connections to it."""

import json
import socket
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from threading import Thread

import mlx.core as mx
from mlx_lm.generate import generate_step
from tokenizers import Tokenizer, decoders, models, processors

import oracle
import tiny
from mlx_mcsd import serve
from mlx_mcsd.sampling import model_defaults

LETTERS = [chr(c) for c in range(32, 127)] + ["\n", "th", "he", "an", " a", " b", "ab", "é", "你"]


def write_model(directory, seed=3, **config):
    """A random model whose every token but three is text, so that what it writes can be told."""
    vocab = {piece: i for i, piece in enumerate([*tiny.SPECIAL, *LETTERS])}
    merges = [(piece[0], piece[1]) for piece in LETTERS if len(piece) == 2]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.add_special_tokens(tiny.SPECIAL)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": len(vocab)}
    config, tensors = oracle.random_checkpoint(seed, **shape | config)
    oracle.write_checkpoint(directory, config, tensors)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@contextmanager
def running(model, sessions, *flags):
    """(server, app) of a model's directory, answering on a free port."""
    parser = serve.setup_arg_parser()
    parser.set_defaults(**model_defaults(model))
    flags = ["--port", "0", "--session-dir", str(sessions), "--model", str(model), *flags]
    server, app = serve.make_server(parser.parse_args(flags), model)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server, app
    finally:
        server.shutdown()
        app.engine.close()
        server.server_close()


def address(server):
    return "http://{}:{}".format(*server.server_address[:2])


def exchange(server, data, *, timeout=10, then_close=False):
    """Send bytes on a connection of their own; everything that comes back until it closes."""
    with socket.create_connection(server.server_address[:2], timeout=timeout) as connection:
        try:
            connection.sendall(data)
            if then_close:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it was refused before it was whole
        received = b""
        try:
            while more := connection.recv(65536):
                received += more
        except ConnectionError:
            pass
        return received


def request(method, path, body=None, **headers):
    """The bytes of a request that ends its connection."""
    headers = {"Host": "localhost", "Connection": "close"} | headers
    if body is not None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Length": len(body)} | headers
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + (body or b"")


def ask(server, method, path, body=None, **headers):
    """(status, JSON) of a request."""
    answer = exchange(server, request(method, path, body, **headers))
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(content) if content else None


def wait_until(condition, seconds=10):
    """Whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def stream(server, body, path="/v1/completions"):
    """The events of a streamed answer, as they come."""
    connection = HTTPConnection(*server.server_address[:2], timeout=60)
    try:
        content = json.dumps({"stream": True, **body})
        connection.request("POST", path, content, {"Host": "localhost"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
    finally:
        connection.close()


def greedy(app, prompt, n):
    """What the model writes alone after these ids, to its end: ids, log probabilities, margins.

    A margin is how far the best token of a step is ahead of the second; the last one may be of the
    token that ends the text.
    """

    ids, chances, margins = [], [], []

    def run():
        model = app.engine.model
        steps = generate_step(
            mx.array(prompt), model, max_tokens=n, prompt_cache=model.make_cache()
        )
        for token, logprobs in steps:
            best = mx.sort(logprobs[: app.engine.known])[-2:].tolist()
            if int(token) in app.engine.tokenizer.eos_token_ids:
                margins.append(best[1] - best[0])
                break
            ids.append(int(token))
            chances.append(best[1])
            margins.append(best[1] - best[0])

    app.engine.call(run)
    return ids, chances, margins
