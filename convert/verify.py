"""Is the result the source? The logits of both, from the files on the disk, layer by layer.

The source goes through the PyTorch reference, read by torch and the safetensors library; the result
through MLX, loaded as a user will load it. Neither side sees the other's code or arrays. Both
compute in float32, so that one tolerance serves all types: the reference gets the source's weights
rounded by torch to the type that was stored. A packed weight has no rounding of torch's to compare
with: the reference then gets what is on the disk, unpacked, and every number of it must lie within
a step of the source's. What rounding and packing do to the logits is measured apart from that.

One layer is in memory at a time, on each side, and a few rows of the embedding and of the head.
"""

import re
import warnings
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pickle import UnpicklingError

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import load_model

from .result import ROWS, Result

TOLERANCE = 1e-5
"""Of the largest logit, for every 12 layers: the rounding errors of float32 add up with depth."""

TOKENS, FEW_TOKENS, LARGE = 72, 16, 10**8
"""A row, of two: enough for a second chunk; few for models of so many numbers, or it takes long."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

MISSING = "PyTorch and transformers are not installed (pip install 'mlx-mcsd[convert]')"

# With which torch and safetensors refuse a file: pickles end in any of these.
REFUSALS = (RuntimeError, UnpicklingError, SafetensorError, EOFError, LookupError, TypeError)
REFUSALS += (AttributeError, ValueError, OSError)


@dataclass
class Verification:
    """What was compared and how it came out.

    Attributes:
        tokens: how many were read.
        difference: the largest of two logits, over the largest logit.
        tolerance: what it may be.
        effect: of rounding or packing on the logits, likewise; None where there is neither.
        agreement: the share of tokens after which the likeliest token stays the same; or None.
        step: the largest error of a packed weight over what its packing allows; or None.
        unread: a file that torch refuses, compared as the converter's own reader has it; or None.
    """

    tokens: int
    difference: float
    tolerance: float
    effect: float | None = None
    agreement: float | None = None
    step: float | None = None
    unread: str | None = None

    def text(self):
        """A few sentences."""
        of = "the source's weights" if self.step is None else "the quantized weights"
        rounded = ", rounded alike," if self.step is None and self.effect is not None else ""
        lines = [
            f"Verified: over {self.tokens} tokens the logits differ from those of {of}{rounded} in "
            f"PyTorch by {self.difference:.1e} of the largest at most (tolerance "
            f"{self.tolerance:.1e}, in float32)."
        ]
        if self.step is not None:
            lines.append(
                f"No quantized weight is further from the source's than {self.step:.2f} of what "
                "its format allows."
            )
        if self.effect is not None:
            what = "Rounding" if self.step is None else "Quantization"
            lines.append(
                f"{what} itself moves the logits by up to {self.effect:.1e} of the largest and "
                f"keeps the likeliest token at {self.agreement:.0%} of the places."
            )
        if self.unread is not None:
            lines.append(
                f"torch itself does not read {self.unread} with weights only: its numbers are as "
                "the converter reads them."
            )
        return " ".join(lines)

    def json(self):
        """The same for scripts."""
        return asdict(self)


def available():
    """Tell whether what the reference needs is installed."""
    return find_spec("torch") is not None and find_spec("transformers") is not None


def need():
    """Raise unless what the reference needs is installed."""
    if not available():
        raise MCSDError(f"[verify] --verify compares with a PyTorch model but {MISSING}.")


def verify(out, checkpoint, names, args, ids=(), source_ids=None):
    """Compare the model in a directory with the source it was made from.

    Args:
        out: the directory written.
        checkpoint: the source, a `Checkpoint`.
        names: its names -> names of the layout, of the tensors that were used.
        args: the model's.
        ids: tokens of a text, as the result's tokenizer reads it.
        source_ids: tokens of the same text, as the source's does; None is `ids`.

    Returns:
        A `Verification`.

    Raises:
        MCSDError: if the two differ beyond the tolerance, or PyTorch is not installed.
    """
    need()
    source, result = Source(checkpoint, names, args), Result(out, args)
    stored = Stored(source, result)
    N = TOKENS if result.size < LARGE else FEW_TOKENS
    random = np.random.default_rng(0).integers(0, args.vocab_size, (2, N))
    rows = [random.copy(), random]
    for row, given in zip(rows, (ids, ids if source_ids is None else source_ids), strict=True):
        row[0, : min(len(given), N)] = list(given)[:N]
    logits = run(out, result, rows[0])
    wanted = reference(stored.blocks, args, rows[1])
    tolerance = TOLERANCE * max(1, args.num_hidden_layers / 12)
    found = Verification(2 * N, difference(logits, wanted), tolerance)
    if stored.changed:
        exact = reference(source.blocks, args, rows[1])
        found.effect = difference(logits, exact)
        found.agreement = float((logits.argmax(-1) == exact.argmax(-1)).mean())
        found.step = stored.step
    found.unread = source.refused[0] if source.refused else None
    if not found.difference <= tolerance:
        raise MCSDError(
            f"[verify] the logits of the result must be the source's to {tolerance:.1e} of the "
            f"largest but differ by {found.difference:.1e}; nothing was written. Please report it."
        )
    return found


def difference(logits, wanted):
    """The largest difference over the largest number; numbers that are no numbers must agree."""
    finite = np.isfinite(wanted)
    if not np.array_equal(finite, np.isfinite(logits)):
        return float("inf")
    largest = np.abs(wanted[finite]).max(initial=0)
    gap = np.abs(logits[finite] - wanted[finite]).max(initial=0)
    return float(gap / largest) if largest else float(gap)


class Source:
    """The source's tensors under the names of the layout, float32 in torch."""

    def __init__(self, checkpoint, names, args):
        self.checkpoint, self.args = checkpoint, args
        self.file, self.opened, self.refused = None, None, []
        self.places = {}
        for name, target in names.items():
            match = re.fullmatch(r"(.*)\.(\w+)_proj\.weight", target)
            stem = match[2] if match else ""
            if re.fullmatch("[uvef]{2,4}", stem):
                parts = list(stem)
            else:
                parts = stem.split("_") if stem in ("gate_up", "up_gate") else [stem]
            for index, part in enumerate(parts):
                place = f"{match[1]}.{part}_proj.weight" if match else target
                self.places[place] = (name, index, len(parts))

    def open(self, file):
        """A file as the library that wrote it reads it: a safetensors handle, or a tree of tensors.

        None where torch refuses it, as it does pickles of protocols 4 and 5. One file is open at a
        time: what has been read of one stays in memory, mapped, as long as it is.
        """
        if file == self.file:
            return self.opened
        import torch

        self.file, self.opened = file, None
        try:
            if file.suffix == ".safetensors":
                self.opened = safe_open(file, "pt")
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of a pickle that torch does not write itself
                    self.opened = torch.load(
                        file, map_location="cpu", weights_only=True, mmap=is_zip(file)
                    )
        except REFUSALS:
            self.refused.append(file.name)
        return self.opened

    def blocks(self, name):
        """Yield one tensor of the layout, `ROWS` of its rows at a time."""
        stored, index, count = self.places[name]
        reader, path = self.checkpoint._homes[stored]
        value = self.open(reader.file)
        if value is None:
            value = self.own(stored)
        elif reader.file.suffix == ".safetensors":
            value = value.get_tensor(*path)
        else:
            for key in path:
                value = value[key]
        value = value.detach()
        if count > 1:
            value = value.chunk(count, dim=-2)[index]
        C = self.args.num_channels
        per_channel = self.args.projection == "channel" and re.search(r"\.[uvef]_proj\.", name)
        if per_channel and value.ndim == 2:  # the blocks on the diagonal of a D x D matrix
            Dc = len(value) // C
            value = value.reshape(C, Dc, C, Dc).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        for block in value.split(ROWS):  # of what is mapped: read here
            yield block.float().contiguous()

    def own(self, name):
        """A tensor as the converter's own reader has it, in the stored type."""
        import torch

        values = np.require(self.checkpoint.values(name), requirements="W")
        if self.checkpoint.tensors[name][0] == "BF16":  # read as its bits
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(values)


def is_zip(file):
    """Tell the format whose tensors torch can leave on the disk until they are used."""
    with open(file, "rb") as stream:
        return stream.read(4) == b"PK\3\4"


class Stored:
    """The source's tensors as the result must have them: rounded by torch, or unpacked.

    Attributes:
        changed: whether any was rounded or packed.
        step: the largest error of a packed number, over what is allowed; None where none is.
    """

    def __init__(self, source, result):
        self.source, self.result = source, result
        self.changed, self.step = False, None

    def blocks(self, name):
        """Yield one tensor of the layout, `ROWS` of its rows at a time, float32 in torch."""
        import torch

        if dtype := self.result.dtype(name):
            dtype = getattr(torch, str(dtype).removeprefix("mlx.core."))
            for block in self.source.blocks(name):
                rounded = block.to(dtype).float()
                self.changed |= not torch.equal(rounded.nan_to_num(), block.nan_to_num())
                yield rounded
            return
        self.changed = True
        step = 0.0
        pairs = zip(self.source.blocks(name), self.result.unpacked(name), strict=True)
        for block, arrays in pairs:
            packed, allowed = (torch.from_numpy(np.array(array)) for array in arrays)
            error = (packed - block).abs()
            relative = (error / allowed.clamp(min=1e-30)).where(error > 0, 0.0)
            step = max(step, float(relative.max()))
            yield packed
        if not step <= 1:
            raise MCSDError(
                "[verify] every quantized weight must lie within a step of the source's but one of "
                f"{name} is off by {step:.2g} times what its format allows; nothing was written. "
                "Quantize it otherwise, or leave it float, by a --q-rule."
            )
        self.step = max(self.step or 0.0, step)


def reference(blocks, args, ids):
    """Logits (B, N, K) of ids (B, N), by the PyTorch reference with weights from `blocks(name)`."""
    import torch
    from torch.nn.functional import linear

    from .reference.configuration_mcsd import MCSDConfig
    from .reference.modeling_mcsd import MCSDLayer, MCSDRMSNorm

    config = MCSDConfig(**{k: v for k, v in asdict(args).items() if k != "model_type"})

    def tensor(name):
        return torch.cat(list(blocks(name)))

    ids = torch.from_numpy(ids)
    with torch.no_grad():
        x = torch.empty(*ids.shape, args.hidden_size)  # (B, N, D)
        start = 0
        for block in blocks(EMBEDDING):
            here = (start <= ids) & (ids < start + len(block))
            x[here] = block[ids[here] - start]
            start += len(block)
        for i in tqdm(range(args.num_hidden_layers), "comparing", unit="layer", disable=None):
            with torch.device("meta"):
                layer = MCSDLayer(config).eval()
            weights = {name: tensor(f"model.layers.{i}.{name}") for name in layer.state_dict()}
            layer.load_state_dict(weights, assign=True)
            x, _ = layer(x)
            del layer, weights
        norm = MCSDRMSNorm(args.hidden_size, args.rms_norm_eps)
        norm.load_state_dict({"weight": tensor("model.norm.weight")})
        x = norm(x)
        head = EMBEDDING if args.tie_word_embeddings else HEAD
        return torch.cat([linear(x, block) for block in blocks(head)], dim=-1).numpy()


def run(out, result, ids):
    """Logits (B, N, K) of ids (B, N), by the MLX model in a directory; a used layer is let go."""
    model = load_model(out, lazy=True, dtype=mx.float32)
    backbone = model.model
    embed = backbone.embed_tokens
    if result.dtype(EMBEDDING):  # as stored: the rows that are used become float32
        embed.weight = result.read(EMBEDDING)
    x = embed(mx.array(ids)).astype(mx.float32)
    mx.eval(x)
    tied = model.args.tie_word_embeddings
    if not tied:
        del embed, backbone.embed_tokens
    while backbone.layers:
        x = backbone.layers.pop(0)(x)
        mx.eval(x)
        mx.clear_cache()
    x = backbone.norm(x)
    name, head = (EMBEDDING, embed) if tied else (HEAD, model.lm_head)
    product = head.as_linear if tied else head
    if result.dtype(name) is None:
        return np.array(product(x))
    weight, logits = result.read(name), []
    for start in range(0, weight.shape[0], ROWS):
        head.weight = weight[start : start + ROWS].astype(mx.float32)
        logits.append(np.array(product(x)))
    return np.concatenate(logits, axis=-1)
