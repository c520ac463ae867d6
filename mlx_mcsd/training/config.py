"""The settings of a run: each is written once, here, and is a flag and a key of the YAML file."""

import argparse
import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from .. import cli
from ..errors import MCSDError

PRESETS = {
    "5m": dict(
        hidden_size=256,
        num_channels=8,
        num_hidden_layers=5,
        intermediate_size=768,
        vocab_size=2048,
        projection="dense",
        tie_word_embeddings=True,
    ),
    **{
        size: dict(
            hidden_size=D,
            num_channels=C,
            num_hidden_layers=L,
            intermediate_size=4 * D,
            vocab_size=65536,
            projection="dense",
            fusion="concat",
            output_projection=True,
        )
        for size, D, C, L in (("1.6b", 2560, 10, 12), ("3b", 2560, 10, 20), ("10b", 3072, 12, 60))
    },
}
"""Shapes by name: one of the bundled model's kind, and the paper's three."""

Texts = tuple[str, ...]

SHAPE = (
    *("hidden_size", "num_channels", "num_hidden_layers", "intermediate_size", "projection"),
    *("fusion", "output_projection", "sections", "hidden_act", "tie_word_embeddings"),
    "initializer_range",
)
"""Settings that are keys of the model's config."""


def _option(default, help, *, low=None, above=None, below=None, fixed=False):
    """A setting; a `fixed` one cannot change when a run is resumed."""
    bounds = {"low": low, "above": above, "below": below}
    metadata = {"help": help, "fixed": fixed, **bounds}
    return field(default=default, metadata=metadata)


def _fixed(default, help, **bounds):
    return _option(default, help, fixed=True, **bounds)


@dataclass(kw_only=True)
class TrainConfig:
    """Every setting of a training run; checked on construction.

    Raises:
        MCSDError: naming the setting, what it must be and what it was.
    """

    data: Texts = _fixed(  # noqa: RUF009 (a field)
        (),
        "texts (a file is one document), .jsonl files of text, prompt and completion, or messages, "
        "folders with train.jsonl and valid.jsonl, or what Hugging Face's save_to_disk wrote",
    )
    val_data: Texts = _fixed(  # noqa: RUF009
        (), "the same, held out; default: a part of --data"
    )
    val_fraction: float = _fixed(0.02, "part of --data to hold out; 0 is none", low=0, below=1)
    separator: str | None = _fixed(None, "what stands between the documents of a text file")
    mask_prompt: bool = _fixed(
        False, "of messages, learn the last reply alone; of a prompt and completion always so"
    )
    tokenizer: str | None = _fixed(
        None,
        "a directory with a tokenizer.json, or a SentencePiece model; default: the tokenizer of "
        "--init-from, or one trained on the data",
    )
    vocab_size: int | None = _fixed(None, "K; default: the tokenizer's, or the preset's", low=1)
    chat_template: str | None = _fixed(None, "a Jinja file; default: the tokenizer's")
    output_dir: str | None = _option(None, "the folder to make: of the run, and of the model")
    init_from: str | None = _fixed(
        None, "begin with the weights of a model, a directory or a hub id"
    )

    size: Literal[*PRESETS] = _fixed(
        "5m", "shape of a new model: one of the bundled one's kind, or the paper's"
    )
    hidden_size: int | None = _fixed(None, "D, instead of the preset's, as are the next", low=1)
    num_channels: int | None = _fixed(None, "C", low=1)
    num_hidden_layers: int | None = _fixed(None, "L", low=1)
    intermediate_size: int | None = _fixed(None, "F, the width of the MLP", low=1)
    projection: Literal["channel", "dense"] | None = _fixed(None, "per channel, or over all of D")
    fusion: Literal["add", "concat"] | None = _fixed(None, "of slope and decay")
    output_projection: bool | None = _fixed(None, "project the fused sections back to D")
    sections: Texts | None = _fixed(  # noqa: RUF009
        None, "slope, decay, or two of them"
    )
    hidden_act: Literal["gelu", "gelu_pytorch_tanh", "silu"] | None = _fixed(None, "of the MLP")
    tie_word_embeddings: bool | None = _fixed(None, "the head is the embedding")
    initializer_range: float | None = _fixed(None, "standard deviation of fresh weights", above=0)

    iters: int = _option(1000, "steps of the optimiser", low=1)
    batch_size: int = _fixed(16, "rows of tokens read side by side, over all machines", low=1)
    max_seq_length: int = _fixed(
        256, "N, tokens of a row read in a step; the next step goes on with the state", low=1
    )
    pack: bool = _fixed(False, "cut no document that fits into N tokens; pads rows")
    forget: float = _fixed(
        0.1,
        "part of the steps in which a row begins with an empty state, to learn how a text begins",
        low=0,
    )
    grad_accumulation_steps: int = _fixed(
        1, "batches of rows, one after the other, to each step of the optimiser", low=1
    )
    learning_rate: float = _option(1e-3, "the highest", above=0)
    warmup: int = _option(100, "steps in which the learning rate rises", low=0)
    final_lr: float = _option(0.1, "part of it left at the end of the cosine", low=0)
    weight_decay: float = _option(0.1, "of matrices; norms and the embedding have none", low=0)
    adam_beta1: float = _option(0.9, "of AdamW", low=0, below=1)
    adam_beta2: float = _option(0.95, "of AdamW", low=0, below=1)
    max_grad_norm: float = _option(1.0, "gradients are scaled down to this norm", above=0)
    dropout: float = _option(0.0, "of what each mixer and MLP adds", low=0, below=1)
    dtype: Literal["float32", "bfloat16"] = _fixed(
        "float32", "of the computation and of the result; the optimiser's weights are float32"
    )
    grad_checkpoint: bool = _option(False, "compute each layer twice, to save memory")
    seed: int = _fixed(
        0, "of fresh weights, of the order of documents and of dropout", low=0, below=2**64
    )

    steps_per_report: int = _option(10, "steps between lines of the log", low=1)
    steps_per_eval: int = _option(200, "steps between evaluations of the held-out texts", low=1)
    val_batches: int = _option(25, "segments of all rows to evaluate, -1 for all", low=-1)
    save_every: int = _option(100, "steps between checkpoints", low=1)
    keep: int = _option(2, "checkpoints to keep", low=1)

    def __post_init__(self):
        for f in FIELDS.values():
            setattr(self, f.name, check(f, getattr(self, f.name)))
        if self.init_from and (given := [n for n in SHAPE if getattr(self, n) is not None]):
            _fail(f"{given[0]} must not be set with init_from: the model has its own.")
        if self.init_from and self.size != FIELDS["size"].default:
            _fail("size must not be set with init_from: the model has its own.")
        if self.init_from and self.tokenizer:
            _fail("tokenizer must not be set with init_from: the model has its own.")
        if self.val_data and self.val_fraction != FIELDS["val_fraction"].default:
            _fail("val_fraction must not be set with val_data: that is what is held out.")
        if self.separator == "":
            _fail("separator must not be empty.")

    def shape(self) -> dict[str, Any]:
        """The model's keys: the preset's, with what is set in their place; no vocabulary."""
        given = {name: getattr(self, name) for name in SHAPE}
        shape = PRESETS[self.size] | {k: v for k, v in given.items() if v is not None}
        if "sections" in shape:
            shape["sections"] = list(shape["sections"])
        return {k: v for k, v in shape.items() if k != "vocab_size"}


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}


def check(f: dataclasses.Field, value: Any) -> Any:
    """Return the value of a setting as its type, from YAML or Python.

    Raises:
        MCSDError: naming the setting, what it must be and what it was.
    """
    kind = _kind(f)
    if value is None and kind is not f.type:
        return None
    if (
        kind is float
        and isinstance(value, str)
        and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value)
    ):
        value = float(value)  # 1e-4, which YAML 1.1 takes for a text
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind == Texts and isinstance(value, str | list):
        value = (value,) if isinstance(value, str) else tuple(value)
    if get_origin(kind) is Literal:
        fits, wanted = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
    elif kind == Texts:
        fits = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        wanted = "a list of texts"
    elif kind in (int, float):
        fits = type(value) is kind and _within(f.metadata, value)
        wanted = f"{'an integer' if kind is int else 'a number'}{_bounds(f.metadata)}"
    else:
        fits = type(value) is kind
        wanted = {bool: "true or false", str: "a text"}[kind]
    if not fits:
        _fail(f"{f.name} must be {wanted} but got {value!r}.")
    return value


def _within(bounds, value) -> bool:
    low, above, below = bounds["low"], bounds["above"], bounds["below"]
    return (
        (low is None or value >= low)
        and (above is None or value > above)
        and value < (float("inf") if below is None else below)  # which no NaN is
    )


def _bounds(bounds) -> str:
    parts = [
        f"{word} {bounds[key]:g}"
        for key, word in (("low", "of at least"), ("above", "above"), ("below", "below"))
        if bounds[key] is not None
    ]
    return f" {' and '.join(parts)}" if parts else ""


def add_arguments(parser: cli.Parser) -> None:
    """Add a flag for every setting, absent from what is parsed unless it is given."""
    for f in FIELDS.values():
        flag = f"--{f.name.replace('_', '-')}"
        text = f.metadata["help"]
        if not (f.default is None or f.default is False or f.default == ()):
            text += f" (default: {f.default})"
        options = {"default": argparse.SUPPRESS, "help": text}
        kind = _kind(f)
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif get_origin(kind) is Literal:
            parser.add_argument(flag, choices=get_args(kind), **options)
        elif kind == Texts:
            parser.add_argument(flag, nargs="+", metavar=flag[2:].upper(), **options)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[kind]
            parser.add_argument(flag, type=_argument(f, kind), metavar=metavar, **options)


def _kind(f: dataclasses.Field) -> Any:
    """The type of a setting that is set."""
    kinds = get_args(f.type)
    return kinds[0] if type(None) in kinds else f.type


def _argument(f, kind):
    def parse(text):
        try:
            return check(f, kind(text))
        except MCSDError as error:
            message = str(error).removeprefix(f"[train] {f.name} ").removesuffix(".")
            raise argparse.ArgumentTypeError(message) from None
        except ValueError:
            number = "an integer" if kind is int else "a number"
            bounds = _bounds(f.metadata)
            raise argparse.ArgumentTypeError(f"must be {number}{bounds} but got {text!r}") from None

    return parse


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        MCSDError: if it is none, or names a setting that does not exist.
    """
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        _fail(f"cannot read {path}: {error.strerror}.")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        _fail(f"{path} must be YAML but: {' '.join(str(error).split())[:200]}.")
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        _fail(f"{path} must hold settings, as key: value, but holds a {type(settings).__name__}.")
    for key in settings:
        if key not in FIELDS:
            close = difflib.get_close_matches(str(key), FIELDS, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            _fail(f"{path} must hold settings of a run but {key!r} is none{hint}")
    return settings


def to_yaml(config: TrainConfig) -> str:
    """Every setting, as a YAML file that `read_yaml` reads back."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def changes(old: TrainConfig, new: TrainConfig) -> list[str]:
    """How the settings of a resumed run differ from its own: "name: old, now new".

    Raises:
        MCSDError: if one differs that cannot.
    """
    differing = [
        f
        for f in FIELDS.values()
        if f.name != "output_dir" and getattr(old, f.name) != getattr(new, f.name)
    ]
    for f in differing:
        if f.metadata["fixed"]:
            _fail(
                f"{f.name} must stay {getattr(old, f.name)!r} when a run is resumed but got "
                f"{getattr(new, f.name)!r}; begin another run, perhaps with --init-from."
            )
    return [f"{f.name}: {getattr(old, f.name)}, now {getattr(new, f.name)}" for f in differing]


def _fail(message: str):
    raise MCSDError(f"[train] {message}")
