"""Train an MCSD model on a cluster, or on one machine, with PyTorch and Hugging Face accelerate.

    accelerate launch examples/train_accelerate.py --out runs/cluster \
        --tokenizer mlx_mcsd/assets/stories --data STORIES.txt
    python -m mlx_mcsd.convert --hf-path runs/cluster --mlx-path cluster-mlx

How many processes, on what, in which precision, and whether each holds the whole model (DDP) or a
share of it (FSDP) is accelerate's to know: its flags or `accelerate config`. The batch is that of
all processes together, so the losses are those of one. Writes OUT/log.jsonl and, whatever the
sharding, a Hugging Face directory with the whole model.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

from mlx_mcsd.convert.reference.configuration_mcsd import MCSDConfig
from mlx_mcsd.convert.reference.modeling_mcsd import MCSDForCausalLM
from mlx_mcsd.errors import MCSDError, exits_cleanly
from mlx_mcsd.files import write_atomically
from mlx_mcsd.source import Source


def parse_args(argv=None):
    """Command line; sizes and rates are those of a small first model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id of a tokenizer")
    parser.add_argument("--data", nargs="+", required=True, help="text files")
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--intermediate-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16, help="rows a step, all processes together")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    return parser.parse_args(argv)


def rows_of(tokenizer, paths, length, batch):
    """The texts, one behind the other, as rows (rows, N) of ids; they fill a batch or more."""
    ids = []
    for path in paths:
        ids += tokenizer("".join(Source([path])), verbose=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if len(rows) < batch:
        raise MCSDError(
            f"--data must fill a batch of {batch} rows of {length} tokens but fills {len(rows)}: "
            "name more texts, or a smaller --batch or --length."
        )
    return rows


@exits_cleanly
def main(argv=None):
    """Train and save."""
    args = parse_args(argv)
    accelerator = Accelerator(
        cpu=args.cpu,
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
    )
    if args.batch % accelerator.num_processes:
        raise MCSDError(
            f"--batch must be a multiple of the {accelerator.num_processes} processes but is "
            f"{args.batch}."
        )
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    model = MCSDForCausalLM(
        MCSDConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            num_channels=args.channels,
            num_hidden_layers=args.layers,
            intermediate_size=args.intermediate_size,
            projection="dense",
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rows = rows_of(tokenizer, args.data, args.length, args.batch)
    loader = DataLoader(rows, args.batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, args.steps // 20), args.steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    count = accelerator.num_processes
    kind = f"{count} process{'es' if count > 1 else ''} ({accelerator.distributed_type.name})"
    accelerator.print(f"{len(rows)} rows, {args.batch} a step, on {kind}", flush=True)
    losses = []
    bar = tqdm(total=args.steps, unit="step", disable=not accelerator.is_main_process)
    model.train()
    while len(losses) < args.steps:
        for ids in loader:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update()
            if len(losses) == args.steps:
                break
    bar.close()

    # The whole state on the main process, whoever held which part of it.
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.out, state_dict=state)
        tokenizer.save_pretrained(args.out)
        lines = [json.dumps({"step": i + 1, "loss": loss}) for i, loss in enumerate(losses)]
        write_atomically(args.out / "log.jsonl", "".join(f"{line}\n" for line in lines).encode())
    accelerator.end_training()


if __name__ == "__main__":
    main()
