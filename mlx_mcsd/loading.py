"""From a path or a hub id to a model and its tokenizer; nothing of a checkpoint is ever executed.

Everything that can be checked without reading weights is checked first: the config, the headers
and sizes of the weight files, every tensor's name and shape, the tokenizer.
"""

import json
import os.path
import re
import stat
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import tokenizers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from safetensors import SafetensorError, safe_open

from .config import ModelArgs
from .errors import MCSDError
from .model import Model
from .text import Detokenizer

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DOWNLOADED = ["*.json", "model*.safetensors", "tokenizer.model", "*.jinja", "*.txt", "LICENSE*"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
# Larger than any tokenizer, and than what JSON values of a few bytes each may make of it.
MAX_JSON, MAX_VALUES = 2**26, 4_000_000
STORED = {"F32", "F16", "BF16"}


def load(
    path: str | Path | None = None,
    *,
    lazy: bool = False,
    tokenizer_config: dict | None = None,
    dtype: mx.Dtype | None = None,
) -> tuple[Model, TokenizerWrapper | None]:
    """Load a model and its tokenizer.

    Args:
        path: a directory in the checkpoint layout, converted or not, or a hub id ``owner/name``;
            None is the bundled storyteller.
        lazy: leave the weights on disk until they are first used.
        tokenizer_config: extra settings of the tokenizer, such as ``{"eos_token": "</s>"}``.
        dtype: of the weights and quantization scales; None is float32 on the CPU backend (17 to
            31 times faster there than float16) and as stored on a GPU.

    Returns:
        The model, and the tokenizer, or None where the directory has no file of one
        (tokenizer.json, tokenizer_config.json or tokenizer.model).

    Example:
        >>> model, tokenizer = load()
        >>> logits = model(mx.array(tokenizer.encode("Once upon a time"))[None])  # (1, N, K)

    Raises:
        MCSDError: naming the file, key or tensor that is missing, corrupt or unfit.
    """
    directory = resolve(path)
    has_tokenizer = any((directory / name).exists() for name in TOKENIZER_FILES)
    tokenizer = load_tokenizer(directory, tokenizer_config) if has_tokenizer else None
    return load_model(directory, lazy=lazy, dtype=dtype), tokenizer


def resolve(path: str | Path | None = None) -> Path:
    """The directory of a checkpoint: ``path`` itself, the bundled model's, or a hub download's."""
    if path is None:
        bundled = Path(str(files("mlx_mcsd"))) / "assets" / "stories"
        if not bundled.is_dir():
            _fail("this installation has no bundled model; name a directory or a hub id.")
        return bundled
    name = str(path)
    if not name:
        _fail("a path must not be empty; name a directory, or a hub id such as owner/name.")
    # Unlike Path's methods these take any string, however long, for a path.
    if os.path.isdir(name):
        return Path(name)
    shown = name if name.isprintable() else repr(name)
    shown = shown if len(shown) <= 300 else f"{shown[:300]}..."
    if os.path.exists(name):
        _fail(f"{shown} must be a directory but is a file; name the directory that holds it.")
    if not HUB_ID.fullmatch(name):
        _fail(f"no directory {shown}; name one, or a hub id such as owner/name.")
    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        _fail(f"no directory {shown}, and the hub did not give it: {one_line(error)}", error)


def load_model(
    directory: str | Path, *, lazy: bool = False, dtype: mx.Dtype | None = None
) -> Model:
    """Load the model alone; arguments and errors as in :func:`load`, of a directory."""
    directory = Path(directory)
    args = ModelArgs.from_dict(read_config(directory))
    if dtype is not None and not mx.issubdtype(dtype, mx.floating):
        _fail(f"dtype must be a floating-point type but got {dtype}.")
    check_tensors(Model(args), read_headers(directory))
    try:
        model, _ = mlx_lm.utils.load_model(
            directory,
            lazy=True,
            model_config={"model_file": None},  # a file of the checkpoint: never executed
            get_model_classes=lambda config: (Model, ModelArgs),
        )
    except MCSDError:
        raise
    except (RuntimeError, ValueError) as error:
        # What is left for MLX to refuse: a packing that its quantization settings do not fit.
        _fail(f"the weights in {directory} do not fit their config: {one_line(error)}", error)
    if dtype is None and mx.default_device() == mx.cpu:
        dtype = mx.float32
    if dtype is not None:
        model.set_dtype(dtype)
    if not lazy:
        mx.eval(model.parameters())
    return model


def load_tokenizer(directory: str | Path, tokenizer_config: dict | None = None) -> TokenizerWrapper:
    """Load the tokenizer alone; arguments and errors as in :func:`load`, of a directory."""
    directory = Path(directory)
    config = read_config(directory)
    vocab_size = ModelArgs.from_dict(config).vocab_size
    if not (directory / "tokenizer.json").exists():
        _fail(f"no tokenizer in {directory}: tokenizer.json is missing.")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (directory / name).exists():
            read_json(directory / name)
    problem = f"the tokenizer in {directory} does not load"
    try:
        tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises the bare class
        _fail(f"{problem}: {one_line(error)}", error)
    try:
        tokenizer = mlx_lm.utils.load_tokenizer(
            directory,
            {**(tokenizer_config or {}), "trust_remote_code": False},
            eos_token_ids=config.get("eos_token_id"),
        )
        # mlx-lm's own for byte pieces repeats text, and nothing but this names another.
        tokenizer._detokenizer = Detokenizer(tokenizer._tokenizer)
        tokenizer.encode("a")  # some settings are read only here
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        _fail(f"{problem}: {type(error).__name__}: {one_line(error)}", error)
    if (needed := 1 + max(tokenizer.get_vocab().values(), default=-1)) > vocab_size:
        _fail(
            f"the model's vocabulary is smaller than the tokenizer's in {directory}: "
            f"vocab_size is {vocab_size}, the tokenizer needs {needed}."
        )
    return tokenizer


def load_adapters(model: Model, path: str | Path) -> None:
    """Put the adapters that ``mlx_lm.lora`` trained, in the directory ``path``, on the model."""
    path = Path(path)
    config = read_json(path / "adapter_config.json")
    needed = set() if config.get("fine_tune_type") == "full" else {"num_layers", "lora_parameters"}
    if missing := sorted(needed - config.keys()):
        _fail(f"adapter_config.json in {path} must have {some(missing)}.")
    read_header(path / "adapters.safetensors")
    try:
        mlx_lm.utils.load_adapters(model, str(path))
    except (KeyError, TypeError, ValueError) as error:
        _fail(f"the adapters in {path} do not fit the model: {one_line(error)}", error)
    model.eval()


def read_config(directory: Path) -> dict:
    """The content of ``config.json``, end-of-text ids of ``generation_config.json`` taken over."""
    read_json(directory / "config.json")
    if (directory / "generation_config.json").exists():
        read_json(directory / "generation_config.json")
    config = mlx_lm.utils.load_config(directory)
    settings, foreign = config.get("quantization"), config.get("quantization_config")
    needed = {"group_size", "bits"}
    if settings is not None and not (isinstance(settings, dict) and needed <= settings.keys()):
        _fail(f"quantization must have group_size and bits but is {settings!r} in {directory}.")
    if settings is None and foreign:
        _fail(
            f"{directory} is quantized in a way MLX does not write (quantization_config without "
            "quantization); convert the original weights instead."
        )
    return config


def read_json(file: Path) -> dict:
    """The JSON object in ``file``: a regular file, of a size that will not fill the memory."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_JSON:
            _fail(f"{file} must be a file of at most {MAX_JSON} bytes but is not.")
        text = file.read_text(encoding="utf-8")
        if sum(map(text.count, ",[{")) > MAX_VALUES:
            _fail(f"{file} must hold at most {MAX_VALUES} values but holds more.")
        content = json.loads(text)
    except MCSDError:
        raise
    except FileNotFoundError:
        _fail(f"{file.name} is missing in {file.parent}.")
    except (OSError, ValueError, RecursionError) as error:
        _fail(f"{file} must hold JSON but: {one_line(error)}", error)
    if not isinstance(content, dict):
        _fail(f"{file} must hold a JSON object but holds a {type(content).__name__}.")
    return content


def read_headers(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (stored type, shape) of every tensor, from files found whole; no weights are read."""
    homes = sorted(directory.glob("model*.safetensors"))
    if (directory / "model.safetensors.index.json").exists():
        index = read_json(directory / "model.safetensors.index.json").get("weight_map")
        if not isinstance(index, dict):
            _fail(f"model.safetensors.index.json in {directory} must have a weight_map.")
        shards = {str(shard) for shard in index.values()}
        if missing := sorted(shards - {file.name for file in homes}):
            _fail(f"weights missing in {directory}: its index names {some(missing)}.")
    if not homes:
        _fail(f"no weights in {directory}: it must hold model.safetensors, or shards and an index.")
    found = {}
    for file in homes:
        header = read_header(file)
        if twice := [name for name in header if name in found]:
            _fail(f"{some(twice)} of {file} are stored twice; remove the stale file.")
        found |= header
    return found


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (stored type, shape) of one file's tensors; safetensors checks its sizes."""
    try:
        with safe_open(file, "numpy") as tensors:
            entries = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: (e.get_dtype(), tuple(e.get_shape())) for name, e in entries.items()}
    except (OSError, SafetensorError) as error:
        _fail(f"{file} must be a whole safetensors file but: {one_line(error)}", error)


def check_tensors(model: Model, found: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise unless ``found`` (see :func:`read_headers`) fills the model, and nothing is left over.

    Names may be separate or fused; of packed tensors only the names are compared.
    """
    wanted = {name: value.shape for name, value in tree_flatten(model.parameters())}
    if model.args.tie_word_embeddings and "lm_head.weight" in found:  # the embedding once more
        wanted["lm_head.weight"] = model.model.embed_tokens.weight.shape
    for path, module in model.named_modules():
        for fused, parts in getattr(module, "fused", {}).items():
            if (name := f"{path}.{fused}.weight") in found:
                continue
            # Fused projections are stacked on their output axis, the last but one.
            *lead, rows, columns = wanted.pop(name)
            part_shape = (*lead, rows // len(parts), columns)
            wanted |= {f"{path}.{part}.weight": part_shape for part in parts}

    packed = {name.removesuffix(".scales") for name in found if name.endswith(".scales")}
    missing = [name for name in wanted if name not in found]
    unexpected = [
        name for name in found if name not in wanted and name.rpartition(".")[0] not in packed
    ]
    if missing or unexpected:
        sides = [f"missing {some(missing)}"] if missing else []
        sides += [f"unexpected {some(unexpected)}"] if unexpected else []
        _fail(f"the tensors do not fit the config: {'; '.join(sides)}.")
    for name, shape in wanted.items():
        if name.rpartition(".")[0] in packed:
            continue
        kind, found_shape = found[name]
        if found_shape != shape:
            _fail(f"{name} must have shape {shape} but has {found_shape}.")
        if kind not in STORED:
            _fail(f"{name} must be stored as {', '.join(sorted(STORED))} but is {kind}.")


def some(names) -> str:
    """The first three of many names."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def one_line(error: BaseException) -> str:
    """The message of an exception on one line, ending in one full stop."""
    return " ".join(str(error).split())[:300].rstrip(".") + "."


def _fail(message: str, cause: BaseException | None = None):
    raise MCSDError(f"[load] {message}") from cause
