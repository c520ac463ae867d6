import dataclasses
import json

import pytest

from mlx_mcsd.config import SECTIONS, ModelArgs
from mlx_mcsd.errors import MCSDError

REQUIRED = {
    "vocab_size": 100,
    "hidden_size": 24,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
}


def test_defaults():
    args = ModelArgs.from_dict(REQUIRED)
    assert args == ModelArgs(**REQUIRED)
    assert dataclasses.asdict(args) == REQUIRED | {
        "model_type": "mcsd",
        "projection": "channel",
        "fusion": "add",
        "output_projection": False,
        "sections": ["slope", "decay"],
        "mixer": "mcsd",
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


GOOD = [
    {"projection": "dense"},
    {"fusion": "concat", "output_projection": True},
    {"output_projection": True},
    *({"sections": sections} for sections in SECTIONS),
    {"hidden_act": "gelu_pytorch_tanh"},
    {"hidden_act": "silu"},
    {"hidden_size": 40, "num_channels": 20},
    {"num_channels": 1},
    {"vocab_size": 2**31 - 1, "intermediate_size": 2**30 - 1},
    {"hidden_size": 2**29 - 2, "num_hidden_layers": 1000},
    {"rms_norm_eps": 1},
    {"tie_word_embeddings": True},
    {"bos_token_id": 0, "eos_token_id": [1, 99], "pad_token_id": None},
]


@pytest.mark.parametrize("change", GOOD, ids=str)
def test_accepts(change):
    args = dataclasses.asdict(ModelArgs.from_dict(REQUIRED | change))
    assert {key: args[key] for key in change} == change


BAD = [
    ({"model_type": "llama"}, "model_type must be 'mcsd' but got 'llama'."),
    ({"hidden_size": 100, "num_channels": 8}, "divisible by num_channels but got 100 and 8."),
    ({"hidden_size": 42, "num_channels": 21}, "num_channels must be at most 20"),
    *(
        ({key: value}, f"{key} must be a positive integer but got {value!r}.")
        for key, value in [
            ("vocab_size", 0),
            ("hidden_size", -24),
            ("num_channels", 3.0),
            ("num_hidden_layers", True),
            ("intermediate_size", "40"),
            ("max_position_embeddings", None),
        ]
    ),
    *(
        ({key: value}, f"{key} must be at most {most} but got {value}.")
        for key, most, value in [
            ("vocab_size", 2**31 - 1, 2**31),
            ("hidden_size", 2**29 - 1, 2**40),
            ("intermediate_size", 2**30 - 1, 10**30),
            ("num_hidden_layers", 1000, 10**9),
        ]
    ),
    ({"projection": "Dense"}, "projection must be 'channel' or 'dense' but got 'Dense'."),
    ({"projection": ["dense"]}, "projection must be 'channel' or 'dense' but got ['dense']."),
    ({"fusion": "mul"}, "fusion must be 'add' or 'concat' but got 'mul'."),
    ({"fusion": "concat"}, 'fusion "concat" needs output_projection to be true'),
    ({"output_projection": 1}, "output_projection must be true or false but got 1."),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false but got 'no'."),
    ({"hidden_act": "relu"}, "hidden_act must be 'gelu' or 'gelu_pytorch_tanh' or 'silu'"),
    ({"sections": ["decay", "slope"]}, "sections must be one of ['slope', 'decay'], ['slope']"),
    ({"sections": "slope"}, "but got 'slope'."),
    ({"sections": []}, "sections must be one of"),
    ({"mixer": None}, "mixer must be a string but got None."),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number but got 0."),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number but got nan."),
    ({"rms_norm_eps": 10**400}, f"rms_norm_eps must be a positive number but got {10**400}."),
    ({"initializer_range": float("inf")}, "initializer_range must be a positive number"),
    ({"initializer_range": "0.02"}, "initializer_range must be a positive number but got '0.02'."),
    ({"eos_token_id": 100}, "eos_token_id must be within the vocabulary, 0 to 99, but got 100."),
    ({"pad_token_id": -1}, "pad_token_id must be within the vocabulary, 0 to 99, but got -1."),
    ({"bos_token_id": True}, "bos_token_id must be null, an integer or a list of integers"),
    ({"eos_token_id": [1, "2"]}, "eos_token_id must be null, an integer or a list of integers"),
    ({"eos_token_id": [1, 100]}, "eos_token_id must be within the vocabulary"),
]


@pytest.mark.parametrize("change, complaint", BAD, ids=[str(change)[:80] for change, _ in BAD])
def test_refuses(change, complaint):
    for build in (ModelArgs.from_dict, lambda config: ModelArgs(**config)):
        with pytest.raises(MCSDError) as error:
            build(REQUIRED | change)
        message = str(error.value)
        assert message.startswith("[ModelArgs] ")
        assert complaint in message
        assert "\n" not in message


def test_unknown_keys_are_named_with_the_likely_one():
    config = REQUIRED | {"num_channel": 3, "rope_theta": 1e4}
    with pytest.raises(MCSDError) as error:
        ModelArgs.from_dict(config)
    assert str(error.value) == (
        "[ModelArgs] unknown keys 'num_channel' (did you mean 'num_channels'?), 'rope_theta' "
        "in the config; remove or correct it."
    )


def test_missing_keys_are_named_all_at_once():
    with pytest.raises(MCSDError) as error:
        ModelArgs.from_dict({"model_type": "mcsd", "vocab_size": 10, "num_channels": 2})
    assert str(error.value) == (
        "[ModelArgs] missing keys 'hidden_size', 'num_hidden_layers', 'intermediate_size' "
        "in the config."
    )


def test_another_architecture_is_named_before_its_keys():
    with pytest.raises(MCSDError, match="model_type must be 'mcsd' but got 'llama'"):
        ModelArgs.from_dict({"model_type": "llama", "num_attention_heads": 8})


def test_reads_what_transformers_writes(tmp_path):
    """Both the short form and the full one, with every default transformers adds."""
    from transformers import PretrainedConfig

    class Config(PretrainedConfig):
        model_type = "mcsd"

        def __init__(self, sections=("slope",), **kwargs):
            self.sections = list(sections)
            for key, value in REQUIRED.items():
                setattr(self, key, kwargs.pop(key, value))
            super().__init__(**kwargs)

    config = Config(bos_token_id=1, eos_token_id=[2, 3], dtype="bfloat16")
    config.save_pretrained(tmp_path)
    short = json.loads((tmp_path / "config.json").read_text())
    full = json.loads(config.to_json_string(use_diff=False))
    assert "id2label" in full and "id2label" not in short
    for content in (short, full, config.to_dict()):
        args = ModelArgs.from_dict(content)
        assert (args.sections, args.bos_token_id, args.eos_token_id) == (["slope"], 1, [2, 3])
        assert args.hidden_size == REQUIRED["hidden_size"]


def test_reads_what_mlx_lm_adds():
    quantization = {"group_size": 32, "bits": 4, "mode": "affine"}
    added = {
        "model_file": "shim.py",
        "quantization": quantization,
        "quantization_config": quantization,
        "quantize_activations": False,
        "_name_or_path": "x",
    }
    assert ModelArgs.from_dict(REQUIRED | added) == ModelArgs(**REQUIRED)
