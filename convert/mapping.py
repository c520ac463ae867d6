"""Which tensor of a source fills which parameter of the model, with nothing over and nothing open.

The checkpoint layout and the run-time tree differ in one thing only: matrices that read the same
input are separate on disk and one below the other at run time. `TABLE` says which parameter each
name belongs to; how the rows are joined is said once, by each module's `fused`, and done once, by
`Model.sanitize`. Names are compared whole, never by a part.
"""

import re

from mlx.utils import tree_flatten

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import check_tensors, some

LAYER = r"(model\.layers\.[0-9]+)"

# A name on disk, and the run-time names it may have: the model has exactly one of them.
TABLE = {
    r"model\.embed_tokens\.weight": ("model.embed_tokens.weight",),
    LAYER + r"\.(mixer_norm|mlp_norm)\.weight": (r"\1.\2.weight",),
    LAYER + r"\.mixer\.[uv]_proj\.weight": (
        r"\1.mixer.uvef_proj.weight",
        r"\1.mixer.uv_proj.weight",
    ),
    LAYER + r"\.mixer\.[ef]_proj\.weight": (
        r"\1.mixer.uvef_proj.weight",
        r"\1.mixer.ef_proj.weight",
    ),
    LAYER + r"\.mixer\.(decay_norm|decay_norm_0|o_proj)\.weight": (r"\1.mixer.\2.weight",),
    LAYER + r"\.mlp\.(?:gate|up)_proj\.weight": (r"\1.mlp.gate_up_proj.weight",),
    LAYER + r"\.mlp\.down_proj\.weight": (r"\1.mlp.down_proj.weight",),
    r"model\.norm\.weight": ("model.norm.weight",),
    # A head may be stored beside the embedding it is tied to.
    r"lm_head\.weight": ("lm_head.weight", "model.embed_tokens.weight"),
    # What mlx-lm saved brings the run-time names.
    LAYER + r"\.mixer\.(uvef|uv|ef)_proj\.weight": (r"\1.mixer.\2_proj.weight",),
    LAYER + r"\.mlp\.gate_up_proj\.weight": (r"\1.mlp.gate_up_proj.weight",),
}


def destination(name, parameters):
    """Return the run-time name of what a tensor fills, by `TABLE`.

    Args:
        name: a tensor's name on disk.
        parameters: the names of the model's parameters.

    Returns:
        One of `parameters`, or None where the tensor has no place among them.
    """
    for pattern, targets in TABLE.items():
        if match := re.fullmatch(pattern, name):
            candidates = (match.expand(target) for target in targets)
            return next((c for c in candidates if c in parameters), None)
    return None


def fill(model, checkpoint):
    """Load every parameter of a model, lazily, from the tensors of a checkpoint.

    Args:
        model: a `Model`, not quantized.
        checkpoint: a `Checkpoint`.

    Raises:
        MCSDError: tensors that are missing, or that the model or the table has no place for, or of
            another shape or type than it needs, or a head that differs from the embedding it is
            tied to.
    """
    # Float64 is read as float32.
    kinds = {
        name: (kind.replace("F64", "F32"), s) for name, (kind, s) in checkpoint.tensors.items()
    }
    check_tensors(model, kinds)
    parameters = dict(tree_flatten(model.parameters()))
    places = {name: destination(name, parameters) for name in kinds}
    if unnamed := [name for name, place in places.items() if place is None]:
        raise MCSDError(
            f"[convert] the converter's table of names must have {some(unnamed)} but does not; "
            "only the layout of the mixer mcsd can be converted."
        )
    model.load_weights(list(model.sanitize(checkpoint.read()).items()), strict=True)
