"""The device that a command runs on, the dtype, threads and memory. torch only."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..integration.api import OFF
from .errors import UserError, why


def available_device(device: str | None) -> torch.device:
    """The device, after one number has been there and back."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    # of a GPU that cannot be used, torch's own words say why
    if name.partition(":")[0] not in (*kinds, "cuda"):
        raise UserError(f"--device {name}: not available here; torch has {' and '.join(kinds)}")
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: not available here: {why(error)}") from error


def check_switch() -> None:
    """Raises UserError where `enable` would do nothing: stock would be compared with stock."""
    if os.environ.get(OFF) == "1":
        raise UserError(f"{OFF}=1 is set: nothing would be enabled; unset it to compare with stock")


def chosen_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of --dtype; without it float32 on the cpu, else float16."""
    dtype: torch.dtype = getattr(torch, name or ("float32" if device.type == "cpu" else "float16"))
    return dtype


@contextmanager
def threads(count: int) -> Iterator[None]:
    """The small pipeline computes too little for several threads, which stall each other where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory_of(device: torch.device) -> int | None:
    """The bytes that a device has, all in all; None where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_about_memory(error: BaseException) -> bool:
    """The CPU's allocator raises a RuntimeError like any other, which begins in another way on Windows."""
    said = str(error)
    is_said = "allocate memory" in said or "you tried to allocate" in said
    return is_said or isinstance(error, torch.OutOfMemoryError | MemoryError)
