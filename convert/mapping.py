"""Which tensor of a source fills which parameter of the model, with nothing over and nothing open.

The checkpoint layout and the run-time tree differ in one thing only: matrices that read the same
input are separate on disk and one below the other at run time. Each module says so itself in its
table `fused`, by which `Model.sanitize` concatenates, so no name is written twice:

    on disk                                              at run time
    model.layers.{l}.mixer.{u,v,e,f}_proj.weight         model.layers.{l}.mixer.uvef_proj.weight
    model.layers.{l}.mlp.{gate,up}_proj.weight           model.layers.{l}.mlp.gate_up_proj.weight
    every other tensor                                   the same name

Names are compared whole, never by a part. A source may also bring the run-time names, as anything
that mlx-lm saved does. One tensor may be there for nothing: a head beside a tied embedding.
"""

import mlx.core as mx

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import check_tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def fill(model, checkpoint):
    """Load every parameter of a model, lazily, from the tensors of a checkpoint.

    Args:
        model: a `Model`, not quantized.
        checkpoint: a `Checkpoint`.

    Raises:
        MCSDError: tensors that are missing, or that the model has no place for, or of another shape
            or type than it needs, or a head that differs from the embedding it is tied to.
    """
    # Float64 is read as float32.
    kinds = {
        name: (kind.replace("F64", "F32"), s) for name, (kind, s) in checkpoint.tensors.items()
    }
    check_tensors(model, kinds)
    weights = checkpoint.read()
    tied = model.args.tie_word_embeddings and HEAD in weights
    if tied and not mx.array_equal(weights[HEAD], weights[EMBEDDING], equal_nan=True):
        raise MCSDError(
            f"[convert] {HEAD} must equal {EMBEDDING} with tie_word_embeddings true but differs; "
            "set it to false in config.json if the head is meant."
        )
    model.load_weights(list(model.sanitize(weights).items()), strict=True)
