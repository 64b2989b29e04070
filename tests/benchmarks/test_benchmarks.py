"""The drivers run, gate first; tables, plots and the day with a GPU are made of what they wrote."""

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

import ipa_kernels
from benchmarks import (
    attention,
    figures,
    generation,
    gpu_day,
    host,
    host_rounds,
    host_step,
    peers,
    plots,
    sweeps,
    training,
    unet_step,
)
from ipa_kernels import decoupled_attention, reference
from ipa_kernels.benchmarking import device_time, machine
from ipa_kernels.integration import conditioning_cache
from ipa_kernels.testing import unet_models
from ipa_kernels.testing.layer_cases import CASES

from ..helpers.steady import NEVER

CPU = torch.device("cpu")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["attention", "--device", "cpu", "--small", "--rounds", "1", "--peers", "none", *arguments])
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
    assert len(result["rows"]) == len(cases)
    for row in result["rows"]:
        assert row["within"]
        ours, stock = (row["candidates"][name] for name in ("ipa_kernels", "stock"))
        assert stock["warm"] is stock["cold"] is None
        assert stock["no cold"] == "device cpu: has no CUDA graphs"
        assert stock["bytes_per_second"] == row["bytes"] / stock["wall"]["median"]
        assert stock["of_copy_rate"] == stock["bytes_per_second"] / result["ceilings"]["copy"]["rate"]
        assert stock["flops_per_second"] == row["flops"] / stock["wall"]["median"]
        if impl == "triton":
            assert ours["reason"] == attention.INTERPRETED
            assert ours["within"]
            assert "wall" not in ours
            assert row["ratios"] == {"wall": {}, "warm": {}, "cold": {}}
        else:
            assert row["ratios"]["wall"]["stock"] == stock["wall"]["median"] / ours["wall"]["median"]
            assert row["ratios"]["cold"] == {}


def test_a_red_gate_is_never_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # a joint softmax, the classical mistake
    def joint(query, key, value, image_keys, image_values, **options):
        return decoupled_attention(query, torch.cat([key, *image_keys], 2), torch.cat([value, *image_values], 2), (), ())

    monkeypatch.setattr(attention, "decoupled_attention", joint)
    monkeypatch.setattr(attention, "interleaved", lambda *arguments: pytest.fail("timed behind a red gate"))
    monkeypatch.setattr(attention, "device_times", lambda *arguments: pytest.fail("timed behind a red gate"))
    assert run(monkeypatch, "--cases", "sd15_512_head40") == 1
    assert "not timed: outside the error budget" in capsys.readouterr().out


def test_a_case_that_raises_is_red_and_the_next_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(query, *rest, **options):
        if query.shape[-1] == 40:
            raise RuntimeError("out of order\nand more")
        return decoupled_attention(query, *rest, **options)

    monkeypatch.setattr(attention, "decoupled_attention", raises)
    file = tmp_path / "attention.json"
    assert run(monkeypatch, "--cases", "sd15_512_head40", "sd15_512_head80", "--json", str(file)) == 1
    red, green = json.loads(file.read_text())["rows"]
    assert (red["within"], red["reason"]) == (False, "RuntimeError: out of order")
    assert green["within"]
    assert "not timed: RuntimeError: out of order" in capsys.readouterr().out


def test_a_driver_without_time_lists_what_it_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "attention.json"
    assert run(monkeypatch, "--cases", "sd15_512_head40", "--seconds", "-1", "--json", str(file)) == 0
    document = json.loads(file.read_text())
    assert document["rows"] == []
    assert document["not run"] == ["sd15_512_head40_small"]
    assert "Not run, its time was over: sd15_512_head40_small." in figures.report([document])


def test_peers_compute_the_same_and_say_why_they_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(query, key, value):
        raise NotImplementedError(f"head dim {query.shape[-1]}")

    def joint(query, key, value):
        return peers.sdpa(query, key, value) * 1.01

    monkeypatch.setitem(peers.PEERS, "raises", peers.Peer(lambda: raises))
    monkeypatch.setitem(peers.PEERS, "missing", peers.Peer(lambda: pytest.fail("built"), package="no_such_package"))
    monkeypatch.setitem(peers.PEERS, "narrow", peers.Peer(lambda: pytest.fail("built"), head_dims=32))
    monkeypatch.setitem(peers.PEERS, "wrong", peers.Peer(lambda: joint))
    names = ["sdpa_math", "sdpa_flash", "sdpa_cudnn", "raises", "missing", "narrow", "wrong"]
    file = tmp_path / "attention.json"
    assert run(monkeypatch, "--cases", "sdxl_1024_64x64_three_masked", "--peers", *names, "--json", str(file)) == 0
    (row,) = json.loads(file.read_text())["rows"]
    found = row["candidates"]
    assert set(found) == {"stock", "ipa_kernels", *names}
    assert found["raises"]["reason"] == "NotImplementedError: head dim 64"
    assert found["missing"]["reason"] == "no_such_package: not installed"
    assert found["narrow"]["reason"] == "head dim 64: torch takes at most 32"
    assert "backend" in found["sdpa_cudnn"]["reason"]
    assert found["sdpa_math"]["within"]
    assert found["sdpa_flash"]["within"]
    assert not found["wrong"]["within"], "a wrong peer went green"
    assert found["wrong"]["wall"]["median"] > 0, "a peer outside the budget may be timed, marked"
    backends = {name: found[name]["wall"]["median"] for name in ("sdpa_math", "sdpa_flash")}
    best = min(backends, key=lambda name: backends[name])
    assert row["ratios"]["wall"]["best_sdpa_is"] == best
    assert row["ratios"]["wall"]["best_sdpa"] == backends[best] / found["ipa_kernels"]["wall"]["median"]


def test_masks_and_scales_of_peers_are_those_of_the_inputs() -> None:
    inputs = CASES["sdxl_1024_64x64_three_masked"].small().inputs(torch.float64)
    out = peers.bind(peers.stock_order, peers.sdpa, inputs)()
    positional, keywords = inputs.arguments()
    expected = reference.decoupled_attention(*positional, **keywords)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2))


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(peers.PEERS))
def test_a_peer_on_a_gpu(name: str) -> None:
    """Whoever runs is captured and measured cold and warm; whoever does not says why."""
    device = torch.device("cuda")
    limits = device_time.ceilings(torch.float16, device, rounds=2)
    with torch.no_grad():
        row = attention.measure(CASES["sdxl_1024_32x32_three_masked"], torch.float16, device, "triton", 3, [name], limits)
    assert row["within"], row
    for candidate, entry in row["candidates"].items():
        why_not = entry["reason"] or entry.get("no cold")
        assert why_not or (entry["cold"]["median"] > 0 and entry["warm"]["median"] > 0), entry
        assert not why_not or candidate == name, entry
    assert row["ratios"]["cold"]["stock"] > 0
    assert row["sets"] * row["bytes"] > device_time.CACHE_MARGIN * (device_time.cache_bytes(device) or 0)


def test_the_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grown = sweeps.sweeps(small=False)
    assert [x for x, _ in grown["queries"]] == [64, 256, 1024, 4096, 16384]
    for tokens in (4, 16):
        assert [case.images for _, case in grown[f"adapters of {tokens} tokens"]][-1] == (tokens,) * 8
    assert {case.images for _, case in grown["image tokens"]} >= {(4,), (1024,)}
    assert all((case.heads, case.head_dim) == (10, 64) for row in grown.values() for _, case in row)
    file = tmp_path / "sweep.json"
    monkeypatch.setattr(sweeps, "QUERIES", (8, 16))
    monkeypatch.setattr(sweeps, "SMALL_QUERIES", 16)
    assert run(monkeypatch, "--sweep", "--json", str(file)) == 0
    document = json.loads(file.read_text())
    assert document["benchmark"] == "sweep"
    assert [row["x"] for row in document["rows"] if row["sweep"] == "queries"] == [8, 16]


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


def test_clones_share_weights_and_nothing_else() -> None:
    plain = unet_models.build(unet_models.MODELS["tiny"], torch.float32, CPU)
    loaded = unet_models.clone(plain)
    unet_models.load(loaded, unet_models.MODELS["tiny"], 3)
    enabled = unet_models.clone(loaded)
    ipa_kernels.enable(enabled)
    assert plain.config.encoder_hid_dim_type is None
    assert len(list(loaded.parameters())) > len(list(plain.parameters()))
    assert all(a is b for a, b in zip(loaded.parameters(), enabled.parameters(), strict=True))
    assert not ipa_kernels.explain(loaded).enabled
    assert {processor.scale[2] for name, processor in loaded.attn_processors.items() if "attn2" in name} == {unet_models.SCALE}


@pytest.mark.parametrize(("name", "layers", "millions"), [("sd15", 16, 859.5), ("sdxl", 70, 2567.5)])
def test_the_architectures_are_the_real_ones(name: str, layers: int, millions: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for draw in ("kaiming_uniform_", "uniform_", "ones_", "zeros_"):
        monkeypatch.setattr(torch.nn.init, draw, lambda tensor, *arguments, **options: tensor)
    unet = unet_models.build(unet_models.MODELS[name], torch.float16, torch.device("meta"))
    assert sum("attn2" in processor for processor in unet.attn_processors) == layers
    assert round(sum(parameter.numel() for parameter in unet.parameters()) / 1e6, 1) == millions
    assert unet.dtype == torch.float16


def test_the_unet_step_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    entered = []
    opened = conditioning_cache.ConditioningCache.open

    def opens(*arguments: Any) -> Any:
        entry = opened(*arguments)
        entered.append(entry.is_new)
        return entry

    monkeypatch.setattr(conditioning_cache.ConditioningCache, "open", opens)
    file = tmp_path / "unet_step.json"
    monkeypatch.setattr("sys.argv", ["unet_step", "--device", "cpu", "--rounds", "2", "--json", str(file)])
    assert unet_step.main() == 0
    model = json.loads(file.read_text())["models"]["tiny"]
    rows = {(row["variant"], row["state"]): row for row in model["rows"]}
    assert len(rows) == 9, "no adapter: stock alone; four variants: stock and enabled"
    assert all(row["seconds"]["calls"] == 2 for row in rows.values())
    for variant in unet_step.VARIANTS:
        if variant != "none":
            row = rows[variant, "enabled"]
            assert row["equal"], "eager attention on a CPU is stock's, bit for bit"
            assert row["layers"] == {"triton": 0, "eager": 7, "stock": 0}
            ratio = row["seconds"]["median"] / rows["none", "stock"]["seconds"]["median"]
            assert model["ratios"][f"eager: enabled with {variant} / stock with no adapter"] == ratio
    steps = 3 + 2 + 2  # up to the one that is compared, warming up, timed
    assert entered.count(True) == 4, "one generation for each enabled candidate"
    assert entered.count(False) == 4 * (steps - 1), "every other step is in the middle of it"
    assert "enabled with one / stock with no adapter" in capsys.readouterr().out


def train(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    common = ["training", "--device", "cpu", "--small", "--rounds", "1", "--impl", "eager"]
    monkeypatch.setattr("sys.argv", [*common, "--cases", "sdxl_1024_64x64_masked", *arguments])
    return training.main()


def test_the_training_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "training.json"
    assert train(monkeypatch, "--models", "tiny", "--json", str(file)) == 0
    document = json.loads(file.read_text())
    adapter, everything = document["rows"]
    assert list(adapter["gradients"]) == ["query", "image key 0", "image value 0"]
    assert list(everything["gradients"])[3:] == ["key", "value"]
    for row in (adapter, everything):
        assert row["within"]
        assert row["equal"], "eager attention on a CPU is stock's, bit for bit"
        assert (row["ran"], row["why not the kernel"]) == ("eager", ['impl="eager"'])
        ours, stock = (row["candidates"][name] for name in ("ipa_kernels", "stock"))
        assert ours["saved_bytes"] == stock["saved_bytes"] > 2 * row["query_bytes"], "the outputs of both branches"
        assert ours["peak_bytes"] is None
        assert row["ratios"]["seconds"] == stock["seconds"]["median"] / ours["seconds"]["median"]
    rows = {(row["candidate"], row["checkpointing"]): row for row in document["models"]["tiny"]["rows"]}
    assert len(rows) == 4
    assert all(row["within"] for row in rows.values())
    for name in ("stock", "ipa_kernels"):
        assert rows[name, True]["saved_bytes"] < 0.5 * rows[name, False]["saved_bytes"]
    assert "stock over ours: seconds" in capsys.readouterr().out
    report = figures.report(figures.documents(tmp_path))
    assert "| sdxl_1024_64x64_masked_small, adapter | ipa_kernels | " in report
    assert "| checkpointing | stock | " in report


def test_bytes_without_times(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(training, "interleaved", lambda *arguments: pytest.fail("timed"))
    assert train(monkeypatch, "--models", "--rounds", "0") == 0
    printed = capsys.readouterr().out
    assert "not timed  saved" in printed
    assert "stock over ours: saved_bytes 1.00" in printed


@pytest.mark.parametrize("mistake", ["no gradient of the image keys", "a gradient that is off"])
def test_a_wrong_gradient_is_not_timed(
    mistake: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(query, key, value, image_keys, image_values, **options):
        if mistake == "no gradient of the image keys":
            image_keys = [image_key.detach() for image_key in image_keys]
        else:
            query = query + 1e-4 * (query - query.detach())
        return decoupled_attention(query, key, value, image_keys, image_values, **options)

    monkeypatch.setattr(training, "decoupled_attention", wrong)
    monkeypatch.setattr(training, "interleaved", lambda *arguments: pytest.fail("timed behind a red gate"))
    assert train(monkeypatch, "--models", "--wanted", "adapter") == 1
    expected = "outside the error budget: query" if "off" in mistake else "RuntimeError: The differentiated Tensor at index 1"
    assert f"not timed: {expected}" in capsys.readouterr().out


def train_tiny(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """The driver's exit status and what it wrote of the tiny UNet, with whatever implementation runs there."""
    file = folder / "training.json"
    arguments = ["--device", "cpu", "--rounds", "1", "--cases", "--models", "tiny", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["training", *arguments])
    return training.main(), json.loads(file.read_text())["models"]["tiny"]["rows"]


def test_a_unet_with_wrong_gradients_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = training.Step.__call__

    def wrong(step):
        first, *others = right(step)
        return (first * (1.01 if ipa_kernels.explain(step.unet).enabled else 1), *others)

    monkeypatch.setattr(training.Step, "__call__", wrong)
    status, rows = train_tiny(monkeypatch, tmp_path)
    assert status == 1
    assert [row["within"] for row in rows] == [True, False, True, False]
    assert all("seconds" not in row for row in rows if row["candidate"] == "ipa_kernels")


def test_where_float64_does_not_fit_stock_is_the_ruler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = training.Step.__call__

    def short(step):
        if step.dtype == torch.float64:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(step)

    monkeypatch.setattr(training.Step, "__call__", short)
    status, rows = train_tiny(monkeypatch, tmp_path)
    assert status == 0
    assert all(row["within"] for row in rows)
    assert [row["relative to stock"] for row in rows if row["candidate"] == "ipa_kernels"] == [0.0, 0.0]


def test_saved_bytes_are_counted_once() -> None:
    weight, inputs = torch.ones(100, requires_grad=True), torch.ones(100)
    assert training.saved_bytes(lambda: (weight * inputs).sum(), []) == 400, "of a product with a constant, the constant"
    assert training.saved_bytes(lambda: (weight * inputs).sum(), [inputs.untyped_storage().data_ptr()]) == 0
    assert training.saved_bytes(lambda: (weight.exp() * 2).square().sum(), []) == 800, "exp and square keep one each"
    assert training.saved_bytes(lambda: weight.exp().square().sum(), []) == 400, "both keep the same"


@pytest.mark.parametrize("mistake", ["off by a thousandth", "another scale", "no adapter"])
def test_a_red_unet_step_is_not_timed(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = unet_models.UNetInputs.step

    def wrong(self, unet, i):
        if not ipa_kernels.explain(unet).enabled:
            return step(self, unet, i)
        for processor in unet.attn_processors.values():
            if mistake != "off by a thousandth" and hasattr(processor, "scale"):
                processor.scale = [0.59 if mistake == "another scale" else 0.0]
        return step(self, unet, i) * (1.001 if mistake == "off by a thousandth" else 1)

    monkeypatch.setattr(unet_models.UNetInputs, "step", wrong)
    file = tmp_path / "unet_step.json"
    monkeypatch.setattr("sys.argv", ["unet_step", "--device", "cpu", "--adapters", "one", "--rounds", "1", "--json", str(file)])
    assert unet_step.main() == 1
    model = json.loads(file.read_text())["models"]["tiny"]
    stock, enabled = model["rows"]
    assert stock["seconds"]["median"] > 0
    assert (enabled["within"], enabled["seconds"]) == (False, None)
    assert enabled["reason"] == "not timed: outside the error budget"
    assert model["ratios"] == {}


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", text))


def test_tables_have_the_numbers_of_the_json_and_no_others(tmp_path: Path) -> None:
    timing = {"median": 1.111e-3, "p20": 1.093e-3, "p80": 1.137e-3, "calls": 3}
    entry = {"reason": None, "wall": timing, "warm": None, "cold": None, "bytes_per_second": 17e9, "of_copy_rate": 0.19}
    entry |= {"flops_per_second": 2.3e12, "of_matmul_rate": 0.29}
    row = {"case": {"name": "a_case"}, "within": True, "candidates": {"ipa_kernels": entry, "xformers": {"reason": "absent"}}}
    row["ratios"] = {"wall": {"stock": 3.14}, "warm": {}, "cold": {}}
    limit = {"rate": 41e9, "clock": "wall"}
    document = {"benchmark": "attention", "machine": {}, "ceilings": {"copy": limit}, "rows": [row], "not run": []}
    (tmp_path / "one.json").write_text(json.dumps(document))
    step = {"variant": "one", "state": "stock", "mode": "eager", "reason": "not compiled", "seconds": None}
    models = {"tiny": {"rows": [step], "ratios": {}}}
    other = {"benchmark": "unet_step", "machine": {}, "dtype": "torch.half", "models": models}
    (tmp_path / "more.json").write_text(json.dumps({"benchmark": "collection", "documents": {"unet_step": other}}))
    (tmp_path / "summary.json").write_text("{}")
    found = figures.documents(tmp_path)
    assert found == [document, other]
    report = figures.report(found)
    # 20 and 80: the header, "p20 to p80"
    assert numbers(report) == {"41.0", "3.14", "1111.0", "1093.0", "1137.0", "17", "19", "2.30", "29", "20", "80"}
    assert "| a_case | ipa_kernels | 1111.0 (1093.0 to 1137.0) | not measured | not measured |" in report
    assert "Ratios by the cold clock: not measured." in report
    assert "| a_case | xformers | " + "not measured | " * 7 + "absent |" in report


def test_plots_and_tables_of_device_times(tmp_path: Path) -> None:
    """As a GPU will give them; made up here, for there is none."""
    timing = {"median": 2e-5, "p20": 1.9e-5, "p80": 2.1e-5, "calls": 3}
    entry = {"reason": None, "wall": timing, "warm": timing, "cold": timing}
    row = {"case": {"name": "a_case"}, "sweep": "queries", "x": 64, "within": True, "candidates": {"ipa_kernels": entry}}
    row["ratios"] = {"cold": {"stock": 4.25, "best_sdpa": 3.5, "best_sdpa_is": "sdpa_flash"}}
    facts = {"gpu": "a GPU"}
    found = [
        {"benchmark": kind, "machine": facts, "ceilings": {}, "rows": [row], "not run": []} for kind in ("attention", "sweep")
    ]
    report = figures.report(found)
    assert "Times longer than ipa_kernels, cold clock:" in report
    assert "| a_case | 4.25 | not measured | 3.50 | sdpa_flash |" in report
    assert "| 64 | 20.0 (19.0 to 21.0) | not measured | 20.0 (19.0 to 21.0) | not measured | not measured |" in report
    assert plots._clock([entry]) == "cold"
    assert [path.name for path in plots.plot(found, tmp_path)] == ["attention.png", "sweep.png"]


def test_tables_of_the_first_image() -> None:
    row = {
        "way": "graphed",
        "caches": "cold",
        "first": 7.891,
        "second": 0.123,
        "within": True,
        "layers": {"triton": 7, "eager": 0},
    }
    rows = [row, {**row, "within": False}, {"way": "compiled", "caches": "warm", "reason": "KeyError: x", "within": False}]
    report = figures.report([{"benchmark": "first_image", "machine": {}, "rows": rows}])
    assert "| graphed | cold | 7.89 | 0.12 | 7 triton |" in report
    assert "| graphed | cold | 7.89 | 0.12 | 7 triton; another picture than stock's |" in report
    assert "| compiled | warm | not measured | not measured | KeyError: x |" in report


def test_figures_of_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["figures", str(tmp_path)])
    assert figures.main() == 1
    assert "no JSON of a driver" in capsys.readouterr().out


def script(tmp_path: Path, name: str, body: str) -> gpu_day.Step:
    """A step that runs a module of a line or two."""
    (tmp_path / f"{name}.py").write_text(body)
    return gpu_day.Step(name, (name,), limit=20)


class Patient(subprocess.Popen[bytes]):
    """A process that is out of time once it says that it hangs, and not before, however busy the machine is."""

    def wait(self, timeout: float | None = None) -> int:
        if timeout is None:
            return super().wait()
        while self.poll() is None:
            if Path(f"{self.args[-1]}.hangs").exists():
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode


def test_a_day_goes_on_after_a_failure_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = "import json, sys; json.dump({'benchmark': 'x', 'from': __file__}, open(sys.argv[2], 'w'));"
    todo = [
        script(tmp_path, "fails", f"{writes} sys.exit(3)"),
        replace(
            script(tmp_path, "hangs", f"{writes} open(sys.argv[2] + '.hangs', 'w'); import time; time.sleep(600)"), limit=3
        ),
        script(tmp_path, "cuts", "import sys; open(sys.argv[2], 'w').write('{')"),
        script(tmp_path, "works", writes),
    ]
    out = tmp_path / "out"
    monkeypatch.setattr(gpu_day.subprocess, "Popen", Patient)
    summaries = gpu_day.run(todo, out, 1e9, {**os.environ, "PYTHONPATH": str(tmp_path)})
    assert [summary["result"] for summary in summaries] == ["failed", "out of time", "passed, its JSON is cut", "passed"]
    assert [(summary["status"], summary["limit"]) for summary in summaries] == [(3, 20), (-9, 3), (0, 20), (0, 20)]
    results = json.loads((out / "results.json").read_text())
    assert set(results["documents"]) == {"fails", "hangs", "works"}, "what was written before the end is kept"
    assert json.loads((out / "summary.json").read_text())["steps"] == summaries
    late = gpu_day.run(todo[3:], out, 0.5, dict(os.environ))
    assert late[0]["result"].startswith("not run")


@pytest.mark.parametrize("result", ["passed", "failed", "out of time", "passed, its JSON is cut", "not run: no time is left"])
def test_the_status_of_a_day(result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_day", "--device", "cpu", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu_day, "run", lambda *arguments: [{"result": "passed"}, {"result": result}])
    monkeypatch.setattr(gpu_day.subprocess, "run", lambda *arguments, **options: SimpleNamespace(returncode=0))
    assert gpu_day.main() == (0 if result == "passed" else 1)


def test_the_steps_of_a_day() -> None:
    for device, budget in gpu_day.BUDGET.items():
        todo = gpu_day.steps(device)
        assert {"gpu_tests", "kernel_tests", "attention", "sweep", "generation"} <= {step.name for step in todo}
        assert any(step.name.startswith("unet_step") for step in todo)
        assert budget <= 540
    assert set(gpu_day.CASES) <= set(CASES)
    assert "tests/benchmarking/test_timing.py" in gpu_day._gpu_files()


def test_a_day_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its quickest driver, as `make gpu DEVICE=cpu OUT=folder` starts it."""
    steps = gpu_day.steps
    monkeypatch.setattr(gpu_day, "steps", lambda device: [replace(step, limit=NEVER) for step in steps(device)])
    monkeypatch.setitem(gpu_day.BUDGET, "cpu", 2 * NEVER)
    monkeypatch.setattr("sys.argv", ["gpu_day", "--device", "cpu", "--out", str(tmp_path), "--only", "sweep"])
    assert gpu_day.main() == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.json", "summary.json", "report.md", "log.txt", "sweep.png"}
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)


def test_the_host_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.undo()
    file = tmp_path / "host.json"
    monkeypatch.setattr(host, "CALLS", 3)
    monkeypatch.setattr(
        "sys.argv", ["host", "--device", "cpu", "--rounds", "1", "--adapters", "one masked", "--json", str(file)]
    )
    assert host.main() == 0
    (row,) = json.loads(file.read_text())["rows"]
    seconds = {name: timing["median"] for name, timing in row["seconds"].items()}
    assert row["launch"] == "stubbed"
    assert row["ratio"] == pytest.approx(seconds["later"] / seconds["stock"])
    report = figures.report(figures.documents(tmp_path))
    assert f"| one masked | stubbed | {1e6 * seconds['stock']:.1f} (" in report
    assert "microseconds per call of a layer on the host, the launch stubbed" in capsys.readouterr().out


def test_the_host_driver_measures_a_layer_in_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all cross-attentions of SDXL at tiny widths, one call each: a hot layer in a loop is several times as fast."""
    monkeypatch.undo()
    file = tmp_path / "host.json"
    monkeypatch.setattr(host, "CALLS", 1)
    variants = ["one", "three masked"]
    monkeypatch.setattr("sys.argv", ["host", "--device", "cpu", "--rounds", "2", "--adapters", *variants, "--json", str(file)])
    assert host.main() == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["adapters"] for row in rows] == variants
    for row in rows:
        step = row["step"]
        assert step["layers"] == 70
        # of one layer in a step: the candidates, and what of each is diffusers' or the projections
        seconds = {name: timing["median"] for name, timing in step["seconds"].items()}
        assert set(seconds) == {"stock", "first", "later", "forward", "projections"}
        assert all(timing["calls"] == 2 for timing in step["seconds"].values()), "each a whole step, in turns"
        assert step["ratio"] == pytest.approx(seconds["later"] / seconds["stock"])
        floor = seconds["forward"] + seconds["projections"]
        assert step["above the floor"] == pytest.approx((seconds["later"] - floor) / seconds["stock"])
        # of the whole step, before its first layer
        assert set(step["hook"]) == {"median", "p20", "p80", "calls"}
        assert row["commit"] == host_step.version(CPU)
        assert "baseline" not in row


@pytest.fixture(scope="module")
def step() -> host_step.Step:
    return host_step.Step(1, False, torch.float32, CPU)


def test_the_clock_in_a_step_is_not_seen(step: host_step.Step) -> None:
    """The same is found as where the blocks have their own strings."""
    clocked, plain = step.candidates["later"], unet_models.clone(step.candidates["stock"].unet)
    for module in plain.modules():
        if isinstance(module, BasicTransformerBlock):
            module.norm_type = "layer_norm"
    ipa_kernels.enable(plain, impl="triton")
    with torch.no_grad(), host_step.launch_left_out(CPU):
        for i in range(3):
            clocked.step(i)
            step.inputs.step(plain, i)
    cache = ipa_kernels.explain(plain).cache
    assert cache.hits > cache.misses, "something was not found, so that this proves nothing"
    assert str(ipa_kernels.explain(clocked.unet)) == str(ipa_kernels.explain(plain))


def test_a_step_is_timed_in_its_layers_alone(step: host_step.Step) -> None:
    """Of what takes a millisecond in each block, the cross-attentions are counted and what is called around them is not."""
    candidate = step.candidates["empty"]

    def burn(hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        end = host_step.CLOCK() + 1e-3
        while host_step.CLOCK() < end:
            pass
        return hidden_states

    with torch.no_grad():
        step._time(candidate, 0)
        for block in candidate.blocks:
            del block.attn1, block.ff
            block.attn1 = block.ff = burn
        layers, rest = step._time(candidate, 1)
        assert layers < 0.035
        assert rest > 0.14
        candidate.replace(lambda layer: burn)
        layers, _ = step._time(candidate, 2)
        assert 0.07 < layers < 0.105


@pytest.mark.slow
def test_the_host_driver_measures_another_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of the package, known by the digest of its source."""
    monkeypatch.undo()
    copy, file = tmp_path / "ipa_kernels", tmp_path / "host.json"
    shutil.copytree(Path(ipa_kernels.__file__).parent, copy)
    (copy / "another.py").write_text('"""Not in this one."""\n')
    monkeypatch.setattr(host, "CALLS", 1)
    options = ["--device", "cpu", "--rounds", "1", "--adapters", "one", "--baseline", str(tmp_path), "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["host", *options])
    assert host.main() == 0
    (row,) = json.loads(file.read_text())["rows"]
    step, other = row["step"], row["baseline"]
    assert set(other) == {*step, "commit"}
    assert other["commit"] == machine._digest(copy) != machine._digest(Path(ipa_kernels.__file__).parent)
    assert other["seconds"]["stock"] != step["seconds"]["stock"]
    assert f"in a step of {other['commit']}: stock " in capsys.readouterr().out


def test_a_folder_without_the_package_is_no_baseline(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"--baseline: expected a checkout of this repository, got {tmp_path}, which"):
        host_rounds.Worker(tmp_path, torch.float32, CPU)


def test_steps_are_compared_at_one_speed_of_the_machine() -> None:
    """Samples of a machine that is half as fast, twice as fast, and, most of the time, as it is."""
    layers = {"empty": 0.01, "stock": 0.08, "first": 0.15, "later": 0.045, "forward": 0.017, "projections": 0.024}
    speeds = [1.0, 1.0, 2.0, 0.5, 1.0]
    samples = [
        {name: (seconds / speed, 0.1 / speed) for name, seconds in (layers | {"hook": 0.002}).items()} for speed in speeds
    ]
    step = host_rounds._summary(samples, 0.1)
    expected = {"stock": 1e-3, "first": 2e-3, "later": 5e-4, "forward": 1e-4, "projections": 2e-4}
    for name, seconds in expected.items():
        assert step["seconds"][name] == pytest.approx({"median": seconds, "p20": seconds, "p80": seconds, "calls": 5})
    assert step["hook"] == pytest.approx({"median": 0.002, "p20": 0.002, "p80": 0.002, "calls": 5})
    assert step["ratio"] == pytest.approx(0.5)
    assert step["above the floor"] == pytest.approx(0.2)
    assert step["rest"]["later"] == pytest.approx({"median": 0.1, "p20": 0.1, "p80": 0.2, "calls": 5})

    row = {"adapters": "one", "launch": "stubbed", "seconds": step["seconds"], "ratio": 0.4, "commit": "new"}
    row |= {"step": step, "baseline": step | {"commit": "old"}}
    report = figures.report([{"benchmark": "host", "machine": {}, "rows": [row]}])
    times = " | ".join(f"{1e6 * seconds:.1f} ({1e6 * seconds:.1f} to {1e6 * seconds:.1f})" for seconds in expected.values())
    assert f"| one | stubbed | {times} | 0.40 |" in report
    for commit in ("new", "old"):
        assert f"| one | {commit} | {times} | 0.50 | 0.200 | 2000.0 (2000.0 to 2000.0) |" in report


def test_tables_of_counted_growth() -> None:
    row = {"x": 3, "mma": 128, "min_mma": 127, "registers": 155, "spill_bytes": 0, "blocks": 640, "launches": 1}
    row |= {"stock launches": 10, "bytes": 21610000, "stock bytes": 241810000}
    refused = {"x": 9, "refused": "257 image keys: above 32 the kernel spills registers"}
    document = {"benchmark": "growth", "machine": {}, "arch": "sm_80", "tables": {"adapters": [row, refused]}}
    report = figures.report([document])
    assert "| 3 | 128 | 127 | 155 | 0 | 640 | 1 | 10 | 21610000 | 241810000 |" in report
    assert "| 9 | 257 image keys: above 32 the kernel spills registers |" in report
