"""From where a tensor lies in a file to its name in the model: what trainers wrap around both."""

from .files import refuse

# Tables that hold a model's state dict beside other things: Trainer, Lightning, DeepSpeed, ...
TABLES = ("state_dict", "model_state_dict", "model", "module")
# Put into names by torch.compile, DistributedDataParallel, FSDP and activation checkpointing.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrap(paths, where):
    """Return {path: name in the model} and {path: reason} of tensors that are not the model's.

    Args:
        paths: of all tensors of one file; tuples of keys.
        where: what the file is called in messages.

    Raises:
        MCSDError: two tables that may be the model, or two tensors of one name.
    """
    chosen, beside = {path: path for path in paths}, {}
    while True:
        below = {}
        for path, rest in chosen.items():
            if len(rest) > 1 and rest[0] in TABLES:
                below.setdefault(rest[0], {})[path] = rest[1:]
        if not below:
            break
        if len(below) > 1:
            refuse(
                f"{where} must hold one model but has tensors in {' and '.join(sorted(below))}; "
                "save one of them alone."
            )
        ((table, inner),) = below.items()
        beside |= {path: f"beside {table}" for path in chosen if path not in inner}
        chosen = inner
    names = {path: strip(".".join(rest)) for path, rest in chosen.items()}
    # Lightning's module calls the model `model`, and so does the model its backbone.
    while any(name.startswith("model.model.") for name in names.values()) and all(
        name.startswith("model.") for name in names.values()
    ):
        names = {path: name.removeprefix("model.") for path, name in names.items()}
    seen = {}
    for path, name in names.items():
        if name in seen:
            refuse(
                f"{where} must hold {name} once but has {'.'.join(seen[name])} and "
                f"{'.'.join(path)}."
            )
        seen[name] = path
    return names, beside


def strip(name):
    """The name without the parts that wrappers put into it."""
    *modules, last = name.split(".")
    return ".".join([*(part for part in modules if part not in WRAPPERS), last])
