"""``python -m mlx_mcsd.serve``: OpenAI's interface and a chat page, on this machine."""

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Thread

from .cli import Parser, integer, number
from .errors import MCSDError, exits_cleanly

KEY = "MLX_MCSD_API_KEY"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def setup_arg_parser() -> Parser:
    """Return the parser: the flags of ``mlx_lm.server`` that have a use here, and the limits."""
    theirs = "default: the model's generation_config.json, else"
    parser = Parser(
        prog="mlx_mcsd.serve",
        description="Serve an MCSD model: OpenAI's HTTP interface, and a chat page at /.",
    )
    add = parser.add_argument
    add("--model", help="a directory or a hub id (default: the bundled storyteller)")
    add("--adapter-path", help="a directory of adapters trained by mlx_lm.lora")
    add("--state", help="a state file that every text begins with")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; any but this machine's own needs a key (default: 127.0.0.1)",
    )
    add("--port", type=integer(0, 65535), default=8080, help="0 takes a free one (default: 8080)")
    add(
        "--api-key",
        default=os.environ.get(KEY),
        help=f"key that requests must bring (default: what {KEY} says, which nobody else sees)",
    )
    add(
        "--allowed-hosts",
        type=names,
        default=(),
        help="names, joined by commas, under which the server may be reached besides localhost, "
        "IP addresses and --host",
    )
    add(
        "--allowed-origins",
        type=names,
        default=(),
        help="origins of web pages, joined by commas, that may ask the server besides its own; * "
        "is any (default: none)",
    )
    add(
        "--session-dir",
        default=os.path.join("~", ".mlx_mcsd", "sessions"),
        help="where conversations are kept (default: ~/.mlx_mcsd/sessions)",
    )
    add(
        "--max-tokens",
        "-m",
        type=integer(1),
        default=512,
        help="tokens to generate where a request does not say (default: 512)",
    )
    add("--temp", type=number(0, 2), help=f"sampling temperature, 0 is greedy ({theirs} 0)")
    add("--top-p", type=number(0, 1, above=True), help=f"nucleus sampling ({theirs} 1)")
    add("--min-p", type=number(0, 1), help=f"minimum relative probability ({theirs} 0)")
    add("--top-k", type=integer(0), help=f"sample from this many tokens, 0 is all ({theirs} 0)")
    add(
        "--decode-concurrency",
        type=integer(1),
        default=64,
        help="texts generated at a time (default: 64)",
    )
    add(
        "--prompt-concurrency",
        type=integer(1),
        default=8,
        help="prompts read at a time (default: 8)",
    )
    add(
        "--prefill-step-size",
        type=integer(1),
        default=2048,
        help="prompt tokens read in one step (default: 2048)",
    )
    add(
        "--prompt-cache-bytes",
        type=size,
        default=2**30,
        help="memory for the states at the ends of messages, such as 500MB (default: 1GiB)",
    )
    add(
        "--max-requests",
        type=integer(1),
        default=128,
        help="requests for text at a time; further ones are refused with 429 (default: 128)",
    )
    add(
        "--max-generated-tokens",
        type=integer(1),
        default=32768,
        help="tokens that a request may ask for (default: 32768)",
    )
    add(
        "--max-prompt-tokens",
        type=integer(1),
        default=1048576,
        help="tokens to read for one request at most (default: 1048576)",
    )
    add(
        "--max-body-bytes",
        type=size,
        default=8 * 2**20,
        help="size of a request at most (default: 8MiB)",
    )
    add(
        "--request-timeout",
        type=number(0, above=True),
        default=600.0,
        help="seconds for an answer at most (default: 600)",
    )
    add(
        "--log-level",
        choices=LEVELS,
        default="INFO",
        help="INFO logs a line for each request, without its text (default: INFO).",
    )
    return parser


def names(text: str) -> tuple[str, ...]:
    """Argparse type: words joined by commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def size(text: str) -> int:
    """Argparse type: bytes, with a unit or without."""
    number = text.rstrip("BKMGTbi kmgt").strip()
    unit = text[len(number) :].strip().upper().removesuffix("B")
    power = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}.get(unit.removesuffix("I"))
    if power is None or not (number.isascii() and number.isdecimal() and len(number) < 16):
        raise argparse.ArgumentTypeError(
            f"must be a number of bytes such as 500MB or 2GiB but got {text!r}"
        )
    return int(number) * (1024 if unit.endswith("I") else 1000) ** power


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    check_host(args)
    logging.basicConfig(format="%(asctime)s %(message)s", level=args.log_level, stream=sys.stderr)

    # Seconds of imports, which --help and a mistyped flag need not wait for.
    from . import loading
    from .sampling import model_defaults

    directory = loading.resolve(args.model)
    parser.set_defaults(**model_defaults(directory) | {"max_tokens": 512})
    serve(*make_server(parser.parse_args(argv), directory))
    # All is done and flushed. Ending in order, with threads of MLX and of clients who linger, the
    # interpreter now and then aborts.
    os._exit(0)


def check_host(args) -> None:
    """Raise unless only this machine can reach the server, or a key is asked for."""
    if args.api_key is not None and not (args.api_key.isascii() and args.api_key.isprintable()):
        raise MCSDError("--api-key must be printable ASCII but is not.")
    if args.api_key:
        return
    try:
        infos = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise MCSDError(f"--host {args.host} is no address: {error.strerror}.") from error
    if not all(ipaddress.ip_address(info[4][0].partition("%")[0]).is_loopback for info in infos):
        raise MCSDError(
            f"--host {args.host} can be reached from other machines and needs a key: set {KEY}, or "
            "give --api-key."
        )


def make_server(args, directory: Path):
    """Load the model and listen; returns the server and what its requests share."""
    from . import loading
    from .server.engine import Engine
    from .server.http import Policy, Server
    from .server.prefixes import Prefixes
    from .server.prompts import Prompts
    from .server.protocol import Limits, Sampling
    from .server.routes import App, Slots, make_handler
    from .server.sessions import Sessions
    from .state import State

    def load():
        tokenizer = loading.load_tokenizer(directory)
        model = loading.load_model(directory)
        if args.adapter_path is not None:
            loading.load_adapters(model, args.adapter_path)
        return model, tokenizer, State.load(args.state, model) if args.state else None

    policy = Policy(
        api_key=args.api_key or None,
        hosts=frozenset(name.lower() for name in (args.host, *args.allowed_hosts)),
        origins=frozenset(args.allowed_origins),
        body_bytes=args.max_body_bytes,
    )
    with ExitStack() as undo:
        # The port first: a mistake in it should not wait for the weights.
        server = Server((args.host, args.port), None, policy)
        undo.callback(server.server_close)
        engine = Engine(
            load,
            Prefixes(args.prompt_cache_bytes),
            decode_concurrency=args.decode_concurrency,
            prompt_concurrency=args.prompt_concurrency,
            prefill_step_size=args.prefill_step_size,
        )
        undo.callback(engine.close)
        prompts = Prompts(engine, args.max_prompt_tokens)
        app = App(
            # Of a hub model its id; where a directory lies is nobody's business.
            name=args.model if args.model and not os.path.isdir(args.model) else directory.name,
            engine=engine,
            prompts=prompts,
            sessions=Sessions(Path(os.path.expanduser(args.session_dir)), prompts),
            limits=Limits(
                max_tokens=args.max_tokens,
                most_tokens=max(args.max_tokens, args.max_generated_tokens),
                choices=min(16, args.decode_concurrency),
                sampling=Sampling(args.temp, args.top_p, args.min_p, args.top_k),
            ),
            slots=Slots(args.max_requests),
            request_timeout=args.request_timeout,
        )
        server.RequestHandlerClass = make_handler(app)
        undo.pop_all()
    return server, app


def serve(server, app, grace: float = 5) -> None:
    """Serve until SIGINT or SIGTERM; what is being written then has ``grace`` seconds to end.

    A second signal ends it at once.
    """
    asked, hurry = Event(), Event()

    def stop(*_):
        (hurry if asked.is_set() else asked).set()

    before = {sig: signal.signal(sig, stop) for sig in (signal.SIGINT, signal.SIGTERM)}
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    host, port = server.server_address[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"Serving {app.name} at http://{host}:{port} (Ctrl-C ends it)", flush=True)
    try:
        while app.engine.alive and not asked.wait(0.2):
            pass
        failed = not asked.is_set()
        app.stopping = True
        server.shutdown()
        end = time.monotonic() + grace
        while app.slots.taken and time.monotonic() < end and not hurry.wait(0.05):
            pass
        app.engine.close()
        end = time.monotonic() + 2
        while app.slots.taken and time.monotonic() < end:
            time.sleep(0.02)
        server.server_close()
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
    if failed:
        raise MCSDError("the model failed; the lines above say how.")
    print("Stopped.", flush=True)


if __name__ == "__main__":
    main()
