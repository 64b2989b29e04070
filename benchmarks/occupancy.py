"""How many warps of a compiled kernel a processor has room for, estimated from its registers and shared memory.

NVIDIA: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability". AMD: CDNA 3 and RDNA ISA reference
guides.
"""

from dataclasses import dataclass

from .disassembly import Count


@dataclass(frozen=True)
class Processor:
    """One multiprocessor or compute unit: 32-bit registers, warps and bytes of shared memory that the blocks on it share; lanes
    of a warp; bytes of shared memory that each block costs besides its own.
    """

    registers: int
    warps: int
    shared: int
    lanes: int = 32
    reserved: int = 1024


_AMPERE = Processor(65536, 64, 164 * 1024)
_ADA = Processor(65536, 48, 100 * 1024)
_HOPPER = Processor(65536, 64, 228 * 1024)
_CDNA = Processor(4 * 512 * 64, 32, 64 * 1024, lanes=64, reserved=0)
_RDNA = Processor(4 * 1536 * 32, 64, 128 * 1024, reserved=0)
PROCESSORS = {
    "sm_80": _AMPERE, "sm_86": _ADA, "sm_87": Processor(65536, 48, 164 * 1024), "sm_89": _ADA,
    "sm_90": _HOPPER, "sm_100": _HOPPER, "sm_103": _HOPPER, "sm_120": _ADA, "sm_121": _ADA,
    "gfx90a": _CDNA, "gfx942": _CDNA, "gfx1100": _RDNA, "gfx1201": _RDNA,
}  # fmt: skip


def occupancy(arch: str, num_warps: int, counted: Count) -> float:
    """The share of a processor's warps that blocks of `num_warps` can fill."""
    device = PROCESSORS[arch]
    # registers are given out eight at a time
    per_warp = -(-counted.registers // 8) * 8 * device.lanes
    by_registers = device.registers // per_warp // num_warps
    by_shared = device.shared // (counted.shared_bytes + device.reserved) if counted.shared_bytes else by_registers
    return min(by_registers, by_shared, device.warps // num_warps) * num_warps / device.warps
