"""Launch parameters as data: which block sizes run where, and what is refused. No triton, no torch, no autotuner.

Every row is compiled for its architectures without a GPU, at the lengths that need the most registers, in 16 bits at every head
dim (`python -m benchmarks.compile_report`): shared memory within the device's limit, no spills in 16 bits and in TF32, 16 bytes
per load and store in 16 bits. See docs/decisions/0002-launch-table.md. No row has been timed yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

LARGEST_HEAD_DIM = 256

ANY = 2**63


@dataclass(frozen=True)
class LaunchConfig:
    """How one launch is cut.

    block_m: queries per program. whole_keys, whole_image_keys: a text or an image branch of up to this many keys is held whole
    in registers, a longer one is looped over. block_n: keys per step of that loop. num_warps, num_stages: as in Triton.
    max_image_keys: an image branch of more keys is refused. max_registers: of a thread, None where the compiler decides; it may
    spill a few to make room for another block.
    """

    block_m: int
    block_n: int
    whole_keys: int
    whole_image_keys: int
    num_warps: int
    num_stages: int = 2
    max_image_keys: int = ANY
    max_registers: int | None = None


@dataclass(frozen=True)
class Row:
    """A config, and what it is for: architectures, 16-bit or 32-bit elements, head dims, and up to a number of queries."""

    archs: tuple[str, ...]
    bits: int
    head_dims: Sequence[int]
    queries: int
    config: LaunchConfig


# Shared memory that one block may use, in bytes. NVIDIA: CUDA C++ Programming Guide, table "Technical Specifications per
# Compute Capability", row "Maximum amount of shared memory per thread block". AMD: the local data share of a workgroup,
# 64 KiB, CDNA 3 and RDNA ISA reference guides.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_87": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_103": 227 * 1024,
    "sm_120": 99 * 1024,
    "sm_121": 99 * 1024,
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
    "gfx1100": 64 * 1024,
    "gfx1201": 64 * 1024,
}

COMPILED = tuple(arch for arch in SHARED_MEMORY if arch not in ("sm_87", "sm_103", "sm_121"))
"""What the report compiles; the others share the code of a sibling: sm_87 of sm_86, sm_103 of sm_100, sm_121 of sm_120."""

# Tensor cores by mma.sync, where a warp owns 16 rows; by wgmma, where four warps own 64; by tcgen05, MFMA and WMMA.
AMPERE = ("sm_80", "sm_86", "sm_87", "sm_89")
SM_120 = ("sm_120", "sm_121")
MMA = AMPERE + SM_120
WGMMA = ("sm_90",)
TCGEN05 = ("sm_100", "sm_103")
CDNA = ("gfx90a", "gfx942")
RDNA3 = ("gfx1100",)
RDNA4 = ("gfx1201",)
TF32 = (*MMA, *WGMMA, *TCGEN05, "gfx942")
"""Whose tensor cores multiply float32 in TF32; elsewhere Triton refuses to compile it."""


def dims(first: int, last: int) -> range:
    """Head dims, both ends included."""
    return range(first, last + 1, 8)


# The first row that fits wins. Where mma.sync computes, a warp has 16 rows: with more it spills, and warps that share rows
# repeat each other's products. Whether four or eight such warps are a block is decided by which of the two spills nowhere.
# LaunchConfig(block_m, block_n, whole_keys, whole_image_keys, ...)
TABLE = (
    Row(SM_120, 16, dims(56, 56), ANY, LaunchConfig(128, 16, 128, 32, num_warps=8)),
    Row(MMA, 16, dims(8, 56), ANY, LaunchConfig(128, 32, 128, 32, num_warps=8)),
    Row(MMA, 16, dims(64, 64), ANY, LaunchConfig(64, 32, 128, 32, num_warps=4)),
    Row(AMPERE, 16, dims(72, 80), ANY, LaunchConfig(128, 16, 128, 32, num_warps=8, max_registers=255)),
    Row(SM_120, 16, dims(72, 80), ANY, LaunchConfig(128, 16, 128, 32, num_warps=8)),
    Row(AMPERE, 16, dims(88, 96), ANY, LaunchConfig(128, 16, 128, 32, num_warps=8)),
    Row(SM_120, 16, dims(88, 96), ANY, LaunchConfig(128, 16, 128, 32, num_warps=8, max_image_keys=32)),
    Row(MMA, 16, dims(120, 128), ANY, LaunchConfig(128, 16, 128, 32, num_warps=8, max_image_keys=32)),
    Row(MMA, 16, dims(104, 144), ANY, LaunchConfig(128, 16, 0, 32, num_warps=8, max_image_keys=32)),
    Row(MMA, 16, dims(152, 160), ANY, LaunchConfig(128, 16, 0, 16, num_warps=8, max_image_keys=16)),
    Row(WGMMA, 16, dims(8, 64), 1023, LaunchConfig(64, 64, 128, 128, num_warps=4)),
    Row(WGMMA, 16, dims(72, 96), 1023, LaunchConfig(64, 32, 128, 64, num_warps=4)),
    Row(WGMMA, 16, dims(8, 96), ANY, LaunchConfig(128, 64, 128, 64, num_warps=8)),
    Row(WGMMA, 16, dims(104, 160), ANY, LaunchConfig(128, 16, 128, 32, num_warps=8)),
    Row(TCGEN05, 16, dims(8, 96), 1023, LaunchConfig(64, 64, 128, 32, num_warps=4)),
    Row(TCGEN05, 16, dims(8, 96), ANY, LaunchConfig(128, 64, 128, 32, num_warps=8)),
    Row(TCGEN05, 16, dims(104, 144), ANY, LaunchConfig(128, 16, 128, 32, num_warps=8, max_registers=255)),
    Row(TCGEN05, 16, dims(152, 160), ANY, LaunchConfig(128, 16, 128, 32, num_warps=8, max_image_keys=32, max_registers=255)),
    Row(CDNA, 16, dims(8, 160), ANY, LaunchConfig(128, 64, 128, 32, num_warps=4, num_stages=1)),
    Row(RDNA3, 16, dims(8, 64), ANY, LaunchConfig(64, 16, 80, 16, num_warps=4, num_stages=1)),
    Row(RDNA3, 16, dims(72, 80), ANY, LaunchConfig(64, 16, 0, 16, num_warps=4, num_stages=1)),
    Row(RDNA3, 16, dims(88, 96), ANY, LaunchConfig(64, 16, 0, 16, num_warps=4, num_stages=1, max_image_keys=16)),
    Row(RDNA4, 16, dims(8, 96), ANY, LaunchConfig(64, 32, 128, 32, num_warps=4, num_stages=1)),
    Row(RDNA4, 16, dims(104, 144), ANY, LaunchConfig(64, 16, 0, 16, num_warps=4, num_stages=1, max_image_keys=16)),
    # small tiles, for the sake of registers in TF32; in IEEE precision there are no tensor cores, and the same tiles spill
    Row(tuple(SHARED_MEMORY), 32, dims(8, 64), ANY, LaunchConfig(32, 32, 80, 32, num_warps=4)),
    Row(tuple(SHARED_MEMORY), 32, (80,), ANY, LaunchConfig(32, 16, 80, 16, num_warps=4)),
    Row(tuple(SHARED_MEMORY), 32, (88, 96, 120, 128), ANY, LaunchConfig(16, 16, 80, 16, num_warps=4)),
    Row(tuple(SHARED_MEMORY), 32, (152, 160), ANY, LaunchConfig(16, 16, 0, 16, num_warps=4)),
    Row(tuple(SHARED_MEMORY), 32, (72, 104, 112, 136, 144), ANY, LaunchConfig(32, 16, 0, 16, num_warps=8, max_image_keys=16)),
)

# Triton's interpreter has no registers to run out of.
INTERPRETED = LaunchConfig(64, block_n=64, whole_keys=128, whole_image_keys=128, num_warps=4)


def options(config: LaunchConfig) -> dict[str, int]:
    """The compiler's options of a config, by Triton's names."""
    known = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return known if config.max_registers is None else {**known, "maxnreg": config.max_registers}


def find(arch: str, bits: int, head_dim: int, queries: int) -> LaunchConfig | None:
    """The config for elements of `bits` bits on "sm_90" or "gfx942", or None where the table refuses; `refusal` says why."""
    for row in TABLE:
        if arch in row.archs and row.bits == bits and head_dim in row.head_dims and queries <= row.queries:
            return row.config
    return None


def refusal(arch: str, bits: int, head_dim: int, image_keys: int = 0) -> str | None:
    """Why an architecture does not run a shape with image branches of this length, in one sentence, or None where it does."""
    if arch not in SHARED_MEMORY:
        return f"device architecture {arch}: not in the launch table ({', '.join(SHARED_MEMORY)})"
    rows = [row for row in TABLE if arch in row.archs and row.bits == bits]
    fitting = [row.config for row in rows if head_dim in row.head_dims]
    if not fitting:
        limit = max((row.head_dims[-1] for row in rows), default=0)
        return f"head dim {head_dim}: the launch table ends at {limit} on {arch}, in {bits} bits"
    limit = min(config.max_image_keys for config in fitting)
    if image_keys > limit:
        return f"{image_keys} image keys: above {limit} the kernel spills registers on {arch} at head dim {head_dim}"
    return None


def refusals(arch: str, bits: int) -> list[str]:
    """What an architecture refuses, as a list to read."""
    found = []
    for head_dim in range(8, LARGEST_HEAD_DIM + 1, 8):
        reason = refusal(arch, bits, head_dim) or refusal(arch, bits, head_dim, ANY)
        if reason is not None:
            found.append(reason.replace(f"{ANY} image keys: above", f"head dim {head_dim}: image keys above"))
    return found


LONG_KEYS = 2048
FEW_BLOCKS = 64
"""Where `slower` sets in: by the byte and FLOP model of docs/decisions/0007, not by measurement."""


def slower(arch: str, lengths: tuple[int, ...], blocks: int) -> str | None:
    """Why SDPA per branch is estimated to be faster than a kernel that could run, in one sentence, or None.

    lengths: keys per branch, text first; blocks: programs of the launch.
    """
    allowed = LONG_KEYS * max(1, len(lengths) - 1)
    if arch in WGMMA + TCGEN05 and sum(lengths) > allowed:
        return f"{sum(lengths)} keys in all: above {allowed} SDPA's own kernels for {arch} are estimated to be faster"
    if max(lengths) >= LONG_KEYS and blocks < FEW_BLOCKS:
        return f"{blocks} blocks over {max(lengths)} keys: SDPA, which splits the keys, is estimated to fill the GPU better"
    return None
