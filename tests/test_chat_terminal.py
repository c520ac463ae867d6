"""The chat on a terminal: editing, Ctrl-C, the end of the input."""

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import tiny


class Terminal:
    """A chat behind a terminal of its own."""

    def __init__(self, root, *argv):
        self.main, side = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_mcsd.chat", *map(str, argv)],
            cwd=root,
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
            preexec_fn=self.take_over,
        )
        os.close(side)
        self.text = ""

    @staticmethod
    def take_over():
        """In the chat's process, before it begins."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        # A test run in a shell's background ignores Ctrl-C, and so would all that it starts.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def type(self, text):
        os.write(self.main, text.encode())

    def interrupt(self):
        """Ctrl-C at a hand's speed: just behind a prompt, Python's readline misses a signal."""
        time.sleep(0.5)
        self.type("\x03")

    def wait_for(self, pattern, seconds=100):
        """The text up to the pattern, which is taken."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            ready, _, _ = select.select([self.main], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.text!r}"
            self.text += os.read(self.main, 4096).decode(errors="replace")
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.main)


@pytest.fixture
def terminal(tmp_path, root: Path):
    """A chat on a terminal, whose replies never end."""
    tiny.write_model(tmp_path)
    tiny.write_tokenizer(tmp_path, chat_template=tiny.TEMPLATE)
    terminal = Terminal(root, "--model", tmp_path, "-m", 10**6, "--temp", 1, "--seed", 0)
    yield terminal
    terminal.close()


def test_ctrl_c_ends_the_reply_and_twice_the_chat(terminal):
    terminal.wait_for("> ")
    terminal.type("a b\n")
    terminal.wait_for(r"a b\r\n[^\r]{8}")
    terminal.type("\x03")
    terminal.wait_for("Interrupted; Ctrl-C once more, or Ctrl-D, leaves.\r\n")
    terminal.wait_for("> ")
    terminal.type("/undo\n")
    terminal.wait_for("Took back the last turn; 0 more can be.")
    terminal.type("/stat\x7fte\n")  # edited: readline is there
    terminal.wait_for("main: 0 tokens in 0.4 KiB, 0 turns to take back")
    terminal.wait_for("> ")
    terminal.type("half a line")
    terminal.wait_for("half a line")
    terminal.interrupt()
    terminal.wait_for("Ctrl-C once more, or Ctrl-D, leaves.")
    terminal.wait_for("> ")
    terminal.interrupt()
    assert terminal.process.wait(30) == 130


def test_the_end_of_the_input_leaves(terminal):
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
