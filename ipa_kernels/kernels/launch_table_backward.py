"""Launch parameters of the backward kernel as data: see `launch_table`, whose rules hold here too, and docs/decisions/0012.

In 16 bits and in TF32 a thread may spill up to 64 bytes.
"""

from .launch_table import AMPERE, ANY, LARGEST_HEAD_DIM, SHARED_MEMORY, SM_120, TCGEN05, TF32, WGMMA, LaunchConfig, Row

SPILL_BYTES = 64
"""What a thread may spill, in bytes."""

COMPILED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
"""What the report compiles; the others share the code of a sibling, as in the forward's table."""

CDNA3 = ("gfx942",)

# The first row that fits wins, by the longest image branch too. Only head dims that the report has compiled.
# LaunchConfig(block_m, block_n, whole_keys, whole_image_keys, ...)
TABLE = (
    Row(("sm_80",), 16, (40, 64), ANY, LaunchConfig(64, 32, 128, 32, num_warps=4)),
    Row(AMPERE, 16, (40, 64), ANY, LaunchConfig(128, 32, 128, 32, num_warps=8)),
    Row(AMPERE, 16, (80, 128), ANY, LaunchConfig(64, 16, 0, 16, num_warps=4)),
    Row(SM_120, 16, (40, 64), ANY, LaunchConfig(64, 16, 96, 32, num_warps=4)),
    Row(SM_120, 16, (80,), ANY, LaunchConfig(64, 16, 0, 16, num_warps=4, max_image_keys=16)),
    Row(SM_120, 16, (128,), ANY, LaunchConfig(32, 16, 0, 16, num_warps=4, max_image_keys=16)),
    Row(WGMMA, 16, (40, 64), ANY, LaunchConfig(128, 32, 128, 32, num_warps=8)),
    Row(WGMMA, 16, (80,), ANY, LaunchConfig(128, 32, 128, 32, num_warps=8, max_image_keys=32)),
    Row(WGMMA, 16, (80, 128), ANY, LaunchConfig(128, 16, 0, 16, num_warps=8)),
    Row(TCGEN05, 16, (40,), ANY, LaunchConfig(128, 32, 128, 32, num_warps=8, max_image_keys=32)),
    Row(TCGEN05, 16, (64,), ANY, LaunchConfig(128, 32, 128, 32, num_warps=8)),
    Row(TCGEN05, 16, (80, 128), ANY, LaunchConfig(64, 16, 0, 16, num_warps=4, max_image_keys=16)),
    Row(CDNA3, 16, (40, 64), ANY, LaunchConfig(64, 16, 128, 32, num_warps=4, num_stages=1)),
    Row(CDNA3, 16, (80,), ANY, LaunchConfig(64, 16, 128, 32, num_warps=4, num_stages=1, max_image_keys=32)),
    Row(CDNA3, 16, (128, 160), ANY, LaunchConfig(64, 16, 0, 16, num_warps=4, num_stages=1, max_image_keys=16)),
    # for TF32; IEEE float32 has no tensor cores, and spills
    Row(TF32, 32, (40,), ANY, LaunchConfig(32, 16, 80, 16, num_warps=4)),
    Row(TF32, 32, (64,), ANY, LaunchConfig(16, 16, 80, 16, num_warps=4)),
    Row(TF32, 32, (80, 128), ANY, LaunchConfig(16, 16, 0, 16, num_warps=4, max_image_keys=16)),
)


def find(arch: str, bits: int, head_dim: int, image_keys: int = 0) -> LaunchConfig | None:
    """The config for elements of `bits` bits on "sm_90" or "gfx942", with image branches of up to so many keys, or None where
    the table refuses; `refusal` says why.
    """
    for row in TABLE:
        fits = arch in row.archs and row.bits == bits and head_dim in row.head_dims
        if fits and image_keys <= row.config.max_image_keys:
            return row.config
    return None


def refusal(arch: str, bits: int, head_dim: int, image_keys: int = 0) -> str | None:
    """Why an architecture does not run the backward of a shape with image branches of this length, in one sentence, or None
    where it does.
    """
    if find(arch, bits, head_dim, image_keys) is not None:
        return None
    rows = [row for row in TABLE if arch in row.archs and row.bits == bits]
    if not rows:
        archs = [known for known in SHARED_MEMORY if any(known in row.archs for row in TABLE)]
        return f"device architecture {arch}: not in the backward's launch table ({', '.join(archs)})"
    fitting = [row.config for row in rows if head_dim in row.head_dims]
    if not fitting:
        known = listed(sorted({known for row in rows for known in row.head_dims}))
        return f"head dim {head_dim}: the backward's launch table has {known} on {arch}, in {bits} bits"
    limit = max(config.max_image_keys for config in fitting)
    return f"{image_keys} image keys: the backward's launch table has up to {limit} on {arch} at head dim {head_dim}"


def listed(head_dims: list[int]) -> str:
    """Head dims as in "40 to 64, 80"."""
    found = []
    for first in (d for d in head_dims if d - 8 not in head_dims):
        last = next(d for d in range(first, LARGEST_HEAD_DIM + 1, 8) if d + 8 not in head_dims)
        found.append(str(first) if first == last else f"{first} to {last}")
    return ", ".join(found)


def refusals(arch: str, bits: int) -> list[str]:
    """What an architecture refuses, as a list to read."""
    found = []
    for head_dim in range(8, LARGEST_HEAD_DIM + 1, 8):
        reason = refusal(arch, bits, head_dim) or refusal(arch, bits, head_dim, ANY)
        if reason is not None:
            found.append(reason.replace(f"{ANY} image keys:", "more image keys:"))
    return found
