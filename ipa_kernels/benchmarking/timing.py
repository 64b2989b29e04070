"""How time is taken: the gate of a whole step, interleaved wall time, medians, peaks. torch only.

A time on its own says little, so candidates are timed in turns within one run and compared as ratios of medians. Wall time is
what a caller waits for, launches included; `device_time` measures the time of the device alone.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SLACK = 1.25
"""How much farther from float64 than stock's a whole step may be: attention is a small part of a UNet's rounding."""

RELATIVE = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 1e-4}
"""The distance from stock's step that is allowed where there is no float64."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile, and how many samples were taken."""

    median: float
    p20: float
    p80: float
    calls: int


def interleaved(candidates: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 30) -> dict[str, Timing]:
    """Wall time: every candidate once per round, in turns, after two rounds of warming up; each time the device is waited for.

    Raises ValueError for fewer than one round.
    """
    check_rounds(rounds)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(-2, rounds):
        for name, call in candidates.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if round_ >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: timing(seconds) for name, seconds in times.items()}


def gate(
    actual: Tensor, expected: Tensor, truth: Tensor | None, dtype: torch.dtype | None = None, *, exact: bool = False
) -> dict[str, Any]:
    """Whether an enabled result is as good as the stock one, and the numbers that say so; never where it is NaN.

    Stock's proves nothing where it, or the truth, is not finite, and where it is all zeros: then no result is within.

    truth: in float64, where there is one; dtype: in which it was computed, where the result has another; exact: whether only
    the same bits will do.

    Raises ValueError where the shapes differ.
    """
    _check_shape("result", actual, expected)
    equal, size = torch.equal(actual, expected), _rms(expected.double())
    if exact or truth is None:
        proves_nothing = not 0 < size < math.inf
        distance = _rms(actual.double() - expected.double()) / (size or math.nan)
        bound = 0.0 if exact else RELATIVE[dtype or actual.dtype]
        passed, numbers = not exact and distance <= bound, {"relative to stock": distance, "bound": bound}
    else:
        _check_shape("truth", truth, expected)
        ours, stock = _rms(actual.double() - truth), _rms(expected.double() - truth)
        proves_nothing = not (0 < size < math.inf and stock < math.inf)
        passed, numbers = ours <= SLACK * stock, {"rms": ours, "stock_rms": stock}
    return {"within": (equal or passed) and not proves_nothing, "proves nothing": proves_nothing, "equal": equal, **numbers}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most that a call has allocated at a time, beyond what was there before; None on a CPU, which keeps no account."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def first_line(error: BaseException) -> str:
    """Of what an exception says, with its type, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def check_rounds(rounds: int) -> None:
    """Raise ValueError for fewer than one."""
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")


def timing(seconds: list[float]) -> Timing:
    """The statistics of samples in seconds."""
    ordered = sorted(seconds)
    p20, p80 = ordered[len(ordered) // 5], ordered[(len(ordered) * 4) // 5]
    return Timing(statistics.median(ordered), p20, p80, len(ordered))


def _check_shape(name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise ValueError(f"{name}: expected the shape of stock's result, {list(expected.shape)}, got {list(tensor.shape)}")


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
