"""From the call of a processor to the launch: what a cross-attention costs on the host beside stock's, hot and in a step.

    python -m benchmarks.host [--device cuda] [--adapters one "three masked"] [--rounds 20] [--json FILE] [--baseline FOLDER]

Two measurements. Widths are tiny, so that next to nothing is computed: what is left is Python, the dispatch of operations and,
on a GPU, their launches. All candidates take turns.

hot      One layer, called in a loop, stock and enabled on the same module: everything that it touches is in the caches.
in step  All 70 cross-attentions of SDXL, one call each, with the rest of the UNet between them; seconds are of one layer. How,
         without a hook or a `forward` that the package would see: `benchmarks.host_step`; all at one speed of the machine, and
         from which: `benchmarks.host_rounds`. "hook" is what the package does
         before the first layer of a later step and after its last, for the whole step.

In "first" everything is checked and computed, as in a step that begins a generation (in a step: with new prompt, images and
masks); "later" is the call again, which finds what was computed. "forward" is diffusers' `Attention.forward` around a processor
that does nothing, "projections" the calls of to_q and to_out (in a step with the dropout of to_out): the floor, which both pay.
"Above the floor" is what of "later" is neither, over stock. The image projections run before the first layer and are in none.

--baseline measures a checkout of another version too, by the step's code of this one: a process that runs all the while takes a
round of steps after each one here. Its "stock" is the same code: where the two differ, that much is noise.

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

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # so that the way to the launch can be run; what it launches is left out

from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor

from ipa_kernels.benchmarking.machine import machine_facts
from ipa_kernels.benchmarking.timing import interleaved

from . import host_rounds, host_step
from .calls import many, of_one
from .generation import VARIANTS, Layer, Shape

SHAPE = Shape(1, 16, 64, 2)
CALLS = 100
"""Calls of a layer that are timed together."""


def measure(adapters: str, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    """One row: seconds per call of each candidate, and the ratio of enabled to stock."""
    layer = Layer(SHAPE, 64, adapters, dtype, device)
    processor = layer.attention.processor
    bare = Layer(SHAPE, 64, adapters, dtype, device)
    bare.attention.set_processor(host_step.Nothing())
    with torch.no_grad(), layer.enabled("triton") as memory, host_step.launch_left_out(device):
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


def _line(name: str, step: dict[str, Any]) -> str:
    def microseconds(timing: dict[str, Any]) -> str:
        median, low, high = (f"{1e6 * timing[part]:.0f}" for part in ("median", "p20", "p80"))
        return f"{median} ({low} to {high})"

    times = ", ".join(f"{candidate} {microseconds(timing)}" for candidate, timing in step["seconds"].items())
    ratios = f"later/stock {step['ratio']:.2f}, above the floor {step['above the floor']:.3f}"
    return f"  {name}: {times}; {ratios}; hook {microseconds(step['hook'])} a step"


def main() -> int:
    """Print one line per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--adapters", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write facts about the machine and every number")
    parser.add_argument(
        "--baseline", type=Path, metavar="FOLDER", help="a checkout of another version, to be measured in turns"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    torch.set_num_threads(1)

    facts = machine_facts(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    print("microseconds per call of a layer on the host" + ", the launch stubbed" * (device.type == "cpu"))
    rows = []
    other = nullcontext() if arguments.baseline is None else host_rounds.Worker(arguments.baseline, dtype, device)
    with other as baseline:
        for adapters in arguments.adapters:
            row = measure(adapters, dtype, device, arguments.rounds)
            times = ", ".join(f"{name} {1e6 * timing['median']:.0f}" for name, timing in row["seconds"].items())
            ratios = f"later/stock {row['ratio']:.2f}, first/stock {row['ratio of the first']:.2f}"
            print(f"{adapters}\n  hot: {times}; {ratios}", flush=True)
            number, _, masked = VARIANTS[adapters]
            row |= host_rounds.measure(number, masked, dtype, device, arguments.rounds, baseline) | {
                "commit": host_step.version(device)
            }
            print(_line("in a step", row["step"]), flush=True)
            if baseline is not None:
                print(_line(f"in a step of {baseline.commit}", row["baseline"]), flush=True)
            rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps({"benchmark": "host", "machine": facts, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
