"""What each address answers: OpenAI's interface, sessions, the page."""

import base64
import hashlib
import json
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from queue import Empty, SimpleQueue
from threading import Lock
from urllib.parse import parse_qs, unquote

from .. import __version__
from ..state import state_bytes
from .engine import Engine, Job
from .http import Handler
from .prompts import Prompts, length
from .protocol import APIError, Call, Limits, parse_call, parse_json
from .responses import Reply, usage
from .sessions import Sessions

PAGE = files("mlx_mcsd") / "assets" / "chat.html"
INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)
KEEPALIVE = 10
"""Seconds after which a stream that has nothing to say says so."""


class Slots:
    """Places for requests at work.

    Attributes:
        taken: how many are.
    """

    def __init__(self, number: int):
        self.number, self.taken = number, 0
        self._lock = Lock()

    @contextmanager
    def one(self):
        """Take a place; 429 if there is none."""
        with self._lock:
            if self.taken >= self.number:
                raise APIError(
                    429, "too many requests at a time; try again.", headers={"Retry-After": "1"}
                )
            self.taken += 1
        try:
            yield
        finally:
            with self._lock:
                self.taken -= 1


@dataclass
class App:
    """What every request shares.

    Attributes:
        name: of the model.
        engine: reads and writes.
        prompts: finds what was read before.
        sessions: kept conversations.
        limits: of a request.
        slots: one for each request for text at a time.
        request_timeout: seconds from a request for text to its end.
        stopping: no request for text is taken any more.
    """

    name: str
    engine: Engine
    prompts: Prompts
    sessions: Sessions
    limits: Limits
    slots: Slots
    request_timeout: float
    stopping: bool = False

    def slot(self):
        """A place among the requests at work, for a `with` block."""
        if self.stopping:
            raise APIError(503, "the server is shutting down.", headers={"Retry-After": "5"})
        return self.slots.one()


def page() -> tuple[bytes, str]:
    """The chat page, and the policy that lets a browser run nothing but what it came with."""
    html = PAGE.read_bytes()
    hashes = {"script": "", "style": ""}
    for kind, text in INLINE.findall(html.decode()):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind] += f" 'sha256-{digest}'"
    return html, (
        f"default-src 'none'; script-src{hashes['script']}; style-src{hashes['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


def make_handler(app: App) -> type[Handler]:
    """The handler of this app's addresses."""
    html, policy = page()
    handler = type("AppHandler", (AppHandler,), {"app": app, "html": html, "policy": policy})
    return handler


class AppHandler(Handler):
    """Answers requests."""

    app: App
    html: bytes
    policy: str
    public = frozenset({"/", "/health"})

    def get_page(self):
        """``GET /``."""
        headers = {"Content-Security-Policy": self.policy, "X-Frame-Options": "DENY"}
        self.respond(200, self.html, headers, "text/html; charset=utf-8")

    def get_health(self):
        """``GET /health``."""
        alive = self.app.engine.alive and not self.app.stopping
        content = {"status": "ok" if alive else "unavailable", "active": self.app.engine.active}
        self.respond_json(content, 200 if alive else 503)

    def get_models(self):
        """``GET /v1/models``."""
        self.respond_json({"object": "list", "data": [self.model()]})

    def get_model(self, name: str):
        """``GET /v1/models/NAME``."""
        self.check_model(unquote(name))
        self.respond_json(self.model())

    def model(self) -> dict:
        """The model, in OpenAI's words and some of ours."""
        engine = self.app.engine
        return {
            "id": self.app.name,
            "object": "model",
            "created": self.started,
            "owned_by": f"mlx_mcsd {__version__}",
            "state_bytes": state_bytes(engine.model),
            "state_is_constant": state_bytes(engine.model) == state_bytes(engine.model, 2**20),
            "has_chat_template": engine.tokenizer.has_chat_template,
            "base_tokens": length(engine.base.snapshot),
        }

    started = int(time.time())

    def check_model(self, name) -> None:
        """Raise 404 unless this is the model."""
        if name not in (None, self.app.name, "default_model"):
            raise APIError(
                404,
                f"this server's model is {self.app.name} but {str(name)[:80]!r} was asked for.",
                "model",
                "model_not_found",
            )

    def post_chat(self):
        """``POST /v1/chat/completions``."""
        self.complete(chat=True)

    def post_text(self):
        """``POST /v1/completions``."""
        self.complete(chat=False)

    def complete(self, *, chat: bool):
        """Write texts."""
        app, content = self.app, parse_json(self.body)
        self.check_model(content.get("model"))
        call = parse_call(content, app.limits, chat=chat)
        self.check_bias(call)
        with app.slot():
            base = app.sessions.base(call.session) if call.session else app.engine.base
            prompts = [self.prompt(prompt, base, call) for prompt in call.prompts]
            queue = SimpleQueue()
            jobs = [
                Job(
                    prompt.start,
                    prompt.segments,
                    n=call.n,
                    max_tokens=call.max_tokens,
                    sampling=call.sampling,
                    seed=call.seed,
                    stop=call.stop,
                    logprobs=call.logprobs,
                    after_text=not (chat and app.engine.tokenizer.has_chat_template),
                    first=i * call.n,
                    parts=queue,
                )
                for i, prompt in enumerate(prompts)
            ]
            answer = Answer(self, call, prompts, base)
            try:
                for job in jobs:
                    app.engine.submit(job)
                answer.send(queue)
            finally:
                if answer.open:
                    for job in jobs:
                        app.engine.cancel(job)

    def prompt(self, prompt, base, call: Call):
        """What is left to read of one prompt."""
        prompts = self.app.prompts
        if call.chat:
            return prompts.chat(prompt, base)
        return prompts.text(prompt, base) if isinstance(prompt, str) else prompts.ids(prompt, base)

    def check_bias(self, call: Call) -> None:
        """Raise unless every biased token is one of the tokenizer's."""
        known = self.app.engine.known
        if bad := [token for token, _ in call.sampling.logit_bias if token >= known]:
            raise APIError(400, f"logit_bias: ids are below {known}, got {bad[0]}.", "logit_bias")

    def get_sessions(self):
        """``GET /v1/sessions``."""
        self.respond_json({"object": "list", "data": self.app.sessions.list()})

    def post_sessions(self):
        """``POST /v1/sessions``."""
        self.respond_json(self.app.sessions.create(parse_json(self.body)), 201)

    def get_session(self, name: str):
        """``GET /v1/sessions/ID``."""
        self.respond_json(self.app.sessions.get(name))

    def post_session(self, name: str):
        """``POST /v1/sessions/ID``."""
        self.respond_json(self.app.sessions.update(name, parse_json(self.body)))

    def delete_session(self, name: str):
        """``DELETE /v1/sessions/ID``."""
        self.respond_json(self.app.sessions.delete(name))

    def get_state(self, name: str):
        """``GET /v1/sessions/ID/state``."""
        with self.app.slot():
            command, timeout = "python -m mlx_mcsd.serve", self.app.request_timeout
            data = self.app.sessions.state(name, command, timeout)
        headers = {"Content-Disposition": f'attachment; filename="{name}.state"'}
        self.respond(200, data, headers, "application/octet-stream")

    def post_state(self):
        """``POST /v1/sessions/state``, the body a state file."""
        query = parse_qs(self.path.partition("?")[2], max_num_fields=8)
        title = query.get("title", [""])[0][:80]
        self.respond_json(self.app.sessions.upload(self.body, title), 201)

    routes = {  # noqa: RUF012 (a read-only table)
        re.compile(pattern): methods
        for pattern, methods in {
            r"/": {"GET": get_page},
            r"/health": {"GET": get_health},
            r"/v1/models": {"GET": get_models},
            r"/v1/models/(.+)": {"GET": get_model},
            r"/v1/chat/completions": {"POST": post_chat},
            r"/v1/completions": {"POST": post_text},
            r"/v1/sessions": {"GET": get_sessions, "POST": post_sessions},
            r"/v1/sessions/state": {"POST": post_state},
            r"/v1/sessions/([0-9a-f]{16})": {
                "GET": get_session,
                "POST": post_session,
                "DELETE": delete_session,
            },
            r"/v1/sessions/([0-9a-f]{16})/state": {"GET": get_state},
        }.items()
    }


class Answer:
    """Receives the parts of a request's texts, and sends them as they come or at the end.

    Attributes:
        open: texts that have not ended.
    """

    def __init__(self, handler: AppHandler, call: Call, prompts: list, base):
        self.handler, self.call, self.base = handler, call, base
        self.app = handler.app
        self.open = len(prompts) * call.n
        self.texts = [""] * self.open
        self.tokens: list[list] = [[] for _ in range(self.open)]
        self.counts = [0] * self.open
        self.finishes = [""] * self.open
        self.prompt_tokens = sum(prompt.tokens for prompt in prompts)
        self.cached_tokens = sum(prompt.cached for prompt in prompts)
        self.reply = Reply(call, self.app.name, self.app.engine.tokenizer)
        self.deadline = time.monotonic() + self.app.request_timeout

    def send(self, queue: SimpleQueue) -> None:
        """Send the answer."""
        stream = self.call.stream
        for part in self.parts(queue):
            if isinstance(part, APIError):
                if not self.handler.sent:
                    raise part
                self.event(part.body())
                self.end()
                return
            if part is None:
                if stream:
                    self.write(b": still here\n\n")
                continue
            i = part.index
            self.texts[i] += part.text
            self.counts[i] = part.count
            if not stream:
                self.tokens[i] += part.tokens
            if part.finish is not None:
                self.open -= 1
                self.finishes[i] = part.finish
                if self.call.chat:
                    messages = self.call.prompts[0]
                    self.app.prompts.remember(messages, part, self.texts[i], self.base)
            if stream:
                self.stream(part)
        if not stream:
            whole = self.reply.whole(self.texts, self.tokens, self.finishes, self.usage())
            self.handler.respond_json(whole)
            return
        if self.call.include_usage:
            self.event(self.reply.usage(self.usage()))
        self.write(b"data: [DONE]\n\n")
        self.end()

    def parts(self, queue: SimpleQueue):
        """Each part as it comes, or an error; None when nothing came for a while."""
        quiet = time.monotonic()
        while self.open:
            try:
                part = queue.get(timeout=0.25)
            except Empty:
                part = None
            now = time.monotonic()
            if self.handler.is_gone():
                raise ConnectionError
            if now > self.deadline:
                part = APIError(
                    504,
                    f"the answer took more than {self.app.request_timeout:g} seconds.",
                    headers={"x-should-retry": "false"},
                )
            if part is not None or now - quiet > KEEPALIVE:
                quiet = now
                yield part

    def stream(self, part) -> None:
        """Send a part of a text as an event."""
        counted = self.usage() if self.call.continuous_usage else None
        self.event(self.reply.chunk(part.index, part.text, part.tokens, part.finish, counted))

    def usage(self) -> dict:
        """Tokens so far."""
        return usage(self.prompt_tokens, self.cached_tokens, sum(self.counts))

    def event(self, content: dict) -> None:
        """Send a server-sent event."""
        self.write(f"data: {json.dumps(content)}\n\n".encode())

    def write(self, data: bytes) -> None:
        """Send a stretch of a stream, after its headers."""
        handler = self.handler
        if not handler.sent:
            chunked = handler.request_version == "HTTP/1.1"
            handler.close_connection |= not chunked
            handler.start(
                200, "text/event-stream", {"Transfer-Encoding": "chunked"} if chunked else {}
            )
            handler.end_headers()
            if self.call.chat:
                for i in range(len(self.texts)):
                    self.event(self.reply.role(i))
        if handler.request_version == "HTTP/1.1":
            data = b"%x\r\n%b\r\n" % (len(data), data)
        handler.wfile.write(data)

    def end(self) -> None:
        """Send the end of a stream."""
        if self.handler.request_version == "HTTP/1.1":
            self.handler.wfile.write(b"0\r\n\r\n")
