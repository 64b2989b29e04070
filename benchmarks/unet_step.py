"""A step of a whole UNet in the middle of a generation: stock against enabled, with no adapter, one and three, masked and not.

    python -m benchmarks.unet_step [--device cuda] [--model sd15 sdxl] [--modes eager graphed compiled prepared] [--json FILE]

Architectures are the real ones, weights are random (`ipa_kernels.testing.unet_models`). All candidates of a model share one
set of weights and take turns in one run; each has modules of its own, so that nothing is switched between calls. Wall time of
the whole step, launches and, for stock, masks on the CPU included. Before that, a step that is not the first is compared:

float64  where the weights fit in float64: the enabled step's root mean square distance from the float64 step is at most 1.25
         times the stock step's (attention is a small part of a UNet's rounding: the two errors are nearly the same noise)
stock    elsewhere: relative distance to the stock step at most 1e-2 in float16, 8e-2 in bfloat16, 1e-4 in float32

"Stock" is the stock step in the same mode: eager for "graphed" (`ipa_kernels.graphed`, enabled only), compiled for "prepared"
(compiled after `ipa_kernels.prepare`, enabled only); these modes need the other. A variant outside of its bound is reported and
not timed.
"""

import argparse
import itertools
import json
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

import ipa_kernels
from ipa_kernels.benchmarking import unet_step
from ipa_kernels.benchmarking.machine import machine_facts
from ipa_kernels.benchmarking.timing import first_line, gate, interleaved
from ipa_kernels.benchmarking.unet_step import VARIANTS, compared_in_float64
from ipa_kernels.cli.tables import table
from ipa_kernels.testing.unet_models import MODELS, Model, UNetInputs, build, clone, load

MODES = {"eager": "eager", "graphed": "eager", "compiled": "compiled", "prepared": "compiled"}
"""The modes, each with the mode of the stock step that it is compared with."""


class Pipeline:
    """As much of a diffusers pipeline as `prepare` needs: a call of it begins with a step of its UNet."""

    def __init__(self, unet: Any, inputs: UNetInputs) -> None:
        self.unet = unet
        self.inputs = inputs
        self._progress_bar_config: dict[str, Any] = {}

    def __call__(self) -> Tensor:
        return self.inputs.step(self.unet, 0)

    def set_progress_bar_config(self, **options: Any) -> None:
        """There is none."""

    def maybe_free_model_hooks(self) -> None:
        """There are none."""


class Candidate(unet_step.Candidate):
    """One way to run a variant, in a mode."""

    def __init__(self, variant: str, enabled: bool, mode: str, base: Any, inputs: UNetInputs) -> None:
        super().__init__(variant, enabled, base, inputs)
        self.mode = mode
        if mode == "graphed":
            ipa_kernels.graphed(self.unet)
        if mode == "prepared":
            ipa_kernels.prepare(Pipeline(self.unet, inputs))
        if mode in ("compiled", "prepared"):
            self.module = torch.compile(self.unet)

    @property
    def name(self) -> str:
        """The name of its row."""
        return f"{super().name}, {self.mode}"

    def row(self) -> dict[str, Any]:
        """With its mode, and its graphs if it has any."""
        graphs = ipa_kernels.explain(self.unet).graphs
        return {**super().row(), "mode": self.mode, "graphs": None if graphs is None else graphs._asdict()}


def measure_model(
    model: Model,
    variants: list[str],
    modes: list[str],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    compile_seconds: float,
) -> list[dict[str, Any]]:
    """One row per candidate: the gate, then the times of all that passed it, in turns."""
    plain = build(model, dtype, device)
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    spent = 0.0
    with_adapters: dict[int, Any] = {}
    for variant in variants:
        adapters, masked = VARIANTS[variant]
        if adapters not in with_adapters:
            with_adapters[adapters] = clone(plain)
            load(with_adapters[adapters], model, adapters)
        base = with_adapters[adapters]
        inputs = UNetInputs(model, adapters, masked, dtype, device)
        truth = compared_in_float64(base, inputs) if adapters else None
        expected: dict[str, Tensor] = {}
        for mode, enabled in itertools.product(modes, (False, True)):
            if (enabled and not adapters) or (not enabled and MODES[mode] != mode):
                continue
            candidate = Candidate(variant, enabled, mode, base, inputs)
            if MODES[mode] == "compiled" and spent > compile_seconds:
                rows[candidate.name] = candidate.row() | {
                    "reason": f"not compiled: the {compile_seconds:.0f} s for that are over"
                }
                continue
            start = time.perf_counter()
            try:
                out = candidate.compared()
            except Exception as error:  # what cannot be compiled is a result
                rows[candidate.name] = candidate.row() | {"reason": first_line(error), "within": False}
                continue
            spent += (time.perf_counter() - start) * (MODES[mode] == "compiled")
            rows[candidate.name] = row = candidate.row()
            if not enabled:
                expected[mode] = out
            else:
                stock = expected.get(MODES[mode])
                row |= {"within": False} if stock is None else gate(out, stock, truth)
                if not row["within"]:
                    nothing = row.get("proves nothing")
                    row["reason"] = f"not timed: {'stock proves nothing' if nothing else 'outside the error budget'}"
                    continue
            runs[candidate.name] = candidate
    for name, timing in interleaved(runs, device, rounds).items():
        rows[name]["seconds"] = asdict(timing)
    return list(rows.values())


def key_ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds over seconds, of what was measured: an adapter against none, enabled against stock with the same adapters."""
    seconds = {(row["variant"], row["state"], row["mode"]): row["seconds"]["median"] for row in rows if row["seconds"]}
    found = {}
    for (variant, state, mode), median in seconds.items():
        if state != "enabled":
            continue
        for base, label in (("none", "stock with no adapter"), (variant, f"stock with {variant}")):
            if (base, "stock", MODES[mode]) in seconds:
                found[f"{mode}: enabled with {variant} / {label}"] = median / seconds[base, "stock", MODES[mode]]
    return found


def main() -> int:
    """Print a table per model; 1 if an enabled step is outside its error budget or cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="float16 on a GPU, float32 on a CPU")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), help="default: sd15 and sdxl on a GPU, tiny on a CPU")
    parser.add_argument("--adapters", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=["eager"])
    parser.add_argument("--compile-seconds", type=float, default=600, help="begin no compilation after so many spent on them")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write facts about the machine and one row per candidate, after each model")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "float32"))
    # the rows say what ran and why
    warnings.simplefilter("ignore", ipa_kernels.FallbackWarning)
    logging.set_verbosity_error()
    for mode in arguments.modes:
        if MODES[mode] not in arguments.modes:
            parser.error(f"--modes: {mode} is compared with stock in the mode {MODES[mode]}, which is not among them")
    # every candidate is compiled for itself
    torch._dynamo.config.recompile_limit = 64

    facts = machine_facts(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    document: dict[str, Any] = {"benchmark": "unet_step", "machine": facts, "dtype": str(dtype), "models": {}}
    for name in arguments.model or (["sd15", "sdxl"] if device.type == "cuda" else ["tiny"]):
        with torch.no_grad():
            rows = measure_model(
                MODELS[name], arguments.adapters, arguments.modes, dtype, device, arguments.rounds, arguments.compile_seconds
            )
        document["models"][name] = {"rows": rows, "ratios": key_ratios(rows)}
        print(_text(name, document["models"][name]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    rows = [row for entry in document["models"].values() for row in entry["rows"]]
    return 0 if all(row.get("within", True) for row in rows) else 1


def _text(name: str, entry: dict[str, Any]) -> str:
    rows = []
    for row in entry["rows"]:
        median = f"{1e3 * row['seconds']['median']:.2f} ms" if row["seconds"] else "-"
        layers = ", ".join(f"{count} {impl}" for impl, count in row.get("layers", {}).items() if count)
        notes = "; ".join(filter(None, [row["reason"], layers, *row.get("why not the kernel", [])]))
        rows.append([row["variant"], row["state"], row["mode"], median, notes])
    ratios = (f"  {label}: {ratio:.3f}" for label, ratio in entry["ratios"].items())
    return "\n".join([f"{name}: one step, batch 2", textwrap.indent(table(rows), "  "), *ratios])


if __name__ == "__main__":
    sys.exit(main())
