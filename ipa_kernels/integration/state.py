"""What an enabled UNet and its processors remember. None of it is a parameter; a copy or a pickle keeps the options alone."""

import re
import sys
import warnings
import weakref
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..report import FallbackWarning
from .conditioning_cache import ConditioningCache
from .guards import LayerGuard, ModuleGuard
from .scale_table import ScaleTable

_NOT_THE_USERS = {"ipa_kernels", "diffusers", "torch", "accelerate", "contextlib"}
"""What stands between a call of the user's and a layer: these packages, and what runs the start of a with-block."""


class ModelContext:
    """Shared by what was installed in one UNet: the options, the reasons warned about, what is kept, and the modules.

    is_stepping: whether a step runs whose scales are in the tables; is_prepared: whether the static storage of the layers holds
    what the step that runs was given.
    """

    def __init__(self, impl: str, cache: bool) -> None:
        self.impl = impl
        self.cache = cache
        self.is_stepping = False
        self.is_prepared = False
        self.warned: set[str] = set()
        self.conditioning = ConditioningCache()
        self._guards: dict[int, ModuleGuard] = {}
        # weak: a processor that diffusers has dropped is gone, one that it has stashed is still found
        self.installed: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def warn_once(self, reason: str, instead: str) -> None:
        """Warn at the user's call that `instead` runs, the first time for this reason; with other numbers it is the same."""
        kind = re.sub(r"\[[^][]*\]|[-+.\d]+", "", reason)
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(
                f"ipa_kernels: the kernel is not used in some or all layers; {instead}. Why: {reason}. "
                "print(ipa_kernels.explain(pipe)) lists all layers.",
                FallbackWarning,
                stacklevel=1 + _frames_below_the_user(),
            )

    def guard(self, module: torch.nn.Module) -> ModuleGuard:
        """Of a projection of the UNet's as it is now."""
        known = self._guards.get(id(module))
        if known is None or not known.check() or known.module is not module:
            known = self._guards[id(module)] = ModuleGuard(module)
        return known

    def forget(self) -> None:
        """Drop everything that is kept, and count from 0 again."""
        self.conditioning.forget()
        self.conditioning = ConditioningCache()

    def prune(self) -> None:
        """Drop the guards of modules that are gone."""
        self._guards = {key: guard for key, guard in self._guards.copy().items() if guard.module is not None}

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelContext, (self.impl, self.cache)


class StaticKV(NamedTuple):
    """Of one layer, in memory that is refilled and never moves.

    keys, values: [B, N, H·D], text first; vectors: for a number of queries, a mask [B or 1, M] or None for each image branch.
    """

    keys: list[Tensor]
    values: list[Tensor]
    vectors: dict[int, list[Tensor | None]]


class Layer:
    """What one processor remembers: its place, and what its last call ran.

    guards: by the identity of the `Attention` that calls it, usually one; table: its scales as data; static: None where nothing
    was prepared.
    """

    def __init__(self, name: str, context: ModelContext) -> None:
        self.name = name
        self.context = context
        self.guards: dict[int, LayerGuard] = {}
        self.table = ScaleTable()
        self.static: StaticKV | None = None
        self.impl: str | None = None
        self.reason = ""
        self.calls = 0

    def note_call(self, impl: str, reasons: list[str]) -> None:
        """Note what a call runs; warn about a fallback that the user did not ask for."""
        self.impl = impl
        self.reason = "; ".join(reasons)
        self.calls += 1
        if self.context.impl == "auto":
            for reason in reasons:
                self.context.warn_once(
                    reason,
                    "eager attention runs instead, with stock's result"
                    if impl == "eager"
                    else "diffusers' own code runs instead",
                )


def layer_of(processor: Any) -> Layer | None:
    """What `install` leaves on a processor; None where it was not installed. A user's own may have slots, and no `__dict__`."""
    return getattr(processor, "__dict__", {}).get("_ipa_layer")


def _frames_below_the_user() -> int:
    """How many frames in a row, from the caller's on, are not the user's. Python 3.11 has no `skip_file_prefixes`."""
    frame: FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _NOT_THE_USERS:
        frame = frame.f_back
        count += 1
    return count
