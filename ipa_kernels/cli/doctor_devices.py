"""Which GPUs torch can use, what the kernel does on each, and why a GPU that is there cannot be used."""

import functools

import torch

from ..benchmarking.machine import gpu_facts, output_of
from ..ops.dispatch import architecture, layer_reasons
from .doctor_coverage import TRIED, coverage, try_kernel
from .doctor_diagnosis import BUG, BUILDS, Device, Diagnosis

_DRIVER = f"update the GPU's driver, or install a torch for an older CUDA: {BUILDS}"
_COMPILER = f"Triton needs a C compiler (gcc) and Python's headers (python3-dev) to launch; where both are there, {BUG}"


def build() -> str:
    """What torch was built for."""
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return "no CUDA, no ROCm" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def count(found: Diagnosis) -> int:
    """The GPUs that torch can use; where there are none, a GPU that it should be able to use is a problem."""
    known = len(found.notes)
    gpus = found.attempt("torch cannot look for GPUs", _DRIVER, _visible) or 0
    if gpus:
        return gpus
    for warning in found.notes[known:]:
        found.problem(f"torch finds no GPU: {warning}", _DRIVER)
    del found.notes[known:]
    listed = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if listed is not None:
        gpu, hidden = f"the GPU that nvidia-smi lists ({listed.splitlines()[0]})", found.environment["CUDA_VISIBLE_DEVICES"]
        if hidden in ("-1", "empty"):
            found.notes.append(f"CUDA_VISIBLE_DEVICES hides {gpu}")
        elif torch.version.cuda is None:
            found.problem(f"torch was built without CUDA and cannot use {gpu}", f"install a torch with CUDA: {BUILDS}")
        else:
            found.problem(f"torch cannot use {gpu}", _DRIVER)
    return 0


def examine(found: Diagnosis, gpus: int, *, interpreted: bool) -> None:
    """Every GPU, or what torch computes on where there is none."""
    devices = [torch.device("cuda", index) for index in range(gpus)]
    for device in devices or [torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")]:
        entry = Device(str(device))
        found.devices.append(entry)
        found.attempt(f"{device} cannot be examined", _DRIVER, functools.partial(_examine, found, entry, device, interpreted))


def _visible() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _examine(found: Diagnosis, entry: Device, device: torch.device, interpreted: bool) -> None:
    if device.type == "cuda":
        entry.facts = {"architecture": architecture(device), **gpu_facts(device)}
    entry.inference = coverage(device, gradient=False)
    entry.training = coverage(device, gradient=True)
    if device.type != "cuda" or interpreted or layer_reasons(device, torch.float16, TRIED.head_dim):
        return
    result = found.attempt(f"{device}: the kernel cannot be launched", _COMPILER, lambda: try_kernel(device))
    entry.launched = "failed" if result is None else str(result)
    if result is not None and not result.within:
        found.problem(f"{device}: the kernel is further from float64 than it may be: {result}", f"IPA_KERNELS_DISABLE=1; {BUG}")
