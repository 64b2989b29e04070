"""Facts about the machine and the source: what a result needs beside it to be compared with another. torch only."""

import functools
import json
import os
import platform
import subprocess
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a result needs beside it to be compared with another: device, driver, versions, commit."""
    package = Path(__file__).parents[1]
    facts: dict[str, Any] = {
        "device": device.type,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "interpreter": os.environ.get("TRITON_INTERPRET") == "1",
        "diffusers": _version("diffusers"),
        "ipa_kernels": _version("ipa-kernels"),
        "commit": _commit(package),
        "source": _digest(package),
    }
    if device.type == "cuda":
        facts |= gpu_facts(device)
    return facts


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Of a CUDA or ROCm device: what it is, and what drives it."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(package: Path) -> str | None:
    """Of the clone that the package is part of, else the one that pip installed it from; a repository around is neither."""
    if (package.parent / ".git").exists():
        return output_of("git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        installed = distribution("ipa-kernels")
        if Path(str(installed.locate_file(package.name))).resolve() != package.resolve():
            return None
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, OSError, ValueError):
        return None
    commit = origin.get("vcs_info", {}).get("commit_id")
    return None if commit is None else str(commit)


@functools.cache
def _driver() -> str | None:
    """Of NVIDIA's GPUs, which share one."""
    found = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return None if found is None else found.splitlines()[0]


def _digest(package: Path) -> str:
    """Of the package's source: names the code where there is no git, or where it was edited since the commit."""
    digest = sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def output_of(*command: str) -> str | None:
    """What a program prints, None where there is none or it fails."""
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=20).stdout.strip()
            or None
        )
    except (OSError, subprocess.SubprocessError):
        return None
