"""The launch table: what is found, what is refused, and that every entry compiles without a spill, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ipa_kernels import decoupled_attention
from ipa_kernels.kernels import decoupled_attention as kernel
from ipa_kernels.kernels import launch_table
from ipa_kernels.ops import support

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_every_entry_compiles_within_the_device(arch: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    head_dims = ["40", "64", "80", "88", "128", "160"]
    command = [sys.executable, "-m", "benchmarks.compile_report", "--quick", "--arch", arch, "--head-dim", *head_dims]
    done = subprocess.run(
        [*command, "--json", str(report)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert {(row["dtype"], str(row["head_dim"])) for row in rows} == {
        (dtype, head_dim) for dtype in ("float16", "bfloat16") for head_dim in head_dims
    }
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert 0 < row["shared_bytes"] <= launch_table.SHARED_MEMORY[arch], row
        assert row["mma"] > 0, row


@pytest.mark.parametrize("arch", launch_table.SHARED_MEMORY)
@pytest.mark.parametrize("bits", [16, 32])
def test_a_shape_is_either_found_or_refused(arch: str, bits: int) -> None:
    for head_dim in range(8, launch_table.LARGEST_HEAD_DIM + 8, 8):
        for queries in (1, 1023, 1024, 2**40):
            found = launch_table.find(arch, bits, head_dim, queries)
            assert (found is None) == (launch_table.refusal(arch, bits, head_dim) is not None)


def test_refusals_say_why() -> None:
    assert "sm_75: not in the launch table (sm_80" in (launch_table.refusal("sm_75", 16, 64) or "")
    assert "head dim 256: above 160 the kernel spills registers on sm_80" in (launch_table.refusal("sm_80", 16, 256) or "")


@pytest.fixture
def on_sm_90(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """As if there were an H100: what is chosen for it can be asked without one."""
    monkeypatch.setattr(support, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    return torch.device("cuda", 0)


def test_what_a_gpu_is_given(on_sm_90: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert support.layer_reasons(on_sm_90, torch.float16, 64) == []
    assert support.automatic_reasons(on_sm_90, torch.bfloat16) == []
    assert support.launch_config(on_sm_90, torch.bfloat16, 64, 4096).block_m == 128
    assert support.launch_config(on_sm_90, torch.float16, 64, 64).block_m == 64
    assert support.layer_reasons(on_sm_90, torch.float32, 64) == []
    monkeypatch.setattr(support, "allows_tf32", lambda device: False)
    assert "fp32_precision = 'tf32' lifts this" in support.automatic_reasons(on_sm_90, torch.float32)[0]
    monkeypatch.setattr(support, "allows_tf32", lambda device: True)
    assert support.automatic_reasons(on_sm_90, torch.float32) == []
    assert "head dim 192" in support.layer_reasons(on_sm_90, torch.float16, 192)[0]


def test_an_old_gpu_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "architecture", lambda device: "sm_75")
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    (reason,) = support.layer_reasons(torch.device("cuda", 0), torch.float16, 64)
    assert reason.startswith("device architecture sm_75: not in the launch table")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [40, 64, 80, 88, 128, 160])
def test_the_gpu_at_hand_takes_every_shape_of_the_table(head_dim: int) -> None:
    query = torch.randn(2, 4, 1500, head_dim, device="cuda", dtype=torch.float16)
    out = decoupled_attention(query, query[:, :, :77], query[:, :, :77], [query], [query], impl="triton")
    assert out.isfinite().all()
