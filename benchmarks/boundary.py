"""What it costs to get from Python to a launch: the same empty function behind each kind of boundary that torch offers.

    python -m benchmarks.boundary [--rounds 20] [--json FILE]

The function takes the arguments of the op (one text, two images) and returns the smallest new tensor, so that what is timed is
little more than the boundary. "with grad": an input requires grad, which is when autograd takes part. A CPU is enough: none of
them knows a device. docs/decisions/0013-compiled.md has the choice.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipa_kernels.benchmarking.machine import machine_facts
from ipa_kernels.benchmarking.timing import interleaved

from .calls import many, of_one

CALLS = 200
"""Calls that are timed together."""


class Function(torch.autograd.Function):
    """torch.autograd.Function."""

    @staticmethod
    def forward(context: Any, query: Tensor, scales: Tensor, softmax_scale: float, *tensors: Tensor) -> Tensor:
        """As `empty`; autograd does not follow lists of tensors."""
        return torch.empty(1)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        """Not called."""
        raise NotImplementedError


def function(query: Tensor, keys: list[Tensor], values: list[Tensor], scales: Tensor, softmax_scale: float) -> Tensor:
    """torch.autograd.Function, applied."""
    return Function.apply(query, scales, softmax_scale, *keys, *values)  # type: ignore[no-any-return, no-untyped-call]


def empty(query: Tensor, keys: list[Tensor], values: list[Tensor], scales: Tensor, softmax_scale: float) -> Tensor:
    """What is behind each boundary: the smallest result that may be returned."""
    return torch.empty(1)


def boundaries() -> dict[str, Callable[..., Tensor]]:
    """By name."""
    library = torch.library.Library("ipa_kernels_boundary", "DEF")  # type: ignore[no-untyped-call]
    schema = "(Tensor query, Tensor[] keys, Tensor[] values, Tensor scales, float softmax_scale) -> Tensor"
    library.define(f"defined{schema}")  # type: ignore[no-untyped-call]
    library.impl("defined", empty, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    LIBRARIES.append(library)
    custom = torch.library.custom_op("ipa_kernels_boundary::custom", empty, mutates_args=())
    triton_op = torch.library.triton_op("ipa_kernels_boundary::triton", empty, mutates_args=())
    return {
        "direct call": empty,
        "autograd.Function": function,
        "Library.define and impl": torch.ops.ipa_kernels_boundary.defined.default,
        "custom_op": custom,
        "triton_op": triton_op,
    }


LIBRARIES: list[Any] = []
"""An op lives as long as the library that defines it."""


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row per boundary, with and without grad: seconds per call."""
    found = boundaries()
    rows = []
    for with_grad in (False, True):
        query = torch.randn(2, 8, 4, 64, requires_grad=with_grad)
        tensors = [torch.randn(2, 8, 4, 64) for _ in range(3)]
        arguments = query, tensors, tensors, torch.ones(1, 2), 0.125
        runs = {name: many(partial(call, *arguments), CALLS) for name, call in found.items()}
        for name, timing in interleaved(runs, torch.device("cpu"), rounds).items():
            rows.append({"boundary": name, "with grad": with_grad, "seconds": of_one(timing, CALLS)})
    return rows


def main() -> int:
    """Print one line per boundary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write facts about the machine and every number")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine_facts(torch.device("cpu"))
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    rows = measure(arguments.rounds)
    for row in rows:
        grad = "with grad" if row["with grad"] else "no grad"
        print(f"{row['boundary']:24} {grad:10} {1e6 * row['seconds']['median']:8.1f} us")
    if arguments.json:
        arguments.json.write_text(json.dumps({"benchmark": "boundary", "machine": facts, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
