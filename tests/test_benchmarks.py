"""The drivers run, gate first; one micro-benchmark that CI can track."""

import json
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import ipa_kernels
from benchmarks import attention, generation
from ipa_kernels import decoupled_attention, measure
from ipa_kernels.cases import CASES

CPU = torch.device("cpu")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["attention", "--device", "cpu", "--small", "--rounds", "1", *arguments])
    return attention.main()


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_the_attention_driver(
    impl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "attention.json"
    cases = ["sdxl_1024_64x64_three_masked", "sd15_512_head80", "sdxl_1024_64x64_text_only"]
    assert run(monkeypatch, "--impl", impl, "--cases", *cases, "--json", str(file)) == 0
    printed = capsys.readouterr().out
    assert all(case in printed for case in cases)
    result = json.loads(file.read_text())
    assert result["machine"]["torch"] == torch.__version__
    for row in result["rows"]:
        assert row["within"]
        assert row["speedup"] == row["seconds"]["stock"]["median"] / row["seconds"]["ipa_kernels"]["median"]


def test_a_red_gate_is_never_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # a joint softmax, the classical mistake
    def joint(query, key, value, image_keys, image_values, **options):
        return decoupled_attention(query, torch.cat([key, *image_keys], 2), torch.cat([value, *image_values], 2), (), ())

    monkeypatch.setattr(attention, "decoupled_attention", joint)
    monkeypatch.setattr(attention, "interleaved", lambda *arguments: pytest.fail("timed behind a red gate"))
    assert run(monkeypatch, "--cases", "sd15_512_head40") == 1
    assert "not timed: outside the error budget" in capsys.readouterr().out


def test_candidates_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = measure.interleaved(calls, CPU, rounds=3)
    assert order == ["a", "b"] * 5
    assert all(timing.calls == 3 and timing.p20 <= timing.median <= timing.p80 for timing in timings.values())
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        measure.interleaved(calls, CPU, rounds=0)


@pytest.mark.parametrize("name", ["sdxl_1024_32x32", "sdxl_1024_32x32_three_masked"])
def test_micro_benchmark(name: str, benchmark: BenchmarkFixture, device: torch.device) -> None:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    positional, keywords = CASES[name].inputs(dtype, device).arguments()
    benchmark(lambda: decoupled_attention(*positional, **keywords))


def test_operations_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm: to_q, to_out and the kernel; in eager attention an attention per branch and the weighting, in place."""
    monkeypatch.undo()  # poisoning memory is an operation too
    shape = generation.Shape(1, 64, 64, 4)
    counts = {}
    for variant in generation.VARIANTS:
        row = generation.measure_layer(shape, 32, variant, torch.float32, CPU, rounds=1)
        counts[variant] = tuple(row["operations"].values())
        assert row["equal"], "eager attention on a CPU is stock's, bit for bit"
    # stock, eager, the kernel
    assert counts == {"one": (11, 6, 3), "one masked": (15, 7, 3), "three": (21, 12, 3), "three masked": (33, 15, 3)}


def test_the_generation_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "generation.json"
    monkeypatch.setattr(generation, "MODELS", {"toy": (32, [generation.Shape(3, 64, 64, 4)])})
    monkeypatch.setattr("sys.argv", ["generation", "--device", "cpu", "--rounds", "1", "--steps", "3", "--json", str(file)])
    with pytest.warns(ipa_kernels.report.FallbackWarning):
        assert generation.main() == 0
    result = json.loads(file.read_text())
    calls = result["small"]["calls per generation"]
    assert calls["stock"] == {name: 3 * count for name, count in calls["enabled"].items() if name != "mask resize"} | {
        "mask resize": calls["stock"]["mask resize"]
    }
    assert calls["enabled"]["mask resize"] == 2, "two resolutions"
    assert result["small"]["equal"]
    assert set(result["models"]["toy"]) == set(generation.VARIANTS)
    printed = capsys.readouterr().out
    assert "toy: cross-attention of 3 layers" in printed
