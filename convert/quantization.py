"""Which matrices are quantized and how: a default, rules, and what their widths allow."""

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import one_line, some

from .matching import first_matches

# Group size and bits where none are asked for, as in mlx-lm.
USUAL = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
# Where a width is no multiple of the group size the next smaller one is tried.
AFFINE_GROUPS = (128, 64, 32)


def settings(mode="affine", bits=None, group_size=None):
    """Return checked quantization settings, the mode's usual ones where none are given.

    Raises:
        MCSDError: for what MLX does not know.
    """
    if mode not in USUAL:
        raise MCSDError(f"[convert] --q-mode must be one of {', '.join(USUAL)} but got {mode!r}.")
    usual_group, usual_bits = USUAL[mode]
    group_size = usual_group if group_size is None else group_size
    bits = usual_bits if bits is None else bits
    # Far above what MLX knows; beyond the integers it counts in, it cannot even say so.
    if not (0 < group_size <= 1024 and 0 < bits <= 32):
        raise MCSDError(
            "[convert] --q-group-size must be from 1 to 1024 and --q-bits from 1 to 32 but got "
            f"{group_size} and {bits}."
        )
    try:
        mx.eval(mx.quantize(mx.zeros((1, 32 * group_size)), group_size, bits, mode))
    except ValueError as error:
        raise MCSDError(f"[convert] {one_line(error)}") from None
    return {"group_size": group_size, "bits": bits, "mode": mode}


def read_rule(text):
    """Return (pattern, settings or None) of a rule ``REGEX=BITS[:GROUP]``, ``=MODE``, ``=float``.

    Raises:
        MCSDError: anything else.
    """
    pattern, equals, value = text.rpartition("=")
    if not (equals and pattern):
        value = None
    if value == "float":
        return pattern, None
    if value in USUAL:
        return pattern, settings(value)
    numbers = (value or "").split(":")
    if len(numbers) > 2 or not all(n.isascii() and n.isdigit() and len(n) < 5 for n in numbers):
        raise MCSDError(
            "[convert] --q-rule must be REGEX=BITS, REGEX=BITS:GROUP, REGEX=float, or REGEX= and a "
            f"mode ({', '.join(USUAL)}), but got {text[:100]!r}."
        )
    return pattern, settings("affine", *map(int, numbers))


def choose(model, default, rules=()):
    """Choose the settings of every matrix.

    Args:
        model: a `Model`; only its modules and their shapes count.
        default: from `settings`.
        rules: texts for `read_rule`; the first that matches the whole path of a module decides.

    Returns:
        Three: path -> settings, or None where the matrix stays float; the `quantization` of
        `config.json` as mlx-lm writes it, the default and beside it, by path, what differs; and
        lines on what the widths did not allow.

    Raises:
        MCSDError: rules that are none, take too long or match nothing; or if nothing is quantized.
    """
    found = dict(model.named_modules())
    paths = [name.rpartition(".")[0] for name, _ in tree_flatten(model.parameters())]
    modules = {path: found[path] for path in paths if hasattr(found[path], "to_quantized")}
    pairs = [read_rule(rule) for rule in rules]
    matches = first_matches([(pattern, "") for pattern, _ in pairs], list(modules), "--q-rule")
    used = {match[0] for match in matches if match}
    if idle := [rule for i, rule in enumerate(rules) if i not in used]:
        raise MCSDError(
            f"[convert] --q-rule {idle[0]!r} must match a matrix that no rule before it does, but "
            f"matches none of {some(modules)}."
        )
    chosen, floats, smaller = {}, [], {}
    for (path, module), match in zip(modules.items(), matches, strict=True):
        asked = pairs[match[0]][1] if match else default
        chosen[path] = got = asked and fit(asked, module.weight.shape[-1])
        if asked and not got:
            floats.append(path)
        elif asked != got:
            smaller.setdefault(got["group_size"], []).append(path)
    if not any(chosen.values()):
        raise MCSDError(
            "[convert] some matrix must be quantized but the rules and the group size "
            f"{default['group_size']} leave all of them float; use a smaller group, or no -q."
        )
    lines = [
        f"{len(paths)} of {len(modules)} matrices in groups of {group}, their width being no "
        f"multiple of more: {some(paths)}."
        for group, paths in smaller.items()
    ]
    if floats:
        lines.append(
            f"{len(floats)} of {len(modules)} matrices stay float, their width being no multiple "
            f"of any group size: {some(floats)}."
        )
    exceptions = {path: dict(got) for path, got in chosen.items() if got and got != default}
    return chosen, default | exceptions, lines


def fit(asked, width):
    """Return the settings asked for, with the largest group that divides a width, or None."""
    groups = [asked["group_size"]]
    if asked["mode"] == "affine":
        groups += [group for group in AFFINE_GROUPS if group < groups[0]]
    group = next((group for group in groups if width % group == 0), None)
    return group and asked | {"group_size": group}
