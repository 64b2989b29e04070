"""The micro-benchmarks that CI can track: `make bench-micro`. They run as tests too, where pytest-benchmark is installed."""

from typing import TYPE_CHECKING

import pytest
import torch

from ipa_kernels import decoupled_attention
from ipa_kernels.testing.layer_cases import CASES

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark: not installed")


@pytest.mark.parametrize("name", ["sdxl_1024_32x32", "sdxl_1024_32x32_three_masked"])
def test_micro_benchmark(name: str, benchmark: "BenchmarkFixture", device: torch.device) -> None:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    positional, keywords = CASES[name].inputs(dtype, device).arguments()
    benchmark(lambda: decoupled_attention(*positional, **keywords))
