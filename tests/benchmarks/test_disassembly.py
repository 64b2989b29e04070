"""What is read out of listings: a report that reads nothing finds no fault."""

import pytest

from benchmarks import disassembly

LINES = disassembly.Lines("decoupled_attention.py", range(170, 171))

PTX = """
\t.loc\t2 57 26                         // tiles.py:57:26 @[ decoupled_attention.py:170:69 ]
\t@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
{second}
\t.loc\t2 57 26                         // tiles.py:57:26 @[ decoupled_attention.py:33:9 @[ decoupled_attention.py:180:5 ] ]
\t@%p1 ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
"""


@pytest.mark.parametrize(
    ("second", "narrowest"),
    [
        ("", 16),
        ("\t@%p2 ld.global.v2.b32 { %r5, %r6 }, [ %rd1 + 8 ];", 8),
        ("\t@%p2 ld.global.b16 { %rs5 }, [ %rd1 + 8 ];", 2),
        ("\tcp.async.cg.shared.global [ %r7 + 0 ], [ %rd1 + 0 ], 0x10, %r8;", 16),
        ("\tcp.async.ca.shared.global [ %r7 + 0 ], [ %rd1 + 0 ], 0x4, %r8;", 4),
        ("\t@%p2 ld.global.v8.b32 { %r5 }, [ %rd1 + 8 ];", 16),
    ],
)
def test_loads_of_queries_in_ptx(second: str, narrowest: int) -> None:
    assert min(disassembly._ptx_widths(PTX.replace("{second}", second), LINES)) == narrowest


def test_sass() -> None:
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;
        /*0020*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0030*/              @UP1 HGMMA.64x80x16.F32 R24, gdesc[UR4], R24 ;
        /*0040*/                   STG.E.64 [R2.64], R8 ;
        /*0050*/                   UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4] ;
    """
    assert disassembly._SASS.findall(listing) == [
        "MOV", "LDG.E.128", "HMMA.16816.F32", "HGMMA.64x80x16.F32", "STG.E.64", "UTCHMMA",
    ]  # fmt: skip
    assert [disassembly._sass_shape(code) for code in ("HMMA.16816.F32", "HGMMA.64x80x16.F32", "UTCHMMA")] == [
        (16, 8, 16), (64, 80, 16), None,
    ]  # fmt: skip
    widths = {"STG.E.128": 16, "STG.E.64": 8, "STG.E": 4, "STG.E.U16": 2, "STG.E.U8": 1}
    assert {code: disassembly._sass_width(code) for code in widths} == widths


def test_amd() -> None:
    assembly = """
\t.loc\t2 57 26 is_stmt 1              ; tiles.py:57:26 @[ decoupled_attention.py:170:69 ]
\tglobal_load_dwordx4 v[2:5], v[0:1], off
\t.loc\t2 57 26                         ; tiles.py:57:26 @[ decoupled_attention.py:180:9 ]
\tglobal_load_ushort v6, v[0:1], off
\tv_mfma_f32_32x32x8_f16 v[0:15], v[2:3], v[4:5], v[0:15]
\tv_mfma_f32_16x16x16_bf16 v[0:3], v[2:3], v[4:5], v[0:3]
\tglobal_store_b64 v[2:3], v[0:1], off
    .private_segment_fixed_size: 12
    .vgpr_count:     103
"""
    found = disassembly._count_amd(assembly, 2048, LINES)
    assert found == disassembly.Count(103, 12, 2048, 2, 32 * 32 * 8 + 16 * 16 * 16, 5, 16, 8)
