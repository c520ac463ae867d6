"""Every setting is a flag and a key; what is wrong is told in one line."""

import dataclasses

import pytest

from mlx_mcsd import train
from mlx_mcsd.config import ModelArgs
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.training.config import FIELDS, PRESETS, TrainConfig, changes, read_yaml, to_yaml


def test_every_flag_is_a_setting_and_back():
    parser = train.setup_arg_parser()
    flags = {a.dest for a in parser._actions} - {"help", "config", "resume"}
    assert flags == set(FIELDS)
    words = ["--data", "a", "b", "--no-pack", "--size", "3b", "--iters", "7", "--dropout", ".5"]
    words += ["--sections", "slope", "decay", "--tokenizer", "t", "--output-projection"]
    given = {k: v for k, v in vars(parser.parse_args(words)).items() if k in FIELDS}
    config = TrainConfig(**given)
    assert (config.data, config.pack, config.size) == (("a", "b"), False, "3b")
    assert (config.iters, config.dropout, config.tokenizer) == (7, 0.5, "t")
    assert (config.sections, config.output_projection) == (("slope", "decay"), True)


def test_yaml_gives_back_every_setting(tmp_path):
    config = TrainConfig(data=["ä b", "c"], learning_rate=3e-5, sections=["slope"], pack=True)
    (tmp_path / "c.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert set(read_yaml(tmp_path / "c.yaml")) == set(FIELDS)
    assert TrainConfig(**read_yaml(tmp_path / "c.yaml")) == config


def test_yaml_reads_what_people_write(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-4\ndata: one.txt\nweight_decay: 0\n")
    config = TrainConfig(**read_yaml(tmp_path / "c.yaml"))
    assert (config.learning_rate, config.data, config.weight_decay) == (1e-4, ("one.txt",), 0.0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("batchsize: 4", "'batchsize' is none; did you mean batch_size?"),
        ("zzz: 4", "'zzz' is none."),
        ("batch_size: 0", "batch_size must be an integer of at least 1 but got 0."),
        ("batch_size: true", "batch_size must be an integer of at least 1 but got True."),
        ("dropout: 1", "dropout must be a number of at least 0 and below 1 but got 1.0."),
        ("learning_rate: .nan", "learning_rate must be a number above 0 but got nan."),
        ("learning_rate: fast", "learning_rate must be a number above 0 but got 'fast'."),
        ("dtype: float16", "dtype must be one of float32, bfloat16 but got 'float16'."),
        ("data: [1]", "data must be a list of texts but got (1,)."),
        ("pack: 1", "pack must be true or false but got 1."),
        ("output_dir: 1", "output_dir must be a text but got 1."),
        ("- a", "must hold settings, as key: value, but holds a list."),
        ("a: [", "must be YAML but: while parsing"),
        ("init_from: m\nhidden_size: 3", "hidden_size must not be set with init_from"),
        ("init_from: m\ntokenizer: t", "tokenizer must not be set with init_from"),
        ("init_from: m\nsize: 3b", "size must not be set with init_from"),
        ("val_data: v\nval_fraction: 0.5", "val_fraction must not be set with val_data"),
        ("separator: ''", "separator must not be empty."),
        ("learning_rate: 1.2.3e4", "learning_rate must be a number above 0 but got '1.2.3e4'."),
        ("seed: 100000000000000000000", "seed must be an integer of at least 0 and below 1.8"),
    ],
)
def test_complaints(tmp_path, text, complaint):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(MCSDError) as error:
        TrainConfig(**read_yaml(tmp_path / "c.yaml"))
    assert complaint in str(error.value) and str(error.value).count("\n") == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--iters x", "argument --iters: must be an integer of at least 1 but got 'x'"),
        ("--iters 0", "argument --iters: must be an integer of at least 1 but got 0"),
        ("--dropout inf", "argument --dropout: must be a number of at least 0 and below 1"),
    ],
)
def test_flags_complain(words, complaint):
    with pytest.raises(MCSDError) as error:
        train.setup_arg_parser().parse_args(words.split())
    assert complaint in str(error.value)


def test_every_setting_is_kept_or_told_when_a_run_is_resumed():
    for f in FIELDS.values():
        old = TrainConfig()
        value = next(
            v
            for v in (True, 3, 0.25, "float32", "bfloat16", "3b", "dense", "silu", "add", ("x",))
            if v != getattr(old, f.name) and fits(f.name, v)
        )
        new = dataclasses.replace(old, **{f.name: value})
        if f.name == "output_dir":
            assert changes(old, new) == []
        elif f.metadata["fixed"]:
            with pytest.raises(MCSDError, match=f"{f.name} must stay .* when a run is resumed"):
                changes(old, new)
        else:
            assert changes(old, new) == [
                f"{f.name}: {getattr(old, f.name)}, now {getattr(new, f.name)}"
            ]


def fits(name, value):
    try:
        TrainConfig(**{name: value})
    except MCSDError:
        return False
    return True


@pytest.mark.parametrize(
    ("size", "billions"), [("5m", 0.0048), ("1.6b", 1.75), ("3b", 2.69), ("10b", 10.59)]
)
def test_presets(size, billions):
    """Parameters by the shapes: four D x D of a block, one of 2D x D, three of D x F."""
    args = ModelArgs(**TrainConfig(size=size).shape(), vocab_size=PRESETS[size]["vocab_size"])
    D, F, L, K = (
        *(args.hidden_size, args.intermediate_size, args.num_hidden_layers, args.vocab_size),
    )
    block = 4 * D * D + 2 * D * D * args.output_projection + 3 * D * F
    count = L * block + K * D * (1 if args.tie_word_embeddings else 2)
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_setting_replaces_the_presets():
    shape = TrainConfig(hidden_size=40, sections=["slope"], tie_word_embeddings=False).shape()
    args = ModelArgs(**shape, vocab_size=9)
    assert (args.hidden_size, args.num_channels, args.sections) == (40, 8, ["slope"])
    assert not args.tie_word_embeddings
