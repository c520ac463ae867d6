"""Someone else's loop, transformers' Trainer, on the PyTorch reference: train, resume, convert."""

import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import generate as mlx_generate

import tiny
from oracle import relative_error

torch = pytest.importorskip("torch", reason="the reference needs the convert extra")
pytest.importorskip("accelerate", reason="Trainer needs the convert extra")
transformers = pytest.importorskip("transformers")

# The names before transformers 5.20 serve all its versions.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

Collator = transformers.DataCollatorForLanguageModeling
TEXTS = ["a b ab ba\nb", "bb aa", "a b a b a b a b", "ba ab a b b a bb"] * 4


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    tiny.write_tokenizer(tmp_path / "tokenizer", eos_token="</s>", pad_token="</s>")
    return transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def make_model(**config):
    from mlx_mcsd.convert.reference.configuration_mcsd import MCSDConfig
    from mlx_mcsd.convert.reference.modeling_mcsd import MCSDForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_channels": 2, "num_hidden_layers": 2, "intermediate_size": 40}
    return MCSDForCausalLM(MCSDConfig(vocab_size=tiny.VOCAB_SIZE, **sizes | config))


def make_trainer(out, tokenizer, model=None, collator=None, callbacks=(), **options):
    """A Trainer as in anybody's script, on the CPU."""
    options = {
        **{"output_dir": str(out), "use_cpu": True, "report_to": [], "disable_tqdm": True},
        **{"dataloader_pin_memory": False, "per_device_train_batch_size": 2},
        **{"learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"},
        **options,
    }
    data = [tokenizer(text) for text in TEXTS]
    return transformers.Trainer(
        model=model or make_model(),
        args=transformers.TrainingArguments(**options),
        train_dataset=data,
        eval_dataset=data[:4],
        data_collator=collator or Collator(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


class StopAt(transformers.TrainerCallback):
    """Ends the training after a step, as if someone had."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_train_resume_convert_generate(tokenizer, tmp_path):
    """All the usual switches at once; what comes out converts, and MLX says what PyTorch says."""
    from mlx_mcsd import load
    from mlx_mcsd.convert.__main__ import main as convert
    from mlx_mcsd.convert.reference.modeling_mcsd import MCSDForCausalLM

    switches = {
        **{"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        **{"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4},
        **{"max_steps": 8, "lr_scheduler_type": "cosine", "warmup_steps": 1},
    }
    whole = make_trainer(tmp_path / "whole", tokenizer, **switches)
    whole.train()
    history = whole.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.5
    assert len(evaluated) == 2 and evaluated[1] < evaluated[0]
    predicted = whole.predict(whole.eval_dataset)  # with the state among the outputs, in evaluation
    assert predicted.metrics["test_loss"] == pytest.approx(evaluated[1])
    assert predicted.predictions.shape[::2] == (4, tiny.VOCAB_SIZE)

    out = tmp_path / "resumed"
    make_trainer(out, tokenizer, callbacks=[StopAt(4)], **switches).train()
    resumed = make_trainer(out, tokenizer, **switches)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    for (name, a), b in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name

    # The checkpoint as it lies there, optimizer, pickled arguments and all.
    convert(["--hf-path", str(out / "checkpoint-8"), "--mlx-path", str(tmp_path / "mlx")])
    twin, mlx_tokenizer = load(str(tmp_path / "mlx"))
    model = MCSDForCausalLM.from_pretrained(out / "checkpoint-8").eval()
    ids = tokenizer("ab b", return_tensors="pt")
    with torch.no_grad():
        want = model(**ids).logits
    assert relative_error(twin(mx.array(ids["input_ids"].numpy())), want) < 1e-5
    told = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = mlx_generate(twin, mlx_tokenizer, "ab b", max_tokens=6)
    assert text == tokenizer.decode(told, skip_special_tokens=True) and text


def test_accumulated_batches_are_one_batch(tokenizer, tmp_path):
    """Rows of unequal lengths: the mean is over all tokens of a step, not of means."""
    weights = []
    for batch, steps in ((4, 1), (1, 4)):
        trainer = make_trainer(
            tmp_path / str(batch),
            tokenizer,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=2,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
        )
        trainer.train()
        weights.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    start = dict(make_model().named_parameters())
    for name, value in weights[0].items():
        moved = value - start[name].detach()
        assert relative_error(weights[1][name] - start[name].detach(), moved) < 1e-4, name
        assert moved.abs().max() > 0, name


def test_packed_rows_learn_what_padded_rows_learn(tokenizer):
    """transformers' flattening collator: one row, positions that start anew at each document."""
    model, documents = make_model(), [tokenizer(text) for text in TEXTS[:4]]
    padded = Collator(tokenizer, mlm=False)(documents)
    packed = transformers.DataCollatorWithFlattening(return_tensors="pt")(documents)
    assert packed["input_ids"].shape[0] == 1 and (packed["position_ids"] == 0).sum() == 4
    gradients = []
    for batch in (padded, packed):
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, want in gradients[0].items():
        assert relative_error(gradients[1][name], want) < 1e-5, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_gradients(tokenizer, reentrant):
    model = make_model().train()
    batch = Collator(tokenizer, mlm=False)([tokenizer(text) for text in TEXTS[:4]])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert model.is_gradient_checkpointing
    for name, want in gradients[0].items():
        assert torch.equal(gradients[1][name], want), name


def test_autocast_keeps_sums_and_loss_in_float32(tokenizer):
    """In bfloat16 the matrices multiply; what is summed over history or tokens is float32."""
    model, seen = make_model(), {}
    mixer = model.model.layers[1].mixer
    mixer.u_proj.register_forward_hook(lambda m, a, y: seen.update(product=y.dtype))
    mixer.decay_norm.register_forward_hook(lambda m, a, y: seen.update(sums=a[0].dtype))
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (2, 70)))
    plain = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert seen == {"product": torch.bfloat16, "sums": torch.float32}
    assert loss.dtype == torch.float32
    assert 0 < abs(loss.item() - plain.item()) < 1e-2 * plain.item()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_it_compiles_as_one_graph():
    """torch.compile finds nothing in a training step that it must leave to Python."""
    model = make_model().train()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (2, 70)))
    mask, positions = torch.ones_like(ids), torch.arange(70).remainder(31)[None]
    want = model(ids, attention_mask=mask, position_ids=positions, labels=ids).loss
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))  # torch's own
        got = compiled(ids, attention_mask=mask, position_ids=positions, labels=ids).loss
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
