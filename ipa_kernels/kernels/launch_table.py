"""Launch parameters as data: which block sizes run where, and what is refused. No triton, no torch, no autotuner.

Every row is compiled for its architectures without a GPU, at the head dims 40, 64, 80, 88, 128 and 160 and the lengths that
need the most registers (`python -m benchmarks.compile_report`): no spills, shared memory within the device's limit; see
docs/decisions/0002-launch-table.md. No row has been timed on a GPU yet.
"""

from dataclasses import dataclass

LARGEST_HEAD_DIM = 256


@dataclass(frozen=True)
class LaunchConfig:
    """How one launch is cut.

    block_m: queries per program. whole_keys, whole_image_keys: a text or an image branch of up to this many keys is held whole
    in registers, a longer one is looped over. block_n: keys per step of that loop. num_warps, num_stages: as in Triton.
    """

    block_m: int
    block_n: int
    whole_keys: int
    whole_image_keys: int
    num_warps: int
    num_stages: int = 2


@dataclass(frozen=True)
class Row:
    """A config, and what it is for: architectures, 16-bit or 32-bit elements, up to a head dim and a number of queries."""

    archs: tuple[str, ...]
    bits: int
    head_dim: int
    queries: int
    config: LaunchConfig


# Shared memory that one block may use, in bytes. NVIDIA: CUDA C++ Programming Guide, table "Technical Specifications per
# Compute Capability", row "Maximum amount of shared memory per thread block". AMD: the local data share of a workgroup,
# 64 KiB, CDNA 3 ISA reference guide.
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
    "gfx942": 64 * 1024,
}

# Tensor cores by mma.sync, where a warp owns 16 rows; by wgmma or tcgen05, where four warps own 64; by MFMA.
AMPERE = ("sm_80", "sm_86", "sm_87", "sm_89")
MMA = (*AMPERE, "sm_120", "sm_121")
WGMMA = ("sm_90", "sm_100", "sm_103")
CDNA = ("gfx942",)

ANY = 2**63

# The first row that fits wins. block_m is 16 times the number of warps where mma.sync computes: a warp with more rows spills,
# and warps that share rows repeat each other's products (the last resort, at a head dim of 160, on sm_120 from 128 on).
TABLE = (
    Row(MMA, 16, 64, 1023, LaunchConfig(64, block_n=64, whole_keys=128, whole_image_keys=32, num_warps=4)),
    Row(MMA, 16, 64, ANY, LaunchConfig(128, block_n=64, whole_keys=128, whole_image_keys=32, num_warps=8)),
    Row(MMA, 16, 96, 1023, LaunchConfig(64, block_n=16, whole_keys=80, whole_image_keys=16, num_warps=4)),
    Row(MMA, 16, 96, ANY, LaunchConfig(128, block_n=16, whole_keys=80, whole_image_keys=16, num_warps=8)),
    Row(AMPERE, 16, 128, ANY, LaunchConfig(128, block_n=16, whole_keys=80, whole_image_keys=16, num_warps=8)),
    Row(MMA, 16, 160, ANY, LaunchConfig(64, block_n=16, whole_keys=0, whole_image_keys=0, num_warps=8)),
    Row(WGMMA, 16, 64, 1023, LaunchConfig(64, block_n=64, whole_keys=128, whole_image_keys=128, num_warps=4)),
    Row(WGMMA, 16, 96, 1023, LaunchConfig(64, block_n=32, whole_keys=128, whole_image_keys=64, num_warps=4)),
    Row(WGMMA, 16, 96, ANY, LaunchConfig(128, block_n=64, whole_keys=128, whole_image_keys=64, num_warps=8)),
    Row(WGMMA, 16, 160, ANY, LaunchConfig(128, block_n=16, whole_keys=128, whole_image_keys=32, num_warps=8)),
    Row(CDNA, 16, 128, ANY, LaunchConfig(128, block_n=32, whole_keys=128, whole_image_keys=32, num_warps=8)),
    Row(CDNA, 16, 160, ANY, LaunchConfig(128, block_n=16, whole_keys=80, whole_image_keys=16, num_warps=8)),
    # IEEE float32 has no tensor cores: small tiles, for the sake of registers and compile time
    Row(MMA + WGMMA + CDNA, 32, 160, ANY, LaunchConfig(32, block_n=32, whole_keys=80, whole_image_keys=32, num_warps=4)),
)

# Triton's interpreter has no registers to run out of.
INTERPRETED = LaunchConfig(64, block_n=64, whole_keys=128, whole_image_keys=128, num_warps=4)


def find(arch: str, bits: int, head_dim: int, queries: int) -> LaunchConfig | None:
    """The config for elements of `bits` bits on "sm_90" or "gfx942", or None where the table refuses; `refusal` says why."""
    for row in TABLE:
        if arch in row.archs and row.bits == bits and head_dim <= row.head_dim and queries <= row.queries:
            return row.config
    return None


def refusal(arch: str, bits: int, head_dim: int) -> str | None:
    """Why an architecture does not run a shape, in one sentence, or None where it does."""
    if arch not in SHARED_MEMORY:
        return f"device architecture {arch}: not in the launch table ({', '.join(SHARED_MEMORY)})"
    limit = max((row.head_dim for row in TABLE if arch in row.archs and row.bits == bits), default=0)
    if head_dim > limit:
        return f"head dim {head_dim}: above {limit} the kernel spills registers on {arch}"
    return None
