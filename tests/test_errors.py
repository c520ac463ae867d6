import subprocess
import sys

import pytest

from mlx_mcsd.errors import MCSDError, exits_cleanly


def test_is_a_value_error():
    with pytest.raises(ValueError, match="two"):
        raise MCSDError("two")


def test_result_and_arguments_pass_through():
    @exits_cleanly
    def main(argv=None, *, extra=0):
        """Doc."""
        return argv, extra

    assert main(["-x"], extra=3) == (["-x"], 3)
    assert main.__doc__ == "Doc."


def test_user_error_is_one_line_and_status_1(capsys):
    @exits_cleanly
    def main(argv=None):
        raise MCSDError("first\nsecond")

    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1
    assert exit.value.__suppress_context__
    assert capsys.readouterr() == ("", "error: first second\n")


def test_interrupt_is_status_130(capsys):
    @exits_cleanly
    def main(argv=None):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("bug", [ValueError("v"), RuntimeError("r"), SystemExit(3)])
def test_bugs_pass_through(bug):
    @exits_cleanly
    def main(argv=None):
        raise bug

    with pytest.raises(type(bug)) as caught:
        main()
    assert caught.value is bug


COMMAND = """
from mlx_mcsd.errors import exits_cleanly
exits_cleanly(lambda: print("naïve", flush={flush}))()
"""


@pytest.mark.parametrize("flush", [True, False], ids=["flushed", "at-the-end"])
@pytest.mark.parametrize(
    ("redirection", "status", "out", "err"),
    [
        ("", 0, "na?ve\n", ""),
        (">/dev/full", 1, "", "error: [Errno 28] No space left on device\n"),
        (">&-", 1, "", "error: standard output must be open but is closed.\n"),
    ],
    ids=["ascii", "full", "closed"],
)
def test_streams(redirection, status, out, err, flush, root):
    """An encoding that lacks a character, a full disk, no stream at all: never a traceback."""
    command = ["sh", "-c", f'exec "$0" -W error "$@" {redirection}', sys.executable, "-c"]
    done = subprocess.run(
        [*command, COMMAND.format(flush=flush)],
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(root), "HOME": "/"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)
