"""The measuring core: interleaved timing, medians, facts about the machine. torch only.

A time on its own says little, so candidates are timed in turns within one run and compared as ratios of medians.
"""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Wall time of one call in seconds: median, 20th and 80th percentile, and how many calls were timed."""

    median: float
    p20: float
    p80: float
    calls: int


def interleaved(candidates: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 30) -> dict[str, Timing]:
    """Time every candidate once per round, in turns, after two rounds of warming up; the device is waited for each time."""
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(-2, rounds):
        for name, call in candidates.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if round_ >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: _timing(seconds) for name, seconds in times.items()}


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a result needs beside it to be compared with another: device, driver, versions, commit."""
    facts: dict[str, Any] = {
        "device": device.type,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "ipa_kernels": _version("ipa-kernels"),
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["cuda"] = torch.version.cuda or torch.version.hip
    return facts


def _timing(seconds: list[float]) -> Timing:
    ordered = sorted(seconds)
    p20, p80 = ordered[len(ordered) // 5], ordered[(len(ordered) * 4) // 5]
    return Timing(statistics.median(ordered), p20, p80, len(ordered))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
