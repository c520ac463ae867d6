"""Writing a converted model: everything into a directory beside the target, then one rename."""

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_lm.utils import save_config, save_model

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import one_line

# mlx-lm imports the model from this file where a user allows it with --trust-remote-code.
SHIM_NAME = "mcsd.py"
SHIM = "from mlx_mcsd.model import Model, ModelArgs  # noqa: F401\n"

# Taken over byte for byte where they are.
COPIED = ("generation_config.json", "LICENSE")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)

CARD = """---
library_name: mlx
pipeline_tag: text-generation
tags:
- mlx
- mcsd
---

# {name}

An MCSD language model in MLX format, converted from `{origin}` with

    python -m mlx_mcsd.convert {options}

To run it:

    pip install mlx-mcsd
    python -m mlx_mcsd.generate --model {name} --prompt "Once upon a time"
"""


def write(target, model, config, *, source, tokenizer, origin, options):
    """Write a directory that `mlx_mcsd.load` and every mlx-lm command can load.

    Args:
        target: the directory to make; it must not exist.
        model: the `Model`, whose parameters are written under their run-time names, in shards of at
            most 5 GB, and given up.
        config: the content of `config.json`, with `quantization` if quantized.
        source: the directory whose other small files are copied.
        tokenizer: the directory whose tokenizer is copied, or None.
        origin: what the card calls the source.
        options: the command's options, for the card.

    Raises:
        MCSDError: when the disk refuses; nothing is left behind then.
    """
    with directory(target) as out:
        save_model(out, model, donate_model=True)
        save_config(config, out / "config.json")
        (out / SHIM_NAME).write_text(SHIM)
        files = [source / name for name in COPIED]
        files += [tokenizer / name for name in TOKENIZER_FILES] if tokenizer else []
        for file in files:
            if file.exists():
                shutil.copyfile(file, out / file.name)
        card = CARD.format(name=target.name, origin=origin, options=options)
        (out / "README.md").write_text(card)


@contextmanager
def directory(target):
    """A directory to fill, renamed to `target` when the block ends well and removed when not."""
    target = Path(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    # mlx raises RuntimeError where a file cannot be written.
    except (OSError, RuntimeError) as error:
        raise MCSDError(f"[convert] {target} could not be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:  # the innermost first; one that holds something stays
            with suppress(OSError):
                parent.rmdir()
