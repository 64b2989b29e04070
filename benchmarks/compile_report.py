"""Compile every entry of the launch table for every architecture, without a GPU, and count what came out.

    python -m benchmarks.compile_report [--arch sm_90 ...] [--head-dim 64 ...] [--quick | --hardest] [--backward] [--json FILE]

What is compiled is what a launch compiles: one source for both (`ipa_kernels.kernels.specialization`), specialised on nothing
that a launch may change. An entry is unfit, and the exit status 1, if it spills, exceeds the shared memory of the device, does
without tensor cores, loads queries or stores the output with less than 16 bytes per thread, or, where a tensor core multiplies
16 x 8 x 16, needs over 10 % more of that than the shape does. Of float32 multiplied in TF32 (`--dtype tf32`, what impl="auto"
runs) shared memory, spills and tensor cores are judged, in IEEE precision (float32) shared memory alone.

min_mma is the minimum for tiles of 16: over every branch, ceil8(keys) columns of Q·Kᵗ and ceil16(keys) rows of V, times
ceil16(head dim), per query; a loop counts one block of keys and the rest after the last block. Elsewhere than on mma.sync it is
in instructions of the mean size that was used, or on tcgen05 the fewest instructions; an excess there is named, not judged.

--backward compiles the backward kernel instead, with its own table. It may spill up to 64 bytes per thread and load queries by
8 bytes; the width of its stores is not judged, nor is its minimum: three products per key, five where a loop walks over the
keys twice, and one more for each of dK and dV.
"""

import argparse
import functools
import inspect
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from ipa_kernels.benchmarking.machine import machine_facts
from ipa_kernels.kernels import launch_table, launch_table_backward
from ipa_kernels.kernels.backward import decoupled_attention_backward_kernel
from ipa_kernels.kernels.forward import decoupled_attention_kernel
from ipa_kernels.kernels.launch_table import LaunchConfig
from ipa_kernels.kernels.specialization import INTERPRETED, Specialization, source, specialize
from ipa_kernels.kernels.specialization_backward import Wanted, backward_source
from ipa_kernels.report import plural

from . import backward_classes
from .backward_classes import LONG
from .disassembly import Count, Lines, count
from .occupancy import occupancy

HEAD_DIMS = tuple(range(8, 161, 8))
USED_HEAD_DIMS = (40, 64, 80, 128, 160)
"""Those of UNets: SD 1.5 has 40, 80 and 160, SDXL and Kolors 64; 128 is that of most transformers."""
FLOAT32 = ("tf32", "float32")
"""Tensors in float32, multiplied in TF32 or in IEEE precision."""
DTYPES = ("float16", "bfloat16", *FLOAT32)


@dataclass(frozen=True)
class Entry:
    """One compilation: an architecture, a shape class, the lengths of the branches, text first, with masks or without; of the
    backward kernel where gradients are wanted.
    """

    arch: str
    dtype: str
    head_dim: int
    lengths: tuple[int, ...]
    masked: bool
    config: LaunchConfig
    wanted: Wanted | None = None

    @property
    def specialization(self) -> Specialization:
        """What a launch of these lengths compiles."""
        dtype = "float32" if self.dtype in FLOAT32 else self.dtype
        masks = (dtype if self.masked else None,) * (len(self.lengths) - 1)
        return specialize(dtype, self.head_dim, self.lengths, masks, self.dtype == "tf32", self.config)

    @property
    def minimum(self) -> int:
        """Multiply-adds per query that tiles of 16 need, loops counted once."""
        columns = 0
        for i, branch in enumerate(self.specialization.branches):
            keys = branch.whole or self.config.block_n + branch.rest
            columns += up(keys, 8) + up(keys, 16)
            if self.wanted is not None:
                columns += up(keys, 8) * (1 if branch.whole else 3)
                columns += up(keys, 16) * (self.wanted.keys[i] + self.wanted.values[i])
        return columns * up(self.head_dim, 16)


def hardest(config: LaunchConfig) -> Iterator[tuple[int, ...]]:
    """Lengths that reach every path of a config, at its limits."""
    text, image = config.whole_keys, config.whole_image_keys
    if text and image:
        yield text, image, image, image
    if image:
        yield LONG, image, image, image
    if config.max_image_keys >= LONG:
        yield LONG, LONG, LONG


def used(config: LaunchConfig) -> Iterator[tuple[int, ...]]:
    """Lengths that pipelines have: alone, one and three adapters, a long prompt, every token of a face."""
    yield from ((77,), (77, 4), (77, 16, 16, 16), (154, 4), (256, 16))
    if config.max_image_keys >= 257:
        yield 77, 257


def entries(archs: list[str], dtypes: list[str], head_dims: list[int], which: str) -> Iterator[Entry]:
    """Shape classes of the table; which: "all", "hardest" lengths, or "quick": one of those for each row, in turn."""
    for arch in archs:
        turn = 0
        for row in (row for row in launch_table.TABLE if arch in row.archs):
            # only what a launch can find: an earlier row may have taken a head dim
            dims = [d for d in head_dims if launch_table.find(arch, row.bits, d, row.queries) is row.config]
            for dtype in (dtype for dtype in dtypes if _runs(arch, dtype, row.bits)):
                if which == "quick":
                    classes = list(hardest(row.config))
                    for head_dim in dims[-1:]:
                        yield Entry(arch, dtype, head_dim, classes[turn % len(classes)], True, row.config)
                        turn += 1
                    continue
                for head_dim in dims:
                    for lengths in hardest(row.config):
                        yield Entry(arch, dtype, head_dim, lengths, True, row.config)
                    for lengths in used(row.config) if which == "all" and head_dim in USED_HEAD_DIMS else ():
                        for masked in (True, False) if len(lengths) > 1 else (False,):
                            yield Entry(arch, dtype, head_dim, lengths, masked, row.config)


def backward_entries(archs: list[str], dtypes: list[str], head_dims: list[int], which: str) -> Iterator[Entry]:
    """As `entries`, of the backward's table."""
    for arch in archs:
        turn = 0
        for row in (row for row in launch_table_backward.TABLE if arch in row.archs):
            # only what a launch can find: an earlier row may have taken a head dim
            longest = min(row.config.max_image_keys, LONG)
            dims = [d for d in head_dims if launch_table_backward.find(arch, row.bits, d, longest) is row.config]
            classes = list(backward_classes.hardest(row.config))
            for dtype in (dtype for dtype in dtypes if _runs(arch, dtype, row.bits)):
                if which == "quick":
                    for head_dim in dims[-1:]:
                        lengths, wanted = classes[turn % len(classes)]
                        yield Entry(arch, dtype, head_dim, lengths, True, row.config, wanted)
                        turn += 1
                    continue
                for head_dim in dims:
                    for lengths, wanted in classes:
                        yield Entry(arch, dtype, head_dim, lengths, True, row.config, wanted)
                    for lengths, wanted in backward_classes.used(row.config) if which == "all" else ():
                        found = launch_table_backward.find(arch, row.bits, head_dim, max(lengths[1:]))
                        if head_dim in USED_HEAD_DIMS and found is row.config:
                            yield Entry(arch, dtype, head_dim, lengths, False, row.config, wanted)


def measure(entry: Entry) -> Count:
    """Compile one entry and count. Raises RuntimeError where kernels are interpreted."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: an interpreted kernel cannot be compiled; unset it")
    target = (
        GPUTarget("hip", entry.arch, 64 if entry.arch in launch_table.CDNA else 32)
        if entry.arch.startswith("gfx")
        else GPUTarget("cuda", int(entry.arch.removeprefix("sm_")), 32)
    )
    options = launch_table.options(entry.config)
    if entry.wanted is None:
        asked, lines = source(entry.specialization), _query_lines(decoupled_attention_kernel.fn)
    else:
        asked = backward_source(entry.specialization, entry.wanted)
        lines = _query_lines(decoupled_attention_backward_kernel.fn)
    return count(triton.compile(asked, target=target, options=options), lines)


@functools.cache
def _query_lines(kernel: Any) -> Lines:
    """Where a kernel loads its queries."""
    lines, first = inspect.getsourcelines(kernel)
    (line,) = (first + i for i, text in enumerate(lines) if text.lstrip().startswith("q = load_rows("))
    return Lines(Path(inspect.getfile(kernel)).name, range(line, line + 1))


def min_mma(entry: Entry, counted: Count) -> int | None:
    """See above; None for float32, whose instructions are of other shapes, and of the backward elsewhere than on mma.sync."""
    if not counted.mma or entry.dtype in FLOAT32 or (entry.wanted is not None and entry.arch not in launch_table.MMA):
        return None
    if counted.multiply_adds is None:
        # tcgen05 does not show its shape: the fewest instructions, each 16 deep and as wide as it may be
        keys = sum(up(branch.whole or entry.config.block_n + branch.rest, 16) for branch in entry.specialization.branches)
        return keys // 16 + len(entry.lengths) * up(entry.head_dim, 16) // 16
    # mma.sync, MFMA and WMMA are a warp's, wgmma is one of four warps
    groups = entry.config.num_warps // (4 if entry.arch in launch_table.WGMMA else 1)
    minimum = entry.minimum * entry.config.block_m // groups
    return round(minimum / (counted.multiply_adds / counted.mma))


def excess(entry: Entry, counted: Count) -> str | None:
    """Why over 10 % more matrix instructions than the least are no fault here."""
    least = min_mma(entry, counted)
    if least is None or counted.mma <= 1.1 * least:
        return None
    if entry.wanted is not None:
        return "backward: an excess over the least is not judged"
    if entry.arch in launch_table.MMA:
        return None
    if counted.multiply_adds is None:
        return "tcgen05: each tile of 64, 32 or 16 is an instruction of its own, and the pipeline copies the body of a loop"
    return "the pipeline copies the body of a loop"


def faults(entry: Entry, counted: Count) -> list[str]:
    """What makes an entry unfit to ship; of IEEE float32 memory alone, of TF32 neither widths nor numbers of instructions."""
    limit = launch_table.SHARED_MEMORY[entry.arch]
    found = []
    if counted.shared_bytes > limit:
        found.append(f"shared memory {counted.shared_bytes} over the {limit} of {entry.arch}")
    if entry.dtype == "float32":
        return found
    if counted.spill_bytes > (0 if entry.wanted is None else launch_table_backward.SPILL_BYTES):
        found.append(f"spills {counted.spill_bytes} bytes per thread")
    if not counted.mma:
        found.append("no tensor core instruction")
    if entry.dtype == "tf32":
        return found
    # a block of the backward may have fewer queries: a narrow tile of them is not 16 bytes for every thread
    if counted.query_load < (16 if entry.wanted is None else 8):
        found.append(f"loads queries by {counted.query_load} bytes per thread")
    # of the backward, what is stored besides dQ may be smaller than the threads of a block times 16 bytes
    if counted.output_store < 16 and entry.wanted is None:
        found.append(f"stores the output by {counted.output_store} bytes per thread")
    least = min_mma(entry, counted)
    if entry.wanted is None and least is not None and counted.mma > 1.1 * least and entry.arch in launch_table.MMA:
        found.append(f"{counted.mma} matrix instructions where {least} would do")
    return found


def up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def _runs(arch: str, dtype: str, bits: int) -> bool:
    return _bits(dtype) == bits and (dtype != "tf32" or arch in launch_table.TF32)


def _bits(dtype: str) -> int:
    return 32 if dtype in FLOAT32 else 16


def row(entry: Entry, counted: Count) -> dict[str, Any]:
    """What `--json` writes for an entry."""
    return {
        "pass": "forward" if entry.wanted is None else "backward",
        "arch": entry.arch,
        "dtype": entry.dtype,
        "head_dim": entry.head_dim,
        "lengths": entry.lengths,
        "masked": entry.masked,
        "wanted": None if entry.wanted is None else asdict(entry.wanted),
        "block_m": entry.config.block_m,
        "num_warps": entry.config.num_warps,
        **asdict(counted),
        "min_mma": min_mma(entry, counted),
        "excess": excess(entry, counted),
        "occupancy": round(occupancy(entry.arch, entry.config.num_warps, counted), 3),
        "faults": faults(entry, counted),
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line for each row."""
    facts = json.dumps(machine_facts(torch.device("cpu")))
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"benchmark": "compile_report", "machine": {facts}, "rows": [\n{lines}\n]}}\n')


def main() -> int:
    """Print one line per entry; 1 if one is unfit."""
    every_arch = list(launch_table.SHARED_MEMORY)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=every_arch)
    parser.add_argument("--dtype", nargs="+", default=["float16", "bfloat16"], choices=DTYPES)
    parser.add_argument("--head-dim", nargs="+", type=int, default=list(HEAD_DIMS))
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quick", action="store_true", help="one entry for each row of the table: minutes instead of an hour")
    amount.add_argument("--hardest", action="store_true", help="only the lengths that need the most registers")
    parser.add_argument("--backward", action="store_true", help="the backward kernel and its table")
    parser.add_argument("--json", type=Path, help="write one row per entry")
    arguments = parser.parse_args()

    which = "quick" if arguments.quick else "hardest" if arguments.hardest else "all"
    listed, table = (backward_entries, launch_table_backward) if arguments.backward else (entries, launch_table)
    archs = arguments.arch or list(table.COMPILED)
    asked = list(listed(archs, arguments.dtype, arguments.head_dim, which))
    rows = []
    print("arch      dtype     D    block warps  registers  spill  shared   mma  (min)  instr  occupancy  keys per branch")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for entry, counted in zip(asked, pool.map(measure, asked, chunksize=4), strict=True):
            rows.append(row(entry, counted))
            print(_line(entry, counted, rows[-1]), flush=True)
    for reason, number in Counter(row["excess"] for row in rows if row["excess"]).items():
        print(f"{number} entr{plural(number, 'ies', 'y')} with over 10 % more matrix instructions than the least: {reason}")
    unfit = sum(bool(row["faults"]) for row in rows)
    print(f"{len(asked)} entr{plural(len(asked), 'ies', 'y')}, {unfit} unfit (triton {triton.__version__})")
    for arch in archs:
        for dtype in arguments.dtype:
            print(f"{arch} {dtype}: {'; '.join(table.refusals(arch, _bits(dtype)))}")
    if arguments.json:
        write(arguments.json, rows)
    return 1 if unfit else 0


def _line(entry: Entry, counted: Count, row: dict[str, Any]) -> str:
    least = "" if row["min_mma"] is None else f"({row['min_mma']})"
    return (
        f"{entry.arch:9} {entry.dtype:9} {entry.head_dim:<4} {entry.config.block_m:>5} {entry.config.num_warps:>5}"
        f" {counted.registers:>10} {counted.spill_bytes:>6} {counted.shared_bytes:>7} {counted.mma:>5} {least:>6}"
        f" {counted.instructions:>6} {row['occupancy']:>9.0%}   {'+'.join(map(str, entry.lengths))}{'  masked' * entry.masked}"
        f"{_asked(entry)}"
        f"  {'; '.join(row['faults'])}"
    )


def _asked(entry: Entry) -> str:
    """Which branches need gradients of their keys or values."""
    if entry.wanted is None:
        return ""
    pairs = zip(entry.wanted.keys, entry.wanted.values, strict=True)
    return "  d" + ",".join(str(i) for i, pair in enumerate(pairs) if any(pair))


if __name__ == "__main__":
    sys.exit(main())
