"""Launch parameters of the backward kernel as data: see `launch_table`, whose rules hold here too, and docs/decisions/0012.

A thread may spill up to 64 bytes.
"""

from .launch_table import AMPERE, ANY, CDNA, LARGEST_HEAD_DIM, SHARED_MEMORY, SM_120, TCGEN05, WGMMA, LaunchConfig, Row, dims

SPILL_BYTES = 64
"""What a thread may spill, in bytes."""

TABLE = (
    Row(AMPERE + SM_120 + WGMMA + TCGEN05, 16, dims(8, 64), ANY, LaunchConfig(64, 32, 128, 32, num_warps=4)),
    Row(CDNA, 16, dims(8, 64), ANY, LaunchConfig(64, 32, 128, 32, num_warps=4, num_stages=1)),
    Row(AMPERE + SM_120 + WGMMA + TCGEN05 + CDNA, 32, dims(8, 160), ANY, LaunchConfig(32, 32, 80, 32, num_warps=4)),
)


def find(arch: str, bits: int, head_dim: int) -> LaunchConfig | None:
    """The config for elements of `bits` bits on "sm_90" or "gfx942", or None where the table refuses; `refusal` says why."""
    for row in TABLE:
        if arch in row.archs and row.bits == bits and head_dim in row.head_dims:
            return row.config
    return None


def refusal(arch: str, bits: int, head_dim: int, lengths: tuple[int, ...] = ()) -> str | None:
    """Why an architecture does not run the backward of a shape with branches of these lengths, text first, or None where it
    does.
    """
    rows = [row for row in TABLE if arch in row.archs and row.bits == bits]
    if not rows:
        archs = sorted({arch for row in TABLE for arch in row.archs}, key=list(SHARED_MEMORY).index)
        return f"device architecture {arch}: not in the backward's launch table ({', '.join(archs)})"
    config = find(arch, bits, head_dim)
    if config is None:
        limit = max(row.head_dims[-1] for row in rows)
        return f"head dim {head_dim}: above {limit} the backward kernel spills registers on {arch}"
    return None


def refusals(arch: str, bits: int) -> list[str]:
    """What an architecture refuses, as a list to read."""
    reasons = (refusal(arch, bits, head_dim) for head_dim in range(8, LARGEST_HEAD_DIM + 1, 8))
    return [reason for reason in reasons if reason is not None]
