"""A stranger's tokenizer, tried in a process of its own before it is used in this one.

A `tokenizer.json` is a program of sorts: its rules can let a text grow without end or ask for any
amount of padding, and the library that runs it ends the process on some that are malformed.
"""

import os
import random
import signal
import subprocess
import sys
from functools import lru_cache

from mlx_mcsd.errors import MCSDError

from .readers.files import shown

SECONDS, BYTES = 5, 2 * 2**30
"""Of the processor's time, and of memory (where the system counts it, as Linux does)."""

# A file that does not parse is told of elsewhere.
SCRIPT = f"""
import random, resource, sys
limit = resource.getrlimit(resource.RLIMIT_AS)[1]
try:
    resource.setrlimit(resource.RLIMIT_AS, ({BYTES}, limit))
except (OSError, ValueError):
    pass
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS} + 1))
from tokenizers import Tokenizer
content = sys.stdin.buffer.read().decode()
try:
    tokenizer = Tokenizer.from_str(content)
except Exception:
    sys.exit()
size = tokenizer.get_vocab_size()
words = tokenizer.decode(random.Random(0).choices(range(size), k=100)) if size else ""
special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
for text in (*sys.argv[1:], "".join(f"a{{s}} {{s}}b" for s in special), words):
    tokenizer.encode(text)
    tokenizer.encode_batch([text], add_special_tokens=False)
"""


def own_words(tokenizer):
    """A text of a hundred words that a tokenizer knows, always the same."""
    size = tokenizer.get_vocab_size()
    return tokenizer.decode(random.Random(0).choices(range(size), k=100)) if size else ""


@lru_cache(maxsize=2)
def check(content, texts):
    """Refuse a tokenizer that cannot be used within bounds.

    Args:
        content: the bytes of a `tokenizer.json`.
        texts: what it will be asked to encode, a tuple.

    Raises:
        MCSDError: it takes more time or memory than any honest one, or ends the process.
    """
    quiet = {"RUST_BACKTRACE": "0", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, *texts],
        input=content,
        capture_output=True,
        env=os.environ | quiet,
    )
    if done.returncode:
        reason = "takes too much memory"
        if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
            reason = f"takes more than {SECONDS} s"
        elif done.returncode == 1:  # Python's own end: the last line says why
            reason = shown(done.stderr.decode("utf-8", "replace").strip().splitlines()[-1], 200)
        raise MCSDError(
            f"[convert] tokenizer.json must encode and decode short texts but: {reason}; supply "
            "another, or none."
        )
