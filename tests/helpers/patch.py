"""A function of torch or diffusers replaced by one that changes its result from step to step, and counts its calls."""

from collections import Counter
from typing import Any

import pytest
from torch import Tensor

import ipa_kernels

from .controls import Control
from .generate import generate

STEPS = 2


class Patch:
    """In the place of a function: what that returns grows from step to step, and its calls are counted."""

    def __init__(self, place: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.own = getattr(place, name)
        self.place, self.name, self.monkeypatch = place, name, monkeypatch
        self.step = 0
        self.calls: Counter[int] = Counter()

    def put(self) -> None:
        def patch(*arguments: Any, **options: Any) -> Any:
            self.calls[self.step] += 1
            out = self.own(*arguments, **options)
            factor = 1 + 0.01 * self.step
            if isinstance(out, list):
                return [tensor * factor for tensor in out]
            return out * factor if isinstance(out, Tensor) else out

        is_static = isinstance(self.place, type) and isinstance(vars(self.place).get(self.name), staticmethod)
        self.monkeypatch.setattr(self.place, self.name, staticmethod(patch) if is_static else patch)

    def remove(self) -> None:
        self.monkeypatch.setattr(self.place, self.name, self.own)

    def after_step(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.step = step + 1
        return tensors


def run(
    pipe: Any, patch: Patch, names: tuple[str, ...], control: Control | None = None, steps: int = STEPS
) -> tuple[Tensor, Counter[int]]:
    """(latents, calls of the patch in each step)."""
    patch.step, patch.calls = 0, Counter()
    latents = generate(pipe, names, control, steps=steps, callback_on_step_end=patch.after_step)
    return latents, patch.calls


def impls(pipe: Any) -> set[str | None]:
    return {layer.impl for layer in ipa_kernels.explain(pipe).layers}
