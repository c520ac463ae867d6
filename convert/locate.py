"""Where the files of a checkpoint are: in a directory, at a hub id, as its index says, or alone."""

import os.path
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from mlx_mcsd.loading import one_line, read_json, resolve, some

from .readers.files import check_name, refuse, shown, size_of

# Names and index, in the order of preference.
LAYOUTS = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
BARE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# Read or copied by whoever converts the checkpoint.
SIDECARS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "LICENSE",
    "README.md",
)
MAX_SIDECAR = 2**26
# What trainers leave beside a model that is not the model.
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\..*")
SHARD = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})(\.[a-z]+)")


def locate(path):
    """Find the files of weights; nothing is read but the index.

    Args:
        path: a directory, a hub id, or a file of weights.

    Returns:
        The directory, the files, and what the index lists, file name -> names of tensors; None
        where there is no index.

    Raises:
        MCSDError: no weights, more than one model, a shard that is missing or unlisted, or a file
            outside the directory.
    """
    name = str(path)
    if os.path.exists(name) and not os.path.isdir(name):
        size_of(name)
        check_sidecars(Path(name).parent)
        return Path(name).parent, [Path(name)], None
    directory = resolve(path)
    check_sidecars(directory)
    if not os.path.isdir(name) and not weights_in(directory)[0]:
        try:
            snapshot_download(name, allow_patterns=["pytorch_model*.bin*"])
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            refuse(f"{name} has no safetensors, and the hub gave nothing else: {one_line(error)}")
    files, index = weights_in(directory)
    listed = read_index(directory, index) if index else None
    names = {file.name for file in files}
    wanted = set(listed) if index else wanted_shards(names)
    if missing := sorted(wanted - names):
        refuse(f"weights missing in {directory}: it must also hold {some(missing)}.")
    if index and (stale := sorted(names - wanted)):
        refuse(
            f"{directory} must hold the weights that its index lists but also has {some(stale)}; "
            "remove the stale files."
        )
    if not files:
        refuse(
            f"no weights in {directory}: it must hold model.safetensors, pytorch_model.bin, shards "
            "of one and their index, or one .pt or .pth file."
        )
    for file in files:
        own(directory, file.name)
    return directory, files, listed


def weights_in(directory):
    """The files of weights in a directory, of the first layout there is, and its index or None."""
    for pattern, index in LAYOUTS:
        files = sorted(directory.glob(pattern))
        has_index = os.path.lexists(directory / index)
        if files or has_index:
            return files, index if has_index else None
    files = sorted(
        file
        for file in directory.iterdir()
        if file.suffix in BARE and not NO_WEIGHTS.fullmatch(file.name)
    )
    if len(files) > 1:
        refuse(f"{directory} must hold one model but has {some(f.name for f in files)}; name one.")
    return files, None


def read_index(directory, index):
    """What an index lists: file name -> names of tensors."""
    own(directory, index)
    weight_map = read_json(directory / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(f"{index} in {directory} must have a weight_map of names and files.")
    listed = {}
    for name, file in weight_map.items():
        # A name alone: no way out of the directory, nor to a file of another kind.
        if type(file) is not str or Path(file).name != file or Path(file).suffix not in BARE:
            refuse(
                f"{index} must name files in its own directory but places {shown(name)} in "
                f"{shown(repr(file))}."
            )
        check_name(name, directory / index)
        listed.setdefault(file, set()).add(name)
    return listed


def wanted_shards(names):
    """Every file that must be there for the count in the names of those that are."""
    wanted = set()
    for name in names:
        if match := SHARD.fullmatch(name):
            stem, _, count, suffix = match.groups()
            wanted |= {f"{stem}-{i:05}-of-{count}{suffix}" for i in range(1, int(count) + 1)}
    return wanted


def check_sidecars(directory):
    """Refuse a small file that is none, or too large for one, whoever will open it."""
    for name in SIDECARS:
        file = own(directory, name)
        if file.exists() and (size := file.stat().st_size) > MAX_SIDECAR:
            refuse(f"{shown(file, 300)} must have at most {MAX_SIDECAR} bytes but has {size}.")


def own(directory, name):
    """Return the path of a file that a directory holds, whether or not it is there.

    A link out of the directory is refused, for nobody asked for what it leads to; the hub's cache
    links to its own blobs.
    """
    file = Path(directory) / name
    if not os.path.lexists(file):
        return file
    real = Path(os.path.realpath(file))
    blob = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    if not blob and real.parent != Path(os.path.realpath(directory)):
        refuse(f"{shown(file, 300)} must lie in its directory but is a link out of it; copy it.")
    size_of(file)
    return file
