"""MCSD language models on Apple silicon: attention-free, with a state of fixed size.

    from mlx_mcsd import load

    model, tokenizer = load()

loads the bundled storyteller; a directory or a hub id loads another model.
"""

import os
from importlib import import_module

# Imported without PyTorch, transformers complains; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# From the M5 on, MLX multiplies float32 matrices in TF32, with ten bits of mantissa; the state must
# stay float32. Read at the first such product; half-precision weights are not affected.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

__version__ = "0.1.0"
__all__ = ["Model", "ModelArgs", "State", "__version__", "load", "stream_generate"]

_HOME = {
    "load": ".loading",
    "Model": ".model",
    "ModelArgs": ".config",
    "State": ".state",
    "stream_generate": ".generation",
}


def __getattr__(name: str):
    # MLX and its libraries take seconds to import; `import mlx_mcsd` alone should not.
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
