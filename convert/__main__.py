"""The command: ``python -m mlx_mcsd.convert --hf-path SOURCE --mlx-path TARGET``."""

import json
from argparse import BooleanOptionalAction

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
        help="the source: a directory or a file of safetensors or torch weights, or a hub id; with "
        "--reverse the directory to make",
    )
    p.add_argument(
        "--mlx-path",
        default="mlx_model",
        help="the directory to make, which must not exist; with --reverse the source "
        "(default: %(default)s)",
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
        "--model-file",
        action=BooleanOptionalAction,
        default=True,
        help="write the file that mlx-lm imports the model from with --trust-remote-code; an "
        "mlx-lm that has models/mcsd.py needs neither (default: --model-file)",
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
    p.add_argument(
        "--upload-repo",
        metavar="OWNER/NAME",
        help="upload the result to this repository of the hub",
    )
    p.add_argument(
        "--reverse",
        action="store_true",
        help="write the Hugging Face directory --hf-path, for PyTorch, from the MLX model "
        "--mlx-path; of the other flags --dtype and --dequantize go with it",
    )
    p.add_argument(
        "-d", "--dequantize", action="store_true", help="with --reverse: unpack quantized weights"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return p


@exits_cleanly
def main(argv=None):
    """Run the command."""
    args = vars(setup_arg_parser().parse_args(argv))
    if args.pop("reverse"):
        return reverse(args)
    if args.pop("dequantize"):
        raise MCSDError("[convert] --dequantize needs --reverse but it is not set.")
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
        if report.uploaded:
            print(f"Uploaded to https://huggingface.co/{report.uploaded}")


def reverse(args):
    """Run the way back; its flags are few."""
    taken = ("mlx_path", "hf_path", "dtype", "dequantize")
    defaults = vars(setup_arg_parser().parse_args(["--hf-path", ""]))
    if other := [key for key, value in args.items() if key not in taken and value != defaults[key]]:
        flags = {action.dest: action.option_strings[-1] for action in setup_arg_parser()._actions}
        raise MCSDError(f"[convert] --reverse must go without {flags[other[0]]} but has it.")
    from mlx_mcsd.convert.reverse import reverse

    print(f"Wrote {reverse(**{key: args[key] for key in taken})}")


if __name__ == "__main__":
    main()
