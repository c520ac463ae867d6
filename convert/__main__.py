"""The command: ``python -m mlx_mcsd.convert --hf-path SOURCE --mlx-path TARGET``."""

from mlx_mcsd.cli import Parser, integer
from mlx_mcsd.errors import MCSDError, exits_cleanly


def setup_arg_parser():
    """Return the parser; flags and defaults are those of ``mlx_lm.convert``."""
    p = Parser(
        prog="python -m mlx_mcsd.convert",
        description="Convert an MCSD checkpoint in the Hugging Face layout to MLX.",
    )
    p.add_argument(
        "--hf-path",
        "--model",
        required=True,
        help="the source: a directory with config.json and safetensors, or a hub id",
    )
    p.add_argument(
        "--mlx-path",
        default="mlx_model",
        help="the directory to make; it must not exist (default: %(default)s)",
    )
    p.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="type of the weights that are not quantized (default: as in the source)",
    )
    p.add_argument("-q", "--quantize", action="store_true", help="quantize the model")
    p.add_argument("--q-bits", type=integer(1, 8), help="bits per weight (default: 4; mxfp8: 8)")
    p.add_argument(
        "--q-group-size",
        type=integer(1),
        help="weights that share a scale (default: 64; mxfp4 and mxfp8: 32; nvfp4: 16)",
    )
    p.add_argument(
        "--q-mode",
        choices=["affine", "mxfp4", "nvfp4", "mxfp8"],
        default="affine",
        help="quantization mode (default: %(default)s)",
    )
    return p


@exits_cleanly
def main(argv=None):
    """Run the command."""
    args = setup_arg_parser().parse_args(argv)
    if not args.quantize and (args.q_bits or args.q_group_size or args.q_mode != "affine"):
        raise MCSDError(
            "[convert] --q-bits, --q-group-size and --q-mode need -q but it is not set."
        )
    # MLX and mlx-lm take seconds to import; --help and a mistyped flag should not.
    from mlx_mcsd.convert.pipeline import convert

    print(f"Wrote {convert(**vars(args))}")


if __name__ == "__main__":
    main()
