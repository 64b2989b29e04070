"""The launch of a validated call: scales and masks in the form that the kernels read."""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .dispatch import allows_tf32, launch_class, launch_config
from .validation import Problem

if TYPE_CHECKING:
    from ..kernels.launch import Launch


def scales_for_kernel(problem: Problem) -> Tensor | None:
    """[B or 1, n] in float32 on the device of the query."""
    if not problem.masks:
        return None
    scales, device = problem.scales, problem.query.device
    if not isinstance(scales, Tensor):
        stream = _stream(device)
        return filled(scales, problem.query) if stream is None else _remembered(scales, device, stream)
    if scales.device != device and _stream(device) is None:
        return torch.cat([filled(row, problem.query) for row in scales.tolist()])
    return _copied(scales.to(torch.float32), device)


def filled(scales: Iterable[float], like: Tensor) -> Tensor:
    """[1, n] in float32, each number written by the device of `like` itself; fake where that is fake.

    A compiler may hold a symbol for a number. A CUDA graph fills its own memory in each replay: it reads nothing that may be
    gone by then, and leaves nothing behind that is empty until then.
    """
    return torch.cat([like.new_full((1, 1), scale, dtype=torch.float32) for scale in scales], dim=1)


@functools.lru_cache(maxsize=256)
def _remembered(scales: tuple[float, ...], device: torch.device, stream: int) -> Tensor:
    # by value: copying a few numbers to a GPU costs more than the kernel; and by stream: on another one the copy may still
    # be under way, and memory that is let go of is given to the next that asks on its own stream
    return _copied(torch.tensor([scales], dtype=torch.float32, device="cpu"), device)


def _copied(scales: Tensor, device: torch.device) -> Tensor:
    if scales.device == device:
        return scales
    # from pinned memory the copy does not wait for what the GPU is doing
    return scales.pin_memory().to(device, non_blocking=True)


def _stream(device: torch.device) -> int | None:
    """What the current call is queued on; None where it is captured in a CUDA graph."""
    if device.type != "cuda":
        return 0
    return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(device).cuda_stream


def masks_for_kernel(problem: Problem) -> tuple[Tensor | None, ...]:
    """[B or 1, M] each, in a dtype that the kernels read."""
    known = (torch.float32, problem.query.dtype)
    return tuple(mask if mask is None or mask.dtype in known else mask.to(torch.float32) for mask in problem.masks)


def make_launch(problem: Problem) -> "Launch":
    """The launch for a problem, its query aside: for a query of the same shape, dtype and device."""
    query = problem.query
    config = launch_config(query.device, query.dtype, query.shape[3], query.shape[2])
    launch = launch_class()
    assert config is not None, "call_reasons was empty"
    assert launch is not None, "call_reasons was empty"
    return launch(
        query.shape,
        problem.keys,
        problem.values,
        scales_for_kernel(problem),
        masks_for_kernel(problem),
        problem.softmax_scale,
        allows_tf32(query.device),
        config,
    )
