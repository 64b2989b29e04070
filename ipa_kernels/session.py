"""What an enabled UNet and its processors remember. None of it is a parameter; a copy or a pickle keeps the options alone."""

import re
import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import steps
from .conditioning import Memory
from .report import FallbackWarning
from .scales import Table


class Session:
    """Shared by what was taken over in one UNet: the options, the reasons warned about, the memory, and the modules.

    is_stepping: whether a step runs whose scales are in the tables; is_prepared: whether what the layers hold is what the step
    that runs was given.
    """

    def __init__(self, impl: str, cache: bool) -> None:
        self.impl = impl
        self.cache = cache
        self.is_stepping = False
        self.is_prepared = False
        self.warned: set[str] = set()
        self.memory = Memory()
        # weak: a processor that diffusers has dropped is gone, one that it has put aside is still found
        self.taken: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def warn_once(self, reason: str, instead: str) -> None:
        """Warn that `instead` runs, the first time for this reason; with other numbers in it, it is the same reason."""
        kind = re.sub(r"\[[^][]*\]|[-+.\d]+", "", reason)
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(f"ipa_kernels: {instead} instead of the kernel: {reason}", FallbackWarning, stacklevel=2)

    def __reduce__(self) -> tuple[Any, ...]:
        return Session, (self.impl, self.cache)


class Held(NamedTuple):
    """What was prepared for one layer, in memory that is refilled and never moves.

    keys, values: [B, N, H·D], text first; vectors: for a number of queries, a mask [B or 1, M] or None for each image branch.
    """

    keys: list[Tensor]
    values: list[Tensor]
    vectors: dict[int, list[Tensor | None]]


class Layer:
    """What one processor remembers: its place, and what its last call ran.

    table: its scales as data; held: None where nothing was prepared.
    """

    def __init__(self, name: str, session: Session) -> None:
        self.name = name
        self.session = session
        self.table = Table()
        self.held: Held | None = None
        self.impl: str | None = None
        self.reason = ""
        self.calls = 0

    def record(self, impl: str, reasons: list[str]) -> None:
        """Note what a call runs; warn about a fallback that the user did not ask for."""
        self.impl = impl
        self.reason = "; ".join(reasons)
        self.calls += 1
        if self.session.impl == "auto":
            for reason in reasons:
                self.session.warn_once(
                    reason, "eager attention, whose result is stock's, runs" if impl == "eager" else "diffusers' own code runs"
                )


def is_recorded(session: Session) -> bool:
    """Whether a call is recorded, by a compiler or for a CUDA graph, to be run again with other data."""
    return torch.compiler.is_compiling() or steps.is_recorded(session)
