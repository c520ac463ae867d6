"""Matches names against a user's regular expressions, within bounded time.

Python's `re` can take longer than anyone lives, on a short pattern, and cannot be stopped from
within; a process can.
"""

import json
import subprocess
import sys

from mlx_mcsd.errors import MCSDError

SECONDS = 5
LONGEST = 500
"""Characters of a pattern, a replacement or a name."""

SCRIPT = """
import json, re, sys
rules, names = json.load(sys.stdin)
for rule, (pattern, template) in enumerate(rules):
    try:
        re.sub(pattern, template, "")  # the template is parsed even where nothing matches
    except (re.error, IndexError, RecursionError, OverflowError) as error:
        json.dump({"rule": rule, "error": str(error)}, sys.stdout)
        sys.exit()
rules = [(re.compile(pattern), template) for pattern, template in rules]
def first(name):
    for rule, (pattern, template) in enumerate(rules):
        if match := pattern.fullmatch(name):
            return rule, match.expand(template)
json.dump([first(name) for name in names], sys.stdout)
"""


def first_matches(rules, names, where):
    """Return, for each name, (rule, text) of the first rule that matches the whole name, or None.

    Args:
        rules: pairs of a pattern and what its match expands to, in the syntax of Python's `re`.
        names: a list of what to match.
        where: where the rules come from, for the errors.

    Raises:
        MCSDError: a pattern or a replacement that is none, or that takes longer than 5 s.
    """
    for text in (*(text for rule in rules for text in rule), *names):
        if len(text) > LONGEST:
            raise MCSDError(
                f"[convert] {where}: rules and names must have at most {LONGEST} characters but "
                f"{text[:40]!r}... has {len(text)}."
            )
    if not rules:
        return [None] * len(names)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-W", "ignore", "-c", SCRIPT],
            input=json.dumps([rules, names]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise MCSDError(
            f"[convert] {where}: matching must take less than {SECONDS} s but takes longer; avoid "
            "repeats inside repeats, as in (a+)+."
        ) from None
    found = json.loads(done.stdout)
    if isinstance(found, dict):
        pattern, template = rules[found["rule"]]
        raise MCSDError(
            f"[convert] {where}: {pattern!r} -> {template!r} must be a regular expression and its "
            f"replacement but: {found['error']}."
        )
    return found
