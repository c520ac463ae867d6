"""The command: what it refuses before it starts, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

import serving
from mlx_mcsd import serve
from mlx_mcsd.errors import MCSDError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    serving.write_model(directory)
    return directory


def fails(capsys, *flags):
    """The line that a command ends with."""
    with pytest.raises(SystemExit) as exit:
        serve.main(list(flags))
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_help_needs_no_mlx():
    code = (
        "import sys; from mlx_mcsd import serve\n"
        "try: serve.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(m in sys.modules for m in ('mlx.core', 'mlx_lm', 'transformers')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "--prompt-cache-bytes" in run.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "--port: must be an integer from 0 to 65535"),
        (["--host", "0.0.0.0"], "can be reached from other machines and needs a key"),
        (["--host", "::"], "can be reached from other machines and needs a key"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid is no address"),
        (["--api-key", "schlüssel"], "--api-key must be printable ASCII"),
        (["--prompt-cache-bytes", "lots"], "must be a number of bytes such as 500MB or 2GiB"),
        (["--prompt-cache-bytes", "-5MB"], "expected one argument"),
        (["--model", "/nowhere"], "no directory /nowhere"),
        (["--frob"], "unrecognized arguments: --frob"),
    ],
)
def test_mistakes_end_in_a_line(capsys, monkeypatch, flags, message):
    monkeypatch.delenv(serve.KEY, raising=False)
    assert message in fails(capsys, *flags)


def test_a_state_that_does_not_fit_ends_in_a_line(capsys, model, tmp_path):
    (tmp_path / "bad.state").write_bytes(b"PK\x03\x04")
    flags = ["--model", str(model), "--port", "0", "--session-dir", str(tmp_path)]
    message = fails(capsys, *flags, "--state", str(tmp_path / "bad.state"))
    assert "must be a whole state file" in message
    assert "No such file" in fails(capsys, *flags, "--state", str(tmp_path / "none.state"))


def test_a_port_in_use_ends_in_a_line(capsys, model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = ["--model", str(model), "--port", port, "--session-dir", str(tmp_path)]
        assert "Address already in use" in fails(capsys, *flags)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("5", 5), ("2k", 2000), ("500MB", 500 * 10**6), ("2GiB", 2**31), ("1 TB", 10**12)],
)
def test_sizes(text, expected):
    assert serve.size(text) == expected


def test_any_host_with_a_key_and_this_machine_without():
    parser = serve.setup_arg_parser()
    for flags in (
        ["--host", "0.0.0.0", "--api-key", "k"],
        ["--host", "::1"],
        ["--host", "localhost"],
    ):
        serve.check_host(parser.parse_args(flags))
    with pytest.raises(MCSDError):
        serve.check_host(parser.parse_args(["--host", "0.0.0.0", "--api-key", ""]))


@pytest.fixture
def command(model, tmp_path):
    """A running command: (process, address)."""
    flags = ["--model", str(model), "--port", "0", "--session-dir", str(tmp_path), "--temp", "0"]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "mlx_mcsd.serve", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
    )
    line = process.stdout.readline()
    match = re.fullmatch(r"Serving .* at http://(127\.0\.0\.1):(\d+) \(Ctrl-C ends it\)\n", line)
    assert match, (line, process.communicate(timeout=5))
    yield process, (match[1], int(match[2]))
    process.kill()
    process.communicate()


def streaming(address, **options):
    """A connection on which a text is being written."""
    body = {"prompt": "ab", "temperature": 0, "stream": True, **options}
    connection = socket.create_connection(address, timeout=20)
    connection.sendall(serving.request("POST", "/v1/completions", body))
    received = b""
    while b"data: {" not in received:
        received += connection.recv(4096)
    return connection, received


def rest(connection):
    received = b""
    with connection:
        while more := connection.recv(65536):
            received += more
    return received


def test_a_signal_lets_short_texts_end_and_cancels_long_ones(command):
    process, address = command
    short, begun = streaming(address, max_tokens=150, user="s3cret", prompt="s3cret")
    long, _ = streaming(address, max_tokens=30000)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    whole = begun + rest(short)
    assert b'"finish_reason": "length"' in whole and b"data: [DONE]" in whole
    cut = rest(long)
    error = json.loads(re.findall(rb"data: (.*)\n\n", cut)[-1])["error"]
    assert error["message"] == "the server is shutting down."
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - asked < 15
    assert (process.returncode, out) == (0, "Stopped.\n")
    assert "Traceback" not in err
    assert re.search(r"127.0.0.1 'POST /v1/completions' 200 \d+\.\d\ds", err), err
    assert "s3cret" not in err


def test_a_second_signal_ends_it_at_once(command):
    process, address = command
    connection, _ = streaming(address, max_tokens=30000)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert time.monotonic() - asked < 4  # of the five seconds that a text has to end
    assert process.returncode == 0
    assert b"shutting down" in rest(connection)
