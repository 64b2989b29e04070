"""What `ipa-kernels doctor` concludes: facts, problems, notes. What it asks of the machine is in `doctor_probes`.

Messages of libraries may name users, machines, paths and secrets. None of them is in a diagnosis: `told` has all that is.
"""

import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .doctor_coverage import Group

BUILDS = "https://pytorch.org/get-started/locally"
"""Where torch's builds are."""

BUG = "report this as a bug, with this text"

T = TypeVar("T")

_MODULES = sys.stdlib_module_names | {
    "PIL",
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "ipa_kernels",
    "numpy",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
    "xformers",
}
"""Modules whose names may be in a report."""

PHRASES = (
    "driver on your system is too old",
    "Found no NVIDIA driver on your system",
    "Torch not compiled with CUDA enabled",
    "no kernel image is available for execution on the device",
    "CUDA unknown error",
    "out of memory",
    "out of resource",
    "PassManager::run failed",
    "Failed to find C compiler",
    "cannot open shared object file",
    "undefined symbol",
    "cannot import name",
    "compiled using NumPy 1.x cannot be run in",
)
"""What may be quoted of a message of torch, triton or the linker: the same words on every machine."""

_OF_NO_INTEREST = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)


def told(error: BaseException) -> str:
    """Of an exception or a warning: its type and the module that is missing, or a known phrase; never its message."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__.partition(".")[0] in _MODULES).__name__
    missing = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ImportError) else ""
    message = "".join(traceback.format_exception_only(error))
    quoted = missing if missing in _MODULES else next((phrase for phrase in PHRASES if phrase in message), "")
    return f"{kind}: {quoted}" if quoted else kind


@dataclass(frozen=True)
class Problem:
    """Something that is in the way of the kernel or of `enable`, and what to do about it; a line each."""

    what: str
    do: str


@dataclass
class Device:
    """A GPU, or what computes where there is none.

    launched: what one launch of the kernel came to, None where there was none.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    inference: list["Group"] = field(default_factory=list)
    training: list["Group"] = field(default_factory=list)
    launched: str | None = None


@dataclass
class Diagnosis:
    """Everything that the doctor says. Values are None where something is not installed, not set or not known.

    messages: what libraries said, in full. For the user's eyes: no field, and so in no report.
    """

    ipa_kernels: dict[str, str | None] = field(default_factory=dict)
    installed: dict[str, str | None] = field(default_factory=dict)
    environment: dict[str, str | None] = field(default_factory=dict)
    devices: list[Device] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.messages: list[str] = []

    def problem(self, what: str, do: str) -> None:
        """Add one, if it is new."""
        if Problem(what, do) not in self.problems:
            self.problems.append(Problem(what, do))

    def attempt(self, what: str, do: str, probe: Callable[[], T]) -> T | None:
        """The result of a probe; where it raises None, and a problem. What it warns of is a note."""
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = probe()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and the panics of extensions in Rust are no Exception
            self.problem(f"{what}: {told(error)}", do)
            self.messages.append("".join(traceback.format_exception(error)))
            return None
        for warning in caught:
            note = told(warning.message) if isinstance(warning.message, Warning) else warning.category.__name__
            if note not in self.notes and not issubclass(warning.category, _OF_NO_INTEREST):
                self.notes.append(note)
                self.messages.append(f"{warning.category.__name__}: {warning.message}\n")
        return result
