"""A conversion from start to end: open the source, plan, write, compare, rename into place."""

import shlex
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import save_config
from tqdm import tqdm

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.model import MODEL_FILE, SHIM

from . import quantization, verify, writing
from .checkpoint import Checkpoint
from .plan import make_plan
from .report import Report
from .streaming import Reader
from .tokens import add_tokenizer, copy
from .upload import check_repo, upload
from .weights import Shards

DTYPES = ("float16", "bfloat16", "float32")

# Taken over byte for byte where they are.
COPIED = ("generation_config.json", "LICENSE")


def convert(
    hf_path,
    mlx_path="mlx_model",
    *,
    dtype=None,
    quantize=False,
    q_bits=None,
    q_group_size=None,
    q_mode="affine",
    q_rules=(),
    name_map=None,
    config=(),
    allow_nonfinite=False,
    model_file=True,
    dry_run=False,
    verification=None,
    upload_repo=None,
):
    """Convert a checkpoint to a directory that `mlx_mcsd.load` and the mlx-lm commands load.

    Args:
        hf_path: a directory in the checkpoint layout, a file of weights, or a hub id.
        mlx_path: the directory to make; it must not exist.
        dtype: "float32", "float16" or "bfloat16", of all weights that are not quantized; None keeps
            the source's types.
        quantize: quantize every matrix whose width is a multiple of a group size.
        q_bits: bits per quantized weight; None is the mode's usual number.
        q_group_size: weights that share a scale; None is the mode's usual number.
        q_mode: "affine", "mxfp4", "nvfp4" or "mxfp8".
        q_rules: exceptions for some matrices, "REGEX=8", "REGEX=4:32", "REGEX=mxfp4" or
            "REGEX=float"; the first whose expression matches the whole path of a module decides.
        name_map: a JSON file of rules for a source with names of its own, see `naming`.
        config: "KEY=VALUE" texts, which go before `config.json`.
        allow_nonfinite: take weights that are NaN or infinite.
        model_file: write the file that mlx-lm imports the model from, and name it in the config;
            False is for an mlx-lm that has `mlx_lm/models/mcsd.py`.
        dry_run: plan everything, but read no weights and write nothing.
        verification: compare the result's logits with those of the source in PyTorch; None does
            where PyTorch is installed.
        upload_repo: "owner/name" on the hub, to upload the result to.

    Returns:
        A `Report`.

    Raises:
        MCSDError: for whatever is wrong with the source, the target or the options. Nothing is
            written then.
    """
    target = writing.new_directory(mlx_path, "--mlx-path")
    check_choice("--dtype", dtype, (None, *DTYPES))
    check_choice("--q-mode", q_mode, quantization.USUAL)
    if not quantize and (q_bits or q_group_size or q_rules or q_mode != "affine"):
        raise MCSDError(
            "[convert] --q-bits, --q-group-size, --q-mode and --q-rule need -q but it is not set."
        )
    settings = quantization.settings(q_mode, q_bits, q_group_size) if quantize else None
    if verification and not dry_run:
        verify.need()
    if upload_repo is not None:
        check_repo(upload_repo)

    source = Checkpoint(hf_path)
    cast = dtype and getattr(mx, dtype)
    plan = make_plan(
        source,
        dtype=cast,
        settings=settings,
        q_rules=q_rules,
        name_map=name_map,
        config=config,
        model_file=model_file,
    )
    path = Path(hf_path)
    if path.is_dir():
        path = path.resolve()
    origin = path.name if path.exists() else str(hf_path)
    report = Report(origin, target, source.tensors, plan)
    if dry_run:
        return report

    options = ["--hf-path", origin, "--mlx-path", target.name]
    options += ["--dtype", dtype] if dtype else []
    if quantize:
        options += ["-q", "--q-bits", str(settings["bits"]), "--q-mode", q_mode]
        options += ["--q-group-size", str(settings["group_size"])]
        options += [word for rule in q_rules for word in ("--q-rule", rule)]
    options += ["--name-map", Path(name_map).name] if name_map is not None else []
    options += [word for text in config for word in ("--config", text)]
    options += ["--allow-nonfinite"] if allow_nonfinite else []
    options += [] if model_file else ["--no-model-file"]
    with writing.directory(target) as out:
        save_config(plan.config, out / "config.json")
        if model_file:
            (out / MODEL_FILE).write_text(SHIM)
        copy(COPIED, source.directory, out)
        ids = add_tokenizer(source.directory, plan.args, out)
        write_weights(out, plan, Reader(source, cast, allow_nonfinite))
        if verification or (verification is None and verify.available()):
            report.verification = verify.verify(out, source, plan.names, plan.args, *ids)
        elif verification is None:
            report.plan.notes.append(f"Not verified: {verify.MISSING}.")
        found = report.verification.text() if report.verification else ""
        name = upload_repo or target.name
        card = writing.card(name, origin, shlex.join(options), found, model_file)
        (out / "README.md").write_text(card)
    report.written = True
    if upload_repo is not None:
        upload(target, upload_repo)
        report.uploaded = upload_repo
    return report


def write_weights(out, plan, reader):
    """Write the weights of a plan, and read them back."""
    if plan.head:
        embedding = next(p for p in plan.parameters if p.name == "model.embed_tokens.weight")
        (part,) = embedding.parts
        if reader.fingerprint(plan.head) != reader.fingerprint(part.source):
            raise MCSDError(
                f"[convert] {plan.head} must equal {part.source} with tie_word_embeddings true but "
                "differs; --config tie_word_embeddings=false takes the head as it is."
            )
    stored = [parameter.stored() for parameter in plan.parameters]
    with Shards(out, stored, plan.size, {"format": "mlx"}) as shards:
        for parameter, names in zip(
            tqdm(plan.parameters, unit="tensor", disable=None), stored, strict=True
        ):
            for rows in reader.rows(parameter):
                packed = (
                    [rows]
                    if parameter.settings is None
                    else mx.quantize(rows, **parameter.settings)
                )
                for name, part in zip(names, packed, strict=True):
                    shards.append(name, part)
            mx.clear_cache()
        shards.verify()


def check_choice(flag, value, choices):
    """Refuse a value that is none of the choices; the command's parser does so for its flags."""
    if value not in choices:
        wanted = ", ".join(str(choice) for choice in choices)
        raise MCSDError(f"[convert] {flag} must be one of {wanted} but got {value!r}.")
