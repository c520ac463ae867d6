"""The PyTorch reference against the float64 quadratic form and MLX: outputs and gradients."""

import json
import subprocess
import sys
import textwrap

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import oracle
from models import mlx_model, one_by_one, random_splits, random_tokens, torch_model
from oracle import VARIANTS, random_checkpoint, relative_error, write_checkpoint

torch = pytest.importorskip("torch", reason="the reference needs the convert extra")
torch.set_num_threads(1)  # on models this small a second thread only waits

TOLERANCE = 1e-5  # float32, relative to the largest logit


@pytest.fixture
def build(tmp_path):
    """Seed and config -> the reference, and the checkpoint it was read from."""

    def build(seed, **config):
        config, tensors = random_checkpoint(seed, **config)
        return torch_model(write_checkpoint(tmp_path / str(seed), config, tensors)), config, tensors

    return build


def run(model, tokens, splits=None, **kwargs):
    """Logits (B, N, K) of tokens (B, N): at once, or through the state in runs (start, stop)."""
    tokens = torch.as_tensor(tokens)
    state, parts = None, []
    with torch.no_grad():
        for a, b in splits or [(0, tokens.shape[1])]:
            pieces = {k: torch.as_tensor(v)[:, a:b] for k, v in kwargs.items()}
            out = model(tokens[:, a:b], past_key_values=state, use_cache=True, **pieces)
            state = out.past_key_values
            parts.append(out.logits.float().numpy())
    return np.concatenate(parts, axis=1)


# --- against the oracle and MLX ----------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(build, variant):
    """Oracle, reference and MLX agree; the reference also token by token and in random runs."""
    model, config, tensors = build(0, hidden_size=15, num_channels=3, rms_norm_eps=0.1, **variant)
    tokens = random_tokens(1, 2, 67)
    want = oracle.logits(config, tensors, tokens)
    got = run(model, tokens)
    assert relative_error(got, want) < TOLERANCE
    assert relative_error(run(model, tokens[:, :9], one_by_one(9)), want[:, :9]) < TOLERANCE
    assert relative_error(run(model, tokens, random_splits(2, 67)), want) < TOLERANCE
    assert relative_error(mlx_model(config, tensors)(mx.array(tokens)), got) < TOLERANCE


@pytest.mark.parametrize("hidden_act", sorted(oracle.ACTIVATIONS))
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_activation_and_head(build, hidden_act, tied):
    """Every MLP activation, and a head that is the embedding."""
    model, config, tensors = build(3, hidden_act=hidden_act, tie_word_embeddings=tied)
    tokens = random_tokens(4, 1, 20)
    want = oracle.logits(config, tensors, tokens)
    assert relative_error(run(model, tokens), want) < TOLERANCE


@pytest.mark.parametrize(
    "C, D",
    [pytest.param(3, 60, id="C=3,Dc=20"), pytest.param(1, 60, id="C=1,Dc=60")],
)
def test_lengths(build, C, D):
    """Every length at once and in random runs; 200 single steps."""
    model, config, tensors = build(5, num_channels=C, hidden_size=D)
    tokens = random_tokens(6, 1, 600)
    want = oracle.logits(config, tensors, tokens)
    for N in (1, 2, 63, 64, 65, 200, 600):
        assert relative_error(run(model, tokens[:, :N]), want[:, :N]) < TOLERANCE, N
        splits = random_splits(N, N)
        assert relative_error(run(model, tokens[:, :N], splits), want[:, :N]) < TOLERANCE, splits
    steps = run(model, tokens[:, :200], one_by_one(200))
    assert relative_error(steps, want[:, :200]) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_mlx(build, variant):
    """Same loss, same gradient of every tensor, mapped to MLX's run-time names by sanitize()."""
    model, config, tensors = build(7, hidden_size=15, num_channels=3, **variant)
    tokens = random_tokens(8, 2, 70)
    ids = torch.as_tensor(tokens)
    model.train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    twin = mlx_model(config, tensors)

    def loss_fn(twin, tokens):
        return nn.losses.cross_entropy(twin(tokens)[:, :-1], tokens[:, 1:], reduction="mean")

    twin_loss, got = nn.value_and_grad(twin, loss_fn)(twin, mx.array(tokens))
    assert twin_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    want = twin.sanitize({k: mx.array(p.grad.numpy()) for k, p in model.named_parameters()})
    got = dict(tree_flatten(got))
    assert got.keys() == want.keys()
    for name in got:  # sums over every token in another order, so wider than the logits'
        assert relative_error(got[name], want[name]) < 1e-4, name


# --- padding and packing -----------------------------------------------------------------------

PROMPTS = (5, 64, 1, 71)  # lengths


def padded_batch(side):
    """Rows, and the same padded on one side with random ids: (rows, tokens, mask)."""
    rows = [random_tokens(20 + N, N) for N in PROMPTS]
    width = max(PROMPTS)
    tokens, mask = random_tokens(9, len(rows), width), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, at], mask[i, at] = row, 1
    return rows, tokens, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pieces", [1, 3], ids=["at once", "in pieces"])
def test_padding(build, side, pieces):
    """A padded row equals that row alone, and so does its next token."""
    model, config, tensors = build(10)
    rows, tokens, mask = padded_batch(side)
    after = random_tokens(11, len(rows), 2)
    tokens = np.concatenate([tokens, after], axis=1)
    mask = np.concatenate([mask, np.ones_like(after)], axis=1)
    width = max(PROMPTS)
    splits = [*random_splits(12, width, pieces), (width, width + 1), (width + 1, width + 2)]
    got = run(model, tokens, splits, attention_mask=mask)
    for i, row in enumerate(rows):
        want = oracle.logits(config, tensors, np.concatenate([row, after[i]])[None])[0]
        assert relative_error(got[i][mask[i] == 1], want) < TOLERANCE, len(row)


def test_gradients_with_padding(build):
    """A left-padded batch, one row all padding, has the gradients of its rows, and no NaN."""
    model, *_ = build(13)
    real = random_tokens(14, 2, 20)
    padded = random_tokens(15, 3, 86)
    padded[:2, 66:] = real
    grads = []
    for tokens in (real, padded):
        ids = torch.as_tensor(tokens)
        mask = torch.zeros_like(ids)
        mask[:2, -20:] = 1
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, -20] = -100  # in the padded rows predicted by padding, in the others by nothing
        model.zero_grad()
        model.train()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, want in grads[0].items():
        assert relative_error(grads[1][name], want) < TOLERANCE, name


@pytest.mark.parametrize("variant", VARIANTS[:1] + VARIANTS[3:5])
def test_packed_documents(build, variant):
    """Documents packed with `reset` equal the documents alone, in any split; gradients as well."""
    model, config, tensors = build(16, hidden_size=15, num_channels=3, **variant)
    tokens, resets = random_tokens(17, 2, 150), np.zeros((2, 150), bool)
    resets[0, [0, 1, 2, 63, 64, 65, 128]] = True
    resets[1, [70, 149]] = True
    want = oracle.logits(config, tensors, tokens, resets)
    assert relative_error(run(model, tokens, reset=resets), want) < TOLERANCE
    splits = random_splits(18, 150)
    assert relative_error(run(model, tokens, splits, reset=resets), want) < TOLERANCE
    steps = run(model, tokens[:, :70], one_by_one(70), reset=resets[:, :70])
    assert relative_error(steps, want[:, :70]) < TOLERANCE
    embeddings = model.model.embed_tokens(torch.as_tensor(tokens)).detach().requires_grad_()
    hidden = model.model(inputs_embeds=embeddings, reset=torch.as_tensor(resets)).last_hidden_state
    hidden[1, 70:149].square().sum().backward()
    reached = embeddings.grad.abs().amax(-1) > 0
    assert reached[1, 70:148].all()
    assert not reached[0].any() and not reached[1, :70].any() and not reached[1, 149:].any()


def test_packed_and_padded(build):
    """Both at once: padding between documents and inside them; a reset on padding is void."""
    model, config, tensors = build(19)
    tokens, rng = random_tokens(20, 3, 150), np.random.default_rng(20)
    mask, resets = rng.random((3, 150)) < 0.7, rng.random((3, 150)) < 0.1
    want = [
        oracle.logits(config, tensors, *(a[None, real] for a in (row, reset)))[0]
        for row, reset, real in zip(tokens, resets, mask, strict=True)
    ]
    for N, splits in ((150, None), (150, random_splits(20, 150)), (60, one_by_one(60))):
        got = run(model, tokens[:, :N], splits, reset=resets[:, :N], attention_mask=mask[:, :N])
        for row, real, alone in zip(got, mask[:, :N], want, strict=True):
            assert relative_error(row[real], alone[: real.sum()]) < TOLERANCE, splits


# --- generate(), dtypes, transformers ----------------------------------------------------------


def greedy(model, prompt, steps):
    """Greedy decoding by a full forward for every token, without any state."""
    ids = torch.as_tensor(prompt)[None]
    for _ in range(steps):
        with torch.no_grad():
            best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    return ids[0, len(prompt) :].tolist()


def test_generate(build):
    """Cached and left-padded generate() equals greedy full forwards of each row alone."""
    model, *_ = build(22)
    rows, tokens, mask = padded_batch("left")
    want = [greedy(model, row, 8) for row in rows]
    common = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    got = model.generate(torch.as_tensor(tokens), attention_mask=torch.as_tensor(mask), **common)
    assert got[:, max(PROMPTS) :].tolist() == want
    alone = torch.as_tensor(rows[0])[None]
    for use_cache in (True, False):
        got = model.generate(
            alone, attention_mask=torch.ones_like(alone), use_cache=use_cache, **common
        )
        assert got[0, len(rows[0]) :].tolist() == want[0]


def test_generate_beams(build):
    """Beam search, which reorders the state, finds the same with it and without."""
    model, *_ = build(23)
    ids = torch.as_tensor(random_tokens(24, 2, 6))
    common = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    got = model.generate(ids, attention_mask=mask, **common)
    assert (
        got.tolist() == model.generate(ids, attention_mask=mask, use_cache=False, **common).tolist()
    )


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_generate_goes_on_from_a_state(build, padded):
    """A conversation continued by its state gives what the whole of it gives at once."""
    model, _, _ = build(36)
    tokens = torch.tensor(random_tokens(36, 2, 20))
    mask = torch.ones_like(tokens)
    if padded:  # every row begins with padding
        mask[0, :3] = mask[1, :7] = 0
    options = {"max_new_tokens": 6, "do_sample": False}
    whole = model.generate(tokens, attention_mask=mask, **options)
    first = model(tokens[:, :12], attention_mask=mask[:, :12], use_cache=True)
    again = model.generate(
        tokens, attention_mask=mask, past_key_values=first.past_key_values, **options
    )
    assert torch.equal(again, whole)


def test_flattened_documents_are_told_apart_by_their_positions(build):
    """Rows as DataCollatorWithFlattening makes them: position_ids start again at 0."""
    model, _, _ = build(37)
    tokens = torch.tensor(random_tokens(37, 1, 30))
    positions = torch.cat([torch.arange(11), torch.arange(19)])[None]
    with torch.no_grad():
        packed = model(tokens, position_ids=positions).logits
        alone = torch.cat([model(tokens[:, :11]).logits, model(tokens[:, 11:]).logits], 1)
    assert relative_error(packed.numpy(), alone.numpy()) < 1e-5


def test_inputs_that_mean_nothing_are_refused(build):
    model, _, _ = build(38)
    tokens = torch.tensor(random_tokens(38, 2, 5))
    for mask in (torch.ones(2, 4), torch.ones(1, 5), torch.ones(2, 1, 5, 5)):
        with pytest.raises(ValueError, match="attention_mask must be"):
            model(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match="there is no attention"):
        model(tokens, output_attentions=True)
    with pytest.raises(TypeError, match="atention_mask"):
        model(tokens, atention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_tuples_on_request(build):
    model, _, _ = build(39)
    tokens = torch.tensor(random_tokens(39, 1, 5))
    loss, logits, state = model(tokens, labels=tokens, use_cache=True, return_dict=False)
    named = model(tokens, labels=tokens)
    assert torch.equal(loss, named.loss) and torch.equal(logits, named.logits)
    assert state.get_seq_length() == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [1, 70])
def test_state_is_float32(build, dtype, N):
    """A narrow model keeps a float32 state, holding more than that dtype could."""
    model, *_ = build(25)
    model.to(dtype)
    with torch.no_grad():
        out = model(torch.as_tensor(random_tokens(26, 2, N)), use_cache=True)
        step = torch.as_tensor(random_tokens(27, 2, 1))
        out = model(step, past_key_values=out.past_key_values, use_cache=True)
    assert out.logits.dtype == dtype
    for histories, count in out.past_key_values.layers:
        assert histories.dtype == torch.float32
        assert (histories != histories.to(dtype).float()).any()
        assert count.tolist() == [N + 1, N + 1]


def test_autocast_leaves_the_recurrence_float32(build):
    """Mixed precision narrows the projections, never the sums over history."""
    model, *_ = build(25)
    tokens = torch.as_tensor(random_tokens(26, 1, 40))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = model(tokens, use_cache=True).past_key_values
    for histories, _ in state.layers:
        assert histories.dtype == torch.float32
        assert (histories != histories.bfloat16().float()).any()


def test_state_is_not_changed_in_place(build):
    """One prompt's state may be continued twice."""
    model, *_ = build(28)
    with torch.no_grad():
        state = model(torch.as_tensor(random_tokens(29, 1, 5)), use_cache=True).past_key_values
        step = torch.as_tensor(random_tokens(30, 1, 1))
        first = model(step, past_key_values=state, use_cache=True).logits
        assert torch.equal(model(step, past_key_values=state, use_cache=True).logits, first)


AUTO = """
    import sys
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    directory = sys.argv[1]
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(AutoConfig.from_pretrained(directory, trust_remote_code=True)) is type(model.config)
    with torch.no_grad():
        torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
    meddling = [m for m in sys.modules if m.partition(".")[0] in ("mlx", "mlx_lm", "mlx_mcsd")]
    assert not meddling, meddling
"""


def test_remote_code(build, tmp_path):
    """A saved directory is complete: transformers alone reads it, without this package or MLX."""
    model, config, tensors = build(31, fusion="concat", output_projection=True)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    assert {"configuration_mcsd.py", "modeling_mcsd.py"} <= {p.name for p in saved.iterdir()}
    written = json.loads((saved / "config.json").read_text())
    assert {k: written[k] for k in config if k not in ("dtype", "torch_dtype")} == {
        k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")
    }
    assert oracle.read_checkpoint(saved)[1].keys() == tensors.keys()
    tokens = torch.as_tensor(random_tokens(32, 2, 9))
    torch.save(tokens, tmp_path / "tokens")
    command = [sys.executable, "-c", textwrap.dedent(AUTO)]
    command += [str(saved), str(tmp_path / "tokens"), str(tmp_path / "logits")]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    want = oracle.logits(config, tensors, tokens.numpy())
    assert relative_error(torch.load(tmp_path / "logits"), want) < TOLERANCE


def test_config_round_trip(build, tmp_path):
    """What is saved, both sides read back; a bad value is refused by name."""
    from mlx_mcsd.config import ModelArgs
    from mlx_mcsd.convert.reference.configuration_mcsd import MCSDConfig

    model, config, _ = build(35, sections=["decay", "decay"], rms_norm_eps=1e-4)
    model.config.save_pretrained(tmp_path / "config")
    again = MCSDConfig.from_pretrained(tmp_path / "config")
    args = ModelArgs.from_dict(json.loads((tmp_path / "config" / "config.json").read_text()))
    for key in config.keys() - {"dtype", "torch_dtype"}:
        assert getattr(again, key) == config[key], key
        assert getattr(args, key) == config[key], key
    refused = [
        *({"num_channels": 5}, {"num_channels": True}, {"fusion": "concat"}),
        *({"sections": ["slope", "decoy"]}, {"sections": None}, {"rms_norm_eps": -1.0}),
        *({"output_projection": "false"}, {"initializer_range": "0.02"}),
    ]
    for wrong in refused:
        # A wrong shape is named with the key it contradicts.
        named = {"num_channels": "num_channels", "fusion": "output_projection"}
        key = next(iter(wrong))
        with pytest.raises(ValueError, match=named.get(key, key)):
            MCSDConfig(**{k: v for k, v in config.items() if "dtype" not in k} | wrong)
