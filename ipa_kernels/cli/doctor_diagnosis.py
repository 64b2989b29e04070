"""What the doctor finds: facts, problems, notes. A probe that raises becomes a problem."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .doctor_redaction import said

BUILDS = "https://pytorch.org/get-started/locally"
"""Where torch's builds are."""

BUG = "report this as a bug, with this text"

T = TypeVar("T")

_OF_NO_INTEREST = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)


@dataclass(frozen=True)
class Problem:
    """Something that is in the way of the kernel or of `enable`, and what to do about it; a line each."""

    what: str
    do: str


@dataclass
class Device:
    """A GPU, or what computes where there is none.

    inference, training: lists of `coverage.Group`. launched: what one launch of the kernel came to, None where there was none.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    inference: list[Any] = field(default_factory=list)
    training: list[Any] = field(default_factory=list)
    launched: str | None = None


@dataclass
class Diagnosis:
    """Everything that the doctor says. Values are None where something is not installed, not set or not known."""

    ipa_kernels: dict[str, str | None] = field(default_factory=dict)
    installed: dict[str, str | None] = field(default_factory=dict)
    environment: dict[str, str | None] = field(default_factory=dict)
    devices: list[Device] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
            self.problem(f"{what}: {said(type(error), str(error))}", do)
            return None
        for warning in caught:
            note = said(warning.category, str(warning.message))
            if note not in self.notes and not issubclass(warning.category, _OF_NO_INTEREST):
                self.notes.append(note)
        return result
