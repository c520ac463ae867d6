"""A run's folder made ready: the tokenizer, the model's config and the tokens."""

import shutil
from pathlib import Path

import mlx.core as mx
import tokenizers
from mlx.utils import tree_flatten, tree_unflatten

from .. import loading
from ..config import ModelArgs
from ..errors import MCSDError
from ..files import write_atomically
from ..model import Model
from ..tokenizer import save_tokenizer
from . import corpus, sources, vocabulary
from .config import FIELDS, PRESETS, TrainConfig
from .encoding import Encoder
from .export import write_config
from .split import Split, survey

DATA = "data"
GENERATION = "generation_config.json"


def prepare(config: TrainConfig, run: Path) -> None:
    """Make a run's folder ready, unless it is.

    Raises:
        MCSDError: if the data, the tokenizer or the shape are unfit.
    """
    if (run / DATA / corpus.COMPLETE).exists():
        return
    for name in (*vocabulary.FILES, GENERATION):  # of an attempt with other settings
        (run / name).unlink(missing_ok=True)
    train, valid = sources.find(config.data, config.separator)
    if config.val_data:
        # A folder stands for what it holds out, if it holds something out.
        valid = [s for name in config.val_data for s in _held_out(name, config.separator)]
    elif valid and config.val_fraction != FIELDS["val_fraction"].default:
        raise MCSDError(
            f"[train] val_fraction must not be set where data hold out a part: {valid[0].name}."
        )
    found = survey(train, config.seed)
    split = None if valid or not config.val_fraction else Split(found, config.val_fraction)
    tokenizer = _add_tokenizer(config, run, train, found, split)
    if found.messages and not tokenizer.has_chat_template:
        print("The tokenizer has no chat template: each message is put behind its <|role|>.")
        write_atomically(run / "chat_template.jinja", vocabulary.TEMPLATE.encode())
        tokenizer = loading.load_tokenizer(run)
    K = ModelArgs.from_dict(loading.read_config(run)).vocab_size
    encoder = Encoder(tokenizer, config.mask_prompt)
    corpus.write(run / DATA, train, found, split, valid, encoder, K)


def _held_out(name, separator):
    train, valid = sources.find([name], separator)
    return valid or train


def _add_tokenizer(config, run, train, found, split):
    """Write the tokenizer and the config of the model; return the tokenizer."""
    context = config.max_seq_length
    if config.init_from:
        source = loading.resolve(config.init_from)
        model = loading.read_config(source)
        if model.get("quantization"):
            raise MCSDError(
                f"[train] init_from must be a model of floats but {config.init_from} is quantized: "
                "name the model that it was made of, or `mlx_lm.convert --dequantize` it."
            )
        loading.load_tokenizer(source)
        for name in (*vocabulary.FILES, GENERATION):
            if (source / name).is_file():
                shutil.copyfile(source / name, run / name)
        args = ModelArgs.from_dict(model)
        if config.vocab_size not in (None, args.vocab_size):
            raise MCSDError(
                f"[train] vocab_size must be the model's {args.vocab_size} with init_from but is "
                f"{config.vocab_size}."
            )
    else:
        vocab_size = config.vocab_size
        if config.tokenizer:
            vocabulary.take_over(config.tokenizer, run, context)
            needed = _ids(run / "tokenizer.json")
            vocab_size = needed if vocab_size is None else vocab_size
            if vocab_size < needed:
                raise MCSDError(
                    f"[train] vocab_size must be at least the tokenizer's {needed} but is "
                    f"{vocab_size}."
                )
        else:
            vocab_size = vocab_size or PRESETS[config.size]["vocab_size"]
            proto = vocabulary.train(train, found, split, vocab_size, config.seed)
            save_tokenizer(run, proto, context)
        args = ModelArgs(**config.shape(), vocab_size=vocab_size, max_position_embeddings=context)
    if config.chat_template:
        shutil.copyfile(config.chat_template, run / "chat_template.jinja")
    write_config(run, args, config.dtype)
    tokenizer = loading.load_tokenizer(run)
    if not config.init_from:
        for kind in ("bos", "eos", "pad"):
            setattr(args, f"{kind}_token_id", getattr(tokenizer, f"{kind}_token_id"))
        write_config(run, args, config.dtype)
    return tokenizer


def _ids(file: Path) -> int:
    """How many ids a tokenizer needs."""
    try:
        vocabulary_ids = tokenizers.Tokenizer.from_file(str(file)).get_vocab()
    except Exception as error:  # the library raises the bare class
        raise MCSDError(f"[train] {file.name} does not load: {loading.one_line(error)}") from error
    return 1 + max(vocabulary_ids.values(), default=-1)


def make_model(config: TrainConfig, run: Path) -> Model:
    """The model to begin with, in float32: another's weights, or fresh ones from the seed.

    Fresh matrices are normal with the standard deviation `initializer_range`, gains are 1; those of
    the decay norm are `initializer_range`, because a normalised average of the past at full size
    would drown the embeddings at first.
    """
    if config.init_from:
        return loading.load_model(loading.resolve(config.init_from), dtype=mx.float32)
    args = ModelArgs.from_dict(loading.read_config(run))
    model = Model(args)
    fresh, key = [], mx.random.key(config.seed)
    for name, weight in sorted(tree_flatten(model.parameters())):
        if weight.ndim > 1:
            key, mine = mx.random.split(key)
            weight = args.initializer_range * mx.random.normal(weight.shape, key=mine)
        elif "decay_norm" in name:
            weight = mx.full(weight.shape, args.initializer_range)
        fresh.append((name, weight))
    model.update(tree_unflatten(fresh))
    return model
