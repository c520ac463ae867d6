"""One model on several machines: the ranks together are the model that one process is.

`sharded.py` runs in two and in three processes of the ring backend; its findings are judged here.
"""

import json
import os
import random
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import oracle
import tiny
from mlx_mcsd import generate
from mlx_mcsd.errors import MCSDError
from mlx_mcsd.mixers.base import Mixer
from mlx_mcsd.model import Model, ModelArgs
from models import Rank
from oracle import random_checkpoint
from sharded import ODD, QUANTIZED, B

TOLERANCE = 1e-5
VARIANTS = {variant.id: variant.values[0] for variant in oracle.VARIANTS}


def free_ports(count):
    """The first of neighbouring ports that nobody uses, below those a system hands out itself."""
    while True:
        first = random.randrange(20_000, 32_000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


def run_ranks(out, ranks, *command, stdin=os.devnull):
    """Run a command as each of some ranks, as mlx.launch does; returns what each prints."""
    first, codes = free_ports(ranks), [None]
    hosts = [[f"127.0.0.1:{first + rank}"] for rank in range(ranks)]
    (out / "hosts.json").write_text(json.dumps(hosts))
    logs = [out / f"{rank}.log" for rank in range(ranks)]
    group = {"MLX_HOSTFILE": str(out / "hosts.json")} if ranks > 1 else {}
    deadline = time.monotonic() + 600
    with ExitStack() as stack:
        processes = []
        for rank, log in enumerate(logs):
            process = subprocess.Popen(
                [sys.executable, *command],
                env=os.environ | group | {"MLX_RANK": str(rank)},
                stdin=stack.enter_context(open(stdin)),
                stdout=stack.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        # Where one fails the others would wait for it for ever.
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.05)
            codes = [process.poll() for process in processes]
    assert codes == [0] * ranks, [log.read_text() for log in logs]
    return [log.read_text() for log in logs]


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def found(request, tmp_path_factory):
    """The findings of every rank."""
    out, ranks = tmp_path_factory.mktemp("ranks"), request.param
    run_ranks(out, ranks, Path(__file__).with_name("sharded.py"), out)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


def share(total, rank, ranks):
    """Of so many channels or features, those of a rank."""
    return total * (rank + 1) // ranks - total * rank // ranks


def expected_bytes(config, rank, ranks):
    """A float32 rank's: embedding, head and norms whole, the rest by its channels and features."""
    K, D, F, C, L = (
        config[f"{name}"]
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size"),
            *("num_channels", "num_hidden_layers"),
        )
    )
    Dc, c, f = D // C, share(C, rank, ranks), share(F, rank, ranks)
    sections = config["sections"]
    projections = 2 * len(sections) * c * Dc * (Dc if config["projection"] == "channel" else D)
    gains = sections.count("decay") * c * Dc
    width = len(sections) * Dc if config["fusion"] == "concat" else Dc
    output = D * c * width if config["output_projection"] else 0
    return 4 * (2 * K * D + D + L * (projections + gains + output + 2 * D + 3 * D * f))


# --- what the ranks found ----------------------------------------------------------------------


def test_variants(found):
    """Unequal shares of 5 channels and 13 features: the logits, states and bytes of each rank."""
    ranks, Dc = len(found), 4
    names = [name for name in VARIANTS if ranks == 2 or name.endswith("slope+decay")]
    for rank, results in enumerate(r["variants"] for r in found):
        assert list(results) == names
        for name, result in results.items():
            config, _ = random_checkpoint(0, **ODD, **VARIANTS[name])
            assert result["error"] < TOLERANCE, name
            slots = [[B, share(5, rank, ranks), Dc]] * len(config["sections"])
            assert result["states"] == [[*slots, [B]]], name
            assert result["bytes"] == expected_bytes(config, rank, ranks), name


def test_gradients(found):
    """A rank's gradients are its share of the whole model's, those of what all hold included."""
    for rank in found:
        assert len(rank["gradients"]) == 6
        for variant, errors in rank["gradients"].items():
            assert len(errors) > 8
            assert max(errors.values()) < TOLERANCE, variant


def test_quantized(found):
    """Shares are cut between quantization groups: nothing is quantized anew."""
    names = [name for name in QUANTIZED if len(found) == 2 or name.startswith("affine")]
    for results in (rank["quantized"] for rank in found):
        assert list(results) == names
        for name, result in results.items():
            assert result["error"] < TOLERANCE, name


def test_pipeline(found):
    """Every rank ends with the logits; each holds the state and the bytes of its own layers."""
    config, _ = random_checkpoint(0, **ODD | {"num_hidden_layers": 4})
    whole = expected_bytes(config, 0, 1)
    layer = whole - expected_bytes(config | {"num_hidden_layers": 3}, 0, 1)
    layers = {2: [2, 2], 3: [2, 1, 1]}[len(found)]
    for rank, own in zip(found, layers, strict=True):
        assert rank["layers"]["error"] < TOLERANCE
        assert rank["layers"]["states"] == [[[B, 5, 4], [B, 5, 4], [B]]] * own
        assert rank["layers"]["bytes"] == whole - (4 - own) * layer


@pytest.mark.parametrize("how", ["shard", "pipeline"])
def test_same_tokens(found, how):
    """mlx-lm's loop and its batches say on every rank what one process says."""
    for rank in found:
        assert rank[how] == rank["whole"] == found[0]["whole"]


def test_seed(found):
    """Without --seed, `mlx_mcsd.generate` draws the same tokens everywhere."""
    seeds = [rank["seed"] for rank in found]
    assert isinstance(seeds[0], int) and seeds == seeds[:1] * len(found)


# --- shares ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_published_size(ranks):
    """The 10B model (C = 12): nothing but embedding, head and norms is held twice."""
    config = {
        **{"vocab_size": 65_536, "hidden_size": 3072, "num_channels": 12, "num_hidden_layers": 60},
        **{"intermediate_size": 12_288, "projection": "dense", "fusion": "concat"},
        **{"output_projection": True, "sections": ["slope", "decay"]},
    }
    for rank in range(ranks):
        model = Model(ModelArgs(**config))  # no weight of it is ever computed
        model.shard(Rank(rank, ranks))
        held = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
        assert held == expected_bytes(config, rank, ranks)
        assert model.layers[0].mixer.state_bytes(1) == 4 * (2 * 3072 // ranks + 1)


def build(**config):
    return Model(ModelArgs.from_dict(random_checkpoint(0, **config)[0]))


def quantized(group_size, **config):
    model = build(**config)
    nn.quantize(model, group_size, 4, class_predicate=lambda p, _: "o_proj" in p or "down" in p)
    return model


def adapted():
    model = build(num_channels=4)
    keys = {"mlp.gate_up_proj"}
    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": keys})
    return model


def twice():
    model = build(num_channels=4)
    model.shard(Rank(0, 2))
    return model


def foreign():
    model = build()
    model.layers[0].mixer = Mixer()
    return model


O_PROJ = {"output_projection": True, "hidden_size": 64, "num_channels": 4}


@pytest.mark.parametrize(
    "model, ranks, complaint",
    [
        pytest.param(
            lambda: build(num_channels=2),
            3,
            "num_channels must be at least 3 for 3 processes but is 2; use 2 at most",
            id="channels",
        ),
        pytest.param(
            lambda: quantized(32, **O_PROJ, intermediate_size=128),
            3,
            r"num_channels must be at least 6 .* is 4 \(its quantization groups hold 2 together\)",
            id="channels of a quantized o_proj",
        ),
        pytest.param(
            lambda: quantized(64, hidden_size=64, num_channels=4, intermediate_size=64),
            2,
            "intermediate_size must be at least 128 for 2 processes but is 64",
            id="quantized down_proj",
        ),
        pytest.param(adapted, 2, "one is a LoRALinear; fuse", id="adapters"),
        pytest.param(twice, 2, "load it anew", id="twice"),
        pytest.param(foreign, 2, "Mixer is not; use a pipeline", id="another mixer"),
    ],
)
def test_refusals(model, ranks, complaint):
    with pytest.raises(MCSDError, match=complaint):
        model().shard(Rank(0, ranks))


def test_pipeline_needs_layers():
    with pytest.raises(MCSDError, match="at least the number of processes but got 2 and 3"):
        build(num_hidden_layers=2).model.pipeline(Rank(0, 3))


def test_a_group_of_one_changes_nothing():
    model = build()
    before = dict(tree_flatten(model.parameters()))
    model.shard()
    after = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(after[name], value).item() for name, value in before.items())


# --- commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [[], ["--pipeline"]], ids=["tensor", "pipeline"])
def test_generate(tmp_path, capsys, how):
    """Two processes tell the story that one tells; the second prints nothing."""
    tiny.write_model(tmp_path / "model", num_channels=3)
    flags = ["--model", str(tmp_path / "model"), "--temp", "0.8", "--seed", "1", *how]
    flags += ["--prompt", "a b", "-m", "9", "--verbose", "false"]
    generate.main(flags)
    story = capsys.readouterr().out
    assert len(story) > 9
    assert run_ranks(tmp_path, 2, "-m", "mlx_mcsd.generate", *flags) == [story, ""]


@pytest.mark.parametrize("flag", ["--state", "--save-state", "--prompt-cache-file"])
def test_generate_needs_one_process(monkeypatch, capsys, flag):
    """A state on several machines is in parts: no file holds it."""
    monkeypatch.setattr(mx.distributed, "init", lambda: Rank(1, 2))
    args = generate.setup_arg_parser().parse_args([flag, "file"])
    with pytest.raises(MCSDError, match=f"{flag} needs one process but 2 were launched"):
        generate.join(args)


def test_chat(tmp_path):
    """`mlx_lm.chat`, on two processes, answers as it does on one."""
    tiny.write_model(tmp_path, num_channels=3, num_hidden_layers=3)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tiny.write_tokenizer(tmp_path, chat_template=template)
    (tmp_path / "shim.py").write_text("from mlx_mcsd.model import Model, ModelArgs  # noqa\n")
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_file": "shim.py"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = dict.fromkeys(mx.load(str(tmp_path / "model.safetensors")), "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    command = ["-m", "mlx_lm", "chat", "--model", tmp_path, "--trust-remote-code", "-m", "12"]
    (tmp_path / "typed").write_text("a b\nb a\nq\n")

    def said(ranks, *how):
        text = run_ranks(tmp_path, ranks, *command, *how, stdin=tmp_path / "typed")[0]
        # Speeds differ, and mlx-lm leaves while its look-ahead step may still wait for the others.
        return [x for x in text.splitlines() if "tok/s" not in x and "[ring]" not in x]

    alone = said(1)
    assert len(alone) > 10
    assert said(2) == alone
    assert said(2, "--pipeline") == alone
