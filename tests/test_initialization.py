"""Fresh weights, in PyTorch and in MLX: of one scale, and decay sections that begin quietly."""

import json

import mlx.core as mx
import pytest
import torch
from mlx.utils import tree_flatten

from mlx_mcsd.convert.reference.configuration_mcsd import MCSDConfig
from mlx_mcsd.convert.reference.modeling_mcsd import MCSDForCausalLM
from mlx_mcsd.training.config import TrainConfig
from mlx_mcsd.training.prepare import make_model

SHAPE = dict(
    vocab_size=300,
    hidden_size=64,
    num_channels=4,
    num_hidden_layers=2,
    intermediate_size=96,
    projection="dense",
    initializer_range=0.05,
)


@pytest.fixture(params=["torch", "mlx"])
def fresh(request, tmp_path):
    """Names and numpy arrays of a new model's weights, and a function to logits of every layer."""
    if request.param == "torch":
        torch.manual_seed(0)
        model = MCSDForCausalLM(MCSDConfig(**SHAPE))
        return {name: p.detach().numpy() for name, p in model.named_parameters()}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mcsd", **SHAPE}))
    model = make_model(TrainConfig(), tmp_path)
    return {name: mx.array(p).__array__() for name, p in tree_flatten(model.parameters())}


def test_matrices_are_normal_and_gains_one_but_the_decay_norms(fresh):
    for name, weight in fresh.items():
        if weight.ndim > 1:
            assert weight.std() == pytest.approx(0.05, rel=0.05), name
            assert abs(weight.mean()) < 0.003, name
        else:
            assert weight == pytest.approx(0.05 if "decay_norm" in name else 1.0), name
    assert sum("decay_norm" in name for name in fresh) == 2


def test_a_fresh_layer_leaves_the_embeddings_heard():
    torch.manual_seed(0)
    model = MCSDForCausalLM(MCSDConfig(**{**SHAPE, "initializer_range": 0.02})).eval()
    ids = torch.randint(0, 300, (1, 64))
    added = []
    for layer in model.model.layers:
        layer.mixer.register_forward_hook(lambda _, __, out: added.append(out[0].std().item()))
    with torch.no_grad():
        model(ids)
    embedded = model.model.embed_tokens(ids).std().item()
    # With gains of 1 a layer would add 20 times what the embeddings are.
    assert len(added) == 2 and max(added) < 2 * embedded
