"""What is compared and timed: a step of a whole UNet in the middle of a generation, stock or enabled, by adapters and masks."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..integration.api import enable, explain
from ..testing.unet_models import Model, UNetInputs, build, clone, load
from .timing import first_line, gate, interleaved, peak_bytes

VARIANTS = {"none": (0, False), "one": (1, False), "one masked": (1, True), "three": (3, False), "three masked": (3, True)}
"""Adapters (one: base, 4 tokens; three: Plus, 16 tokens each), and whether each has a mask.

With random weights a left-out adapter moves the step by 0.3 (one) or 0.7 (three), and a scale of 0.59 for 0.6 by 5e-3 or more.
"""

COMPARED = 2
"""Which step is compared: of a graphed UNet the first runs as ever, the second is captured, this one is but a replay."""


class Candidate:
    """One way to run a variant. Called again and again it goes through the steps of a generation.

    It has modules of its own around the parameters of `base`, so that nothing is switched between calls.
    """

    def __init__(self, variant: str, enabled: bool, base: Any, inputs: UNetInputs) -> None:
        self.variant = variant
        self.state = "enabled" if enabled else "stock"
        self.unet = clone(base)
        if enabled:
            enable(self.unet)
        self.module: Any = self.unet
        self.inputs = inputs
        self.steps = itertools.count()

    @property
    def name(self) -> str:
        """The name of its row."""
        return f"{self.variant}, {self.state}"

    def __call__(self) -> Tensor:
        return self.inputs.step(self.module, next(self.steps))

    def compared(self) -> Tensor:
        """The first calls, up to the one that is compared, and its result."""
        for _ in range(COMPARED):
            self()
        return self()

    def row(self) -> dict[str, Any]:
        """What it is, and what its layers ran according to `explain`."""
        row: dict[str, Any] = {"variant": self.variant, "state": self.state, "reason": None, "seconds": None}
        report = explain(self.unet)
        if self.state == "enabled" and report.layers:
            row["layers"] = {"triton": report.triton, "eager": report.eager, "stock": report.stock}
            row["why not the kernel"] = sorted({layer.reason for layer in report.layers if layer.reason})
        return row


def in_float64(base: Any, inputs: UNetInputs, run: Callable[[Any, UNetInputs], Tensor], room: int) -> Tensor | None:
    """What `run` returns of a UNet and its inputs in float64, by stock's code; None where it does not fit beside the rest.

    room: what it takes, in units of the weights in float64.
    """
    size = 8 * sum(parameter.numel() for parameter in base.parameters())
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(base.device)[0] < room * size:
            return None
    try:
        return run(copy.deepcopy(base).double(), inputs.double())
    except torch.OutOfMemoryError:
        return None


def compared_in_float64(base: Any, inputs: UNetInputs) -> Tensor | None:
    """The truth of the step that is compared; None where it does not fit."""
    return in_float64(base, inputs, lambda unet, inputs: inputs.step(unet, COMPARED), room=3)


def measure(
    model: Model, dtype: torch.dtype, device: torch.device, rounds: int, side: int | None = None
) -> list[dict[str, Any]]:
    """One row per variant, stock and enabled: first the gate of all, then, only if all are within, the times of all in turns.

    On a CPU in float32 only the same bits will do. Then the peak of memory, None on a CPU.
    """
    plain = build(model, dtype, device)
    exact = device.type == "cpu" and dtype == torch.float32
    bases: dict[int, Any] = {}
    runs: dict[str, Candidate] = {}
    rows: dict[str, dict[str, Any]] = {}
    for variant, (adapters, masked) in VARIANTS.items():
        if adapters not in bases:
            bases[adapters] = clone(plain)
            load(bases[adapters], model, adapters)
        base, inputs = bases[adapters], UNetInputs(model, adapters, masked, dtype, device, side)
        stock = Candidate(variant, False, base, inputs)
        expected = stock.compared()
        runs[stock.name], rows[stock.name] = stock, stock.row()
        if not adapters:
            continue
        enabled = Candidate(variant, True, base, inputs)
        runs[enabled.name] = enabled
        try:
            actual = enabled.compared()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # stock ran
            rows[enabled.name] = enabled.row() | {"within": False, "reason": first_line(error)}
            continue
        truth = None if exact else compared_in_float64(base, inputs)
        rows[enabled.name] = enabled.row() | gate(actual, expected, truth, exact=exact)
    if all(row.get("within", True) for row in rows.values()):
        for name, timing in interleaved(runs, device, rounds).items():
            rows[name]["seconds"] = asdict(timing)
            rows[name]["peak_bytes"] = peak_bytes(runs[name], device)
    return list(rows.values())
