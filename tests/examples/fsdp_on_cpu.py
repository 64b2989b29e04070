"""Run examples/train_ip_adapter.py with FSDP on CPUs, which torch can do and accelerate has no switch for.

accelerate's `AcceleratorState` makes FSDP of several GPUs only; here it makes it of several CPUs, too.
"""

import atexit
import gc
from typing import Any

import train_ip_adapter
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from torch.distributed.tensor import DTensor

initialise = AcceleratorState.__init__


def with_fsdp(self: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    """What `AcceleratorState.__init__` does for several GPUs."""
    initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)


def count_shards() -> None:
    """Say how many parameters are in shards."""
    shards = [thing for thing in gc.get_objects() if type(thing) is DTensor and thing.to_local().numel() < thing.numel()]
    print(f"shards: {len(shards)}", flush=True)


AcceleratorState.__init__ = with_fsdp
atexit.register(count_shards)
train_ip_adapter.main()
