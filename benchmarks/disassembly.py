"""What a compiler made of a kernel: registers, spills, shared memory, matrix instructions, the width of loads and stores.

NVIDIA: cuobjdump and nvdisasm, both shipped in Triton's wheel, and the PTX, whose line numbers tell which load is which.
AMD: the assembly and its metadata.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton


class Lines(NamedTuple):
    """Lines of one file, by its name."""

    file: str
    lines: range


@dataclass(frozen=True)
class Count:
    """registers, spill_bytes: per thread; shared_bytes: per block; mma: matrix instructions of a warp, or, where a group of
    warps or the block issues one together, of that; multiply_adds: of those, where their shape can be read, else None;
    instructions: of a warp; query_load, output_store: the narrowest, in bytes per thread.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    mma: int
    multiply_adds: int | None
    instructions: int
    query_load: int
    output_store: int


def count(compiled: Any, query_lines: Lines) -> Count:
    """Count a compiled kernel; query_lines: where the queries are loaded."""
    if "cubin" in compiled.asm:
        return _count_nvidia(compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared, query_lines)
    return _count_amd(compiled.asm["amdgcn"], compiled.metadata.shared, query_lines)


_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)", re.M)


def _count_nvidia(cubin: bytes, ptx: str, shared: int, query_lines: Lines) -> Count:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        listing = _output(tools / "nvdisasm", "-c", file.name)
    opcodes = Counter(_SASS.findall(listing))
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    matrix = {opcode: n for opcode, n in opcodes.items() if opcode.split(".")[0] in ("HMMA", "HGMMA", "UTCHMMA")}
    stores = [_sass_width(opcode) for opcode in opcodes if opcode.startswith("STG.")]
    return Count(
        resources["REG"],
        resources["STACK"],
        shared,
        sum(matrix.values()),
        _multiply_adds({_sass_shape(opcode): n for opcode, n in matrix.items()}),
        opcodes.total(),
        min(_ptx_widths(ptx, query_lines), default=0),
        min(stores, default=0),
    )


def _sass_shape(opcode: str) -> tuple[int, int, int] | None:
    """(m, n, k) of HMMA.16816 and HGMMA.64x80x16; UTCHMMA keeps its shape in a descriptor."""
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        return int(found[1]), int(found[2]), int(found[3])
    return {"16816": (16, 8, 16), "1688": (16, 8, 8)}.get(opcode.split(".")[1]) if opcode.startswith("HMMA") else None


def _sass_width(opcode: str) -> int:
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[part] for part in opcode.split(".") if part in widths), 4)


def _ptx_widths(ptx: str, lines: Lines) -> list[int]:
    """Bytes per thread of each global load that stems from these lines of the kernel."""
    widths, here, number = [], False, _file_number(ptx, lines.file)
    for line in ptx.splitlines():
        if ".loc" in line:
            here = _stems_from(line, lines, number)
        elif here and (found := re.search(r"(?:ld\.global|cp\.async\.c[ag]\.shared\.global)\S*", line)):
            vector = re.search(r"\.v(\d)", found[0])
            bits = re.search(r"\.[bfu](\d+)", found[0])
            copied = re.search(r"\], (0x[0-9a-f]+|\d+)", line)
            if bits is None:
                widths.append(int(copied[1], 0) if copied else 0)
            else:
                widths.append(int(bits[1]) // 8 * (int(vector[1]) if vector else 1))
    return widths


def _stems_from(location: str, lines: Lines, number: str) -> bool:
    """Whether a .loc, or a call that it was inlined at, is on one of these lines.

    number: of their file. Triton 3.9 writes `inlined_at file line column`, older ones the whole chain in a comment.
    """
    found = re.findall(rf"\b{re.escape(lines.file)}:(\d+):", location) + re.findall(rf"inlined_at {number} (\d+) ", location)
    return any(int(line) in lines.lines for line in found)


def _file_number(listing: str, file: str) -> str:
    found = re.search(rf'\.file\s+(\d+)\s.*\b{re.escape(file)}"', listing)
    return found[1] if found else "none"


_AMD_WIDTHS = {"dwordx4": 16, "b128": 16, "dwordx3": 12, "b96": 12, "dwordx2": 8, "b64": 8, "dword": 4, "b32": 4}


def _count_amd(assembly: str, shared: int, query_lines: Lines) -> Count:
    def metadata(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert match is not None, f"no {name} in the assembly"
        return int(match.group(1))

    loads, stores, here, number = [], [], False, _file_number(assembly, query_lines.file)
    for line in assembly.splitlines():
        if "\t.loc" in line:
            here = _stems_from(line, query_lines, number)
        elif found := re.match(r"\s+(?:global|buffer|flat)_(load|store)_(\w+)", line):
            width = _AMD_WIDTHS.get(found[2], 2)
            if found[1] == "store":
                stores.append(width)
            elif here:
                loads.append(width)
    shapes = Counter(re.findall(r"^\s+v_(?:mfma|wmma)_f32_(\d+)x(\d+)x(\d+)", assembly, re.M))
    return Count(
        metadata("vgpr_count"),
        metadata("private_segment_fixed_size"),
        shared,
        shapes.total(),
        _multiply_adds({(int(m), int(n), int(k)): number for (m, n, k), number in shapes.items()}),
        len(re.findall(r"^\s+[a-z]+_\w+", assembly, re.M)),
        min(loads, default=0),
        min(stores, default=0),
    )


def _multiply_adds(shapes: dict[tuple[int, int, int] | None, int]) -> int | None:
    if None in shapes:
        return None
    return sum(m * n * k * number for (m, n, k), number in shapes.items())  # type: ignore[misc]


def _output(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
