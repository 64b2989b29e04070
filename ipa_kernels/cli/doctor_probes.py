"""What `ipa-kernels doctor` asks of this machine: versions, environment, imports. `doctor_diagnosis` concludes from it.

Needs nothing but Python: torch, too, may be missing or broken.
"""

import functools
import importlib
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from .. import __version__
from ..report import plural
from .doctor_diagnosis import BUILDS, Diagnosis

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "xformers", "numpy")
"""The packages whose versions are in the report, in this order."""

VARIABLES = (
    "IPA_KERNELS_DISABLE",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
"""The only environment variables that get into the report."""

_PLAIN_VALUE = re.compile(r"-?\d{1,3}(,-?\d{1,3})*|true|false|yes|no|on|off", re.IGNORECASE)


def examine() -> Diagnosis:
    """Look at everything, and try the kernel once on each GPU that it supports."""
    found = Diagnosis()
    found.ipa_kernels["version"] = __version__
    found.installed = {"python": platform.python_version(), "system": _system()}
    found.installed |= {name: _version(name) for name in PACKAGES}
    found.environment = {name: _value(name) for name in VARIABLES}
    _check_versions(found)
    _check_switch(found)
    loading = functools.partial(importlib.import_module, "torch")
    torch = found.attempt("torch cannot be imported", f"reinstall torch for this machine: {BUILDS}", loading)
    if torch is not None:
        found.attempt("torch or ipa_kernels is not whole", "reinstall torch and ipa-kernels", lambda: _with_torch(found, torch))
    return found


def _with_torch(found: Diagnosis, torch: Any) -> None:
    from ..benchmarking.machine import machine_facts
    from . import doctor_devices as devices

    found.installed["torch"] = f"{torch.__version__} ({devices.build()})"
    facts = machine_facts(torch.device("cpu"))
    found.ipa_kernels |= {name: facts[name] for name in ("commit", "source")}
    threads = facts["threads"]
    found.installed["processor"] = f"{facts['processor']}, {threads} thread{plural(threads)}"
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    found.environment["torch.backends.cuda.matmul.fp32_precision"] = precision
    gpus = devices.count(found)
    interpreted = _check_triton(found, torch, gpus)
    _check_diffusers(found)
    devices.examine(found, gpus, interpreted=interpreted)


def _check_versions(found: Diagnosis) -> None:
    """Against the floors in our own metadata. What is missing is for others to say."""
    try:
        floors = requires("ipa-kernels") or []
    except PackageNotFoundError:
        found.notes.append("ipa-kernels runs from a source tree that is not installed: versions are not checked")
        return
    for requirement in floors:
        match = re.match(r"([\w-]+)[^;]*?>=\s*([\d.]+)", requirement)
        installed = found.installed.get(match[1]) if match else None
        if match and installed and _release(installed) < _release(match[2]):
            do = f"pip install --upgrade '{match[1]}>={match[2]}'"
            found.problem(f"{match[1]} {installed} is older than {match[2]}, the oldest version that is known to work", do)


def _check_switch(found: Diagnosis) -> None:
    switch = found.environment["IPA_KERNELS_DISABLE"]
    if switch == "1":
        found.problem("IPA_KERNELS_DISABLE=1: enable(pipe) does nothing", "unset IPA_KERNELS_DISABLE")
    elif switch is not None:
        found.notes.append("IPA_KERNELS_DISABLE is set, but not to 1: that has no effect")


def _check_triton(found: Diagnosis, torch: Any, gpus: int) -> bool:
    """Whether kernels run in Triton's interpreter."""

    def load() -> tuple[str, bool] | None:
        try:
            from ..kernels.launch import INTERPRETED, triton

            return str(triton.__version__), INTERPRETED
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
        if not gpus or sys.platform != "linux":
            found.notes.append("triton is not installed: no kernel, eager attention everywhere")
        elif torch.version.hip is not None:
            found.problem("triton is not installed, which torch's ROCm builds bring", f"reinstall torch for ROCm: {BUILDS}")
        else:
            found.problem("triton is not installed: no kernel", "pip install 'ipa-kernels[triton]'")
        return None

    again = "reinstall triton in the version that this torch asks for (pip show torch)"
    loaded = found.attempt("triton is installed but cannot be imported", again, load)
    if loaded is None:
        return False
    found.installed["triton"], interpreted = loaded
    if interpreted and gpus:
        found.problem("TRITON_INTERPRET is set: kernels would run in Python, so none is used", "unset TRITON_INTERPRET")
    elif interpreted:
        found.notes.append('TRITON_INTERPRET is set: impl="triton" runs in Triton\'s interpreter, for debugging')
    return interpreted


def _check_diffusers(found: Diagnosis) -> None:
    def load() -> None:
        import ipa_kernels.integration.hooks  # noqa: F401

    extra = "pip install 'ipa-kernels[diffusers]'"
    if found.installed["diffusers"] is None:
        found.notes.append(f"diffusers is not installed: decoupled_attention runs, enable(pipe) needs it ({extra})")
        return
    if found.installed["transformers"] is None:
        found.notes.append(f"transformers is not installed: most pipelines need it ({extra})")
    found.attempt("diffusers is installed but enable(pipe) cannot use it", f"{extra} --upgrade", load)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
    except Exception:  # a folder of metadata that an interrupted pip left behind
        return "unreadable"


def _system() -> str:
    """Its kind, version and processor. The name of a kernel that somebody built himself may say anything."""
    number = re.match(r"[\d.]+", platform.release())
    version = platform.mac_ver()[0] or (number[0] if number else "")
    libc = " ".join(platform.libc_ver())
    wsl = "WSL" if "microsoft" in platform.release().lower() else ""
    return ", ".join(filter(None, [f"{platform.system()} {version}", wsl, platform.machine(), libc.strip()]))


def _release(text: str) -> tuple[int, ...]:
    """As in (2, 13) of "2.13.0+cpu"; what has no number is newer than everything."""
    match = re.match(r"\d+(\.\d+)*", text)
    numbers = [int(part) for part in match[0].split(".")] if match else [sys.maxsize]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _value(variable: str) -> str | None:
    """A value of numbers or a plain word; of others only that they are there."""
    value = os.environ.get(variable)
    return value if value is None or _PLAIN_VALUE.fullmatch(value) else "empty" if not value else "set to something else"
