"""Scales and masks in the form that the kernels read."""

import functools

import torch
from torch import Tensor

from .arguments import Problem


def scales_for_kernel(problem: Problem) -> Tensor | None:
    """[B or 1, n] in float32 on the device of the query."""
    if not problem.masks:
        return None
    scales = problem.scales
    if not isinstance(scales, Tensor):
        return _scales_on_device(scales, problem.query.device)
    return _to_device(scales.to(torch.float32), problem.query.device)


@functools.lru_cache(maxsize=256)
def _scales_on_device(scales: tuple[float, ...], device: torch.device) -> Tensor:
    # remembered by value: copying a few numbers to a GPU costs more than the kernel
    return _to_device(torch.tensor([scales], dtype=torch.float32), device)


def _to_device(scales: Tensor, device: torch.device) -> Tensor:
    if scales.device == device:
        return scales
    # from pinned memory the copy does not wait for what the GPU is doing
    return scales.pin_memory().to(device, non_blocking=True)


def masks_for_kernel(problem: Problem) -> tuple[Tensor | None, ...]:
    """[B or 1, M] each, in a dtype that the kernels read."""
    known = (torch.float32, problem.query.dtype)
    return tuple(mask if mask is None or mask.dtype in known else mask.to(torch.float32) for mask in problem.masks)
