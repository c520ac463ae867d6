"""The generate command: the text, the flags, and one line for every mistake."""

import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.generate import setup_arg_parser as mlx_lm_arguments
from mlx_lm.models.cache import save_prompt_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tiny
from mlx_mcsd import generate, generation, load
from mlx_mcsd.state import State

PROMPT = "a b ab"
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ mood }}{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random model; nothing in the tests writes here."""
    directory = tmp_path_factory.mktemp("generate") / "model"
    tiny.write_model(directory)
    return directory


@pytest.fixture
def chat_directory(tmp_path):
    """A random model with a chat template."""
    tiny.write_model(tmp_path / "chat")
    tiny.write_tokenizer(tmp_path / "chat", chat_template=CHAT)
    return tmp_path / "chat"


@pytest.fixture
def run(directory, capsys):
    """Runs the command on the random model: its standard output, nothing on standard error."""

    def run(*argv, model=directory, err=""):
        generate.main(["--model", str(model), *map(str, argv)])
        out = capsys.readouterr()
        assert out.err == err
        return out.out

    return run


@pytest.fixture
def fails(directory, capsys):
    """Runs the command, which must exit with status 1 and one line; returns that line."""

    def fails(*argv, model=directory):
        with pytest.raises(SystemExit) as caught:
            generate.main(["--model", str(model), *map(str, argv)])
        assert caught.value.code == 1
        line = capsys.readouterr().err
        assert line.startswith("error: ")
        assert line.count("\n") == 1 and line.endswith("\n")
        return line

    return fails


@pytest.fixture
def seen(monkeypatch):
    """Prompts, in tokens, as the token loop gets them; it generates nothing but their first id."""
    prompts = []

    def stream(model, tokenizer, tokens, **options):
        prompts.append(tokenizer.decode(tokens))
        yield from original(model, tokenizer, tokens, **options | {"max_tokens": 1})

    original = generation.stream_generate
    monkeypatch.setattr(generation, "stream_generate", stream)
    return prompts


def greedy(directory, prompt, count):
    """Ids of the likeliest continuation, the whole text read again for each."""
    model, tokenizer = load(directory)
    tokens = tokenizer.encode(prompt)
    for _ in range(count):
        logits = model(mx.array(tokens)[None])[0, -1]  # (K,)
        tokens.append(int(mx.argmax(logits[: len(tokenizer)])))
    return tokens[-count:]


def text_of(directory, ids):
    """What the streaming detokenizer makes of ids."""
    detokenizer = load(directory)[1].detokenizer
    for token in ids:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return detokenizer.text


def force(monkeypatch, ids):
    """Make the sampler choose these ids, whatever the model, and then </s>."""
    ids = iter(ids)
    sampler = lambda _: mx.array([next(ids, tiny.SPECIAL.index("</s>"))])  # noqa: E731
    monkeypatch.setattr(generate, "make_sampler", lambda *_: sampler)


# --- the text ----------------------------------------------------------------------------------


def test_default_is_greedy_and_equals_the_plain_loop(run, directory):
    ids = greedy(directory, PROMPT, 24)
    assert len(set(ids)) > 3
    out = run("-p", PROMPT, "-m", 24, "--verbose", "false")
    assert out == text_of(directory, ids) + "\n"


def test_verbose_prints_prompt_text_and_summary(run, directory):
    text = text_of(directory, greedy(directory, PROMPT, 8))
    out = run("-p", PROMPT, "-m", 8)
    rule = "=" * 10 + "\n"
    assert out.startswith(f"{rule}{PROMPT}{text}\n{rule}")
    prompt, generation, memory, state = out.removeprefix(f"{rule}{PROMPT}{text}\n{rule}").split(
        "\n", 3
    )
    assert prompt.startswith("Prompt: 5 tokens, ") and prompt.endswith(" tokens-per-sec")
    assert generation.startswith("Generation: 8 tokens, ")
    assert memory.startswith("Peak memory: ") and memory.endswith(" GB")
    # L = 2 layers of 2 D = 48 floats and a count: 392 bytes
    assert state == "State: 0.4 KiB, whatever the context length\n"


def test_state_stays_as_small_after_a_long_text(run):
    short = run("-p", PROMPT, "-m", 1)
    long = run("-p", PROMPT * 50, "-m", 60, "--prefill-step-size", 7)
    assert short.splitlines()[-1] == long.splitlines()[-1]


def test_seed_gives_the_same_text_again(run):
    flags = ("-p", PROMPT, "-m", 30, "--temp", 1.2, "--verbose", "false", "--seed")
    first = run(*flags, 3)
    assert run(*flags, 3) == first
    assert run(*flags, 4) != first


@pytest.mark.parametrize(
    "flags",
    [
        ("--top-k", 1),
        ("--top-p", 1e-6),
        ("--min-p", 1),
        ("--temp", 1e-4),
        ("--top-k", 1, "--xtc-probability", 0.9, "--min-tokens-to-keep", 10**6),
    ],
    ids=lambda flags: flags[0],
)
def test_narrowest_sampling_is_greedy(run, directory, flags):
    want = text_of(directory, greedy(directory, PROMPT, 12)) + "\n"
    flags = flags if "--temp" in flags else ("--temp", 1.5, *flags)
    assert run("-p", PROMPT, "-m", 12, "--verbose", "f", *flags) == want


def test_top_k_wider_than_the_vocabulary_and_xtc_sample(run):
    flags = ("-p", PROMPT, "-m", 30, "--temp", 1.5, "--seed", 1, "--verbose", "F")
    plain = run(*flags)
    assert run(*flags, "--top-k", 10**9) == plain
    assert run(*flags, "--xtc-probability", 1, "--xtc-threshold", 0.01) != plain


def test_ids_the_tokenizer_cannot_spell_are_never_sampled(tmp_path, run):
    config, tensors = tiny.write_model(tmp_path)
    tensors["lm_head.weight"][len(tiny.PIECES) :] *= 100
    tiny.oracle.write_checkpoint(tmp_path, config, tensors)
    ids = greedy(tmp_path, PROMPT, 10)
    assert max(ids) < len(tiny.PIECES)
    out = run("-p", PROMPT, "-m", 10, "--verbose", "f", model=tmp_path)
    assert out == text_of(tmp_path, ids) + "\n"


def test_extra_eos_token_ends_the_text(run, directory):
    ids = greedy(directory, PROMPT, 24)
    stop = next(i for i, token in enumerate(ids) if i and token not in ids[:i])
    out = run("-p", PROMPT, "-m", 24, "--verbose", "f", "--extra-eos-token", ids[stop])
    assert out == text_of(directory, ids[:stop]) + "\n"


def test_characters_arrive_whole_and_at_once(run, directory, monkeypatch):
    text = "b a\n\n😀 é 漢"
    tokenizer = load(directory)[1]
    force(monkeypatch, tokenizer.encode(text, add_special_tokens=False))
    pieces = []

    class Recorder(io.StringIO):
        def flush(self):
            pieces.append(self.getvalue())
            self.truncate(0)
            self.seek(0)

    monkeypatch.setattr(sys, "stdout", Recorder())
    generate.main(["--model", str(directory), "--verbose", "false", "--extra-eos-token", "</s>"])
    assert "".join(pieces) == text + "\n"
    # every character by itself, except a space that belongs to the next letter, and behind an
    # emoji, which waits to see whether another joins it
    assert [p for p in pieces if p.strip()] == ["b", " a", "😀 ", "é", "漢"]


def test_interrupt_leaves_the_text_and_status_130(directory, monkeypatch, capsys):
    def stream(*_, **__):
        yield SimpleNamespace(text=" there")
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "stream_generate", stream)
    with pytest.raises(SystemExit) as caught:
        generate.main(["--model", str(directory), "-p", "hello"])
    assert caught.value.code == 130
    out = capsys.readouterr()
    assert (out.out, out.err) == ("==========\nhello there\n", "")


def test_prompt_and_text_meet_as_the_tokenizer_joins_them(tmp_path, run, monkeypatch):
    # A byte-level tokenizer: its detokenizer drops the space that begins a text.
    tiny.write_model(tmp_path)
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    for continuation in (" upon", "upon", ", é"):
        ids = tokenizer.encode(continuation).ids
        force(monkeypatch, ids)
        out = run("-p", "Once", "-m", len(ids), model=tmp_path)
        assert out.split("\n")[1] == f"Once{continuation}"


# --- the prompt --------------------------------------------------------------------------------


def test_prompt_defaults_and_escapes_and_standard_input(run, seen, monkeypatch):
    run()
    run("-p", r"a\nb\tc")
    monkeypatch.setattr(sys, "stdin", io.StringIO("from\nstdin\\n\n"))
    run("--prompt", "-")
    assert seen == ["<s>Once upon a time", "<s>a\nb\tc", "<s>from\nstdin\\n\n"]


def test_chat_template_is_applied(run, seen, chat_directory):
    run("-p", "hi", model=chat_directory)
    run("-p", "hi", "--system-prompt", "be", model=chat_directory)
    run("-p", "hi", "--prefill-response", "so", model=chat_directory)
    run("-p", "hi", "--chat-template-config", '{"mood": "!"}', model=chat_directory)
    out = run("-p", "hi", "--ignore-chat-template", model=chat_directory)
    assert seen == [
        "[user]hi[assistant]",
        "[system]be[user]hi[assistant]",
        "[user]hi[assistant]so",
        "[user]hi[assistant]!",
        "<s>hi",
    ]
    assert out.startswith("==========\nhi")


def test_chat_flags_without_a_template_are_said_to_do_nothing(run):
    warning = (
        "warning: --system-prompt, --prefill-response have no effect without a chat template.\n"
    )
    run("-m", 1, "--system-prompt", "be", "--prefill-response", "so", err=warning)


def test_prompt_cache_continues_where_it_ended(run, fails, directory, tmp_path):
    model, tokenizer = load(directory)
    cache, file = model.make_cache(), tmp_path / "state.safetensors"
    model(mx.array(tokenizer.encode("a b"))[None], cache=cache)
    save_prompt_cache(str(file), cache, {"model": str(directory)})
    want = run("-p", "a b ab", "-m", 12, "--verbose", "f")
    flags = ("-p", " ab", "-m", 12, "--verbose", "f", "--prompt-cache-file", file)
    assert run(*flags) == want
    other = tmp_path / "other"
    tiny.write_model(other, hidden_size=32)
    assert f"was made by the model {directory} but --model is {other}" in fails(*flags, model=other)
    save_prompt_cache(str(file), cache, {"model": str(other)})
    assert "is another model's" in fails(*flags, model=other)
    assert "must be a prompt cache" in fails("--prompt-cache-file", directory / "model.safetensors")
    assert "no prompt cache" in fails("--prompt-cache-file", tmp_path / "none.safetensors")


def test_a_saved_state_continues_as_if_never_stopped(run, fails, directory, tmp_path, root):
    file = tmp_path / "a.state"
    flags = ("--temp", 1.2, "--verbose", "f")
    whole = run("-p", PROMPT, "-m", 30, "--seed", 3, *flags)
    first = run("-p", PROMPT, "-m", 11, "--seed", 3, "--save-state", file, *flags)
    done = process(*map(str, ("--model", directory, "--state", file, "-m", 19, *flags)), cwd=root)
    assert (done.returncode, done.stderr) == (0, b"")
    assert first.removesuffix("\n") + done.stdout.decode() == whole
    assert run("--state", file, "-m", 19, "--seed", 4, *flags) != done.stdout.decode()
    shown = run("--state", file, "-m", 1, "--temp", 0)
    assert shown.startswith("==========\n") and "Prompt: 1 tokens" in shown
    assert "must be a state file" in fails("--state", directory / "model.safetensors")
    assert "goes with neither" in fails("--state", file, "--prompt-cache-file", file)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert "in a directory to write to" in fails(
        "-m", 1, "--save-state", tmp_path / "none" / "a.state"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_prompt_behind_a_state_begins_no_text(run, seen, directory, chat_directory, tmp_path):
    for model, want in ((directory, ["<s>a b", " ab"]), (chat_directory, ["a b", "[user] ab"])):
        flags = () if model is directory else ("--ignore-chat-template",)
        run("-p", "a b", "-m", 1, "--save-state", tmp_path / "a", *flags, model=model)
        run("-p", " ab", "--state", tmp_path / "a", model=model)
        run("--state", tmp_path / "a", model=model)
        assert [seen[0].removeprefix("<s>"), seen[1]] == [
            want[0].removeprefix("<s>"),
            want[1] + ("" if model is directory else "[assistant]"),
        ]
        assert seen[2] == ""
        seen.clear()


def test_ctrl_c_keeps_the_state_of_the_text_shown(directory, tmp_path, monkeypatch, capsys):
    def interrupting(logprobs):
        steps.append(1)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return mx.argmax(logprobs[..., : len(tiny.PIECES)], axis=-1)

    steps, file = [], tmp_path / "a.state"
    monkeypatch.setattr(generate, "make_sampler", lambda *_: interrupting)
    with pytest.raises(SystemExit) as caught:
        generate.main(
            ["--model", str(directory), "-p", PROMPT, "--save-state", str(file), "--verbose", "f"]
        )
    assert caught.value.code == 130
    ids = greedy(directory, PROMPT, 5)
    out = capsys.readouterr()
    assert (out.out, out.err) == (text_of(directory, ids) + "\n", "")
    model, tokenizer = load(directory)
    want = State(model)
    want.read([*tokenizer.encode(PROMPT), *ids])
    state = State.load(file, model)
    assert (state.hash, state.pending) == (want.hash, want.pending)


# --- the model's own sampling ------------------------------------------------------------------


def test_generation_config_sets_the_defaults_and_flags_win(tmp_path, run, fails, directory):
    tiny.write_model(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 1.5, "max_new_tokens": 5}))
    assert "Generation: 5 tokens" in run("-p", PROMPT, model=tmp_path)
    greedy_text = run("-p", PROMPT, "-m", 20, "--verbose", "f", model=tmp_path)
    assert greedy_text == run("-p", PROMPT, "-m", 20, "--verbose", "f")  # no "do_sample"
    file.write_text(json.dumps({"do_sample": True, "temperature": 1.5, "top_k": None}))
    flags = ("-p", PROMPT, "-m", 20, "--verbose", "f", "--seed", 1)
    assert run(*flags, model=tmp_path) == run(*flags, "--temp", 1.5) != greedy_text
    assert run(*flags, "--temp", 0, model=tmp_path) == greedy_text
    file.write_text(json.dumps({"do_sample": True}))
    assert run(*flags, model=tmp_path) == run(*flags, "--temp", 1) != greedy_text
    file.write_text(json.dumps({"top_k": 1}))
    assert run(*flags, "--temp", 1, model=tmp_path) == greedy_text


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("top_p", 7, "a number above 0, at most 1 but got '7'"),
        ("temperature", "hot", "a number of at least 0 but got 'hot'"),
        ("min_p", True, "a number from 0 to 1 but got 'True'"),
        ("top_k", 0.5, "an integer of at least 0 but got '0.5'"),
        ("max_new_tokens", 0, "an integer of at least 1 but got '0'"),
    ],
)
def test_generation_config_is_blamed_for_its_values(tmp_path, fails, key, value, expected):
    tiny.write_model(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, key: value}))
    assert fails(model=tmp_path) == f"error: {key} in {file} must be {expected}.\n"


# --- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["-p", ""], "the prompt must not be empty"),
        (["-p", "\udcff"], "must be UTF-8"),
        (["--temp", "-0.1"], "--temp: must be a number of at least 0 but got '-0.1'"),
        (["--temp", "nan"], "--temp"),
        (["--temp", "inf"], "--temp"),
        (["--top-p", "0"], "--top-p: must be a number above 0, at most 1 but got '0'"),
        (["--top-p", "1.01"], "--top-p"),
        (["--min-p", "2"], "--min-p: must be a number from 0 to 1 but got '2'"),
        (["--top-k", "-1"], "--top-k: must be an integer of at least 0 but got '-1'"),
        (["--top-k", "1.5"], "--top-k"),
        (["-m", "0"], "-m: must be an integer of at least 1 but got '0'"),
        (["--max-tokens", "many"], "got 'many'"),
        (["--seed", "-1"], "--seed"),
        (["--xtc-threshold", "0.6"], "--xtc-threshold"),
        (["--xtc-probability", "2"], "--xtc-probability"),
        (["--min-tokens-to-keep", "0"], "--min-tokens-to-keep"),
        (["--prefill-step-size", "0"], "--prefill-step-size"),
        (["--verbose", "maybe"], "must be true or false but got 'maybe'"),
        (["--chat-template-config", "{"], "must be a JSON object but got '{'"),
        (["--chat-template-config", "[]"], "must be a JSON object but got '[]'"),
        (["--max-kv-size", "8"], "unrecognized arguments: --max-kv-size 8"),
        (["--extra-eos-token", "zz"], "'zz' is no token"),
        (["--extra-eos-token", "265"], "'265' is no token"),
        (["--extra-eos-token", "9" * 5000], "is no token"),
        (["--adapter-path", "nowhere"], "adapter_config.json is missing in nowhere"),
        (["--model", "nowhere"], "no directory nowhere"),
    ],
    ids=" ".join,
)
def test_mistake_is_one_line(fails, flags, expected):
    assert expected in fails(*flags)


def test_empty_or_garbled_standard_input_is_one_line(fails, monkeypatch):
    for data, expected in ((b"", "must not be empty"), (b"\xff\xfe", "must be UTF-8")):
        stdin = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        assert expected in fails("-p", "-")


def test_closed_standard_input_is_one_line(fails, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert "needs standard input but it is closed" in fails("-p", "-")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('no system\nplease') }}", "no system please."),
        ("{{ 1 / 0 }}", "division by zero."),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ 'abc'.index('d') }}", "substring not found."),
        ("{{ '{x}'.format() }}", "'x'."),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{% if %}", "Expected an expression"),
        ("{{ '\ud800' }}", ""),
    ],
    ids=["raises", "division", "recursion", "value", "lookup", "type", "syntax", "surrogate"],
)
def test_template_that_fails_is_one_line(fails, chat_directory, template, why):
    tiny.write_tokenizer(chat_directory, chat_template=template)
    assert f"the chat template refuses these messages: {why}" in fails(model=chat_directory)


def test_a_model_without_a_tokenizer_is_one_line(fails, tmp_path):
    tiny.write_model(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer in" in fails(model=tmp_path)


def test_flags_are_those_of_mlx_lm_but_for_what_a_fixed_state_cannot_use():
    def flags(parser):
        return {flag for action in parser._actions for flag in action.option_strings}

    left_out = flags(mlx_lm_arguments()) - flags(generate.setup_arg_parser())
    assert left_out == {
        "--trust-remote-code",  # nothing of a checkpoint is executed
        "--max-kv-size",
        "--kv-bits",
        "--kv-group-size",
        "--quantized-kv-start",
        "--draft-model",
        "--num-draft-tokens",
        "--image",
        "--quantize-activations",
        "-qa",
        "--use-default-chat-template",  # mlx-lm reads it and does nothing
    }


# --- the process -------------------------------------------------------------------------------


def process(*argv, flags=(), **options):
    command = [sys.executable, *flags, "-m", "mlx_mcsd.generate", *argv]
    return subprocess.run(command, capture_output=True, timeout=120, **options)


def test_process_is_silent_under_warnings_as_errors(directory, root):
    argv = ("--model", directory, "-m", "4", "-p", "-", "--verbose", "false")
    done = process(*argv, flags=("-W", "error"), input=b"a b ab", cwd=root)
    assert (done.returncode, done.stderr) == (0, b"")
    ids = greedy(directory, "a b ab", 4)
    assert done.stdout.decode() == text_of(directory, ids) + "\n"


def test_process_reports_a_mistake_and_help(directory, root):
    done = process("--model", directory, "-m", "-3", cwd=root)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().splitlines() == [
        "error: argument --max-tokens/-m: must be an integer of at least 1 but got '-3' "
        "(see mlx_mcsd.generate --help)"
    ]
    done = process("--help", flags=("-X", "importtime"), cwd=root)
    assert done.returncode == 0 and done.stdout.startswith(b"usage: mlx_mcsd.generate")
    assert b"argparse" in done.stderr and b"mlx.core" not in done.stderr  # nobody waits for MLX


def test_reader_who_leaves_early_gets_no_traceback(directory, root):
    command = [sys.executable, "-m", "mlx_mcsd.generate", "--model", directory, "-m", "100000"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, cwd=root) as running:
        assert running.stdout.readline() == b"==========\n"
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 1
