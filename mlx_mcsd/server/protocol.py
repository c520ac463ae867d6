"""What a request may ask: JSON bodies to checked values, mistakes to OpenAI's error bodies."""

import json
import math
from dataclasses import dataclass, field
from http import HTTPStatus

ROLES = ("system", "developer", "user", "assistant")
UNSUPPORTED = {
    "chat": ("tools", "functions", "audio", "prediction", "web_search_options"),
    "text": ("suffix", "echo"),
}
"""Fields that would change the answer in a way that is not offered: refused unless empty."""

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    505: "invalid_request_error",
}


class APIError(Exception):
    """What a request is refused with.

    Args:
        status: HTTP status.
        message: one line, for the person who wrote the request.
        param: the field at fault.
        code: OpenAI's name of the mistake, where it has one.
        headers: further headers of the response.
    """

    def __init__(self, status, message, param=None, code=None, headers=()):
        super().__init__(message)
        self.status, self.param, self.code = HTTPStatus(status), param, code
        self.headers = dict(headers)

    def body(self) -> dict:
        """The JSON that OpenAI's clients read."""
        kind = TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: mlx-lm's sampler and logits processors, by their names."""

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What the server's owner allows a request, and what one gets that does not say."""

    max_tokens: int = 512
    most_tokens: int = 32768
    prompt_tokens: int = 131072
    choices: int = 16
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Call:
    """A checked request for text.

    ``prompts`` holds, for a chat, one list of messages (role, text); else texts or token ids.
    """

    chat: bool
    prompts: list
    sampling: Sampling
    seed: int | None
    n: int
    max_tokens: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool
    logprobs: int | None
    session: str | None


def parse_json(body: bytes) -> dict:
    """The JSON object that a body holds: UTF-8, finite numbers, text without lone surrogates."""

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    try:
        text = body.decode()
        content = json.loads(text, parse_constant=refuse)
        # Lone surrogates are no text: no tokenizer takes them and no answer could quote them.
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise APIError(400, f"the body must be JSON in UTF-8 but: {reason[:200]}.") from None
    if not isinstance(content, dict):
        raise APIError(400, f"the body must be a JSON object but is a {type(content).__name__}.")
    return content


class Fields:
    """The fields of a JSON object, each read with a check; null is the same as absent."""

    def __init__(self, content: dict):
        self.content = {name: value for name, value in content.items() if value is not None}

    def fail(self, name: str, wanted: str):
        """Raise: ``name`` must be what is ``wanted``."""
        came = json.dumps(self.content[name]) if name in self.content else "nothing"
        came = came if len(came) <= 80 else f"{came[:80]}..."
        raise APIError(400, f"{name} must be {wanted} but got {came}.", name)

    def boolean(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.content.get(name, default)
        return value if isinstance(value, bool) else self.fail(name, "true or false")

    def integer(self, name: str, low: int, high: int, default=None):
        """An integer from ``low`` to ``high``, both included."""
        value = self.content.get(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.fail(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float, *, above=False) -> float:
        """A number from ``low`` (or strictly above it) to ``high``."""
        value = self.content.get(name, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        # A giant integer compares exactly; only one within the range becomes a float.
        if not fits or not (low < value if above else low <= value) or not value <= high:
            start = "above" if above else "from"
            self.fail(name, f"a number {start} {low:g} to {high:g}")
        return float(value)

    def text(self, name: str, default=None, *, longest: int = 1000):
        """A string of at most ``longest`` characters."""
        value = self.content.get(name, default)
        if value is not default and not (isinstance(value, str) and len(value) <= longest):
            self.fail(name, f"a string of at most {longest} characters")
        return value

    def refuse(self, names, extra=()):
        """Raise if any of these fields asks for something."""
        for name in names:
            if self.content.get(name):
                raise APIError(400, f"{name} is not supported by this server.", name)
        for name, allowed in extra:
            if name in self.content and self.content[name] not in allowed:
                self.fail(name, " or ".join(json.dumps(value) for value in allowed))


def parse_call(content: dict, limits: Limits, *, chat: bool) -> Call:
    """Check a body of ``/v1/chat/completions`` or ``/v1/completions``.

    Raises:
        APIError: naming the first field that is at fault.
    """
    fields = Fields(content)
    fields.refuse(
        UNSUPPORTED["chat" if chat else "text"],
        [
            ("response_format", [{"type": "text"}]),
            ("modalities", [["text"]]),
            ("tool_choice", ["none", "auto"]),
            ("function_call", ["none", "auto"]),
        ],
    )
    n = fields.integer("n", 1, limits.choices, 1)
    best_of = fields.integer("best_of", 1, limits.choices, n)
    if best_of != n:
        fields.fail("best_of", f"equal to n, {n}")
    prompts = [parse_messages(fields)] if chat else parse_prompts(fields)
    if len(prompts) * n > limits.choices:
        raise APIError(
            400, f"at most {limits.choices} texts a request but got {len(prompts) * n}.", "prompt"
        )
    options = Fields(parse_object(fields, "stream_options"))
    stream = fields.boolean("stream")
    return Call(
        chat=chat,
        prompts=prompts,
        sampling=parse_sampling(fields, limits.sampling),
        seed=fields.integer("seed", -(2**63), 2**64 - 1),
        n=n,
        max_tokens=parse_max_tokens(fields, limits),
        stop=parse_stop(fields),
        stream=stream,
        include_usage=stream and options.boolean("include_usage"),
        continuous_usage=stream and options.boolean("continuous_usage_stats"),
        logprobs=parse_logprobs(fields, chat),
        session=fields.text("session", longest=64),
    )


def parse_object(fields: Fields, name: str) -> dict:
    """A field that is a JSON object."""
    value = fields.content.get(name, {})
    return value if isinstance(value, dict) else fields.fail(name, "an object")


def parse_max_tokens(fields: Fields, limits: Limits) -> int:
    """The newer of OpenAI's two names first."""
    default = fields.integer("max_tokens", 1, limits.most_tokens, limits.max_tokens)
    return fields.integer("max_completion_tokens", 1, limits.most_tokens, default)


def parse_sampling(fields: Fields, default: Sampling) -> Sampling:
    """OpenAI's fields, and mlx-lm's further ones."""
    bias = parse_object(fields, "logit_bias")
    for token, value in bias.items():
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and fits):
            fields.fail("logit_bias", "an object of token ids and numbers")
        if not -100 <= value <= 100:
            fields.fail("logit_bias", "of numbers from -100 to 100")
    return Sampling(
        temp=fields.number("temperature", 0, 2, default.temp),
        top_p=fields.number("top_p", 0, 1, default.top_p, above=True),
        min_p=fields.number("min_p", 0, 1, default.min_p),
        top_k=fields.integer("top_k", 0, 2**31, default.top_k),
        logit_bias=tuple((int(token), float(value)) for token, value in bias.items()),
        repetition_penalty=fields.number("repetition_penalty", 0, 10, default.repetition_penalty),
        presence_penalty=fields.number("presence_penalty", -2, 2, default.presence_penalty),
        frequency_penalty=fields.number("frequency_penalty", -2, 2, default.frequency_penalty),
    )


def parse_stop(fields: Fields) -> tuple[str, ...]:
    """One string, or up to four."""
    stop = fields.content.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    whole = isinstance(stop, list) and len(stop) <= 4
    if not whole or not all(isinstance(word, str) and 0 < len(word) <= 1000 for word in stop):
        fields.fail("stop", "a string, or up to 4, of 1 to 1000 characters")
    return tuple(stop)


def parse_logprobs(fields: Fields, chat: bool) -> int | None:
    """How many alternatives to report with each token; None reports no probabilities."""
    if not chat:
        return fields.integer("logprobs", 0, 5)
    top = fields.integer("top_logprobs", 0, 20, 0)
    wanted = fields.boolean("logprobs")
    if top and not wanted:
        raise APIError(400, "top_logprobs needs logprobs to be true.", "top_logprobs")
    return top if wanted else None


def parse_messages(fields: Fields, name: str = "messages") -> list[tuple[str, str]]:
    """(role, text) of each message; OpenAI's text parts are joined, "developer" is "system"."""
    messages = fields.content.get(name)
    if not isinstance(messages, list) or not messages:
        fields.fail(name, "a list of at least one message")
    parsed = []
    for i, message in enumerate(messages):
        where = f"{name}[{i}]"
        if not isinstance(message, dict):
            raise APIError(400, f"{where} must be an object with role and content.", name)
        role = message.get("role")
        if role not in ROLES:
            raise APIError(400, f"{where}.role must be one of {', '.join(ROLES)}.", name)
        if message.get("tool_calls") or message.get("function_call"):
            raise APIError(400, f"{where}: tool calls are not supported by this server.", name)
        role = "system" if role == "developer" else role
        parsed.append((role, parse_content(message.get("content"), f"{where}.content", name)))
    return parsed


def parse_content(content, where: str, name: str) -> str:
    """The text of a message: a string, or parts that are all text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    if not all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
        for p in parts
    ):
        raise APIError(400, f"{where} must be text, or a list of parts of type text.", name)
    return "".join(part["text"] for part in parts)


def parse_prompts(fields: Fields) -> list:
    """A text or token ids, or a list of either: texts as str, ids as tuples."""
    prompt = fields.content.get("prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if prompts is prompt and prompts and all(is_id(token) for token in prompts):
        prompts = [prompts]
    parsed = []
    for item in prompts:
        if isinstance(item, list) and item and all(is_id(token) for token in item):
            parsed.append(tuple(item))
        elif isinstance(item, str) and item:
            parsed.append(item)
        else:
            fields.fail("prompt", "a text, a list of token ids, or a list of these")
    return parsed or fields.fail("prompt", "a text that is not empty")


def is_id(token) -> bool:
    """Whether this may be the id of a token of some model."""
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31


def finite(value: float) -> float:
    """A log probability that JSON can hold."""
    return value if math.isfinite(value) else -9999.0
