"""Conversations, to the letter: what is typed, and all that is printed."""

import io
import os
import signal
import sys
import time

import mlx.core as mx
import numpy as np
import pytest

import tiny
from mlx_mcsd import chat, load
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.session import Session
from mlx_mcsd.state import State
from tiny import TEMPLATE

HINT = "/help lists the commands; the end of the input, Ctrl-D, leaves.\n"
PLAIN = (
    "This model has no chat template: you and it write one text in turn, a paragraph each. It goes "
    "on where you end; an empty line lets it write another.\n"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random model without a chat template; nothing in the tests writes here."""
    directory = tmp_path_factory.mktemp("chat") / "plain"
    tiny.write_model(directory)
    return directory


@pytest.fixture(scope="module")
def templated(tmp_path_factory):
    """The same with one."""
    directory = tmp_path_factory.mktemp("chat") / "templated"
    tiny.write_model(directory)
    tiny.write_tokenizer(directory, chat_template=TEMPLATE, eos_token="</s>")
    return directory


@pytest.fixture
def talk(directory, monkeypatch, capsys, tmp_path):
    """Chats: types the lines, lets the model say the replies; standard output and error."""

    def talk(typed, replies=(), *argv, model=directory):
        script = list(replies)
        tokenizer = load(model)[1]

        def scripted(args, _):
            ids = tokenizer.encode(script.pop(0), add_special_tokens=False) if script else []
            ids = iter([*ids, *tokenizer.encode("\n", add_special_tokens=False)])
            return lambda _: mx.array([next(ids, tiny.SPECIAL.index("</s>"))])

        monkeypatch.setattr(chat, "make_sampler", scripted)
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.chdir(tmp_path)
        chat.main(["--model", str(model), *argv])
        assert not script
        out = capsys.readouterr()
        return out.out, out.err

    return talk


class Recorder:
    """What the model read, as text."""

    def __init__(self, monkeypatch, tokenizer):
        self.texts = []
        original = State.read

        def read(state, tokens, *args):
            self.texts.append(tokenizer.decode(tokens))
            original(state, tokens, *args)

        monkeypatch.setattr(State, "read", read)

    def take(self):
        texts, self.texts = [t for t in self.texts if t], []
        return texts


# --- transcripts -------------------------------------------------------------------------------


def test_a_text_written_in_turn(talk, directory, monkeypatch):
    heard = Recorder(monkeypatch, load(directory)[1])
    out, err = talk("a b\nab 漢\n\nb", [" 🙂 ab", " b\n", "\n\nab", "a"])
    assert out == "🙂 ab\nb\nab\na\n"
    assert err == HINT + PLAIN
    assert heard.take() == ["<s>a b", "\nab 漢", "\nb"]


def test_taking_back_and_asking_again(talk):
    typed = "a\n/retry\n/state\nb\n/undo\n/state\n/undo 2\n/undo\n/state\n/retry\n/exit\nnever"
    out, err = talk(typed, [" one", " two", " three"])
    assert out == (
        "one\n"
        "two\n"
        "main: 6 tokens in 0.4 KiB, 1 turn to take back\n"
        "three\n"
        "Took back the last turn; 1 more can be.\n"
        "main: 6 tokens in 0.4 KiB, 1 turn to take back\n"
        "Took back the last turn; 0 more can be.\n"
        "main: 0 tokens in 0.4 KiB, 0 turns to take back\n"
    )
    assert err == HINT + PLAIN + (
        "error: there are only 1 turn to take back, not 2.\n"
        "error: there are only 0 turns to take back, not 1.\n"
    )


def test_branches(talk):
    typed = "a\n/fork b\nb\n/state\n/switch\n/switch main\n/state\n/fork b\n/switch c\n/fork\n"
    out, err = talk(typed, [" one", " two"])
    assert out == (
        "one\n"
        "This is b now; /switch main goes back.\n"
        "two\n"
        "b: 12 tokens in 0.4 KiB, 2 turns to take back\n"
        "b (here), main\n"
        "This is main now.\n"
        "main: 6 tokens in 0.4 KiB, 1 turn to take back\n"
    )
    assert err == HINT + PLAIN + (
        "error: there is a conversation b already; /switch b goes there.\n"
        "error: there is no conversation c, only b, main.\n"
        "error: /fork needs a NAME.\n"
    )


def test_the_system_prompt_enters_once(talk, templated, monkeypatch):
    heard = Recorder(monkeypatch, load(templated)[1])
    typed = "a\nb\n/system\n/system be brief\na\nb\n/reset\na\n\n"
    replies = ["one</s>", "two</s>", "one</s>", "two</s>", "one</s>"]
    out, err = talk(typed, replies, "--system-prompt", "be kind", model=templated)
    assert out == (
        "one\ntwo\nbe kind\nBegan anew, with this system prompt.\none\ntwo\nBegan anew.\none\n"
    )
    assert err == HINT  # nothing about a missing template, and an empty line is no message
    assert heard.take() == [
        "<s>[system]be kind[/]\n[user]a[/]\n[assistant]",
        "[/]\n[user]b[/]\n[assistant]",
        "<s>[system]be brief[/]\n[user]a[/]\n[assistant]",
        "[/]\n[user]b[/]\n[assistant]",
        "<s>[system]be brief[/]\n[user]a[/]\n[assistant]",
    ]


def test_what_looks_like_a_command_is_text(talk, directory, monkeypatch):
    heard = Recorder(monkeypatch, load(directory)[1])
    typed = (
        '/usr/bin is a path\n/hlep\n//undo it\n//x\n / undo\n"""\n/exit\n\nb\n"""\n"""/exit"""\n'
    )
    out, err = talk(typed, ["x"] * 7)
    assert out == "x\n" * 7
    assert err == HINT + PLAIN + (
        "(/hlep is no command, so it is read as text; /help lists them.)\n"
    )
    texts = ["/usr/bin is a path", "/hlep", "/undo it", "//x", " / undo", "\n/exit\n\nb\n", "/exit"]
    assert heard.take() == ["<s>" + texts[0], *(f"\n{text}" for text in texts[1:])]


def test_mistakes_are_one_line_and_the_talk_goes_on(talk):
    typed = (
        f"/reset now\n/undo x\n/undo 0\n/undo {'9' * 5000}\n"
        "/save\n/load none.state\n/save none/a.state\n/load ~/none.state\n/params x=1\n"
        "/params temp=hot\n/params temp\n\n/retry\na\n"
        '"""b\nc'
    )
    out, err = talk(typed, ["", "", "x"])
    assert out == "x\n"
    home = os.path.expanduser("~")
    parameters = (
        "max_tokens, temp, top_p, min_p, top_k, xtc_probability, xtc_threshold, "
        "min_tokens_to_keep, seed"
    )
    assert err == HINT + PLAIN + (
        "error: /reset takes nothing behind it; a text begins with //reset.\n"
        "error: /undo takes a number of turns, from 1, but got 'x'.\n"
        "error: /undo takes a number of turns, from 1, but got '0'.\n"
        "error: /undo takes a number of turns, from 1, but got '99999999999999999999'.\n"
        "error: /save needs a FILE.\n"
        "error: [State] cannot read none.state: No such file or directory.\n"
        "error: cannot write none/a.state: No such file or directory.\n"
        f"error: [State] cannot read {home}/none.state: No such file or directory.\n"
        f"error: /params knows {parameters}, not 'x'.\n"
        "error: temp must be a number of at least 0 but got 'hot'.\n"
        "error: temp must be a number of at least 0 but got ''.\n"
        "error: there is nothing to go on with yet; write something first.\n"
        "error: there are only 0 turns to take back, not 1.\n"
        'error: a text in """ must end with """ but the input ended.\n'
    )


def test_parameters(talk):
    shown = (
        "max_tokens={} temp={} top_p=1 min_p=0 top_k=0 xtc_probability=0.0 xtc_threshold=0.1 "
        "min_tokens_to_keep=1 seed={}\n"
    )
    out, _ = talk(
        "/params\n/params temp=0.5 max_tokens=2\na\n/params seed=7\n", ["abab"], "--temp", "0.9"
    )
    assert out == (
        shown.format(100, 0.9, None) + shown.format(2, 0.5, None) + "ab\n" + shown.format(2, 0.5, 7)
    )


def test_help_names_every_command(talk):
    out, _ = talk("/help\n")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:-2]] == [f"/{name}" for name in chat.COMMANDS]
    assert all(callable(getattr(chat.Chat, name)) for name in chat.COMMANDS if name != "exit")
    assert max(map(len, lines)) <= 80
    assert lines[0] == "/help               show this"


def test_saved_and_loaded_it_goes_on_behind_the_reply(talk, templated, monkeypatch, tmp_path):
    out, _ = talk("a\n/save a.state\n", ["one</s>"], model=templated)
    assert out == "one\nSaved 0.4 KiB to a.state.\n"
    heard = Recorder(monkeypatch, load(templated)[1])
    out, _ = talk("/load a.state\n/undo\nb\n", ["two</s>"], model=templated)
    count = len(load(templated)[1].encode("<s>[user]a[/]\n[assistant]one")) - 1
    assert out == f"Going on from a.state, behind {count} tokens.\ntwo\n"
    assert heard.take() == ["[/]\n[user]b[/]\n[assistant]"]
    out, _ = talk("b\n", ["two</s>"], "--state", "a.state", model=templated)
    assert heard.take() == ["[/]\n[user]b[/]\n[assistant]"]


def test_a_book_comes_before_every_conversation(talk, directory, templated, tmp_path, monkeypatch):
    for model, first in ((directory, "\nbe\nb"), (templated, "[system]be[/]\n[user]b[/]\n[assist")):
        loaded, tokenizer = load(model)
        book = State(loaded)
        book.read(tokenizer.encode("a b"))
        book.save(tmp_path / "book.state", "mlx_mcsd.read book.txt")
        heard = Recorder(monkeypatch, tokenizer)
        flags = ("--state", "book.state", "--system-prompt", "be")
        out, _ = talk("b\n/reset\n/state\nb\n", ["x</s>", "y</s>"], *flags, model=model)
        count = len(tokenizer.encode("a b"))
        state = f"main: {count} tokens in 0.4 KiB, 0 turns to take back\n"
        assert out == f"x\nBegan anew.\n{state}y\n"
        assert [text[: len(first)] for text in heard.take()] == [first, first]


def test_what_a_model_writes_moves_no_cursor(talk):
    out, _ = talk("a\n", ["x\x1b[2Jy\x07\x9bz\tw"])
    assert out == "x\ufffd[2Jy\ufffd\ufffdz\tw\n"


def test_a_line_that_is_no_text_is_told(talk, monkeypatch, capsys, directory):
    stdin = io.TextIOWrapper(
        io.BytesIO(b"a\n\xff\xfe\nb\n"), encoding="utf-8", errors="surrogateescape"
    )
    monkeypatch.setattr(io, "StringIO", lambda _: stdin)
    out, err = talk("", ["x", "y"])
    assert out == "x\ny\n"
    assert err == HINT + PLAIN + "error: a message must be UTF-8 text but is not.\n"


def test_closed_standard_input_is_one_line(monkeypatch, capsys, directory):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as caught:
        chat.main(["--model", str(directory)])
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: a chat needs standard input but it is closed.\n"


# --- long conversations ------------------------------------------------------------------------


def held(state):
    arrays = [np.array(a).tobytes() for c in state.cache for a in c.cache]
    return arrays, state.tokens_seen, state.hash, state.pending, state.tail


def make_session(directory, **options):
    model, tokenizer = load(directory)
    return Session(model, tokenizer, State(model), **options)


def test_a_hundred_turns_are_taken_back_to_the_bit(directory):
    session = make_session(directory)
    states, asked = [], []
    for n in range(120):
        states.append(held(session.state))
        list(session.reply(f"a {n}", max_tokens=3))
        asked.append(held(session.state))
    list(session.retry(max_tokens=3))
    assert held(session.state) == asked[-1]  # greedy: the same reply
    for n in range(119, 19, -1):
        session.undo()
        assert held(session.state) == states[n]
    with pytest.raises(MCSDError, match="only 0 turns to take back"):
        session.undo()


def test_undo_and_branches_keep_what_is_theirs(directory):
    session = make_session(directory, keep=3)
    for n in range(5):
        list(session.reply(f"a {n}", max_tokens=2))
    at_fork = held(session.state)
    session.fork("b")
    session.undo(3)
    list(session.reply("b", max_tokens=2))
    in_b = held(session.state)
    session.switch("main")
    assert held(session.state) == at_fork
    session.undo(3)
    session.switch("b")
    assert held(session.state) == in_b
    session.switch("b")
    assert held(session.state) == in_b


def test_ctrl_c_while_a_message_is_read_takes_the_message_back(talk, monkeypatch):
    original = State.read

    def interrupted(self, ids, step_size, progress):
        monkeypatch.setattr(State, "read", original)
        original(self, ids[:2], step_size)
        os.kill(os.getpid(), signal.SIGINT)
        progress(1)

    monkeypatch.setattr(State, "read", interrupted)
    out, err = talk("a b a b\n/state\na\n", ["", "b"])
    assert out == "main: 0 tokens in 0.4 KiB, 0 turns to take back\nb\n"
    asked = "The message was not read.\nInterrupted; Ctrl-C once more, or Ctrl-D, leaves.\n"
    assert err == HINT + PLAIN + asked


def test_a_turn_costs_its_own_tokens_and_holds_its_own_snapshots(templated, monkeypatch):
    """Turn 200 as turn 101; time is compared with `MLX_MCSD_LONG=1`, on a quiet machine."""
    session = make_session(templated, system="be kind")
    read, figures = [], []
    original = State.read
    monkeypatch.setattr(
        State, "read", lambda self, ids, *a: (read.append(len(ids)), original(self, ids, *a))
    )
    count = 64 if os.environ.get("MLX_MCSD_LONG") else 3
    for n in range(1000, 1200):
        read.clear()
        start = time.process_time()
        list(session.reply(f"a {n}", max_tokens=count))
        seconds = time.process_time() - start
        figures.append((sum(read), mx.get_active_memory(), seconds))
    tokens, memory, _ = figures[100]
    assert figures[-1][0] == tokens
    assert figures[-1][1] <= memory + 20 * session.state.nbytes  # and not 99 snapshots more
    if os.environ.get("MLX_MCSD_LONG"):
        early, late = (np.median([s for *_, s in f]) for f in (figures[100:120], figures[-20:]))
        print(f"CPU time a turn: {early:.4f} s at 101, {late:.4f} s at 200")
        assert late <= 1.1 * early


def test_a_template_that_hides_replies_is_told(templated, tmp_path):
    tiny.write_model(tmp_path)
    tiny.write_tokenizer(tmp_path, chat_template="{{ messages[-1].content }}")
    session = make_session(tmp_path)
    list(session.reply("a", max_tokens=2))
    with pytest.raises(MCSDError, match="must show replies"):
        session.reply("b")
