"""Size, bits per character and speed of a model at every setting of the converter, as Markdown.

    python examples/quantization_table.py stories.txt --out table.md

The text holds stories separated by <|endoftext|> that the model has not seen; each is read from an
empty state, its end included, by the quantized numbers unpacked to float32: what they say, without
the wait for quantized products on a CPU. Speed is that of generating after a short prompt, packed,
the best of three. On MLX's CPU backend scales are loaded as float32, the fastest there.
"""

import argparse
import os
import platform
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it remarks on every config it reads

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.utils import dequantize_model
from stories_text import read_text, repair, split_stories
from tqdm import tqdm

from mlx_mcsd import load
from mlx_mcsd.convert.pipeline import convert
from mlx_mcsd.errors import MCSDError, exits_cleanly
from mlx_mcsd.files import write_atomically
from mlx_mcsd.loading import resolve
from mlx_mcsd.scoring import score

SETTINGS = {
    **{dtype: {"dtype": dtype} for dtype in ("float32", "float16", "bfloat16")},
    **{f"affine, {b} bits": {"quantize": True, "q_bits": b} for b in (8, 6, 5, 4, 3, 2)},
    **{mode: {"quantize": True, "q_mode": mode} for mode in ("mxfp8", "mxfp4", "nvfp4")},
}
HEADER = """| setting | MB | bits per weight | bits per character | tokens/s |
| --- | ---: | ---: | ---: | ---: |"""


def speed(model, tokenizer, prompt, tokens):
    """Tokens per second, the best of three."""
    best = 0.0
    for _ in range(3):
        *_, last = stream_generate(model, tokenizer, prompt, max_tokens=tokens)
        best = max(best, last.generation_tps)
    return best


@exits_cleanly
def main(argv=None):
    """Convert, measure and print one setting after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path, help="stories, separated by <|endoftext|>")
    parser.add_argument("--model", help="directory or hub id (default: the bundled model)")
    parser.add_argument("--prompt", default="Once upon a time", help="to generate from")
    parser.add_argument("--tokens", type=int, default=200, help="to generate for the speed")
    parser.add_argument("--out", type=Path, help="file to write the table to, too")
    args = parser.parse_args(argv)
    stories = split_stories(repair(read_text(args.text)))
    if not stories:
        raise MCSDError(f"{args.text} must hold a story that ends in a full stop but holds none.")
    lines = [HEADER]
    print(HEADER)
    for name, options in SETTINGS.items():
        with TemporaryDirectory() as scratch:
            target = Path(scratch) / "model"
            report = convert(resolve(args.model), target, verification=False, **options)
            model, tokenizer = load(report.target)
            weight = 8 * report.bytes / report.plan.size
            rate = speed(model, tokenizer, args.prompt, args.tokens)
            model = dequantize_model(model)
            model.set_dtype(mx.float32)
            documents = ([story] for story in tqdm(stories, desc=name, disable=None))
            bits = score(model, tokenizer, documents).bits_per_character
        lines.append(
            f"| {name} | {report.bytes / 1e6:.1f} | {weight:.2f} | {bits:.4f} | {rate:.0f} |"
        )
        print(lines[-1], flush=True)
    characters = sum(map(len, stories))
    lines.append(
        f"\n{len(stories)} stories, {characters:,} characters. {platform.system()} "
        f"{platform.machine()}, {os.cpu_count()} cores, {mx.default_device()}, MLX "
        f"{mx.__version__}."
    )
    print(lines[-1])
    if args.out:
        write_atomically(args.out, "\n".join(lines).encode() + b"\n")


if __name__ == "__main__":
    main()
