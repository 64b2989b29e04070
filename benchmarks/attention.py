"""The attention core alone, from projected queries, keys and values on: `decoupled_attention` against stock and its peers.

    python -m benchmarks.attention [--device cuda] [--cases sdxl_1024_64x64 ...] [--peers all] [--sweep] [--json FILE]

Each result is first compared with float64 and with stock in the same dtype, by `ipa_kernels.reference.compare`. A case in which
ours is outside the budget is reported as such and not timed; a peer outside of it is timed and marked. Then all take turns:

wall    eager, warm: what a caller waits for, launches included (an sdpa_* backend is chosen within it)
warm    device time of replayed CUDA graphs, one set of inputs, which stays in the cache as far as it fits
cold    the same over enough sets of fresh random values that each call reads from memory

Bytes are the least that any implementation moves: every input once, the output once. Operations are the useful ones of Q·Kᵗ and
P·V. Both are set against what the same card reached in the same run, on the cold clock (on a CPU: the wall clock).
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipa_kernels import decoupled_attention, reference
from ipa_kernels.benchmarking.device_time import Ceiling, cache_bytes, ceilings, device_times, sets_beyond_cache
from ipa_kernels.benchmarking.machine import machine_facts
from ipa_kernels.benchmarking.timing import Timing, first_line, interleaved
from ipa_kernels.reference import Comparison
from ipa_kernels.report import plural
from ipa_kernels.testing.layer_cases import CASES, Case, Inputs

from .peers import PEERS, bind, runs, sdpa, stock_order
from .sweeps import sweeps

OURS, STOCK = "ipa_kernels", "stock"
WARM_CALLS = 20
"""Calls in a graph of warm inputs."""

CLOCKS = ("wall", "warm", "cold")
INTERPRETED = "not timed: Triton's interpreter on a CPU, whose time says nothing about a GPU"

Calls = dict[str, list[Callable[[], Tensor]]]


def input_sets(case: Case, dtype: torch.dtype, device: torch.device) -> list[Inputs]:
    """Fresh random values in every set: enough sets to outgrow the cache of a GPU, one on a CPU.

    All have the scales of the first, which are options of a layer: torch.compile makes constants of them.
    """
    first = case.inputs(dtype, device)
    cache = cache_bytes(device)
    count = 1 if cache is None else sets_beyond_cache(first.bytes, cache)
    others = (case.inputs(dtype, device, seed) for seed in range(1, count))
    return [first, *(replace(other, image_scales=first.image_scales) for other in others)]


def candidates(sets: list[Inputs], impl: str, peers: list[str]) -> tuple[Calls, dict[str, str]]:
    """One call per set of inputs for ours, stock and each peer that can run; and why the others cannot."""

    def ours(inputs: Inputs) -> Callable[[], Tensor]:
        positional, keywords = inputs.arguments()
        keywords["image_scales"] = inputs.image_scales[0].tolist()
        return lambda: decoupled_attention(*positional, **keywords, impl=impl)  # type: ignore[arg-type]

    found: Calls = {
        STOCK: [bind(stock_order, sdpa, inputs) for inputs in sets],
        OURS: [ours(inputs) for inputs in sets],
    }
    refused = {}
    torch.compiler.reset()
    for name in peers:
        calls = runs(name, sets)
        if isinstance(calls, str):
            refused[name] = calls
        else:
            found[name] = calls
    return found, refused


def gate(inputs: Inputs, calls: Calls) -> dict[str, Comparison]:
    """The distance of each result from float64, beside that of stock."""
    batch, heads, queries, head_dim = inputs.query.shape

    def out(name: str) -> Tensor:
        result = calls[name][0]()
        return result if name == OURS else result.view(batch, queries, heads, head_dim).transpose(1, 2)

    positional, keywords = inputs.arguments()
    results = {name: out(name) for name in calls if name != STOCK}
    return reference.compare_call(results, out(STOCK), *positional, **keywords)  # type: ignore[arg-type]


def measure(
    case: Case, dtype: torch.dtype, device: torch.device, impl: str, rounds: int, peers: list[str], limits: dict[str, Ceiling]
) -> dict[str, Any]:
    """One row: the gate, then the times if it is green. Seconds, bytes, operations, and shares of `limits`."""
    sets = input_sets(case, dtype, device)
    calls, refused = candidates(sets, impl, peers)
    comparisons = gate(sets[0], calls)
    ours = comparisons[OURS]
    row: dict[str, Any] = {
        "case": asdict(case),
        "dtype": str(dtype),
        "sets": len(sets),
        "bytes": sets[0].bytes + sets[0].query.numel() * sets[0].query.element_size(),
        "flops": case.flops,
        "within": ours.within,
        **asdict(ours),
        "candidates": {name: {"reason": reason} for name, reason in refused.items()},
    }
    for name in calls:
        entry: dict[str, Any] = {"reason": None}
        row["candidates"][name] = entry
        if name in comparisons:
            compared = comparisons[name]
            entry |= {"within": compared.within, "rms": compared.rms, "max": compared.max}
    if not ours.within:
        return row
    if impl == "triton" and device.type == "cpu":
        del calls[OURS]
        row["candidates"][OURS]["reason"] = INTERPRETED
    times: dict[str, dict[str, Any]] = {
        "wall": dict(interleaved({name: each[0] for name, each in calls.items()}, device, rounds)),
        "warm": dict(device_times({name: [each[0]] * WARM_CALLS for name, each in calls.items()}, device, rounds)),
        "cold": dict(device_times(dict(calls), device, rounds)),
    }
    for name in calls:
        row["candidates"][name] |= _times({clock: times[clock][name] for clock in CLOCKS}, row, limits)
    row["ratios"] = {clock: ratios(row["candidates"], clock) for clock in CLOCKS}
    return row


def _times(by_clock: dict[str, Timing | str], row: dict[str, Any], limits: dict[str, Ceiling]) -> dict[str, Any]:
    """The part of a candidate's entry that comes from its times; a clock that was not read is None, with the reason."""
    entry: dict[str, Any] = {}
    for clock, found in by_clock.items():
        entry[clock] = None if isinstance(found, str) else asdict(found)
        if isinstance(found, str):
            entry[f"no {clock}"] = found
    best = by_clock["cold"] if isinstance(by_clock["cold"], Timing) else by_clock["wall"]
    assert isinstance(best, Timing)
    entry["bytes_per_second"] = row["bytes"] / best.median
    entry["of_copy_rate"] = entry["bytes_per_second"] / limits["copy"].rate
    entry["flops_per_second"] = row["flops"] / best.median
    entry["of_matmul_rate"] = entry["flops_per_second"] / limits["matmul"].rate
    return entry


def ratios(entries: dict[str, Any], clock: str) -> dict[str, Any]:
    """How many times longer than ours stock, stock compiled and the best SDPA backend take; only what was measured."""
    medians = {name: entry[clock]["median"] for name, entry in entries.items() if entry.get(clock)}
    if OURS not in medians:
        return {}
    found: dict[str, Any] = {name: medians[name] / medians[OURS] for name in (STOCK, "stock_compiled") if name in medians}
    backends = [name for name in medians if name.startswith("sdpa_")]
    if backends:
        best = min(backends, key=lambda name: medians[name])
        found |= {"best_sdpa": medians[best] / medians[OURS], "best_sdpa_is": best}
    return found


def chosen_cases(arguments: argparse.Namespace, small: bool) -> Iterator[tuple[dict[str, Any], Case]]:
    """(what a row says of its sweep, case), in the order of the run."""
    if arguments.sweep:
        for name, cases in sweeps(small).items():
            for x, case in cases:
                yield {"sweep": name, "x": x}, case
    else:
        for name in arguments.cases:
            yield {}, CASES[name].small() if small else CASES[name]


def main() -> int:
    """Print some lines per case; 1 if one is outside its error budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="float16 on a GPU, float32 on a CPU")
    parser.add_argument("--impl", choices=["auto", "triton", "eager"], default="auto")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--sweep", action="store_true", help="instead of the cases: cost over queries, adapters, image tokens")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=["all", "none", *PEERS],
        metavar="PEER",
        help=f"all, none or some of {', '.join(PEERS)} (default: all on a GPU, those that are not compiled on a CPU; none for "
        "--sweep)",
    )
    parser.add_argument("--small", action="store_true", help="two heads and few queries: what an interpreter can run")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after so many; the rest is listed")
    parser.add_argument("--json", type=Path, help="write facts about the machine and one row per case, after each case")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "float32"))
    names = arguments.peers or (["none"] if arguments.sweep else ["all"] if device.type == "cuda" else _eager_peers())
    peers = list(PEERS) if "all" in names else [name for name in names if name != "none"]

    facts = machine_facts(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    if device.type == "cpu":
        print("a CPU: device times are not measured; ours is eager there, the same operations as stock: expect a ratio near 1")
    limits = ceilings(dtype, device)
    copy, matmul = limits["copy"], limits["matmul"]
    print(f"copy {copy.rate / 1e9:.0f} GB/s, {dtype} matmul {matmul.rate / 1e12:.1f} TFLOP/s, {copy.clock} clock")
    document: dict[str, Any] = {
        "benchmark": "sweep" if arguments.sweep else "attention",
        "machine": facts,
        "ceilings": {name: limit.to_dict() for name, limit in limits.items()},
        "rows": [],
        "not run": [],
    }
    start = time.monotonic()
    with torch.no_grad():
        for place, case in chosen_cases(arguments, arguments.small or (arguments.sweep and device.type == "cpu")):
            if time.monotonic() - start > arguments.seconds:
                document["not run"].append(case.name)
                continue
            try:
                row = measure(case, dtype, device, arguments.impl, arguments.rounds, peers, limits)
            except Exception as error:  # the next case may still run
                row = {"case": asdict(case), "within": False, "reason": first_line(error), "candidates": {}}
            row |= place
            document["rows"].append(row)
            print(_lines(case, row), flush=True)
            _write(arguments.json, document)
    if document["not run"]:
        print(f"not run, {arguments.seconds:.0f} seconds were over: {', '.join(document['not run'])}")
        _write(arguments.json, document)
    return 0 if all(row["within"] for row in document["rows"]) else 1


def _write(path: Path | None, document: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n")


def _eager_peers() -> list[str]:
    return [name for name, peer in PEERS.items() if not peer.compiled]


def _lines(case: Case, row: dict[str, Any]) -> str:
    keys = "+".join(map(str, (case.text, *case.images)))
    heads = f"{case.heads} head{plural(case.heads)} of {case.head_dim}"
    lines = [f"{case.name}: {heads}, {case.queries} queries, {keys} keys{', masked' * case.masked}"]
    if not row["within"]:
        lines.append(f"  not timed: {row.get('reason') or f'outside the error budget, {_error(row, row)}'}")
    for name, entry in row["candidates"].items():
        if entry["reason"] is not None:
            lines.append(f"  {name:15} {entry['reason']}")
        elif "wall" in entry:
            times = "  ".join(f"{clock} {_microseconds(entry[clock])}" for clock in CLOCKS)
            shares = f"{entry['bytes_per_second'] / 1e9:6.0f} GB/s ({entry['of_copy_rate']:4.0%} of copy)"
            rate = f"{entry['flops_per_second'] / 1e12:6.2f} TFLOP/s ({entry['of_matmul_rate']:3.0%} of matmul)"
            lines.append(f"  {name:15} {times}  {shares}  {rate}  {_error(entry, row)}")
    for clock, found in row.get("ratios", {}).items():
        if found:
            parts = (f"{name} {value:.2f}" for name, value in found.items() if isinstance(value, float))
            lines.append(f"  {clock}: times ours: {', '.join(parts)}")
    return "\n".join(lines)


def _microseconds(found: dict[str, Any] | None) -> str:
    return f"{'-':>8}  " if found is None else f"{1e6 * found['median']:8.1f}us"


def _error(entry: dict[str, Any], row: dict[str, Any]) -> str:
    """The distance from float64 in units of stock's, rms and largest."""
    if "rms" not in entry:
        return ""
    parts = (f"{entry[k] / row[f'stock_{k}']:.2f}" if row[f"stock_{k}"] else f"{entry[k]:.0e}" for k in ("rms", "max"))
    return f"error {' '.join(parts)}{'' if entry['within'] else ' OUTSIDE the budget'}"


if __name__ == "__main__":
    sys.exit(main())
