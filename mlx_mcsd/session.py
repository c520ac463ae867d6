"""A conversation that can be taken back, asked again and branched, at the cost of a state each."""

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field

from .conversation import encode, render
from .errors import MCSDError
from .generation import read, stream_generate
from .state import Snapshot, State

REPLY = "<reply>"
"""Stands for a reply where what a template writes behind one is looked up."""


@dataclass
class Turn:
    """A message and what was known before and behind it, without the reply."""

    before: Snapshot
    asked: Snapshot
    begun: bool


@dataclass
class Branch:
    """A conversation that is not the current one."""

    snapshot: Snapshot
    turns: deque[Turn]
    begun: bool


@dataclass
class Session:
    """Conversations with a model, of which one is current.

    A turn costs its own tokens only, however many came before, and keeps two snapshots.

    Attributes:
        model: an MCSD model.
        tokenizer: mlx-lm's wrapper, from :func:`mlx_mcsd.load`.
        state: of the current conversation; what it has read at first comes before all of them.
        system: enters once, before the first message.
        keep: turns that can be taken back.
        step_size: tokens of a message read at a time.
        begun: whether a reply ends what was said so far, so that the next message follows one.
        name: of the current conversation.
    """

    model: object
    tokenizer: object
    state: State
    system: str | None = None
    keep: int = 100
    step_size: int = 2048
    begun: bool = False
    name: str = "main"
    turns: deque[Turn] = field(init=False)
    branches: dict[str, Branch] = field(default_factory=dict, init=False)

    def __post_init__(self):
        self.turns = deque(maxlen=self.keep)
        self._base = Branch(self.state.snapshot(), self.turns, self.begun)

    @property
    def plain(self) -> bool:
        """Whether the model has no chat template, so that both sides write one text."""
        return not self.tokenizer.has_chat_template

    def reply(self, message: str, progress=None, **options) -> Generator:
        """Read a message and generate the reply: responses as of :func:`stream_generate`.

        Without a chat template a reply is a paragraph, and an empty message asks for another. What
        ``progress`` raises between two steps takes the message back.
        """
        turn = Turn(self.state.snapshot(), self.state.snapshot(), self.begun)
        tokens = self._tokens(message)
        if not (tokens or self.state.pending):
            raise MCSDError("there is nothing to go on with yet; write something first.")
        try:
            read(self.state, tokens, self.step_size, progress)
        except BaseException:  # an interrupt: nothing was said
            self.state.restore(turn.before)
            raise
        turn.asked = self.state.snapshot()
        self.turns.append(turn)
        return self._generate(options)

    def retry(self, **options) -> Generator:
        """Generate another reply to the last message, from the very state behind it."""
        self._need(1)
        self.state.restore(self.turns[-1].asked)
        return self._generate(options)

    def undo(self, count: int = 1) -> None:
        """Go back before the last messages, to the very state that was."""
        self._need(count)
        for _ in range(count):
            turn = self.turns.pop()
        self.state.restore(turn.before)
        self.begun = turn.begun

    def reset(self, system: str | None = None) -> None:
        """Begin the current conversation anew, with another system prompt if one is given."""
        self.system = self.system if system is None else system
        self.turns = deque(maxlen=self.keep)
        self.state.restore(self._base.snapshot)
        self.begun = self._base.begun

    def fork(self, name: str) -> None:
        """Go on in a copy of the current conversation.

        Raises:
            MCSDError: if there is a conversation of this name.
        """
        if name == self.name or name in self.branches:
            raise MCSDError(f"there is a conversation {name} already; /switch {name} goes there.")
        self._leave()
        self.turns = deque(self.turns, self.keep)
        self.name = name

    def switch(self, name: str) -> None:
        """Go on in another conversation.

        Raises:
            MCSDError: if there is none of this name.
        """
        if name == self.name:
            return
        if name not in self.branches:
            raise MCSDError(f"there is no conversation {name}, only {', '.join(self.names())}.")
        self._leave()
        branch = self.branches.pop(name)
        self.state.restore(branch.snapshot)
        self.turns, self.begun, self.name = branch.turns, branch.begun, name

    def names(self) -> list[str]:
        """Every conversation's name."""
        return sorted([self.name, *self.branches])

    def load(self, state: State, begun: bool) -> None:
        """Go on from a state in place of the current conversation."""
        self.state.restore(state.snapshot())
        self.turns, self.begun = deque(maxlen=self.keep), begun

    def _leave(self) -> None:
        self.branches[self.name] = Branch(self.state.snapshot(), self.turns, self.begun)

    def _need(self, count: int) -> None:
        if count > len(self.turns):
            turns = "turn" if len(self.turns) == 1 else "turns"
            raise MCSDError(f"there are only {len(self.turns)} {turns} to take back, not {count}.")

    def _generate(self, options) -> Generator:
        self.begun = True
        stop = ("\n",) if self.plain else ()
        return stream_generate(
            self.model,
            self.tokenizer,
            state=self.state,
            stop=stop,
            after_text=self.plain,
            **options,
        )

    def _tokens(self, message: str) -> list[int]:
        """What is to be read of a message: with what stands between it and what came before."""
        first = not (self.state.tokens_seen or self.state.pending)
        if self.plain and not message:
            return []
        if self.begun:
            # What comes behind a reply does not depend on what was said, so it is looked up in a
            # short conversation: no turn pays for those before it.
            messages = [("user", "a"), ("assistant", REPLY), ("user", message)]
            text = render(self.tokenizer, messages, reply=True)
            _, found, text = text.partition(REPLY)
            if not found:
                raise MCSDError("the chat template must show replies as they are but does not.")
        else:
            system = [] if self.system is None else [("system", self.system)]
            text = render(self.tokenizer, [*system, ("user", message)], reply=True)
            if not first:
                # Behind a text that was read: its beginning-of-text token is the only one.
                text = f"\n{text}" if self.plain else text.removeprefix(self._bos())
        return encode(self.tokenizer, text, first=first)

    def _bos(self) -> str:
        return self.tokenizer.bos_token or ""
