"""Train the bundled storyteller with the PyTorch reference: tokenizer, model, picture, card facts.

    python examples/train_stories.py --out runs/stories --stories CASED.txt --lower LOWER.txt \
        --books CHILDREN.txt.xz

Stories are read as endless streams: every row continues where its last segment ended, with the
state carried over and reset where a story begins, so that no story is cut. Some of them answer the
request of a user, in the chat template's words. Books are mixed in early and fade out. Killed at
any moment, the same command resumes from the last checkpoint.
Writes OUT/hf (a Hugging Face directory to convert, or a teacher of another run), OUT/log.jsonl,
OUT/loss.png, OUT/facts.json, OUT/unseen.json (the stories held out) and OUT/flat.pt (the weights
where the learning rate began to fall, to start another run from); examples/bundle_stories.py makes
the bundled model of several runs.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from stories_requests import ASSISTANT, CHAT_TEMPLATE, NAME_PIECES, USER, Requests
from stories_scores import bits_per_character, calibrate
from stories_streams import Streams
from stories_teachers import Teachers
from stories_text import load_books, load_stories
from torch.nn import functional as F
from tqdm import tqdm

from mlx_mcsd.convert.reference.configuration_mcsd import MCSDConfig
from mlx_mcsd.convert.reference.modeling_mcsd import MCSDForCausalLM, MCSDState
from mlx_mcsd.errors import MCSDError, exits_cleanly
from mlx_mcsd.files import replacing, write_atomically
from mlx_mcsd.tokenizer import save_tokenizer, train_sentencepiece
from mlx_mcsd.training.report import draw

FREE = (
    *("out", "stories", "lower", "books", "teachers", "init_from"),
    *("calibrate", "threads", "evaluate_every", "checkpoint_every"),
)
"""Options that may be others when a run is resumed: what files hold is not known by their paths."""

SHAPE = (
    *("vocab_size", "hidden_size", "channels", "layers", "intermediate_size"),
    *("projection", "fusion"),
)
"""Options that weights must share with a run to start it."""


def parse_args(argv=None):
    """Command line; the defaults are those of the bundled model's last teacher."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--stories", nargs="+", required=True, help="story files with capitals")
    parser.add_argument("--lower", nargs="*", default=[], help="lower-case story files")
    parser.add_argument("--books", nargs="*", default=[], help="books, .txt or .xz")
    parser.add_argument(
        "--teachers", nargs="*", default=[], help="folders OUT/hf of runs to learn from as well"
    )
    parser.add_argument("--distill", type=float, default=0.9, help="weight of the teachers' loss")
    parser.add_argument("--init-from", type=Path, help="file OUT/flat.pt of a run to begin with")
    parser.add_argument("--part", type=float, default=1.0, help="of the stories to learn from")
    parser.add_argument("--vocab-size", type=int, default=3072)
    parser.add_argument("--hidden-size", type=int, default=320)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--intermediate-size", type=int, default=832)
    parser.add_argument("--projection", choices=["dense", "channel"], default="dense")
    parser.add_argument("--fusion", choices=["add", "concat"], default="add")
    parser.add_argument("--bf16", action="store_true", help="multiply matrices in bfloat16")
    parser.add_argument("--steps", type=int, default=11500)
    parser.add_argument("--batch", type=int, default=16, help="rows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a row and step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--dropout", type=float, default=0.2, help="on each residual branch")
    parser.add_argument("--embedding-dropout", type=float, default=0.1)
    parser.add_argument("--book-share", type=float, default=0.7, help="of the tokens at the start")
    parser.add_argument(
        "--books-flat", type=float, default=0.18, help="part of the steps with that share of them"
    )
    parser.add_argument(
        "--books-until",
        type=float,
        default=0.26,
        help="part of the steps after which they are gone",
    )
    parser.add_argument("--plain", type=float, default=0.4, help="stories that nobody asks for")
    parser.add_argument(
        "--rename", type=float, default=0.9, help="of those, with other names, at the start"
    )
    parser.add_argument(
        "--rename-asked", type=float, default=0.9, help="of the others, with other names"
    )
    parser.add_argument(
        "--drills",
        nargs=2,
        type=int,
        default=[0, 250],
        help="steps that only drill names: at the start, and when the books are gone",
    )
    parser.add_argument(
        "--drill-share",
        nargs=2,
        type=float,
        default=[0.0, 0.6],
        help="of drills in the tokens behind each of these; it fades as training goes on",
    )
    parser.add_argument(
        "--names", action=argparse.BooleanOptionalAction, default=True, help="names are one token"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="in the end, scale the logits to fit one half of the stories held out",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args(argv)


def encode(processor, texts):
    """One array a text: BOS, tokens, EOS."""
    bos, eos = processor.bos_id(), processor.eos_id()
    return [np.array([bos, *ids, eos]) for ids in processor.encode(texts)]


def add_dropout(model, rate, embedding_rate):
    """Dropout on what each mixer and MLP adds to the residual stream, and on the embedding."""
    model.model.embed_tokens.register_forward_hook(
        lambda module, _, out: F.dropout(out, embedding_rate, module.training)
    )
    for layer in model.model.layers:
        layer.mixer.register_forward_hook(
            lambda module, _, out: (F.dropout(out[0], rate, module.training), out[1])
        )
        layer.mlp.register_forward_hook(
            lambda module, _, out: F.dropout(out, rate, module.training)
        )


def make_optimizers(model, args):
    """Muon for the hidden matrices, AdamW for embedding and gains."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embedding = [model.model.embed_tokens.weight]
    gains = [p for p in model.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(
        hidden, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(
        [
            {"params": embedding, "weight_decay": args.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    return [muon, adam]


def schedule(step, args):
    """Share of the peak learning rate: a short warm-up, flat, linear to zero from the middle."""
    warm = min(1.0, (step + 1) / 100)
    return warm * min(1.0, 2 * (1 - step / args.steps))


def start_from(model, path, identity):
    """Load the weights of a flat.pt of the same shape and tokenizer; return the tokens they saw."""
    try:
        saved = torch.load(path, weights_only=True)
        if {name: saved[name] for name in identity} != identity:
            raise ValueError("another shape or tokenizer")
        model.load_state_dict(saved["model"])
        return saved["tokens_seen"]
    except Exception:  # torch raises a dozen kinds for files that are something else
        raise MCSDError(
            "--init-from must be a file flat.pt with the shape and tokenizer of this run but "
            f"{path} is not; train where it comes from anew, with the same sizes and stories."
        ) from None


def save_atomically(payload, path):
    """torch.save beside the target, then rename: a kill leaves the old checkpoint whole."""
    with replacing(path) as partial:
        torch.save(payload, partial)


@exits_cleanly
def main(argv=None):
    """Train, evaluate, export."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train_texts, unseen_texts = load_stories(args.stories, args.lower)
    if args.part < 1:
        random.Random(1).shuffle(train_texts)
        train_texts = train_texts[: int(args.part * len(train_texts))]
    if args.calibrate and len(unseen_texts) < 2:
        raise MCSDError(
            "--calibrate must have two held-out stories or more but has "
            f"{len(unseen_texts)}; leave it out, or give forty stories or more."
        )
    model_file = args.out / "tokenizer.model"
    if not model_file.exists():
        proto = train_sentencepiece(
            train_texts, args.vocab_size, (USER, ASSISTANT), NAME_PIECES if args.names else ()
        )
        write_atomically(model_file, proto)
    proto = model_file.read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    unseen = encode(processor, unseen_texts)
    books = [load_books([path]) for path in args.books]
    for passages in books:
        random.Random(args.seed).shuffle(passages)
    streams = Streams(processor, train_texts, books, Requests(train_texts), args)
    tokens = sum(map(len, encode(processor, train_texts)))
    characters_per_token = sum(map(len, train_texts)) / tokens
    counts = f"{len(train_texts)} stories, {tokens} tokens; {len(unseen)} held out"
    print(f"{counts}; {len(streams.books)} passages of books", file=sys.stderr)

    config = MCSDConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_channels=args.channels,
        num_hidden_layers=args.layers,
        intermediate_size=args.intermediate_size,
        projection=args.projection,
        fusion=args.fusion,
        output_projection=args.fusion == "concat",  # which comes back to D with it
        tie_word_embeddings=True,
        bos_token_id=processor.bos_id(),
        eos_token_id=processor.eos_id(),
        pad_token_id=processor.pad_id(),
    )
    model = MCSDForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    add_dropout(model, args.dropout, args.embedding_dropout)
    optimizers = make_optimizers(model, args)
    is_name = torch.zeros(args.vocab_size, dtype=torch.bool)
    is_name[[processor.piece_to_id(piece) for piece in NAME_PIECES if args.names]] = True
    teachers = Teachers(args.teachers, proto, is_name, args.distill)
    options = {name: value for name, value in vars(args).items() if name not in FREE}
    options["teachers"] = teachers.digests
    identity = {name: options[name] for name in SHAPE}
    identity["tokenizer"] = hashlib.sha256(proto).hexdigest()
    checkpoint, log_path = args.out / "checkpoint.pt", args.out / "log.jsonl"
    step, carried, log, tokens_before = 0, None, [], 0
    if args.init_from and not checkpoint.exists():
        tokens_before = start_from(model, args.init_from, identity)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, value in saved["options"].items():
            if options.get(name) != value:
                raise MCSDError(
                    f"{checkpoint} is of a run with {name} = {value}, not {options.get(name)}; "
                    "repeat its options, or name another --out."
                )
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        streams.restore(saved["streams"])
        torch.set_rng_state(saved["rng"])
        step, carried, log = saved["step"], saved["carried"], saved["log"]
        teachers.states, tokens_before = saved["teacher_states"], saved["tokens_before"]

    model.train()
    bar = tqdm(total=args.steps, initial=step, unit="step", smoothing=0.05)
    while step < args.steps:
        segment, ignored, fresh = streams.next(step / args.steps)
        segment, ignored = torch.from_numpy(segment), torch.from_numpy(ignored)
        inputs, targets = segment[:, :-1], segment[:, 1:].masked_fill(ignored[:, 1:], -100)
        reset = inputs == config.bos_token_id
        past = None if fresh else MCSDState(carried)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            out = model.model(inputs, reset=reset, past_key_values=past, use_cache=True)
            logits = model.lm_head(out.last_hidden_state)
            if args.teachers:
                probabilities = teachers.probabilities(inputs, reset, fresh)
        logits, targets = logits.float().flatten(0, 1), targets.flatten()
        learned = (targets >= 0).sum().clamp(min=1)  # a request may fill a segment
        losses = F.cross_entropy(logits, targets, reduction="none")
        bits = losses.sum().item() / learned.item() / math.log(2) / characters_per_token
        if args.teachers:
            losses = teachers.distil(losses, logits, targets, probabilities)
        loss = losses.sum() / learned
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise MCSDError(
                f"loss and gradient must be numbers but are {loss.item()} and {norm.item()} at "
                f"step {step}; begin anew with a lower --lr."
            )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step, args)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        carried = [tuple(t.detach() for t in layer) for layer in out.past_key_values.layers]
        step += 1
        bar.update()
        if step % 10 == 0:
            bar.set_postfix(bpc=f"{bits:.3f}", norm=f"{norm:.2f}")
            log.append({"step": step, "bits_per_character": round(bits, 4)})
        if step % args.evaluate_every == 0 or step == args.steps:
            unseen_bits = bits_per_character(model, unseen, unseen_texts)
            log.append({"step": step, "val_bits_per_character": round(unseen_bits, 4)})
            bar.write(f"step {step}: {unseen_bits:.4f} bits per character on unseen stories")
            write_atomically(args.out / "loss.png", draw(log))
        if step == max(1, args.steps // 2):
            seen = tokens_before + step * args.batch * args.length
            flat = {"model": model.state_dict(), "tokens_seen": seen, **identity}
            save_atomically(flat, args.out / "flat.pt")
        if step % args.checkpoint_every == 0 or step == args.steps:
            save_atomically(
                {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "streams": streams.state(),
                    "rng": torch.get_rng_state(),
                    "step": step,
                    "carried": carried,
                    "teacher_states": teachers.states,
                    "tokens_before": tokens_before,
                    "log": log,
                    "options": options,
                },
                checkpoint,
            )
            write_atomically(log_path, "".join(json.dumps(line) + "\n" for line in log).encode())
    bar.close()
    scale = 1.0
    if args.calibrate:
        scale = calibrate(model, unseen[::2])
        unseen, unseen_texts = unseen[1::2], unseen_texts[1::2]  # the other half is measured
    hf = args.out / "hf"
    # How a story reads best; generate() and mlx_mcsd.generate take it from here.
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.95, max_new_tokens=400)
    model.save_pretrained(hf)
    template = {"chat_template": CHAT_TEMPLATE}
    save_tokenizer(hf, proto, config.max_position_embeddings, template)
    sources = [*args.stories, *args.lower, *args.books]
    facts = {
        "parameters": parameters,
        "bits_per_character_unseen": round(bits_per_character(model, unseen, unseen_texts), 4),
        "unseen": {"stories": len(unseen), "characters": sum(map(len, unseen_texts))},
        "logit_scale": round(scale, 4),
        "training_tokens_seen": tokens_before + step * args.batch * args.length,
        "training_tokens_before": tokens_before,
        "teachers": [
            {
                "parameters": sum(p.numel() for p in teacher.parameters()),
                "bits_per_character_unseen": round(
                    bits_per_character(teacher, unseen, unseen_texts), 4
                ),
                "sha256": digest,
            }
            for teacher, digest in zip(teachers.models, teachers.digests, strict=True)
        ],
        "sources": {
            Path(p).name: hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in sources
        },
        "options": {k: v for k, v in vars(args).items() if isinstance(v, int | float)},
    }
    write_atomically(args.out / "unseen.json", f"{json.dumps(unseen_texts, indent=1)}\n".encode())
    write_atomically(args.out / "facts.json", f"{json.dumps(facts, indent=2)}\n".encode())
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
