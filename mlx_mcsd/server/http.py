"""HTTP/1.1 on the standard library's server, with limits on everything a client may send.

A connection is a thread; how many there are, how long a request may take to arrive and an answer to
leave, and how large a request may be, is bounded. Every refusal has OpenAI's error body.
"""

import hmac
import io
import ipaddress
import json
import logging
import re
import select
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import BoundedSemaphore

from .protocol import APIError

log = logging.getLogger("mlx_mcsd.serve")

HEADER_BYTES = 32 * 2**10
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Policy:
    """Who may ask, and how much of the server's time and memory a client may take.

    Attributes:
        api_key: asked of every request but the page's and /health; None asks for none.
        hosts: names, besides IP addresses and localhost, under which the server may be reached.
        origins: web pages of other origins that may ask ("*": any).
        body_bytes: of a request.
        connections: open at a time.
        header_timeout: seconds for a request's headers to arrive, idle time before included.
        body_timeout: seconds for its body.
        write_timeout: seconds for a client to take what is sent to it.
    """

    api_key: str | None = None
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = field(default_factory=frozenset)
    body_bytes: int = 8 * 2**20
    connections: int = 256
    header_timeout: float = 20
    body_timeout: float = 60
    write_timeout: float = 30


class Incoming(io.RawIOBase):
    """What a client sends, until a moment and up to a number of bytes."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self.began = False
        self.expect(0, 0)

    def expect(self, seconds: float, size: int) -> None:
        """Allow ``size`` bytes more, within ``seconds`` from now."""
        self._deadline, self._left = time.monotonic() + seconds, size

    def readable(self):
        """It is."""
        return True

    def readinto(self, buffer):
        """Read once; TimeoutError past the deadline, APIError past the size."""
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        if self._left <= 0:
            raise APIError(431, f"headers must have at most {HEADER_BYTES} bytes.")
        self._connection.settimeout(seconds)
        n = self._connection.recv_into(buffer)
        self._left -= n
        self.began = True
        return n


class Server(ThreadingHTTPServer):
    """Accepts connections, up to the policy's number, each in a thread of its own."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler, policy: Policy):
        self.policy = policy
        self._free = BoundedSemaphore(policy.connections)
        infos = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = infos[0]
        super().__init__(address, handler)

    def server_bind(self):
        """Bind without asking a name server who we are, as the base class does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request, client_address):
        """Serve a connection, or close it at once if there are too many."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        """In the connection's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request, client_address):
        """A bug: tell the owner in the log; the client was told that there was one."""
        log.exception("a request failed unexpectedly")


class Handler(BaseHTTPRequestHandler):
    """One connection. A subclass has ``routes``: path pattern -> {method: function}."""

    protocol_version = "HTTP/1.1"
    server: Server
    public: frozenset[str] = frozenset()
    """Paths that need no key."""

    def setup(self):
        """Begin a connection."""
        super().setup()
        self.rfile.close()
        self.incoming = Incoming(self.connection)
        self.rfile = io.BufferedReader(self.incoming)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

    def finish(self):
        """End it so that a client who is still sending gets to read the answer."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.incoming.expect(1, 2**20)
            with suppress(APIError):
                while self.incoming.readinto(bytearray(2**16)):
                    pass
        super().finish()

    def handle_one_request(self):
        """Read a request and answer it."""
        self.close_connection = True
        self.sent = False
        self.begun = time.monotonic()
        self.incoming.began = False
        self.command, self.path, self.request_version = "", "", "HTTP/1.1"
        try:
            self.incoming.expect(self.server.policy.header_timeout, HEADER_BYTES)
            self.raw_requestline = self.rfile.readline(HEADER_BYTES)
            if len(self.raw_requestline) == HEADER_BYTES:
                raise APIError(414, f"an address must have less than {HEADER_BYTES} bytes.")
            if not self.raw_requestline.endswith(b"\n") or not self.raw_requestline.strip():
                return
            self.begun = time.monotonic()
            if not self.read_headers():
                return
            self.answer()
        except APIError as error:
            self.fail(error)
        except TimeoutError:
            if not self.sent and self.incoming.began:
                self.fail(APIError(408, "the request took too long to arrive."))
        except OSError:  # the client is gone
            self.close_connection = True
        finally:
            self.log_answer()

    def read_headers(self) -> bool:
        """Parse what came; if it is no request, the connection has no next one."""
        try:
            return self.parse_request()
        except (APIError, OSError):
            self.close_connection = True
            raise

    def answer(self):
        """Check who asks and what, and call the route."""
        # A body that is not read ends the connection, or it would be taken for the next request.
        keep, self.close_connection = not self.close_connection, True
        self.check_form()
        self.check_origin()
        path = self.path.partition("?")[0]
        methods, arguments = self.find(path)
        if self.command == "OPTIONS":
            return self.respond(204, b"", {"Allow": ", ".join(sorted(methods))})
        method = "GET" if self.command == "HEAD" else self.command
        if method not in methods:
            allow = {"Allow": ", ".join(sorted(methods))}
            raise APIError(405, f"{path} cannot be asked to {self.command}.", headers=allow)
        if path not in self.public:
            self.check_key()
        self.body = self.read_body()
        self.close_connection = not keep
        finished = False
        try:
            methods[method](self, *arguments)
            finished = True
        except (APIError, OSError):
            finished = True
            raise
        finally:
            if not finished and not self.sent:
                self.fail(APIError(500, "a mistake of the server's; its log says more."))

    def find(self, path: str):
        """The methods of a path, and what its pattern captures."""
        for pattern, methods in self.routes.items():
            if match := pattern.fullmatch(path):
                return methods, match.groups()
        raise APIError(404, "there is nothing at this address.", code="unknown_url")

    def check_form(self):
        """Refuse what two readers of HTTP may understand differently."""
        if self.request_version not in ("HTTP/1.0", "HTTP/1.1"):
            raise APIError(505, "HTTP must be of version 1.0 or 1.1.")
        if not self.path.startswith("/") or not self.path.isascii():
            raise APIError(400, "an address must be a path in ASCII.")
        for name in ("Host", "Content-Length", "Authorization", "Origin"):
            if len(self.headers.get_all(name, ())) > 1:
                raise APIError(400, f"{name} must come once.")
        if self.headers.defects or not all(
            TOKEN.fullmatch(name) and not set(value) & set("\r\n\0")
            for name, value in self.headers.items()
        ):
            raise APIError(400, "headers must be lines of name: value.")

    def check_origin(self):
        """Refuse web pages that are not this server's: rebound names, other origins."""
        host = self.headers.get("Host", "")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if not self.is_ours(name.lower()):
            raise APIError(
                403,
                f"this server is not known as {host[:80]!r}; its owner can allow it with "
                "--allowed-hosts.",
            )
        origin = self.headers.get("Origin")
        if origin is None or origin.partition("://")[2].lower() == host.lower():
            return
        if not self.server.policy.origins & {"*", origin}:
            raise APIError(
                403,
                f"web pages of {origin[:80]!r} may not ask this server; its owner can allow them "
                "with --allowed-origins.",
            )

    def is_ours(self, name: str) -> bool:
        """Whether this may be a name of this server: one that no stranger can point at it."""
        if name in ("localhost", *self.server.policy.hosts):
            return True
        with suppress(ValueError):
            return bool(ipaddress.ip_address(name.strip("[]")))
        return False

    def check_key(self):
        """Compare the key in constant time."""
        key = self.server.policy.api_key
        given = self.headers.get("Authorization", "").encode("latin-1")
        if key is not None and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise APIError(
                401,
                "this server needs its API key: Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def read_body(self) -> bytes:
        """The body, whole."""
        if self.headers.get("Transfer-Encoding") is not None:
            raise APIError(411, "a body must come with Content-Length, not in chunks.")
        length = self.headers.get("Content-Length")
        if length is None:
            if self.command in ("POST", "PUT", "PATCH"):
                raise APIError(411, "a body must come with Content-Length.")
            return b""
        if not (length.isascii() and length.isdecimal() and len(length) < 20):
            raise APIError(400, "Content-Length must be a number.")
        size, most = int(length), self.server.policy.body_bytes
        if size > most:
            raise APIError(413, f"a body must have at most {most} bytes but has {size}.")
        self.incoming.expect(self.server.policy.body_timeout, size)
        body = self.rfile.read(size) if size else b""
        if len(body) < size:
            raise ConnectionError
        return body

    def respond(self, status: int, body: bytes, headers=(), kind: str = "application/json"):
        """Send an answer, whole."""
        self.start(status, kind, {**dict(headers), "Content-Length": str(len(body))})
        self.end_headers()
        if self.command != "HEAD" and status != 204:
            self.wfile.write(body)

    def respond_json(self, content, status: int = 200, headers=()):
        """Send JSON."""
        self.respond(status, json.dumps(content).encode(), headers)

    def start(self, status: int, kind: str, headers: dict[str, str]):
        """Send the status; headers wait for end_headers."""
        self.sent, self.status = True, status
        self.connection.settimeout(self.server.policy.write_timeout)
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", kind)
        origin = self.headers.get("Origin") if getattr(self, "headers", None) else None
        if origin is not None and self.server.policy.origins & {"*", origin}:
            # Only pages that were allowed come here.
            headers = headers | {
                "Access-Control-Allow-Origin": origin,
                "Access-Control-Allow-Headers": "authorization, content-type",
                "Access-Control-Allow-Methods": "GET, POST, DELETE",
                "Cross-Origin-Resource-Policy": "cross-origin",
                "Vary": "Origin",
            }
        if self.close_connection:
            headers = headers | {"Connection": "close"}
        for name, value in (SECURITY | headers).items():
            self.send_header(name, value)

    def fail(self, error: APIError):
        """Send an error; if an answer has begun, break it off."""
        if self.sent:
            self.close_connection = True
            return
        if self.request_version == "HTTP/0.9":  # which has no headers
            self.request_version = "HTTP/1.0"
        with suppress(OSError):
            self.respond_json(error.body(), error.status, error.headers)

    def send_error(self, code, message=None, explain=None):
        """What the base class refuses by itself: a request line or headers it cannot read."""
        self.close_connection = True
        reason = (message or "it is not HTTP")[:100]
        self.fail(APIError(code, f"the request cannot be read: {reason}."))

    def is_gone(self) -> bool:
        """Whether the client has left."""
        poll = select.poll()  # select takes no number above 1023
        poll.register(self.connection, select.POLLIN)
        try:
            return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def log_answer(self):
        """One line a request: nothing of what was asked or answered."""
        if self.sent:
            seconds = time.monotonic() - self.begun
            line = f"{self.command} {self.path.partition('?')[0][:100]}"
            log.info("%s %r %d %.2fs", self.client_address[0], line, self.status, seconds)

    def log_request(self, code="-", size="-"):
        """Nothing: see log_answer."""

    def version_string(self):
        """What the server calls itself; its versions are nobody's business."""
        return "mlx_mcsd"
