"""The configuration of a model: every key of a checkpoint's ``config.json``, checked."""

import dataclasses
import difflib
import sys
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from mlx_lm.models.base import BaseModelArgs

from .errors import MCSDError

# Written beside the model's own keys by transformers, mlx-lm and the converter; none shapes the
# model, so they are accepted and ignored. Keys that start with "_" are bookkeeping as well.
BOOKKEEPING = {
    *("architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    *("return_dict", "output_attentions", "output_hidden_states", "is_encoder_decoder"),
    *("chunk_size_feed_forward", "problem_type", "id2label", "label2id", "model_file"),
    *("quantization", "quantization_config", "quantize_activations"),
}

SECTIONS = (
    ["slope", "decay"],
    ["slope"],
    ["decay"],
    ["slope", "slope"],
    ["decay", "decay"],
)

# From 21 channels on the slowest alpha, 1 - 2^(-5-i) (Eq. 8), is 1.0 in float32: it never forgets.
MAX_CHANNELS = 20

# MLX counts the rows of an array in 32 bits: K of the embedding, at most 4 D of a dense mixer's
# four projections, 2 F of the MLP's two. Layers are modules, and no file has this many.
MOST = {
    "vocab_size": 2**31 - 1,
    "hidden_size": (2**31 - 1) // 4,
    "intermediate_size": (2**31 - 1) // 2,
    "num_hidden_layers": 1000,
}

TokenIds = int | list[int] | None


def _fail(message: str):
    raise MCSDError(f"[ModelArgs] {message}")


@dataclass(kw_only=True)
class ModelArgs(BaseModelArgs):
    """Shape and variant of an MCSD model; checked on construction.

    Attributes:
        model_type: always ``"mcsd"``.
        vocab_size: K, rows of the embedding and of the head.
        hidden_size: D, features per token; a multiple of ``num_channels``.
        num_channels: C, head-like groups of D / C features with one decay each; at most 20.
        num_hidden_layers: L.
        intermediate_size: F, width of the MLP.
        projection: U, V, E and F per channel (Eqs. 1, 7) or over all D features.
        fusion: theta = slope + decay (Eq. 21) or [slope, decay] per channel (Eq. 13).
        output_projection: project theta back to D; required by ``fusion="concat"``.
        sections: the mixer's one or two slots, each "slope" or "decay".
        mixer: name in the mixer registry.
        hidden_act: activation of the MLP's gate.
        initializer_range: standard deviation of fresh weights, for training from scratch.
        rms_norm_eps: epsilon of every RMSNorm.
        tie_word_embeddings: the head is the embedding.
        max_position_embeddings: training context in tokens; informative, nothing breaks past it.
        bos_token_id: null, a token id or a list of them; so are the next two.
        eos_token_id: ends a generation.
        pad_token_id: fills short rows of a batch.

    Raises:
        MCSDError: naming the key, what it must be and what it was.
    """

    model_type: Literal["mcsd"] = "mcsd"
    vocab_size: int
    hidden_size: int
    num_channels: int
    num_hidden_layers: int
    intermediate_size: int
    projection: Literal["channel", "dense"] = "channel"
    fusion: Literal["add", "concat"] = "add"
    output_projection: bool = False
    sections: list[str] = field(default_factory=lambda: ["slope", "decay"])
    mixer: str = "mcsd"
    hidden_act: Literal["gelu", "gelu_pytorch_tanh", "silu"] = "gelu"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: TokenIds = None

    def __post_init__(self):
        for f in dataclasses.fields(self):
            _check(f.name, f.type, getattr(self, f.name))
        if self.hidden_size % self.num_channels:
            _fail(
                "hidden_size must be divisible by num_channels but got "
                f"{self.hidden_size} and {self.num_channels}."
            )
        if self.num_channels > MAX_CHANNELS:
            _fail(
                f"num_channels must be at most {MAX_CHANNELS} (beyond, the slowest decay is 1.0 in "
                f"float32) but got {self.num_channels}."
            )
        if self.sections not in SECTIONS:
            _fail(
                f"sections must be one of {', '.join(map(str, SECTIONS))} "
                f"but got {self.sections!r}."
            )
        if self.fusion == "concat" and not self.output_projection:
            _fail('fusion "concat" needs output_projection to be true but it is false.')
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            for i in ids if isinstance(ids, list) else [] if ids is None else [ids]:
                if not 0 <= i < self.vocab_size:
                    _fail(
                        f"{name} must be within the vocabulary, 0 to {self.vocab_size - 1}, "
                        f"but got {i}."
                    )

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelArgs":
        """Build the arguments from the content of a ``config.json``.

        Raises:
            MCSDError: for keys nobody knows, keys that are missing, and unfit values.
        """
        # First, or another architecture's config would complain about each of its own keys.
        if "model_type" in params:
            _check("model_type", Literal["mcsd"], params["model_type"])
        fields = {f.name: f for f in dataclasses.fields(cls)}
        known = {k: v for k, v in params.items() if k in fields}
        if unknown := [
            k for k in params if not (k in fields or k in BOOKKEEPING or k.startswith("_"))
        ]:
            _fail(f"unknown {_keys(map(_suggest, unknown))} in the config; remove or correct it.")
        if missing := [
            name
            for name, f in fields.items()
            if name not in known
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]:
            _fail(f"missing {_keys(map(repr, missing))} in the config.")
        return cls(**known)


def _keys(names) -> str:
    names = list(names)
    return f"key{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _suggest(key: str) -> str:
    names = [f.name for f in dataclasses.fields(ModelArgs)]
    close = difflib.get_close_matches(key, names, n=1)
    return f"{key!r} (did you mean {close[0]!r}?)" if close else repr(key)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(name: str, kind: Any, value: Any) -> None:
    """Raise unless ``value`` is fit for a field annotated ``kind``."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if not (isinstance(value, str) and value in choices):
            wanted = " or ".join(map(repr, choices))
            _fail(f"{name} must be {wanted} but got {value!r}.")
    elif kind is int:
        if not (_is_int(value) and value > 0):
            _fail(f"{name} must be a positive integer but got {value!r}.")
        if value > (most := MOST.get(name, value)):
            _fail(f"{name} must be at most {most} but got {value}.")
    elif kind is float:
        number = _is_int(value) or isinstance(value, float)
        if not (number and 0 < value <= sys.float_info.max):  # without a cast: integers may be huge
            _fail(f"{name} must be a positive number but got {value!r}.")
    elif kind is bool:
        if not isinstance(value, bool):
            _fail(f"{name} must be true or false but got {value!r}.")
    elif kind is str:
        if not isinstance(value, str):
            _fail(f"{name} must be a string but got {value!r}.")
    elif kind is TokenIds:
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(map(_is_int, ids)):
            _fail(f"{name} must be null, an integer or a list of integers but got {value!r}.")
