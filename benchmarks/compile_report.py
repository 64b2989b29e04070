"""Compile every entry of the launch table for every architecture, without a GPU, and count what came out.

    python -m benchmarks.compile_report [--arch sm_90 ...] [--head-dim 64 ...] [--quick] [--json FILE]

Registers, stack (spills) and shared memory come from cuobjdump, MMA and memory instructions from nvdisasm, both shipped in
Triton's wheel; AMD's numbers from the metadata of its assembly. Exit status 1 if an entry spills or exceeds the device.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ipa_kernels.kernels import launch_table
from ipa_kernels.kernels.decoupled_attention import decoupled_attention_kernel, whole_lengths
from ipa_kernels.kernels.launch_table import LaunchConfig

HEAD_DIMS = (40, 64, 80, 88, 128, 160)
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
LONG = 1000
"""A length that every config loops over."""


@dataclass(frozen=True)
class Entry:
    """One compilation: an architecture, a shape class, the lengths of the branches, text first, with masks or without."""

    arch: str
    dtype: str
    head_dim: int
    lengths: tuple[int, ...]
    masked: bool
    config: LaunchConfig


@dataclass(frozen=True)
class Count:
    """What the compiler made of it; mma and instructions are per warp, bytes per thread (spill) or block (shared)."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    mma: int
    instructions: int


def length_classes(config: LaunchConfig, quick: bool) -> tuple[tuple[int, ...], ...]:
    """Lengths that reach every path of a config: text and images held whole, at their limits, and looped over."""
    text, image = config.whole_keys or LONG, config.whole_image_keys or LONG
    hardest = ((text, image, image), (text, LONG, LONG), (LONG, LONG, LONG))
    return hardest if quick else (*hardest, (77,), (77, 4), (77, 16, 16, 16), (text, LONG), (LONG, image), (LONG, LONG))


def entries(archs: list[str], dtypes: list[str], head_dims: list[int], quick: bool) -> Iterator[Entry]:
    """Every shape class of the table, once, for the asked architectures, dtypes and head dims."""
    for arch in archs:
        for dtype in dtypes:
            bits = 32 if dtype == "float32" else 16
            for head_dim in head_dims:
                found = (launch_table.find(arch, bits, head_dim, queries) for queries in (64, 4096))
                for config in dict.fromkeys(config for config in found if config is not None):
                    for lengths in length_classes(config, quick):
                        for masked in (True,) if quick or len(lengths) == 1 else (True, False):
                            yield Entry(arch, dtype, head_dim, lengths, masked, config)


def source(entry: Entry) -> ASTSource:
    """The kernel as the launcher specialises it for packed [B, M, H·D] tensors."""
    n = len(entry.lengths)
    pointer = "*" + DTYPES[entry.dtype]
    signature: dict[str, object] = {
        "out_ptr": pointer,
        "q_ptr": pointer,
        "k_ptrs": (pointer,) * n,
        "v_ptrs": (pointer,) * n,
        "scale_ptr": "*fp32" if n > 1 else "constexpr",
        "mask_ptrs": (pointer if entry.masked else "constexpr",) * (n - 1),
        "out_strides": ("i32",) * 3,
        "q_strides": ("i32",) * 3,
        "k_strides": (("i32",) * 3,) * n,
        "v_strides": (("i32",) * 3,) * n,
        "scale_strides": ("i32", "constexpr"),
        "mask_strides": ("i32",) * (n - 1),
        "heads": "i32",
        "q_len": "i32",
        "lengths": ("i32",) * n,
        "qk_scale": "fp32",
    }
    vector = 4 if entry.dtype == "float32" else 8
    constants: dict[str, object] = {
        "HEAD_DIM": entry.head_dim,
        "LENGTHS": whole_lengths(entry.lengths, entry.config),
        "ALIGN": 1 if entry.head_dim % 16 == 0 else vector,
        "BLOCK_M": entry.config.block_m,
        "BLOCK_N": entry.config.block_n,
        "PRECISION": "ieee",
    }
    signature |= dict.fromkeys(constants, "constexpr")
    position = {name: i for i, name in enumerate(decoupled_attention_kernel.arg_names)}
    values: dict[tuple[int, ...], object] = {(position[name],): value for name, value in constants.items()}
    values[position["scale_strides"], 1] = 1
    if n == 1:
        values[(position["scale_ptr"],)] = None
    if not entry.masked:
        values |= {(position["mask_ptrs"], i): None for i in range(n - 1)}

    # a batch or row stride is a multiple of 16 elements, a head stride is the head dim
    aligned: list[tuple[int, ...]] = [(position[name],) for name in ("out_ptr", "q_ptr")]
    aligned += [(position[name], i) for name in ("k_ptrs", "v_ptrs") for i in range(n)]
    aligned += [(position["mask_ptrs"], i) for i in range(n - 1) if entry.masked]
    for j in (0, 1, 2) if entry.head_dim % 16 == 0 else (0, 2):
        aligned += [(position[name], j) for name in ("out_strides", "q_strides")]
        aligned += [(position[name], i, j) for name in ("k_strides", "v_strides") for i in range(n)]
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    return ASTSource(fn=decoupled_attention_kernel, signature=signature, constexprs=values, attrs=attributes)


def count(entry: Entry) -> Count:
    """Compile one entry and count."""
    target = (
        GPUTarget("hip", entry.arch, 64 if entry.arch in launch_table.CDNA else 32)
        if entry.arch.startswith("gfx")
        else GPUTarget("cuda", int(entry.arch.removeprefix("sm_")), 32)
    )
    options = {"num_warps": entry.config.num_warps, "num_stages": entry.config.num_stages}
    compiled = triton.compile(source(entry), target=target, options=options)
    if "cubin" in compiled.asm:
        return _count_nvidia(compiled.asm["cubin"], compiled.metadata.shared)
    return _count_amd(compiled.asm["amdgcn"], compiled.metadata.shared)


def _count_nvidia(cubin: bytes, shared: int) -> Count:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        listing = _output(tools / "nvdisasm", "-c", file.name)
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_]*)", listing, re.M))
    mma = sum(n for opcode, n in opcodes.items() if opcode in ("HMMA", "HGMMA", "UTCHMMA", "QMMA"))
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    return Count(resources["REG"], resources["STACK"], shared, mma, opcodes.total())


def _count_amd(assembly: str, shared: int) -> Count:
    def metadata(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert match is not None, f"no {name} in the assembly"
        return int(match.group(1))

    mma = len(re.findall(r"^\s+v_(?:mfma|wmma)", assembly, re.M))
    instructions = len(re.findall(r"^\s+[a-z]+_\w+", assembly, re.M))
    return Count(metadata("vgpr_count"), metadata("vgpr_spill_count") * 4, shared, mma, instructions)


def _output(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def faults(entry: Entry, counted: Count) -> list[str]:
    """What makes an entry unfit to ship; float32 may spill and has no tensor cores."""
    limit = launch_table.SHARED_MEMORY[entry.arch]
    found = []
    if counted.shared_bytes > limit:
        found.append(f"shared memory {counted.shared_bytes} over the {limit} of {entry.arch}")
    if counted.spill_bytes and entry.dtype != "float32":
        found.append(f"spills {counted.spill_bytes} bytes per thread")
    if not counted.mma and entry.dtype != "float32":
        found.append("no tensor core instruction")
    return found


def main() -> int:
    """Print one line per entry; 1 if one is unfit."""
    every_arch = list(launch_table.SHARED_MEMORY)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=every_arch, choices=every_arch)
    parser.add_argument("--dtype", nargs="+", default=["float16", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--head-dim", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--quick", action="store_true", help="only the lengths that need the most registers")
    parser.add_argument("--json", type=Path, help="write one row per entry")
    arguments = parser.parse_args()

    asked = list(entries(arguments.arch, arguments.dtype, arguments.head_dim, arguments.quick))
    rows = []
    unfit = 0
    print("arch      dtype     D    block warps  registers  spill  shared   mma  instr  keys per branch", flush=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for entry, counted in zip(asked, pool.map(count, asked, chunksize=4), strict=True):
            wrong = faults(entry, counted)
            unfit += bool(wrong)
            rows.append({**asdict(entry), **asdict(counted), "faults": wrong})
            print(
                f"{entry.arch:9} {entry.dtype:9} {entry.head_dim:<4} {entry.config.block_m:>5} {entry.config.num_warps:>5}"
                f" {counted.registers:>10} {counted.spill_bytes:>6} {counted.shared_bytes:>7} {counted.mma:>5}"
                f" {counted.instructions:>6}  {'+'.join(map(str, entry.lengths))}{'  masked' * entry.masked}"
                f"  {'; '.join(wrong)}",
                flush=True,
            )
    print(f"{len(asked)} entries, {unfit} unfit (triton {triton.__version__})")
    if arguments.json:
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1))
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main())
