"""A few stories and small runs over them, for the tests of the storyteller's examples."""

from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

CASED = """Once upon a time there was a dog named Max. Max had a friend, a girl named Lily.
"Hello, Max!" she said. Her mom smiled. "Go and play," said Mom. So they ran to the park.
<|endoftext|>
One day Lily went to the park with her mom. "Look!" she said. "What a ball!" Then I ran.
She and Max ran fast. I think Max was happy.
<|endoftext|>
Tom liked to swim. Tom and Max swam all day. "I love you, Max!" he said.
<|endoftext|>
A story that is cut off in the mid
"""
LOWER = """nd of one that begins before the file does.
one day max saw his mom. "hello, max!" she said. he ran to lily.

she asked, "can i play?" "go," said mom.
tom and i donâ€™t swim. â€œlook!â€ said lily. she ran to max.
"""


@pytest.fixture
def stories(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    cased, lower, books = tmp_path / "cased.txt", tmp_path / "lower.txt", tmp_path / "books.txt"
    cased.write_text(CASED, encoding="utf-8")
    lower.write_text(LOWER, encoding="utf-8")
    books.write_text("# A book\n\nThe old man\nread a book.\n\n" * 200, encoding="utf-8")
    threads = torch.get_num_threads()
    yield {"cased": cased, "lower": lower, "books": books}
    torch.set_num_threads(threads)


@pytest.fixture
def train(stories):
    import train_stories

    def run(out, steps, **more):
        options = {
            **{"vocab_size": 330, "hidden_size": 16, "channels": 2, "layers": 1},
            **{"intermediate_size": 24, "batch": 2, "length": 16, "steps": steps, "threads": 1},
            **{"evaluate_every": 20, "checkpoint_every": 2},
            **more,
        }
        flags = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
        data = ["--stories", stories["cased"], "--lower", stories["lower"]]
        data += ["--books", stories["books"], "--no-names", "--drills", 2, 2, "--drill-share", 0, 0]
        train_stories.main([*map(str, ["--out", out, *data]), *flags])
        return out

    return run
