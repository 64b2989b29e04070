"""Which settings of `accelerate launch` are honoured."""

import argparse
import os

from accelerate import Accelerator, DistributedType

from .arguments import UsageError


def refuse_deepspeed() -> None:
    """Raise UsageError if `accelerate launch` was told to use DeepSpeed, before accelerate looks for it."""
    if _asked("DEEPSPEED"):
        raise UsageError("DeepSpeed: its engine owns the optimizer, whose state the checkpoints here cannot hold; FSDP works")


def check(accelerator: Accelerator, options: argparse.Namespace) -> None:
    """Raise UsageError for settings that this script has no answer to, or that accelerate would ignore without a word."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("--mixed-precision fp16: needs a GPU; bf16 runs on a CPU")
    if int(os.environ.get("WORLD_SIZE", "1")) != accelerator.num_processes:
        # each would train on its own, all into the same folder
        raise UsageError("several processes were launched and accelerate sees one: where there is no GPU, pass --cpu")
    if not _asked("FSDP"):
        return
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UsageError("FSDP: accelerate ignores it on CPUs and with one process")
    if not accelerator.is_fsdp2:
        raise UsageError("FSDP: needs version 2 (fsdp_version: 2), which shards trained parameters beside frozen ones")
    if accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        # transformers would leave the text encoders, which are not sharded, empty in all processes but one
        raise UsageError("FSDP: fsdp_cpu_ram_efficient_loading has to be false")
    if options.ema_decay is not None:
        raise UsageError("FSDP: --ema-decay needs all weights in one process")


def _asked(kind: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"
