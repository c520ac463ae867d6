"""Conversations kept in a directory: their messages, and the states to go on from.

A session is ``ID.json``. Beside it may lie ``ID.state``, what the model remembers after the last
message, and ``ID.base.state``, an uploaded state that comes before the first.
"""

import json
import logging
import re
import secrets
import time
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from threading import Lock

from ..errors import MCSDError
from ..files import write_atomically
from ..state import State, fingerprint
from .engine import Job
from .prefixes import Entry, key
from .prompts import Prompts, length
from .protocol import APIError, Fields, parse_json, parse_messages

log = logging.getLogger("mlx_mcsd.serve")

ID = re.compile(r"[0-9a-f]{16}")
TITLE = 80
MOST = 1000
"""Sessions kept; a request for more is refused."""


class Sessions:
    """The sessions of one model, in a folder of its own.

    Args:
        directory: where the folder is, or will be once there is something to keep.
        prompts: finds and names the states.
    """

    def __init__(self, directory: Path, prompts: Prompts):
        self.prompts, self.engine = prompts, prompts.engine
        self.directory = directory / self.engine.call(lambda: fingerprint(self.engine.model))[:16]
        self._lock = Lock()

    def list(self) -> list[dict]:
        """Every session with the number of its messages, the one used last first."""
        found = []
        for file in self.directory.glob("*.json"):
            try:
                session = self.get(file.stem)
            except APIError as error:
                log.warning("%s is left out: %s", file, error)
                continue
            found.append({**session, "messages": len(session["messages"])})
        return sorted(found, key=lambda session: session["updated"], reverse=True)

    def get(self, name: str) -> dict:
        """A session, with its messages."""
        return _shown(self._read(name))

    def create(self, content: dict) -> dict:
        """A new session, from a JSON body: messages, a title, a session whose base it shares."""
        parent = Fields(content).text("base", longest=64)
        tokens = 0 if parent is None else self._read(parent)["base_tokens"]
        with _disk():
            data = self._file(parent, "base.state").read_bytes() if tokens else b""
        return self._save(self._new(self._fields(content) | {"base_tokens": tokens}, data))

    def upload(self, data: bytes, title: str) -> dict:
        """A new session that begins with an uploaded state, if it is one of this model's."""
        try:
            state = self.engine.call(lambda: State.from_bytes(data, self.engine.model, "the file"))
        except MCSDError as error:
            raise APIError(400, str(error), code="invalid_state") from error
        tokens = state.tokens_seen + len(state.pending)
        return self._save(self._new({"title": title, "base_tokens": tokens}, data))

    def update(self, name: str, content: dict) -> dict:
        """Other messages, another title, or both."""
        with self._lock:
            return self._save(self._read(name) | self._fields(content))

    def delete(self, name: str) -> dict:
        """Remove a session and its states."""
        with self._lock, _disk():
            self._read(name)
            for end in ("json", "state", "base.state"):
                self._file(name, end).unlink(missing_ok=True)
        return {"id": name, "object": "session.deleted", "deleted": True}

    def base(self, name: str) -> Entry:
        """What a session's text begins with; its newest state is brought back if it was dropped."""
        session = self._read(name)
        base = self._base(session)
        if session["state"] and self.engine.prefixes.get(named := self._key(session, base)) is None:
            self._load(named, name, "state", base, session["state"])
        return base

    def state(self, name: str, command: str, timeout: float) -> bytes:
        """The file of what the model remembers after the last message, read first if need be."""
        session, base = self._read(name), self.base(name)
        if not session["messages"]:
            return self._bytes(base, command)
        named = self._key(session, base)
        if self.engine.prefixes.get(named) is None:
            prompt = self.prompts.chat(_pairs(session), base, reply=False)
            job = Job(prompt.start, prompt.segments, max_tokens=1)
            self.engine.submit(job)
            try:
                part = job.parts.get(timeout=timeout)
            except Empty:
                self.engine.cancel(job)
                raise APIError(504, "reading the messages took too long.") from None
            if isinstance(part, APIError):
                raise part
        if (entry := self.engine.prefixes.get(named)) is None:
            raise APIError(409, "the state was dropped at once: --prompt-cache-bytes is too small.")
        return self._bytes(entry, command)

    def _base(self, session: dict) -> Entry:
        if not session["base_tokens"]:
            return self.engine.base
        named = f"base:{session['id']}".encode()
        return self.engine.prefixes.get(named) or self._load(named, session["id"], "base.state")

    def _bytes(self, entry: Entry, command: str) -> bytes:
        def save():
            state = State(self.engine.model)
            state.restore(entry.snapshot)
            return state.to_bytes(command)

        return self.engine.call(save)

    def _load(self, named: bytes, name: str, end: str, base: Entry | None = None, mark: str = ""):
        """Keep the entry that a file holds; a state of other messages than ours is left alone."""
        file = self._file(name, end)
        try:
            snapshot = self.engine.call(lambda: State.load(file, self.engine.model).snapshot())
        except MCSDError as error:
            if mark:  # it can be made again
                log.warning("%s is left out: %s", file, error)
                return None
            raise APIError(409, str(error), code="invalid_state") from error
        entry = Entry(snapshot, length(snapshot) - length(base.snapshot) if base else 0)
        if mark in ("", _mark(entry)):
            self.engine.prefixes.add(named, entry)
        return entry

    def _key(self, session: dict, base: Entry) -> bytes:
        return key(base.snapshot, self.prompts.render(_pairs(session), base))

    def _fields(self, content: dict) -> dict:
        fields = Fields(content)
        given = {}
        if "title" in fields.content:
            given["title"] = fields.text("title", longest=TITLE)
        if fields.content.get("messages") == []:
            given["messages"] = []
        elif "messages" in fields.content:
            messages = parse_messages(fields)
            given["messages"] = [{"role": role, "content": text} for role, text in messages]
        return given

    def _new(self, given: dict, base: bytes) -> dict:
        """A session that is not saved yet, its base state (if any) written."""
        if len(list(self.directory.glob("*.json"))) >= MOST:
            raise APIError(409, f"at most {MOST} sessions are kept; delete some.")
        name, now = secrets.token_hex(8), time.time()
        with _disk():
            self.directory.mkdir(parents=True, exist_ok=True)
            if base:
                write_atomically(self._file(name, "base.state"), base)
        session = {"id": name, "object": "session", "title": "", "created": int(now)}
        return session | {"updated": now, "base_tokens": 0, "state": "", "messages": []} | given

    def _read(self, name: str) -> dict:
        file = self._file(name, "json")
        missing = APIError(404, "there is no such session.", code="session_not_found")
        if not ID.fullmatch(name):
            raise missing
        with _disk():
            try:
                data = file.read_bytes()
            except FileNotFoundError:
                raise missing from None
        content = parse_json(data)
        fields = Fields(content)
        messages = parse_messages(fields) if content.get("messages") else []
        return {
            "id": name,
            "object": "session",
            "title": fields.text("title", "", longest=TITLE),
            "created": fields.integer("created", 0, 2**63, 0),
            "updated": fields.number("updated", 0, 2**63, 0),
            "base_tokens": fields.integer("base_tokens", 0, 2**63, 0),
            "state": fields.text("state", "", longest=2**16),
            "messages": [{"role": role, "content": text} for role, text in messages],
        }

    def _save(self, session: dict) -> dict:
        """Write a session, and the state after its last message if the server has it."""
        session |= {"updated": time.time(), "state": ""}
        entry = None
        if session["messages"]:
            base = self._base(session)
            entry = self.engine.prefixes.get(self._key(session, base))
        if entry is not None:
            session["state"] = _mark(entry)
        # The state last: one that does not fit the session's mark is not believed.
        with _disk():
            write_atomically(self._file(session["id"], "json"), json.dumps(session).encode())
            if entry is not None:
                write_atomically(self._file(session["id"], "state"), self._bytes(entry, ""))
        return _shown(session)

    def _file(self, name: str, end: str) -> Path:
        return self.directory / f"{name}.{end}"


@contextmanager
def _disk():
    """What the disk refuses is told: to the client that, to the owner, in the log, all of it."""
    try:
        yield
    except (MCSDError, OSError) as error:
        log.warning("%s", error)
        raise APIError(507, "the server's disk refuses the session; its log says why.") from error


def _shown(session: dict) -> dict:
    """What of a session is told."""
    return {name: value for name, value in session.items() if name != "state"}


def _pairs(session: dict) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in session["messages"]]


def _mark(entry: Entry) -> str:
    """What tells the state of one text from that of another."""
    snapshot = entry.snapshot
    return f"{snapshot.hash}{list(snapshot.pending)}"
