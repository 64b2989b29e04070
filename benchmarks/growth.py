"""Cost as work grows, counted without a GPU: what one launch executes, for more queries, adapters and image tokens.

    python -m benchmarks.growth [--arch sm_80] [--tables queries ...] [--json FILE]

Each row is compiled for the architecture. Matrix instructions are those that 16 queries of one head execute, the loops as often
as they run; the minimum is that of tiles of 16. Bytes are the least that any implementation moves for SDXL's 64x64 layer in
16-bit: every input once, the output once; stock's are by the model of `benchmarks.generation` (an attention 2 U, the sum of a
branch 5 U). Times for the same rows: `python -m benchmarks.attention --sweep`.
"""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ipa_kernels.kernels import launch_table
from ipa_kernels.testing.layer_cases import Case

from .compile_report import Entry, measure, up
from .disassembly import Count
from .sweeps import sweeps

SWEEPS = sweeps(small=False)


def executed(entry: Entry, counted: Count) -> tuple[int, int]:
    """(matrix instructions, their minimum) of 16 queries of a head; mma.sync only: 16 x 8 x 16 multiply-adds each.

    A loop is one copy of its block in the code, run once for each whole block.
    """
    dims, block = up(entry.head_dim, 16), entry.config.block_n
    of_block = 2 * block * dims // (8 * 16)
    rows = entry.config.block_m // entry.config.num_warps
    total = counted.mma * 16 // rows
    least = 0
    for branch, length in zip(entry.specialization.branches, entry.lengths, strict=True):
        least += (up(length, 8) + up(length, 16)) * dims // (8 * 16)
        if not branch.whole:
            total += of_block * (length // block - 1)
    return total, least


def row(case: Case, arch: str) -> dict[str, Any]:
    """Counts for one case in float16; refused cases say why."""
    refused = launch_table.refusal(arch, 16, case.head_dim, max(case.images, default=0))
    if refused is not None:
        return {"case": case.name, "refused": refused}
    config = launch_table.find(arch, 16, case.head_dim, case.queries)
    assert config is not None, "refusal was None"
    entry = Entry(arch, "float16", case.head_dim, (case.text, *case.images), case.masked, config)
    counted = measure(entry)
    mma, least = executed(entry, counted)
    unit = case.batch * case.heads * case.queries * case.head_dim * 2
    keys = 2 * case.batch * case.heads * (case.text + sum(case.images)) * case.head_dim * 2
    return {
        "case": case.name,
        "queries": case.queries,
        "lengths": entry.lengths,
        "mma": mma,
        "min_mma": least,
        "registers": counted.registers,
        "spill_bytes": counted.spill_bytes,
        "blocks": case.batch * case.heads * math.ceil(case.queries / config.block_m),
        "launches": 1,
        "stock launches": 1 + 3 * len(case.images),
        "bytes": 2 * unit + keys,
        "stock bytes": (2 + 7 * len(case.images)) * unit + keys,
    }


def main() -> int:
    """Print one table per sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_80", choices=launch_table.MMA)
    parser.add_argument("--tables", nargs="+", choices=list(SWEEPS), default=list(SWEEPS), metavar="TABLE")
    parser.add_argument("--json", type=Path, help="write every row")
    arguments = parser.parse_args()
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.tables:
        print(f"\n{name} (the rest as in SDXL's 64x64 layer), {arguments.arch}, float16")
        print(f"{name:>24}  mma per 16 queries  (min)  registers  blocks  launches  of stock       MB  of stock")
        for x, case in SWEEPS[name]:
            found = {"x": x, **row(replace(case, batch=2), arguments.arch)}
            tables.setdefault(name, []).append(found)
            print(_line(x, found), flush=True)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"benchmark": "growth", "arch": arguments.arch, "tables": tables}, indent=1) + "\n"
        )
    return 0


def _line(x: int, found: dict[str, Any]) -> str:
    if "refused" in found:
        return f"{x:>24}  {found['refused']}"
    return (
        f"{x:>24} {found['mma']:>19} {'(' + str(found['min_mma']) + ')':>6} {found['registers']:>10} {found['blocks']:>7}"
        f" {found['launches']:>9} {found['stock launches']:>9} {found['bytes'] / 1e6:>8.2f} {found['stock bytes'] / 1e6:>9.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
