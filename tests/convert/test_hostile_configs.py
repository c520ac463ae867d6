"""Small files that want too much: nothing of them is run or rendered, and what is wrong is told."""

import json
import time
from pathlib import Path

import pytest

from converting import convert, edit_json, refused
from mlx_mcsd import load

LOOP = "{% for i in range(999999999) %}{% for j in range(999999999) %}{% endfor %}{% endfor %}"
ESCAPE = "{{ cycler.__init__.__globals__.os.system('touch canary') }}"


def settings(**changes):
    """Change the tokenizer's settings."""
    return lambda source: edit_json(source / "tokenizer_config.json", **changes)


def part(key, **content):
    """Put a component into the tokenizer."""
    return lambda source: edit_json(source / "tokenizer.json", **{key: content})


def growing(kind, chain):
    """Steps of which each makes ten thousand letters of one."""
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10_000}
    return part(kind, type="Sequence", **{chain: [step] * 4})


START = {"SpecialToken": {"id": "<nobody>", "type_id": 0}}


def generation(content):
    """Write the settings of generation."""
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda source: (source / "generation_config.json").write_text(text)


def special(content):
    """Write the names of special tokens."""
    return lambda source: (source / "special_tokens_map.json").write_text(json.dumps(content))


def code(source):
    """Leave Python files of every name that a config may point to."""
    for name in ("evil", "tokenization_mcsd", "modeling_mcsd", "mcsd", "conftest", "setup"):
        (source / f"{name}.py").write_text("open('canary', 'w')\nclass Evil: pass\n")


HARMLESS = {
    "template that loops": settings(chat_template=LOOP),
    "template that escapes": settings(chat_template=ESCAPE),
    "template of a file": lambda s: (s / "chat_template.jinja").write_text(LOOP + ESCAPE),
    "code for a tokenizer": lambda s: (
        code(s),
        settings(auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})(s),
    ),
    "code for a model": lambda s: (
        code(s),
        edit_json(
            s / "config.json",
            auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
            model_file="evil.py",
        ),
    ),
    "code for both at a hub": lambda s: (
        settings(auto_map={"AutoTokenizer": ["nobody/evil--evil.Evil", None]})(s),
        edit_json(s / "config.json", auto_map={"AutoConfig": "nobody/evil--evil.Evil"}),
    ),
}

REFUSED = {
    "tokenizer settings a list": lambda s: (s / "tokenizer_config.json").write_text("[]"),
    "tokenizer settings nested": lambda s: (s / "tokenizer_config.json").write_text("[" * 10**5),
    "tokenizer nested": lambda s: (s / "tokenizer.json").write_text('{"a":' * 10**5),
    "tokenizer of nothing": lambda s: (s / "tokenizer.json").write_text("{}"),
    "tokenizer a list": lambda s: (s / "tokenizer.json").write_text("[]"),
    "tokenizer empty": lambda s: (s / "tokenizer.json").write_bytes(b""),
    "tokenizer no UTF-8": lambda s: (s / "tokenizer.json").write_bytes(b'{"\xff": 1}'),
    "tokenizer of another model": lambda s: edit_json(s / "tokenizer.json", model={"type": "Evil"}),
    "tokenizer of many values": lambda s: (s / "tokenizer.json").write_text(
        '{"a": [' + "0," * 5_000_000 + "0]}"
    ),
    "tokenizer that pads": part(
        "padding",
        strategy={"Fixed": 2 * 10**9},
        direction="Right",
        pad_to_multiple_of=None,
        pad_id=0,
        pad_type_id=0,
        pad_token="<unk>",
    ),
    "tokenizer that panics": part(
        "post_processor", type="TemplateProcessing", single=[START], pair=[], special_tokens={}
    ),
    "tokenizer of no words": part("model", type="WordLevel", vocab={}, unk_token="x"),
    "tokenizer with a map of nothing": part(
        "normalizer", type="Precompiled", precompiled_charsmap="AAAAAA=="
    ),
    "tokenizer that grows": growing("normalizer", "normalizers"),
    "tokenizer whose words grow": growing("decoder", "decoders"),
    "end of text a word": generation({"eos_token_id": "x"}),
    "end of text a table": generation({"eos_token_id": {"a": 1}}),
    "end of text nested": generation({"eos_token_id": [[1]]}),
    "end of text infinite": generation('{"eos_token_id": 1e999}'),
    "end of text below zero": generation({"eos_token_id": -1}),
    "end of text beyond the vocabulary": generation({"eos_token_id": 10**30}),
    "generation a list": generation([]),
    "generation no JSON": generation("{"),
    "generation nested": generation('{"a":' * 10**5),
}


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """Run in an empty directory."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


@pytest.mark.parametrize("spoil", HARMLESS.values(), ids=HARMLESS)
def test_nothing_is_run(source, target, spoil, empty):
    """Code and templates stay what they are: text, which is not even looked at."""
    spoil(source)
    start = time.monotonic()
    convert(source, target)
    assert time.monotonic() - start < 10
    assert not list(empty.iterdir()) and not list(Path(source).glob("__pycache__"))
    assert [file.name for file in target.glob("*.py")] == ["mcsd.py"]
    assert "evil" not in (target / "config.json").read_text()
    load(target)
    assert not list(empty.iterdir())


@pytest.mark.parametrize("spoil", REFUSED.values(), ids=REFUSED)
def test_refused(source, target, spoil, capsys):
    """One line that names the file, within a moment, and nothing made."""
    spoil(source)
    start = time.monotonic()
    line = refused(capsys, "--hf-path", source, "--mlx-path", target)
    assert time.monotonic() - start < 10
    assert any(word in line for word in ("tokenizer", "generation_config", "eos_token_id")), line
    assert not target.exists()
