"""The documents agree with the code: commands and their flags, the README's words, its links.

`python tests/test_docs.py` writes docs/commands.md anew.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

import pytest

from mlx_mcsd import chat, evaluate, generate, read, serve, train
from mlx_mcsd.bench import __main__ as bench
from mlx_mcsd.convert import __main__ as convert

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "mlx_mcsd.generate": generate.setup_arg_parser,
    "mlx_mcsd.chat": chat.setup_arg_parser,
    "mlx_mcsd.read": read.setup_arg_parser,
    "mlx_mcsd.serve": serve.setup_arg_parser,
    "mlx_mcsd.train": train.setup_arg_parser,
    "mlx_mcsd.convert": convert.setup_arg_parser,
    "mlx_mcsd.evaluate": evaluate.setup_arg_parser,
    "mlx_mcsd.bench": bench.setup_arg_parser,
}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def subcommands(parser):
    """The parsers of a command's subcommands, by name."""
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return actions[0].choices if actions else {}


def parsers():
    """Every command and subcommand with its parser."""
    for name, parser in COMMANDS.items():
        yield name, (parser := parser())
        yield from ((f"{name} {sub}", p) for sub, p in subcommands(parser).items())


def commands_page():
    """The text of docs/commands.md: every flag of every command, from the parsers themselves."""
    lines = [
        "# Commands",
        "",
        "Each runs as `python -m NAME` and, once installed, as `NAME`. Mistakes end in one line on",
        "standard error and exit code 1. This page is written by `python tests/test_docs.py`.",
    ]
    for name, parser in parsers():
        lines += ["", f"## {name}", "", parser.description]
        if subcommands(parser):
            continue
        lines += ["", "| flag | meaning |", "| --- | --- |"]
        for action in parser._actions:
            flags = ", ".join(f"`{flag}`" for flag in action.option_strings or [action.metavar])
            choices = f"; one of {', '.join(action.choices)}" if action.choices else ""
            text = " ".join((action.help % vars(action)).split()).replace("|", r"\|").rstrip(".")
            lines.append(f"| {flags} | {text}{choices} |".replace(r"\n", r"`\n`"))
    return "\n".join(lines) + "\n"


def shell_lines():
    """Every shell line of the documents, with its document."""
    for document in DOCUMENTS:
        for language, block in CODE.findall(document.read_text()):
            if language in ("sh", "shell", "bash"):
                for line in block.replace("\\\n", " ").splitlines():
                    yield pytest.param(line, id=f"{document.name}: {line[:60]}")


def test_commands_page_is_up_to_date():
    assert (ROOT / "docs" / "commands.md").read_text() == commands_page()


@pytest.mark.parametrize("line", list(shell_lines()))
def test_flags_of_documented_commands_exist(line):
    words = shlex.split(line, comments=True)
    name = next((w for w in words if w in COMMANDS), None)
    if name is None:
        # Not a command of ours: then it must be one a reader can type.
        assert words[:1] in (
            [],
            *(["make"], ["git"], ["cd"], ["pip"], ["python"], ["python3"]),
            *(["accelerate"], ["torchrun"]),
        ) or (words[0].startswith(("mlx_lm.", "mlx.launch", ".venv/bin/")))
        return
    arguments = words[words.index(name) + 1 :]
    parser = COMMANDS[name]()
    if subs := subcommands(parser):
        parser = subs[arguments[0]]
    known = {flag for action in parser._actions for flag in action.option_strings}
    assert {w for w in arguments if re.match(r"--?[a-z]", w)} <= known


def anchors(page):
    """What a link to a heading of a page can name: the headings as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_inside_the_tree_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", document.read_text())
    pages = {path: document.parent / path if path else document for path, _ in links}
    assert [path for path, page in pages.items() if not page.exists()] == []
    assert [(path, at) for path, at in links if at and at not in anchors(pages[path])] == []


def test_the_tree_in_the_readme_is_the_tree():
    blocks = [b for _, b in CODE.findall((ROOT / "README.md").read_text()) if "pyproject" in b]
    names = re.findall(r"^( *)(\S+)  +\S", blocks[0], re.MULTILINE)
    folder, missing = "", []
    for indent, name in names:
        if not indent:
            folder = name if name.endswith("/") else ""
        path = (folder if indent else "") + name
        missing += [] if (ROOT / path).exists() else [path]
    assert len(names) > 10
    assert missing == []


def test_python_of_the_readme_runs(capsys):
    blocks = [b for lang, b in CODE.findall((ROOT / "README.md").read_text()) if lang == "python"]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 40


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    (ROOT / "docs" / "commands.md").write_text(commands_page())
    print("Wrote docs/commands.md", file=sys.stderr)
