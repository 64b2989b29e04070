"""The attention core alone: stock diffusers' operations against `decoupled_attention`, on the named cases.

    python -m benchmarks.attention [--device cuda] [--dtype float16] [--cases sdxl_1024_64x64 ...] [--json FILE]

For each case the result is first compared with float64 and with stock in the same dtype; a case outside the budget of
`ipa_kernels.reference.compare` is reported as such and not timed. Then both are timed in turns. Stock is written out here as
diffusers 0.42 has it in `IPAdapterAttnProcessor2_0`, from the projected queries on: masks as they are repeated to [B, M, H·D].
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ipa_kernels import decoupled_attention, reference
from ipa_kernels.cases import CASES, Case, Inputs
from ipa_kernels.measure import interleaved, machine_facts
from ipa_kernels.reference import Comparison


def stock(inputs: Inputs, scales: list[float], masks: list[Tensor | None]) -> Tensor:
    """[B, M, H·D] by stock's operations: per image branch an attention, a multiply by the mask, a multiply, an add."""
    batch, heads, queries, head_dim = inputs.query.shape

    def attend(key: Tensor, value: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(inputs.query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False)
        return out.transpose(1, 2).reshape(batch, queries, heads * head_dim).to(inputs.query.dtype)

    out = attend(inputs.key, inputs.value)
    for key, value, scale, mask in zip(inputs.image_keys, inputs.image_values, scales, masks, strict=True):
        image = attend(key, value)
        out = out + scale * (image if mask is None else image * mask)
    return out


def candidates(case: Case, inputs: Inputs, impl: str) -> dict[str, Callable[[], Tensor]]:
    """What is compared; what stock repeats per call (the masks) is prepared outside of its time, to its advantage."""
    scales = inputs.image_scales[0].tolist()
    batch, heads, queries, head_dim = inputs.query.shape
    masks = [m if m is None else m[..., None].expand(batch, queries, heads * head_dim).clone() for m in inputs.image_masks]
    positional, keywords = inputs.arguments()
    keywords["image_scales"] = scales
    return {
        "stock": lambda: stock(inputs, scales, masks),
        "ipa_kernels": lambda: decoupled_attention(*positional, **keywords, impl=impl),  # type: ignore[arg-type]
    }


def gate(case: Case, inputs: Inputs, runs: dict[str, Callable[[], Tensor]]) -> Comparison:
    """The distance of the result from float64, beside that of stock."""
    batch, heads, queries, head_dim = inputs.query.shape
    positional, keywords = inputs.to(torch.float64).arguments()
    truth = reference.decoupled_attention(*positional, **keywords)  # type: ignore[arg-type]
    expected = runs["stock"]().view(batch, queries, heads, head_dim).transpose(1, 2)
    score = reference.largest_score(inputs.query, (inputs.key, *inputs.image_keys))
    return reference.compare(runs["ipa_kernels"](), expected, truth, score=score, text_only=not case.images)


def measure(case: Case, dtype: torch.dtype, device: torch.device, impl: str, rounds: int) -> dict[str, Any]:
    """One row: the gate, then the times if it is green."""
    inputs = case.inputs(dtype, device)
    runs = candidates(case, inputs, impl)
    comparison = gate(case, inputs, runs)
    row: dict[str, Any] = {"case": asdict(case), "dtype": str(dtype), "within": comparison.within, **asdict(comparison)}
    if comparison.within:
        timings = interleaved(runs, device, rounds)
        row |= {"seconds": {name: asdict(timing) for name, timing in timings.items()}}
        row["speedup"] = timings["stock"].median / timings["ipa_kernels"].median
    return row


def main() -> int:
    """Print one line per case; 1 if a case is outside its error budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="float16 on a GPU, float32 on a CPU")
    parser.add_argument("--impl", choices=["auto", "triton", "eager"], default="auto")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--small", action="store_true", help="two heads and 99 queries: what an interpreter can run")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write facts about the machine and one row per case")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "float32"))

    facts = machine_facts(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    if device.type == "cpu" and arguments.impl == "auto":
        print("on a CPU decoupled_attention is eager: the same operations as stock, so expect a ratio near 1")
    print(f"{'case':34} {'stock':>10} {'ipa_kernels':>12} {'ratio':>6}   distance from float64, of stock's (rms, max)")
    rows = []
    with torch.no_grad():
        for name in arguments.cases:
            case = CASES[name].small() if arguments.small else CASES[name]
            row = measure(case, dtype, device, arguments.impl, arguments.rounds)
            rows.append(row)
            print(_line(case, row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    return 0 if all(row["within"] for row in rows) else 1


def _line(case: Case, row: dict[str, Any]) -> str:
    error = " ".join(
        f"{row[part] / row[f'stock_{part}']:.2f}" if row[f"stock_{part}"] else f"{row[part]:.0e}" for part in ("rms", "max")
    )
    if not row["within"]:
        return f"{case.name:34} not timed: outside the error budget, {error}"
    stock_us, ours_us = (1e6 * row["seconds"][name]["median"] for name in ("stock", "ipa_kernels"))
    return f"{case.name:34} {stock_us:8.0f}us {ours_us:10.0f}us {row['speedup']:6.2f}   {error}"


if __name__ == "__main__":
    sys.exit(main())
