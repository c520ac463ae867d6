"""Loading: what is read, in which dtype, and one line for whatever is wrong with a checkpoint."""

import fnmatch
import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from safetensors.numpy import load_file, save_file

import oracle
import tiny
from mlx_mcsd import load, loading
from mlx_mcsd.errors import MCSDError

TOKENS = np.array([[1, 259, 260, 97, 263, 5]])
TEXT = "a b  ab\n\n\tnaïve 漢字 👩‍👩‍👧 🏳️‍🌈  \n "


@pytest.fixture
def directory(tmp_path):
    """A random checkpoint in the layout, with its tokenizer."""
    tiny.write_model(tmp_path / "model")
    return tmp_path / "model"


def edit_config(directory, **changes):
    """Change keys of `config.json`; None removes one."""
    file = directory / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(directory, change):
    """Rewrite the weights after `change(tensors)`, in place."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def write_shards(directory, names=("a", "b")):
    """Split the weights into model-{name}.safetensors with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    shards = [f"model-{name}.safetensors" for name in names]
    index = {name: shards[i % len(shards)] for i, name in enumerate(sorted(tensors))}
    for shard in shards:
        save_file({k: tensors[k] for k in index if index[k] == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def logits(model):
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def dtypes(model):
    return {value.dtype for _, value in tree_flatten(model.parameters())}


# --- what loads --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", oracle.VARIANTS[::4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_layout_loads_as_the_oracle_reads_it(tmp_path, variant, tied):
    config, tensors = tiny.write_model(tmp_path, tie_word_embeddings=tied, **variant)
    model, _ = load(tmp_path)
    want = oracle.logits(config, tensors, TOKENS)
    assert oracle.relative_error(logits(model), want) <= 1e-5


def test_shards_load_as_one_file(directory):
    want = logits(load(directory)[0])
    write_shards(directory)
    np.testing.assert_array_equal(logits(load(str(directory))[0]), want)


def test_run_time_tree_loads_and_no_file_of_it_is_executed(directory, tmp_path):
    model, _ = load(directory)
    want, marker = logits(model), tmp_path / "executed"
    mx.save_safetensors(
        str(directory / "model.safetensors"), dict(tree_flatten(model.parameters()))
    )
    (directory / "shim.py").write_text(f"open({str(marker)!r}, 'w')")
    edit_config(
        directory,
        model_file="shim.py",
        auto_map={"AutoConfig": "shim.Config", "AutoModelForCausalLM": "shim.Model"},
    )
    got, _ = load(directory)
    np.testing.assert_array_equal(logits(got), want)
    remote = {"auto_map": {"AutoTokenizer": ["shim.Slow", "shim.Fast"]}, "tokenizer_class": "Fast"}
    tiny.write_tokenizer(directory, **remote)
    with pytest.raises(MCSDError, match="custom code"):
        load(directory, tokenizer_config={"trust_remote_code": True})
    assert not marker.exists()


@pytest.mark.parametrize("separate", [False, True], ids=["fused", "separate"])
def test_quantized_tree_loads_with_float32_scales(tmp_path, separate):
    tiny.write_model(tmp_path, hidden_size=64, intermediate_size=64, projection="dense")
    model, _ = load(tmp_path)
    nn.quantize(model, group_size=32, bits=8)
    model.set_dtype(mx.float16)
    weights = dict(tree_flatten(model.parameters()))
    if separate:
        for path, module in model.named_modules():
            for whole, parts in getattr(module, "fused", {}).items():
                for kind in ("weight", "scales", "biases"):
                    rows = mx.split(weights.pop(f"{path}.{whole}.{kind}"), len(parts))
                    names = [f"{path}.{part}.{kind}" for part in parts]
                    weights |= dict(zip(names, rows, strict=True))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    edit_config(tmp_path, quantization={"group_size": 32, "bits": 8})
    model.set_dtype(mx.float32)
    got, _ = load(tmp_path)
    assert dtypes(got) == {mx.float32, mx.uint32}
    assert isinstance(got.layers[0].mlp.down_proj, nn.QuantizedLinear)
    np.testing.assert_array_equal(logits(got), logits(model))


def test_dtype_is_float32_on_the_cpu_as_stored_on_a_gpu_and_whatever_is_asked(
    directory, monkeypatch
):
    edit_tensors(directory, lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()}))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert dtypes(load(directory)[0]) == {mx.float32}
    assert dtypes(load(directory, dtype=mx.bfloat16)[0]) == {mx.bfloat16}
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert dtypes(load(directory)[0]) == {mx.float16}


def test_lazy_leaves_the_weights_on_disk(directory):
    size = sum(v.nbytes for v in load_file(directory / "model.safetensors").values())
    before = mx.get_active_memory()
    lazy = loading.load_model(directory, lazy=True)
    assert mx.get_active_memory() - before < size / 10
    eager = loading.load_model(directory)
    assert mx.get_active_memory() - before >= size
    np.testing.assert_array_equal(logits(lazy), logits(eager))


def test_no_path_is_the_bundled_model(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "files", lambda package: tmp_path / package)
    with pytest.raises(MCSDError, match="no bundled model"):
        load()
    home = tmp_path / "mlx_mcsd" / "assets" / "stories"
    shutil.copytree(directory, home)
    assert logits(load()[0]).shape == (1, 6, tiny.VOCAB_SIZE)


def test_hub_id_downloads_no_code(directory, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(directory)

    monkeypatch.setattr(loading, "snapshot_download", download)
    model, _ = load("owner/name-1.6B")
    assert logits(model).shape == (1, 6, tiny.VOCAB_SIZE)
    assert list(asked) == ["owner/name-1.6B"]
    patterns = asked["owner/name-1.6B"]
    assert not any(pattern.endswith("py") for pattern in patterns)
    for file in (*loading.TOKENIZER_FILES, "config.json", "model.safetensors", "LICENSE.txt"):
        assert any(fnmatch.fnmatch(file, pattern) for pattern in patterns), file


def test_end_of_text_of_the_generation_config_wins(directory):
    edit_config(directory, eos_token_id=2)
    assert load(directory)[1].eos_token_ids == {2}
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert load(directory)[1].eos_token_ids == {3, 4}


# --- the tokenizer -----------------------------------------------------------------------------


def test_streamed_text_is_lossless_and_characters_arrive_whole(directory):
    _, tokenizer = load(directory)
    ids = tokenizer.encode(TEXT)
    assert ids[0] == 1  # <s>
    detokenizer, segments = tokenizer.detokenizer, []
    for token in ids[1:]:
        detokenizer.add_token(token)
        segments.append(detokenizer.last_segment)
    detokenizer.finalize()
    assert "".join([*segments, detokenizer.last_segment]) == TEXT
    assert segments.count("👩") == 2  # four byte tokens each, shown with the last one
    assert not any("\ufffd" in segment for segment in segments)


def test_without_a_tokenizer_the_model_comes_alone(directory, tmp_path):
    bare = shutil.copytree(directory, tmp_path / "bare")
    only("tokenizer-notes.txt")(bare)
    model, tokenizer = load(bare)
    assert tokenizer is None
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(model(tokens), load(directory)[0](tokens))


def test_tokenizer_config_is_passed_on(directory):
    assert load(directory)[1].eos_token_ids == set()
    assert load(directory, tokenizer_config={"eos_token": "</s>"})[1].eos_token_ids == {2}


# --- adapters ----------------------------------------------------------------------------------


@pytest.fixture
def adapters(directory, tmp_path):
    """LoRA adapters for `directory`, with weights that matter."""
    model, _ = load(directory)
    config = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 2, "scale": 4.0, "dropout": 0.5, "keys": ["mlp.down_proj"]},
    }
    model.freeze()
    linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"])
    weights = {k: mx.ones_like(v) for k, v in tree_flatten(model.trainable_parameters())}
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "adapters" / "adapters.safetensors"), weights)
    return tmp_path / "adapters"


def test_adapters_change_the_model_without_dropout(directory, adapters):
    model, _ = load(directory)
    plain = logits(model)
    loading.load_adapters(model, adapters)
    assert oracle.relative_error(logits(model), plain) > 1e-2
    np.testing.assert_array_equal(logits(model), logits(model))


def test_unfit_adapters_are_refused(directory, adapters):
    model, _ = load(directory)
    weights = load_file(adapters / "adapters.safetensors")
    save_file({k: v[..., :1] for k, v in weights.items()}, adapters / "adapters.safetensors")
    with pytest.raises(MCSDError, match="do not fit the model"):
        loading.load_adapters(model, adapters)
    (adapters / "adapters.safetensors").unlink()
    with pytest.raises(MCSDError, match=r"adapters\.safetensors"):
        loading.load_adapters(model, adapters)
    (adapters / "adapter_config.json").write_text("{}")
    with pytest.raises(MCSDError, match="lora_parameters, num_layers"):
        loading.load_adapters(model, adapters)


# --- what is wrong with a checkpoint, in one line ----------------------------------------------


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def drop(name):
    return lambda d: edit_tensors(d, lambda t: t.pop(name))


def replace(name, value):
    return lambda d: edit_tensors(d, lambda t: t.update({name: value}))


def rewrite(file, text):
    return lambda d: (d / file).write_text(text)


def unsound_merges(directory):
    """A merge of pieces that are not in the vocabulary."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].append(["no", "piece"])
    path.write_text(json.dumps(content))


def drop_shard(directory):
    write_shards(directory)
    (directory / "model-b.safetensors").unlink()


def store_twice(directory):
    shutil.copy(directory / "model.safetensors", directory / "model-old.safetensors")


def tie(**head):
    """Tie the embedding, and leave a head of another kind."""

    def break_it(directory):
        edit_config(directory, tie_word_embeddings=True)
        for name, value in head.items():
            replace(f"lm_head.{name}", value)(directory)

    return break_it


def tokenizer_config(**config):
    return lambda d: tiny.write_tokenizer(d, **config)


def only(name):
    """Leave, of the files of a tokenizer, `name` alone."""

    def break_it(directory):
        for file in directory.glob("tokenizer*"):
            file.unlink()
        (directory / name).write_text("{}")

    return break_it


U = "model.layers.0.mixer.u_proj.weight"

BROKEN = {
    "config-missing": (lambda d: (d / "config.json").unlink(), ["config.json is missing in"]),
    "config-corrupt": (rewrite("config.json", '{"model_type": "mc'), ["must hold JSON but"]),
    "config-not-an-object": (rewrite("config.json", "[1]"), ["a JSON object", "a list"]),
    "config-not-text": (lambda d: (d / "config.json").write_bytes(b"\xff"), ["must hold JSON"]),
    "other-architecture": (
        lambda d: edit_config(d, model_type="llama"),
        ["model_type must be 'mcsd' but got 'llama'"],
    ),
    "unknown-key": (
        lambda d: edit_config(d, num_chanels=4),
        ["'num_chanels' (did you mean 'num_channels'?)"],
    ),
    "missing-key": (lambda d: edit_config(d, hidden_size=None), ["missing key 'hidden_size'"]),
    "generation-config-corrupt": (rewrite("generation_config.json", "{"), ["must hold JSON"]),
    "quantization-corrupt": (
        lambda d: edit_config(d, quantization={"bits": 4}),
        ["quantization must have group_size and bits but is {'bits': 4}"],
    ),
    "foreign-quantization": (
        lambda d: edit_config(d, quantization_config={"quant_method": "bitsandbytes"}),
        ["quantized in a way MLX does not write"],
    ),
    "no-weights": (lambda d: (d / "model.safetensors").unlink(), ["no weights in"]),
    "weights-truncated": (
        lambda d: truncate(d / "model.safetensors"),
        ["model.safetensors must be a whole safetensors file"],
    ),
    "weights-corrupt": (rewrite("model.safetensors", "no header"), ["a whole safetensors file"]),
    "weights-empty": (rewrite("model.safetensors", ""), ["a whole safetensors file"]),
    "shard-missing": (drop_shard, ["its index names model-b.safetensors"]),
    "index-corrupt": (rewrite("model.safetensors.index.json", "{}"), ["a weight_map"]),
    "stored-twice": (store_twice, ["and 20 more of", "model.safetensors are stored twice"]),
    "tensor-missing": (drop(U), [f"missing {U}."]),
    "tensor-unexpected": (
        replace("model.layers.7.extra", np.zeros(3)),
        ["unexpected model.layers.7.extra."],
    ),
    "tensor-misnamed": (
        lambda d: edit_tensors(d, lambda t: t.update({"a": t.pop("model.norm.weight")})),
        ["missing model.norm.weight; unexpected a."],
    ),
    "wrong-shape": (
        replace(U, np.zeros((2, 12, 13), np.float32)),
        [f"{U} must have shape (2, 12, 12) but has (2, 12, 13)"],
    ),
    "wrong-type": (
        replace(U, np.zeros((2, 12, 12), np.int32)),
        [f"{U} must be stored as BF16, F16, F32 but is I32"],
    ),
    "wrong-size-in-the-config": (
        lambda d: edit_config(d, intermediate_size=80),
        ["mlp.down_proj.weight must have shape (24, 80) but has (24, 40)"],
    ),
    "huge-sizes-in-the-config": (  # arrays of exabytes, if they were made
        lambda d: edit_config(d, vocab_size=2**31 - 1, intermediate_size=2**30 - 1),
        ["must have shape (2147483647, 24) but has (272, 24)"],
    ),
    "tied-head-of-another-shape": (
        tie(weight=np.zeros((3, 24), np.float32)),
        ["lm_head.weight must have shape (272, 24) but has (3, 24)"],
    ),
    "tied-head-of-another-type": (
        tie(weight=np.zeros((272, 24), np.int32)),
        ["lm_head.weight must be stored as BF16, F16, F32 but is I32"],
    ),
    "tokenizer-missing": (
        lambda d: (d / "tokenizer.json").unlink(),
        ["no tokenizer in", "tokenizer.json is missing"],
    ),
    "tokenizer-corrupt": (lambda d: truncate(d / "tokenizer.json"), ["must hold JSON"]),
    "tokenizer-unsound": (unsound_merges, ["the tokenizer in", "does not load", "vocabulary"]),
    "tokenizer-empty": (rewrite("tokenizer.json", "{}"), ["the tokenizer in", "does not load"]),
    "tokenizer-config-corrupt": (rewrite("tokenizer_config.json", "{"), ["must hold JSON"]),
    "tokenizer-config-alone": (only("tokenizer_config.json"), ["tokenizer.json is missing"]),
    "tokenizer-model-alone": (only("tokenizer.model"), ["tokenizer.json is missing"]),
    "tokenizer-of-an-unknown-tool-parser": (
        tokenizer_config(tool_parser_type="x"),
        ["does not load: ModuleNotFoundError: No module named 'mlx_lm.tool_parsers.x'."],
    ),
    "tokenizer-of-an-unknown-chat-template": (
        tokenizer_config(chat_template_type="x"),
        ["does not load: ModuleNotFoundError: No module named 'mlx_lm.chat_templates.x'."],
    ),
    "tokenizer-that-cannot-encode": (
        tokenizer_config(model_max_length="x"),
        ["does not load: TypeError: "],
    ),
    "vocabulary-too-small": (
        lambda d: edit_config(d, vocab_size=200),
        ["vocabulary is smaller", "vocab_size is 200, the tokenizer needs 265"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint_is_one_line_before_any_weight_is_read(directory, monkeypatch, name):
    def read(*_, **__):
        pytest.fail("the weights were read")

    monkeypatch.setattr(mlx_lm.utils, "load_model", read)
    break_it, expected = BROKEN[name]
    break_it(directory)
    with pytest.raises(MCSDError) as caught:
        load(directory)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_packing_that_the_settings_do_not_fit_is_one_line(directory):
    edit_config(directory, quantization={"group_size": 32, "bits": 4})
    replace("model.norm.scales", np.zeros(3, np.float16))(directory)
    with pytest.raises(
        MCSDError, match=r"do not fit their config: .*model\.norm\.scales"
    ) as caught:
        load(directory)
    assert "\n" not in str(caught.value)


def test_tied_head_that_differs_is_refused(directory):
    edit_config(directory, tie_word_embeddings=True)
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    replace("lm_head.weight", embedding)(directory)
    want = logits(load(directory)[0])
    edit_tensors(directory, lambda t: t.pop("lm_head.weight"))
    np.testing.assert_array_equal(logits(load(directory)[0]), want)
    for kind, head in (("weight", 1.001 * embedding), ("scales", embedding)):
        replace(f"lm_head.{kind}", head)(directory)
        with pytest.raises(MCSDError, match=rf"^\[Model\] lm_head\.{kind} must equal"):
            load(directory)
        drop(f"lm_head.{kind}")(directory)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("nowhere", "nowhere"),
        ("/no/such/directory", "/no/such/directory"),
        ("owner/not-on-this-machine", "owner/not-on-this-machine"),
        ("x" * 5000, "x" * 300 + "..."),
        ("owner/" + "x" * 5000, "owner/" + "x" * 294 + "..."),
        ("a\0b", r"'a\x00b'"),
        ("a\nb", r"'a\nb'"),
    ],
    ids=["name", "path", "hub-id", "long", "long-hub-id", "nul", "two-lines"],
)
def test_path_that_is_nothing_is_one_line(path, shown):
    with pytest.raises(MCSDError) as caught:
        load(path)
    assert str(caught.value).startswith(f"[load] no directory {shown}")
    assert "\n" not in str(caught.value)


def test_empty_path_is_not_the_working_directory(directory, monkeypatch):
    monkeypatch.chdir(directory)
    assert load(".")[1] is not None
    with pytest.raises(MCSDError, match="a path must not be empty"):
        load("")


def test_file_in_place_of_a_directory_is_refused(directory):
    with pytest.raises(MCSDError, match="must be a directory but is a file"):
        load(directory / "model.safetensors")


def test_dtype_must_be_floating(directory):
    with pytest.raises(MCSDError, match=r"floating-point type but got mlx\.core\.int32"):
        load(directory, dtype=mx.int32)
