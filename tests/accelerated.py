"""What one rank runs for `test_accelerate.py`: the example with FSDP, on a CPU.

python accelerated.py EXAMPLE FLAGS...
"""

import os
import runpy
import sys

from accelerate import state
from accelerate.utils import DistributedType

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FSDP["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"  # by the model's _no_split_modules


def shard_on_cpu():
    """Accelerate shards on accelerators only: let it take this group of CPU processes for one."""
    original = state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if getattr(self, "fsdp_plugin", None) is not None:
            self.distributed_type = DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = init


def main(example, *flags):
    os.environ |= FSDP
    shard_on_cpu()
    sys.argv = [example, *flags]
    runpy.run_path(example, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
