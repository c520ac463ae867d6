"""The command: ``python -m mlx_mcsd.convert --hf-path SOURCE --mlx-path TARGET``."""

import json
from argparse import BooleanOptionalAction

from mlx_mcsd.cli import Parser, integer
from mlx_mcsd.errors import exits_cleanly


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
        help="the source: a directory or a file of safetensors or torch weights, or a hub id",
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
    p.add_argument(
        "--q-rule",
        dest="q_rules",
        metavar="REGEX=SETTING",
        action="append",
        default=[],
        help="quantize the matrices whose whole path matches otherwise: REGEX=BITS, "
        "REGEX=BITS:GROUP, REGEX=mxfp4 (or another mode) or REGEX=float; the first rule that "
        "matches decides; repeatable",
    )
    p.add_argument(
        "--name-map",
        metavar="FILE",
        help="a JSON file of rules for a source with names of its own (see docs/convert.md)",
    )
    p.add_argument(
        "--config",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set a key of the config, before config.json; repeatable",
    )
    p.add_argument(
        "--allow-nonfinite", action="store_true", help="take weights that are NaN or infinite"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="print the plan, tensor by tensor, and write nothing"
    )
    p.add_argument(
        "--verify",
        dest="verification",
        action=BooleanOptionalAction,
        help="compare the result's logits with the source's in PyTorch before it is put in place "
        "(default: where PyTorch is installed)",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return p


@exits_cleanly
def main(argv=None):
    """Run the command."""
    args = vars(setup_arg_parser().parse_args(argv))
    as_json = args.pop("json")
    # MLX and mlx-lm take seconds to import; --help and a mistyped flag should not.
    from mlx_mcsd.convert.pipeline import convert

    report = convert(**args)
    if as_json:
        print(json.dumps(report.json(), indent=2))
    else:
        for note in report.plan.notes:
            print(f"[INFO] {note}")
        if not report.written:
            print(report.table())
        print(f"{'Wrote' if report.written else 'Would write'} {report.target}: {report.summary()}")
        if report.verification:
            print(report.verification.text())


if __name__ == "__main__":
    main()
