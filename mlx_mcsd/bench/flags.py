"""The flags of the benchmarks; nothing here takes long to import."""

from ..cli import Parser, integer, number

MODELS = ("mcsd", "llama", "mamba2", "rwkv7", "recurrent_gemma")
CONTEXTS = (128, 1024, 4096, 16_384, 65_536, 131_072)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
REPEATS = 15
QUICK = {"contexts": (128, 512), "batches": (1, 8), "repeats": 3}
TRAINING_TOKENS = (256, 1024, 2048, 4096, 8192, 16_384)
TRAINING_REPEATS = 5
QUICK_TRAINING = {"tokens": (256, 512), "repeats": 3}


def add_model_arguments(parser: Parser) -> None:
    """Add the flags of the benchmarks that compare models."""
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="128 and 512 tokens, batches of 1 and 8, 3 repeats: under a minute",
    )
    add(
        "--models",
        nargs="+",
        choices=MODELS,
        default=MODELS,
        help="which to measure (default: all)",
    )
    add("--contexts", nargs="+", type=integer(1), help="lengths in tokens (default: 128 to 131072)")
    add(
        "--batches",
        nargs="+",
        type=integer(1),
        help="batch sizes, after the first context (default: 1 to 64)",
    )
    add("--repeats", type=integer(1), help=f"timings of each figure (default: {REPEATS})")
    add(
        "--memory-limit",
        type=number(0, above=True),
        default=4.0,
        help="GiB of state or prompt at which a model stops (default: 4)",
    )
    add(
        "--time-limit",
        type=number(0, above=True),
        default=60.0,
        help="seconds of a prompt at which a model stops (default: 60)",
    )
    add(
        "--size",
        choices=("28m", "tiny"),
        default="28m",
        help="of every model, in parameters (default: 28m)",
    )
    add("--output-dir", help="a folder for the rows as JSON and the plots as PNG and SVG")


def add_kernel_arguments(parser: Parser) -> None:
    """Add the flags of `bench kernels`."""
    add = parser.add_argument
    add("--hidden-size", type=integer(1), default=2560, help="D, while timing (default: 2560)")
    add("--num-channels", type=integer(1, 20), default=10, help="C, while timing (default: 10)")
    add("--tokens", type=integer(1), default=2048, help="N, while timing (default: 2048)")
    add("--batch-size", type=integer(1), default=1, help="B, while timing (default: 1)")
    add("--repeats", type=integer(1), default=15, help="timings of each kernel (default: 15)")


def add_training_arguments(parser: Parser) -> None:
    """Add the flags of `bench training`."""
    add = parser.add_argument
    add("--quick", action="store_true", help="256 and 512 tokens, 3 repeats: a few seconds")
    add("--hidden-size", type=integer(1), default=256, help="D (default: 256)")
    add("--num-channels", type=integer(1, 20), default=8, help="C (default: 8)")
    add(
        "--projection",
        choices=("channel", "dense"),
        default="channel",
        help="of the mixer: dense ones take more than all else (default: channel)",
    )
    add("--batch-size", type=integer(1), default=1, help="B (default: 1)")
    add("--tokens", nargs="+", type=integer(1), help="lengths, N (default: 256 to 16384)")
    add("--repeats", type=integer(1), help=f"timings of each figure (default: {TRAINING_REPEATS})")
    add(
        "--memory-limit",
        type=number(0, above=True),
        default=4.0,
        help="GiB of matrices at which the quadratic form stops (default: 4)",
    )
    add("--output-dir", help="a folder for the rows as JSON and the plots as PNG and SVG")
