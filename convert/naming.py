"""A checkpoint's own names brought to those of the layout, by a user's rules.

A rules file holds a list of rules. The first whose "from" matches a whole name decides: "to" is the
name in the layout, with ``\\1`` for the first group; "ignore" leaves the tensor out and says why. A
name that no rule matches stays as it is::

    {"rules": [
      {"from": "wte\\\\.weight", "to": "model.embed_tokens.weight"},
      {"from": "h\\\\.([0-9]+)\\\\.ln_1\\\\.weight", "to": "model.layers.\\\\1.mixer_norm.weight"},
      {"from": "h\\\\.[0-9]+\\\\.rotary\\\\.freq", "ignore": "MCSD has no rotary embedding"}
    ]}
"""

from pathlib import Path

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import read_json, some

from .matching import first_matches

MOST_BYTES = 1_000_000
EXAMPLE = '{"rules": [{"from": REGEX, "to": NAME} or {"from": REGEX, "ignore": REASON}, ...]}'


def read_rules(file):
    """Return the rules of a file, dictionaries as in the module's example, checked.

    Raises:
        MCSDError: a file that is missing or holds anything else.
    """
    file = Path(file)
    if file.is_file() and file.stat().st_size > MOST_BYTES:
        raise MCSDError(f"[convert] {file} must have at most {MOST_BYTES} bytes but has more.")
    content = read_json(file)
    rules = content.get("rules")
    if content.keys() != {"rules"} or not isinstance(rules, list):
        raise MCSDError(f"[convert] {file} must hold {EXAMPLE} but has {some(content) or 'none'}.")
    for number, rule in enumerate(rules, 1):
        fits = isinstance(rule, dict) and rule.keys() in ({"from", "to"}, {"from", "ignore"})
        if not (fits and all(isinstance(text, str) and text for text in rule.values())):
            raise MCSDError(
                f"[convert] rule {number} of {file} must be two texts, from and to, or from and "
                f"ignore, but is {str(rule)[:100]}."
            )
    return rules


def rename(names, rules, where):
    """Apply rules to the names of a source.

    Args:
        names: of its tensors.
        rules: from `read_rules`.
        where: the file they come from, for the errors.

    Returns:
        Two dictionaries: source name -> name in the layout, and source name -> why it is ignored.

    Raises:
        MCSDError: rules that do not compile or take too long.
    """
    names = list(names)
    pairs = [(rule["from"], rule.get("to", "")) for rule in rules]
    renamed, ignored = {}, {}
    for name, match in zip(names, first_matches(pairs, names, where), strict=True):
        if match is None:
            renamed[name] = name
        elif "ignore" in rules[match[0]]:
            ignored[name] = rules[match[0]]["ignore"]
        else:
            renamed[name] = match[1]
    return renamed, ignored
