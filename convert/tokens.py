"""The tokenizer beside a converted model: copied or built, and the same ids as the source's."""

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import load_tokenizer, read_json
from mlx_mcsd.tokenizer import SAMPLES, save_tokenizer

from . import trial
from .locate import own

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)


def copy(names, source, out):
    """Copy the files there are of some names."""
    for name in names:
        if own(source, name).exists():
            shutil.copyfile(source / name, out / name)


def add_tokenizer(source, args, out):
    """Add a tokenizer to a directory with a config: the source's, or one of its `tokenizer.model`.

    Args:
        source: the directory with the source's.
        args: the model's.
        out: the directory to add to.

    Returns:
        The ids of one text, as the result reads it and as the source does; two empty lists, after a
        note on stderr, where the source has no tokenizer.

    Raises:
        MCSDError: if the source's tokenizer does not load or fit the model, or cannot be had with
            the same ids.
    """
    with TemporaryDirectory() as name:
        scratch = Path(name)
        shutil.copyfile(out / "config.json", scratch / "config.json")
        try:
            if own(source, "tokenizer.json").exists():
                copy(FILES, source, scratch)
            elif own(source, "tokenizer.model").exists():
                copy(("chat_template.jinja",), source, scratch)
                settings = own(source, "tokenizer_config.json")
                save_tokenizer(
                    scratch,
                    (source / "tokenizer.model").read_bytes(),
                    args.max_position_embeddings,
                    read_json(settings) if settings.exists() else None,
                )
            else:
                why = f"no tokenizer.json and no tokenizer.model in {source}"
                print(f"warning: converting without a tokenizer: {why}.", file=sys.stderr)
                return [], []
            ids, wanted, difference = compare(scratch)
        except MCSDError as error:
            raise MCSDError(str(error).replace(str(scratch), str(source))) from None
        if difference and own(source, "tokenizer.json").exists():
            # Both came with the source, which transformers reads the same way.
            print(f"warning: the source's {difference}", file=sys.stderr)
            wanted = ids
        elif difference:
            raise MCSDError(f"[convert] the {difference}")
        copy(FILES, scratch, out)
    return ids, wanted


def compare(directory):
    """Compare a tokenizer as a user will load it with its `tokenizer.json`, on many texts.

    They differ where `tokenizer_config.json` names a class that has its own mind.

    Returns:
        The ids of a text made of the vocabulary, as loaded and by `tokenizer.json`; and a line that
        shows the first text on which they differ, and where, or nothing.

    Raises:
        MCSDError: if it does not load.
    """
    read_json(directory / "tokenizer.json")
    trial.check((directory / "tokenizer.json").read_bytes(), SAMPLES)
    loaded = load_tokenizer(directory)
    written = Tokenizer.from_file(str(directory / "tokenizer.json"))
    own_words = trial.own_words(written)
    special = [t.content for t in written.get_added_tokens_decoder().values() if t.special]
    # Those that only tokenizer_config.json knows are added on loading, and found in texts then.
    added = set(loaded.all_special_tokens).difference(special)
    for token in added:
        own_words = own_words.replace(token, "")
    for text in (*SAMPLES, "".join(f"a{s} {s}b" for s in special), own_words):
        ids = loaded.encode(text, add_special_tokens=False)
        wanted = written.encode(text, add_special_tokens=False).ids
        if ids != wanted:
            pairs = zip([*ids, None], [*wanted, None], strict=False)
            first = next(i for i, (a, b) in enumerate(pairs) if a != b)
            return (
                *(ids, wanted),
                f"tokenizer as transformers loads it differs from its tokenizer.json on "
                f"{text[:60]!r}: at token {first} it gives {ids[first : first + 3]} for "
                f"{wanted[first : first + 3]}; if it was trained with the latter, set "
                "tokenizer_class to TokenizersBackend in tokenizer_config.json.",
            )
    return ids, wanted, ""
