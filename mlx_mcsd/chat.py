"""``python -m mlx_mcsd.chat``: a conversation on the terminal, or line by line on a pipe."""

import os
import re
import shlex
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator

from .cli import Interrupts, Parser, integer, size
from .errors import MCSDError, exits_cleanly
from .sampling import add_arguments, add_eos_tokens, begin, make_sampler, model_defaults

COMMANDS = {
    "help": ("", "show this"),
    "reset": ("", "begin anew"),
    "system": ("[TEXT]", "show the system prompt, or set it and begin anew"),
    "undo": ("[N]", "take back the last turn, or the last N"),
    "retry": ("", "another reply to the last message"),
    "fork": ("NAME", "go on in a copy of this conversation"),
    "switch": ("[NAME]", "go to another conversation, or list them"),
    "save": ("FILE", "save the state to a file"),
    "load": ("FILE", "go on from the state in a file"),
    "state": ("", "what the model holds of the conversation"),
    "params": ("[K=V ...]", "show or set the sampling: temp=0.7 top_p=0.9"),
    "exit": ("", "leave; so does the end of the input, or Ctrl-C twice"),
}
PARAMETERS = (
    *("max_tokens", "temp", "top_p", "min_p", "top_k"),
    *("xtc_probability", "xtc_threshold", "min_tokens_to_keep", "seed"),
)
PLAIN = (
    "This model has no chat template: you and it write one text in turn, a paragraph each. It goes "
    "on where you end; an empty line lets it write another."
)
QUOTES = '"""'
CONTROLS = {c: "\ufffd" for c in [*range(32), *range(127, 160)] if chr(c) not in "\n\t"}
"""What a model writes is text: it moves no cursor and sets no colour."""


def setup_arg_parser() -> Parser:
    """Return the parser."""
    parser = Parser(prog="mlx_mcsd.chat", description="Chat with an MCSD model.")
    add = parser.add_argument
    add("--model", help="a directory or a hub id (default: the bundled storyteller)")
    add("--adapter-path", help="a directory of adapters trained by mlx_lm.lora")
    add("--system-prompt", help="enters once, before the first message")
    add("--state", help="begin from a state that mlx_mcsd.read, generate or chat saved")
    add(
        "--keep",
        type=integer(1),
        default=100,
        help="turns that /undo can take back (default: 100)",
    )
    add_arguments(parser)
    add(
        "--prefill-step-size",
        type=integer(1),
        default=2048,
        help="tokens of a message read at a time: smaller takes less memory (default: 2048)",
    )
    return parser


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    argv = sys.argv[1:] if argv is None else argv
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    if sys.stdin is None:
        raise MCSDError("a chat needs standard input but it is closed.")

    # Seconds of imports, which --help and a mistyped flag need not wait for.
    from . import loading
    from .session import Session
    from .state import State

    directory = loading.resolve(args.model)
    parser.set_defaults(**model_defaults(directory))
    args = parser.parse_args(argv)
    tokenizer = loading.load_tokenizer(directory)
    model = loading.load_model(directory)
    if args.adapter_path is not None:
        loading.load_adapters(model, args.adapter_path)
    add_eos_tokens(tokenizer, args.extra_eos_token)
    state = State(model) if args.state is None else State.load(args.state, model)
    begin(args.seed, state)
    session = Session(
        *(model, tokenizer, state, args.system_prompt, args.keep, args.prefill_step_size),
        begun=follows_reply(state),
    )
    say("/help lists the commands; the end of the input, Ctrl-D, leaves.")
    if session.plain:
        say(PLAIN)
    Chat(session, args, shlex.join(["mlx_mcsd.chat", *argv])).run()


def follows_reply(state) -> bool:
    """Whether a loaded state ends with a reply; one that only read a text does not."""
    return bool(state.command) and not state.command.startswith("mlx_mcsd.read")


def say(text: str) -> None:
    """Print what is not part of the conversation."""
    print(text, file=sys.stderr, flush=True)


class Unread(Exception):
    """Ctrl-C came while a message was read."""


class Chat:
    """Reads messages and commands, and prints replies.

    Args:
        session: the conversations.
        args: of the parser; those of the sampling may change.
        command: what made the states that are saved.
    """

    def __init__(self, session, args, command: str):
        self.session, self.args, self.command = session, args, command
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.interrupted = False
        if self.terminal:
            import readline  # noqa: F401 (editing and history for input)

    def run(self) -> None:
        """Converse until the input ends."""
        for line, quoted in self.messages():
            try:
                if not quoted and (command := self.parse(line)):
                    name, rest = command
                    if name == "exit":
                        return
                    getattr(self, name)(rest)
                elif line.strip() or self.session.plain:
                    self.show(self.session.reply, unescape(line, quoted))
            except MCSDError as error:
                say(f"error: {error}")

    def messages(self) -> Iterator[tuple[str, bool]]:
        """Lines, and texts of several lines between triple quotes, until the input ends."""
        while (line := self.read("> ")) is not None:
            if not line.startswith(QUOTES):
                yield line, False
                continue
            lines = [line.removeprefix(QUOTES)]
            while not lines[-1].endswith(QUOTES):
                if (line := self.read("... ")) is None:
                    say(f"error: a text in {QUOTES} must end with {QUOTES} but the input ended.")
                    return
                lines.append(line)
            yield "\n".join(lines).removesuffix(QUOTES), True

    def read(self, prompt: str) -> str | None:
        """Return a line; None where the input ends. Ctrl-C empties it, and leaves when repeated."""
        while True:
            try:
                if self.terminal:
                    line = input(prompt)
                elif not (line := sys.stdin.readline()):
                    raise EOFError
                self.interrupted = False
                line = line.removesuffix("\n")
                line.encode()
                return line
            except UnicodeError:
                say("error: a message must be UTF-8 text but is not.")
            except EOFError:
                if self.terminal:
                    print()
                return None
            except KeyboardInterrupt:
                if self.interrupted or not self.terminal:
                    raise
                self.interrupted = True
                say("\nCtrl-C once more, or Ctrl-D, leaves.")

    def parse(self, line: str) -> tuple[str, str] | None:
        """A command and what follows it; None for text, which a line with an unknown word is."""
        word, _, rest = line.partition(" ")
        name, rest = word[1:], rest.strip()
        if not word.startswith("/") or name not in COMMANDS:
            if re.fullmatch(r"/\w+", line):
                say(f"({line} is no command, so it is read as text; /help lists them.)")
            return None
        wanted = COMMANDS[name][0]
        if rest and not wanted:
            raise MCSDError(f"/{name} takes nothing behind it; a text begins with //{name}.")
        if not rest and wanted and not wanted.startswith("["):
            raise MCSDError(f"/{name} needs a {wanted}.")
        return name, rest

    def show(self, reply, *message: str) -> None:
        """Print a reply as it comes, until it ends or Ctrl-C ends it between two tokens."""
        begun = False
        with Interrupts() as interrupts:

            def stop(_):
                if interrupts.asked:
                    raise Unread

            try:
                options = {"progress": stop} if message else {}
                stream = reply(*message, **options, **self.options())
                for response in stream:
                    text = response.text if begun else response.text.lstrip()
                    begun = begun or bool(text)
                    print(text.translate(CONTROLS), end="", flush=True)
                    if interrupts.asked:
                        break
                print(flush=True)
            except Unread:
                say("The message was not read.")
        if interrupts.asked:
            self.interrupted = True
            say("Interrupted; Ctrl-C once more, or Ctrl-D, leaves.")

    def options(self) -> dict:
        """Return how replies are generated."""
        sampler = make_sampler(self.args, self.session.tokenizer)
        return {"sampler": sampler, "max_tokens": self.args.max_tokens}

    # The commands, by their names.

    def help(self, _) -> None:
        """List the commands."""
        for name, (rest, text) in COMMANDS.items():
            print(f"{f'/{name} {rest}':<20}{text}")
        print(f"{QUOTES:<20}begin and end a message of several lines")
        print(f"{'//help':<20}the text /help; other words behind a / are text anyway", flush=True)

    def reset(self, _) -> None:
        """Begin anew."""
        self.session.reset()
        print("Began anew.", flush=True)

    def system(self, text: str) -> None:
        """Show or set the system prompt."""
        if text:
            self.session.reset(text)
            print("Began anew, with this system prompt.", flush=True)
        else:
            print(self.session.system or "There is no system prompt.", flush=True)

    def undo(self, count: str) -> None:
        """Take back turns."""
        whole = count.isascii() and count.isdecimal() and len(count) < 10
        if count and not (whole and int(count)):
            raise MCSDError(f"/undo takes a number of turns, from 1, but got {count[:20]!r}.")
        self.session.undo(count := int(count or 1))
        turns = "the last turn" if count == 1 else f"{count} turns"
        print(f"Took back {turns}; {len(self.session.turns)} more can be.", flush=True)

    def retry(self, _) -> None:
        """Reply again."""
        self.show(self.session.retry)

    def fork(self, name: str) -> None:
        """Branch."""
        old = self.session.name
        self.session.fork(name)
        print(f"This is {name} now; /switch {old} goes back.", flush=True)

    def switch(self, name: str) -> None:
        """Go to a branch, or list them."""
        if name:
            self.session.switch(name)
            print(f"This is {name} now.", flush=True)
        else:
            marked = (f"{n} (here)" if n == self.session.name else n for n in self.session.names())
            print(", ".join(marked), flush=True)

    def save(self, file: str) -> None:
        """Save the state."""
        self.session.state.save(os.path.expanduser(file), self.command)
        print(f"Saved {size(self.session.state.nbytes)} to {file}.", flush=True)

    def load(self, file: str) -> None:
        """Load a state."""
        from .state import State

        state = State.load(os.path.expanduser(file), self.session.model)
        self.session.load(state, follows_reply(state))
        begin(None, state)
        count = state.tokens_seen + len(state.pending)
        print(f"Going on from {file}, behind {count} tokens.", flush=True)

    def state(self, _) -> None:
        """Describe the state."""
        state, turns = self.session.state, len(self.session.turns)
        print(
            f"{self.session.name}: {state.tokens_seen + len(state.pending)} tokens in "
            f"{size(state.nbytes)}, {turns} {'turn' if turns == 1 else 'turns'} to take back",
            flush=True,
        )

    def params(self, text: str) -> None:
        """Show or set the sampling."""
        actions = {action.dest: action for action in setup_arg_parser()._actions}
        new = {}
        for item in text.split():
            key, _, value = item.partition("=")
            if key not in PARAMETERS:
                raise MCSDError(f"/params knows {', '.join(PARAMETERS)}, not {key!r}.")
            try:
                new[key] = actions[key].type(value)
            except ArgumentTypeError as error:
                raise MCSDError(f"{key} {error}.") from None
        vars(self.args).update(new)
        if "seed" in new:
            begin(new["seed"])
        print(" ".join(f"{k}={getattr(self.args, k)}" for k in PARAMETERS), flush=True)


def unescape(line: str, quoted: bool) -> str:
    """A message: ``//help`` is the text ``/help``."""
    word = line.partition(" ")[0]
    return line[1:] if not quoted and word[:2] == "//" and word[2:] in COMMANDS else line


if __name__ == "__main__":
    main()
