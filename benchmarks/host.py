"""From the call of a processor to the launch: what one hot cross-attention, in a loop, costs on the host, beside stock's.

    python -m benchmarks.host [--device cuda] [--adapters one "three masked"] [--rounds 20] [--json FILE]

In a step of a whole UNet a layer is called once, between others: the same call costs several times as much there, which is not
measured here. The layer is tiny, so that next to nothing is computed: what is left is Python, the dispatch of operations and,
on a GPU, their launches. Stock and enabled run on the same module in turns. In "first" everything is checked and computed, as
in a step that begins a generation; "later" is the call again, which finds what was computed. "forward" is diffusers'
`Attention.forward` around a processor that does nothing, "projections" the call of to_q and to_out: what of "later" is neither
is ours.

On a CPU the launch of the kernel is left out (a stub takes its arguments), and the operations that stock and enabled share are
those of the CPU: read the ratio, not the microseconds. On a GPU nothing is left out, and no call waits for the device.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # so that the way to the launch can be run; what it launches is left out

from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor

from ipa_kernels.benchmarking.machine import machine_facts
from ipa_kernels.benchmarking.timing import interleaved
from ipa_kernels.kernels.launch import Launch

from .calls import many, of_one
from .generation import VARIANTS, Layer, Shape

SHAPE = Shape(1, 16, 64, 2)
CALLS = 100
"""Calls of a layer that are timed together."""


class Nothing:
    """A processor that returns its input."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        return hidden_states


def measure(adapters: str, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    """One row: seconds per call of each candidate, and the ratio of enabled to stock."""
    layer = Layer(SHAPE, 64, adapters, dtype, device)
    processor = layer.attention.processor
    bare = Layer(SHAPE, 64, adapters, dtype, device)
    bare.attention.set_processor(Nothing())
    stubbed: Any = nullcontext()
    if device.type == "cpu":
        stubbed = mock.patch.object(Launch, "_launch", _leave_out)
    with torch.no_grad(), layer.enabled("triton") as memory, stubbed:
        ours = type(processor)

        def stock() -> Tensor:
            processor.__class__ = IPAdapterAttnProcessor2_0
            try:
                return layer()
            finally:
                processor.__class__ = ours

        def first() -> Tensor:
            memory.forget()
            return layer()

        candidates: dict[str, Callable[[], Tensor]] = {
            "stock": stock, "first": first, "later": layer, "forward": bare, "projections": layer.projections,
        }  # fmt: skip
        timings = interleaved({name: many(call, CALLS) for name, call in candidates.items()}, device, rounds)
    row: dict[str, Any] = {"adapters": adapters, "dtype": str(dtype), "launch": "stubbed" if device.type == "cpu" else "real"}
    row["seconds"] = {name: of_one(timing, CALLS) for name, timing in timings.items()}
    row["ratio"] = timings["later"].median / timings["stock"].median
    row["ratio of the first"] = timings["first"].median / timings["stock"].median
    return row


def _leave_out(launch: Launch, *arguments: Any) -> None:
    """In the place of a launch: takes its arguments."""


def main() -> int:
    """Print one line per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--adapters", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write facts about the machine and every number")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    torch.set_num_threads(1)

    facts = machine_facts(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    print("microseconds per call of a layer on the host" + ", the launch stubbed" * (device.type == "cpu"))
    rows = []
    for adapters in arguments.adapters:
        row = measure(adapters, dtype, device, arguments.rounds)
        rows.append(row)
        times = ", ".join(f"{name} {1e6 * timing['median']:.0f}" for name, timing in row["seconds"].items())
        print(f"{adapters:13} {times}; later/stock {row['ratio']:.2f}, first/stock {row['ratio of the first']:.2f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"benchmark": "host", "machine": facts, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
