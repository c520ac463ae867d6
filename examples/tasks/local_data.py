"""Questions of local files for lm_eval: $MLX_MCSD_DATA, or ../shared/data beside the checkout."""

import json
import os
import re
from pathlib import Path

from datasets import Dataset

CHOICE = re.compile(r"\s*(?:Answer|Solution)\d+: ")


def read(name):
    """The content of a data file."""
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    path = Path(os.environ.get("MLX_MCSD_DATA") or beside) / name
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path}: set MLX_MCSD_DATA to the folder of {name}.") from None


def minimal_pairs(file, **_):
    """BLiMP: a grammatical sentence and one that is not, a line."""
    rows = [json.loads(line) for line in read(file).splitlines()]
    pairs = [{"good": row["sentence_good"], "bad": row["sentence_bad"]} for row in rows]
    return {"test": Dataset.from_list(pairs)}


def questions(file, **_):
    """Questions as chat instructions that end in numbered choices, or in true or false."""
    return {"test": Dataset.from_list([question(row) for row in json.loads(read(file))])}


def question(row):
    """The question, its choices and the index of the right one."""
    text, _, _ = row["instruction"].rpartition("\n\nAnswer format:")
    text = text.partition("question: ")[2]
    text, *choices = CHOICE.split(text)
    if not choices:  # true or false
        return {"question": text, "choices": ["no", "yes"], "label": int(row["answer"] == "true")}
    right = int(re.fullmatch(r"(?:answer|solution)(\d+)", row["answer"])[1]) - 1
    return {"question": text, "choices": [c.strip() for c in choices], "label": right}
