"""The launch table: what is found, what is refused, and that every entry compiles without a spill, without a GPU."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import compile_report
from benchmarks.disassembly import Count
from ipa_kernels import UnsupportedError, decoupled_attention
from ipa_kernels.kernels import launch as kernel
from ipa_kernels.kernels import launch_table, launch_table_backward
from ipa_kernels.ops import dispatch

ROOT = Path(__file__).parents[2]


def report(module: str, *arguments: str, folder: Path) -> dict[str, Any]:
    """The JSON of a driver, which compiles: in a process of its own, where kernels are not interpreted."""
    file = folder / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content: dict[str, Any] = json.loads(file.read_text())
    return content


SIBLINGS = ("sm_86", "sm_89", "sm_120", "gfx90a", "gfx1100")
"""Architectures that `make test` leaves to `make test-slow` and `make compile-report`: a relative of each is compiled."""


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.slow if arch in SIBLINGS else ()) for arch in launch_table.COMPILED]
)
def test_every_row_compiles_within_the_device(arch: str, tmp_path: Path) -> None:
    rows = report("compile_report", "--quick", "--arch", arch, folder=tmp_path)["rows"]
    here = [row for row in launch_table.TABLE if arch in row.archs and row.bits == 16]
    assert len(rows) == 2 * len(here)
    assert {row["dtype"] for row in rows} == {"float16", "bfloat16"}
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert 0 < row["shared_bytes"] <= launch_table.SHARED_MEMORY[arch], row
        assert row["mma"] > 0, row
        assert row["query_load"] == row["output_store"] == 16, row
        assert 0 < row["occupancy"] <= 1, row
        if arch in launch_table.MMA:
            assert row["min_mma"] <= row["mma"] <= 1.1 * row["min_mma"], row


@pytest.mark.parametrize(
    "archs", [("sm_80", "gfx942"), pytest.param(("sm_90", "sm_100"), marks=pytest.mark.slow)], ids="+".join
)
def test_the_backward_compiles_within_the_devices(archs: tuple[str, ...], tmp_path: Path) -> None:
    options = ("--backward", "--quick", "--dtype", "float16", "--head-dim", "64", "--arch", *archs)
    rows = report("compile_report", *options, folder=tmp_path)["rows"]
    assert [row["arch"] for row in rows] == list(archs)
    for row in rows:
        assert row["pass"] == "backward"
        assert row["spill_bytes"] <= launch_table_backward.SPILL_BYTES, row
        assert 0 < row["shared_bytes"] <= launch_table.SHARED_MEMORY[row["arch"]], row
        assert row["mma"] > 0, row
        assert row["query_load"] == row["output_store"] == 16, row
        if row["arch"] in launch_table.MMA:
            assert row["min_mma"] <= row["mma"] <= 1.1 * row["min_mma"], row


def test_every_entry_of_the_backward_is_in_its_result() -> None:
    """The table has no head dim that was not compiled at the lengths that need the most registers."""
    result = ROOT / "benchmarks" / "results" / "2026-11-23-compile-report-backward.json"
    rows = [row for row in json.loads(result.read_text())["rows"] if not row["faults"]]
    names = ("arch", "dtype", "head_dim", "block_m", "num_warps")
    compiled = {(*(row[name] for name in names), tuple(row["lengths"])) for row in rows}
    head_dims = list(range(8, launch_table.LARGEST_HEAD_DIM + 8, 8))
    dtypes = ["float16", "bfloat16"]
    for asked in compile_report.backward_entries(list(launch_table_backward.COMPILED), dtypes, head_dims, "hardest"):
        config = asked.config
        entry = (asked.arch, asked.dtype, asked.head_dim, config.block_m, config.num_warps, asked.lengths)
        assert entry in compiled


def test_the_cost_of_adapters(tmp_path: Path) -> None:
    """Per 16 queries, one adapter of 4 tokens: 92 HMMA.16816, 44 over 88 columns and 48 over 96 rows. Three of 16: 128."""
    tables = report("growth", "--tables", "adapters of 4 tokens", "adapters of 16 tokens", folder=tmp_path)["tables"]
    four, sixteen = ({row["x"]: row for row in tables[f"adapters of {n} tokens"]} for n in (4, 16))
    assert four[1]["mma"] == four[1]["min_mma"] == 92
    assert sixteen[3]["mma"] == sixteen[3]["min_mma"] == 128
    assert sixteen[8]["mma"] == sixteen[8]["min_mma"] == 208
    assert all(row["spill_bytes"] == 0 and row["launches"] == 1 for row in (*four.values(), *sixteen.values()))


def entry(**changes: Any) -> compile_report.Entry:
    config = launch_table.find("sm_80", 16, 64, 4096)
    assert config is not None
    known = compile_report.Entry("sm_80", "float16", 64, (77, 4), True, config)
    return replace(known, **changes)


GOOD = Count(128, 0, 20480, 92, 92 * 2048, 1000, 16, 16)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"mma": 101, "multiply_adds": 101 * 2048}, None),
        ({"mma": 102, "multiply_adds": 102 * 2048}, "102 matrix instructions where 92 would do"),
        ({"spill_bytes": 4}, "spills 4 bytes per thread"),
        ({"shared_bytes": 163 * 1024 + 1}, "shared memory 166913 over the 166912 of sm_80"),
        ({"mma": 0, "multiply_adds": 0}, "no tensor core instruction"),
        ({"query_load": 8}, "loads queries by 8 bytes per thread"),
        ({"output_store": 2}, "stores the output by 2 bytes per thread"),
    ],
)
def test_what_makes_an_entry_unfit(changes: dict[str, int], fault: str | None) -> None:
    assert compile_report.faults(entry(), replace(GOOD, **changes)) == ([] if fault is None else [fault])


def test_of_float32_in_ieee_precision_memory_alone_is_judged() -> None:
    counted = replace(GOOD, spill_bytes=400, mma=0, multiply_adds=0)
    assert compile_report.faults(entry(dtype="float32"), counted) == []
    assert "shared memory" in compile_report.faults(entry(dtype="float32"), replace(counted, shared_bytes=2**20))[0]


def test_of_tf32_spills_and_tensor_cores_are_judged_too() -> None:
    assert compile_report.faults(entry(dtype="tf32"), replace(GOOD, query_load=4, output_store=4, mma=999)) == []
    assert compile_report.faults(entry(dtype="tf32"), replace(GOOD, spill_bytes=8)) == ["spills 8 bytes per thread"]
    assert compile_report.faults(entry(dtype="tf32"), replace(GOOD, mma=0)) == ["no tensor core instruction"]


def test_tf32_is_compiled_where_there_is_tf32() -> None:
    listed = list(compile_report.entries(["sm_80", "gfx942", "gfx1100"], ["tf32"], [64], "hardest"))
    assert {e.arch for e in listed} == {"sm_80", "gfx942"}
    assert all(e.specialization.tf32 and e.specialization.dtype == "float32" for e in listed)


@pytest.mark.parametrize("arch", launch_table.SHARED_MEMORY)
@pytest.mark.parametrize("bits", [16, 32])
def test_a_shape_is_either_found_or_refused(arch: str, bits: int) -> None:
    for head_dim in range(8, launch_table.LARGEST_HEAD_DIM + 8, 8):
        for queries in (1, 1023, 1024, 2**40):
            found = launch_table.find(arch, bits, head_dim, queries)
            assert (found is None) == (launch_table.refusal(arch, bits, head_dim) is not None)


def test_refusals_say_why() -> None:
    assert "sm_75: not in the launch table (sm_80" in (launch_table.refusal("sm_75", 16, 64) or "")
    assert launch_table.refusal("sm_80", 16, 168) == "head dim 168: the launch table ends at 160 on sm_80, in 16 bits"
    assert launch_table.refusal("gfx1100", 16, 104) == "head dim 104: the launch table ends at 96 on gfx1100, in 16 bits"


def test_refusals_of_the_backward_say_what_there_is() -> None:
    refusal = launch_table_backward.refusal
    assert refusal("sm_80", 16, 104) == "head dim 104: the backward's launch table has 40, 64, 80, 128 on sm_80, in 16 bits"
    assert refusal("gfx942", 32, 160) == "head dim 160: the backward's launch table has 40, 64, 80, 128 on gfx942, in 32 bits"
    reason = refusal("sm_120", 16, 80, 17)
    assert reason == "17 image keys: the backward's launch table has up to 16 on sm_120 at head dim 80"


@pytest.fixture
def on_sm_90(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """As if there were an H100: what is chosen for it can be asked without one."""
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    return torch.device("cuda", 0)


def test_what_a_gpu_is_given(on_sm_90: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.layer_reasons(on_sm_90, torch.float16, 64) == []
    assert dispatch.automatic_reasons(on_sm_90, torch.bfloat16) == []
    assert dispatch.launch_config(on_sm_90, torch.bfloat16, 64, 4096).block_m == 128
    assert dispatch.launch_config(on_sm_90, torch.float16, 64, 64).block_m == 64
    assert dispatch.layer_reasons(on_sm_90, torch.float32, 64) == []
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="ieee"))
    assert "; set torch.backends.cuda.matmul.fp32_precision = 'tf32'" in dispatch.automatic_reasons(on_sm_90, torch.float32)[0]
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert dispatch.automatic_reasons(on_sm_90, torch.float32) == []
    assert dispatch.allows_tf32(on_sm_90)
    monkeypatch.setattr(dispatch, "architecture", lambda device: "gfx1100")
    assert not dispatch.allows_tf32(on_sm_90), "Triton compiles no TF32 there"
    assert "no tensor cores for it on gfx1100" in dispatch.automatic_reasons(on_sm_90, torch.float32)[0]
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    assert "head dim 192" in dispatch.layer_reasons(on_sm_90, torch.float16, 192)[0]


def test_an_old_gpu_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_75")
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    (reason,) = dispatch.layer_reasons(torch.device("cuda", 0), torch.float16, 64)
    assert reason.startswith("device architecture sm_75: not in the launch table")


def test_lengths_are_refused_where_a_loop_would_spill() -> None:
    assert launch_table.refusal("sm_80", 16, 160, 16) is None
    assert launch_table.refusal("sm_90", 16, 160, 257) is None
    reason = launch_table.refusal("sm_80", 16, 160, 257)
    assert reason == "257 image keys: above 16 the kernel spills registers on sm_80 at head dim 160"


@pytest.mark.parametrize(
    ("arch", "lengths", "blocks", "reason"),
    [
        ("sm_90", (77, 4), 1, None),
        ("sm_90", (512, 257), 640, None),
        ("sm_90", (2048, 257), 640, "2305 keys in all: above 2048"),
        ("sm_90", (2048, 257, 257), 640, None),
        ("sm_80", (2048, 257), 640, None),
        ("sm_80", (2048, 257), 20, "20 blocks over 2048 keys"),
        ("sm_90", (77,), 640, None),
    ],
)
def test_where_sdpa_is_estimated_to_be_faster(arch: str, lengths: tuple[int, ...], blocks: int, reason: str | None) -> None:
    found = launch_table.slower(arch, lengths, blocks)
    assert (found is None) if reason is None else (found or "").startswith(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("image_keys", [16, 1500])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 88, 128, 160])
def test_the_gpu_at_hand_takes_every_shape_of_the_table(head_dim: int, image_keys: int) -> None:
    query = torch.randn(2, 4, 1500, head_dim, device="cuda", dtype=torch.float16)
    inputs = query, query[:, :, :77], query[:, :, :77], [query[:, :, :image_keys]], [query[:, :, :image_keys]]
    refused = launch_table.refusal(dispatch.architecture(query.device), 16, head_dim, image_keys)
    if refused is not None:
        with pytest.raises(UnsupportedError, match=re.escape(refused)):
            decoupled_attention(*inputs, impl="triton")
        return
    assert decoupled_attention(*inputs, impl="triton").isfinite().all()
