"""`ipa-kernels bench`: the gate before the times, what is printed, drawn and written, one line for each mistake; no time."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ipa_kernels
from ipa_kernels import cli
from ipa_kernels.benchmarking import first_image, unet_step
from ipa_kernels.benchmarking.first_image import in_process
from ipa_kernels.cli import bench, bench_chart
from ipa_kernels.cli.bench_table import step_table
from ipa_kernels.cli.device import is_about_memory
from ipa_kernels.testing import unet_models

QUICK = ("--device", "cpu", "--size", "64", "--rounds", "1")
VARIANTS = ["one", "one masked", "three", "three masked"]
Fail = Callable[..., str]


pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(autouse=True)
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[first_image.Job]:
    """The processes that would have been started; each comes back with a picture after a second or two."""
    found: list[first_image.Job] = []

    def in_process(job: first_image.Job, caches: Path) -> dict[str, Any]:
        found.append(job)
        return {"first": 2.25, "second": 1.125, "distance": 0.0, "within": True, "layers": {}}

    monkeypatch.setattr(first_image, "in_process", in_process)
    return found


@pytest.fixture
def fail(mistake: Fail) -> Fail:
    """Runs a bench that has to fail as a user's mistake does, and returns its one line."""
    return lambda *arguments: mistake("bench", *arguments)


def document(kernel: bool = True) -> dict[str, Any]:
    """As a run writes it; the times are made up, and all different."""
    rows = []
    for i, (variant, state) in enumerate([("none", "stock"), *((v, s) for v in VARIANTS for s in ("stock", "enabled"))]):
        median = (10 + i) / 1e3
        seconds = {"median": median, "p20": median - 1e-4, "p80": median + 3e-4, "calls": 7}
        row: dict[str, Any] = {"variant": variant, "state": state, "reason": None, "seconds": seconds, "peak_bytes": i * 10**8}
        if state == "enabled":
            layers = {"triton": 16 * kernel, "eager": 16 * (not kernel), "stock": 0}
            row |= {"within": True, "equal": False, "layers": layers, "why not the kernel": [] if kernel else ["why"]}
        rows.append(row)
    times = {"stock": (3.5, 1.5), "enabled": (4.5, 1.25)}
    pictures = [
        {"way": way, "caches": caches, "first": first + (caches == "empty"), "second": second, "within": True}
        for caches in ("empty", "full")
        for way, (first, second) in times.items()
    ]
    entry = {"side": 512, "rows": rows, "ratios": bench._ratios(rows), "note": bench._note(rows), "first image": pictures}
    facts = {"device": "cuda", "gpu": "a GPU", "commit": 40 * "a", "source": "", "processor": "x86_64", "threads": 1}
    facts |= dict.fromkeys(("ipa_kernels", "torch", "triton", "diffusers"), "1.0")
    return {"benchmark": "bench", "machine": facts, "dtype": "float16", "steps of an image": 20, "models": {"sd15": entry}}


def test_a_run(jobs: list[first_image.Job], capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert cli.main(["bench", *QUICK, "--json", "bench.json"]) == 0
    assert torch.get_num_threads() == threads
    written = json.loads(Path("bench.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert (written["dtype"], list(written["models"])) == ("float32", ["tiny"])
    entry = written["models"]["tiny"]
    rows = {(row["variant"], row["state"]): row for row in entry["rows"]}
    assert set(rows) == {("none", "stock"), *((variant, state) for variant in VARIANTS for state in ("stock", "enabled"))}
    for row in rows.values():
        assert row["seconds"]["calls"] == 1
        assert row["peak_bytes"] is None
    for variant in VARIANTS:
        row = rows[variant, "enabled"]
        assert row["equal"], "eager attention on a CPU is stock's, bit for bit"
        assert row["layers"] == {"triton": 0, "eager": 7, "stock": 0}
        median = row["seconds"]["median"]
        assert entry["ratios"][variant] == {
            "stock": median / rows[variant, "stock"]["seconds"]["median"],
            "stock with none": median / rows["none", "stock"]["seconds"]["median"],
        }
    assert entry["note"].startswith("the kernel did not run here")
    assert jobs == [first_image.Job(way, "tiny", bench.IMAGE_STEPS, "float32", "cpu", 64) for way in ("stock", "enabled")], (
        "nothing is compiled on a CPU: there are no full caches"
    )
    assert [(row["way"], row["first"]) for row in entry["first image"]] == [("stock", 2.25), ("enabled", 2.25)]
    printed = capsys.readouterr().out
    assert "tiny UNet, 64x64 pixels, batch 2 (one picture with guidance), float32" in printed
    assert "4 of 4 enabled steps equal stock's bit for bit" in printed
    assert "the kernel did not run here" in printed
    with Image.open("bench.png") as picture:
        assert picture.format == "PNG"
        assert picture.width == 12 * 120
        assert len(picture.convert("RGB").getcolors(2**24) or ()) > 10


def test_quick(jobs: list[first_image.Job], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *QUICK[:4], "--quick", "--unet", "tiny", "tiny", "--json", "b.json", "--output", "b.png"]) == 0
    entry = json.loads(Path("b.json").read_text())["models"]["tiny"]
    assert not jobs
    assert entry["first image"] == []
    assert {row["seconds"]["calls"] for row in entry["rows"]} == {3}
    assert capsys.readouterr().out.count("tiny UNet") == 1
    assert Path("b.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("mistake", "dtype", "expected"),
    [
        ("the last bit", "float32", r"tiny, one: enabled differs from stock by [\d.e-]+ \(relative, rms\); allowed: 0"),
        ("no adapter", "bfloat16", r"tiny, three masked: enabled is [\d.]+ from float64, stock [\d.]+; allowed: 1.25 times"),
        ("NaN", "bfloat16", r"tiny, three: enabled is nan from float64"),
        ("stock overflows", "bfloat16", r"tiny, three: proves nothing: stock's result is not finite, or all zeros"),
        ("stock is zeros", "float32", r"tiny, one masked: proves nothing: stock's result is not finite, or all zeros"),
        ("an error", "float32", r"tiny, one masked: enabled fails where stock runs: RuntimeError: out of order$"),
    ],
)
def test_a_wrong_step_has_no_time(
    mistake: str, dtype: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = unet_models.UNetInputs.step

    def wrong(self: Any, unet: Any, i: int) -> torch.Tensor:
        if not ipa_kernels.explain(unet).enabled:
            out = right(self, unet, i)
            if mistake == "stock overflows":
                out[0, 0, 0, 0] = float("inf")
            return out * 0 if mistake == "stock is zeros" else out
        if mistake == "an error":
            raise RuntimeError("out of order\nand more")
        if mistake == "no adapter":
            for processor in unet.attn_processors.values():
                if hasattr(processor, "scale"):
                    processor.scale = [0.0] * len(processor.scale)
        out = right(self, unet, i)
        if mistake == "NaN":
            out[0, 0, 0, 0] = float("nan")
        elif mistake == "the last bit":
            out[0, 0, 0, 0] = torch.nextafter(out[0, 0, 0, 0], torch.tensor(9.0))
        return out

    monkeypatch.setattr(unet_models.UNetInputs, "step", wrong)
    monkeypatch.setattr(unet_step, "interleaved", lambda *arguments: pytest.fail("timed behind a red gate"))
    monkeypatch.setattr(first_image, "in_process", lambda *arguments: pytest.fail("started behind a red gate"))
    assert cli.main(["bench", *QUICK, "--dtype", dtype, "--json", "bench.json"]) == 1
    printed = capsys.readouterr().out
    assert re.search(expected, printed, re.MULTILINE)
    assert "no time is shown" in printed
    assert " ms" not in printed
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"distance": 0.5, "first": 1.0, "second": 1.0}, "tiny, first image, enabled: differs from stock's by 0.5 of"),
        ({"reason": "KeyError: it is not there"}, "tiny, first image, enabled: KeyError: it is not there"),
    ],
)
def test_a_wrong_picture_has_no_time(
    result: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = first_image.in_process
    monkeypatch.setattr(
        first_image,
        "in_process",
        lambda job, caches: {**result, "within": False} if job.way == "enabled" else good(job, caches),
    )
    monkeypatch.setattr(unet_step, "measure", lambda *arguments: document()["models"]["sd15"]["rows"])
    assert cli.main(["bench", *QUICK]) == 1
    printed = capsys.readouterr().out
    assert expected in printed
    assert "ms per step" not in printed
    assert not list(Path().iterdir())


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "ipa_kernels.cli.bench_chart")
    monkeypatch.setattr(unet_step, "measure", lambda *arguments: document()["models"]["sd15"]["rows"])
    assert cli.main(["bench", *QUICK, "--json", "bench.json"]) == 0
    printed = capsys.readouterr().out
    assert "three masked  17.00 (16.90 to 17.30)  18.00 (17.90 to 18.30)" in printed
    assert "no plot: import of matplotlib" in printed
    assert "pip install 'ipa-kernels[cli]'" in printed
    assert [path.name for path in Path().iterdir()] == ["bench.json"]


def test_a_full_disk_leaves_what_was_there(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        path = next(Path(argument) for argument in arguments if isinstance(argument, str | Path))
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unet_step, "measure", lambda *arguments: document()["models"]["sd15"]["rows"])
    for name in ("bench.json", "bench.png"):
        Path(name).write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", stop)
        assert "--json bench.json: No space left on device" in fail(*QUICK, "--quick", "--json", "bench.json")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", stop)
    assert "--output bench.png: No space left on device" in fail(*QUICK, "--quick")
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == {"bench.json": b"old", "bench.png": b"old"}
    for path in list(Path().iterdir()):
        path.unlink()


def test_the_table() -> None:
    made = document()
    lines = step_table("sd15", made).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("adapters"))
    cells = [re.split(r"\s{2,}", line) for line in lines[start + 1 : start + 6]]
    assert cells[0] == ["none", "10.00 (9.90 to 10.30)", "0"]
    assert cells[1] == ["one", "11.00 (10.90 to 11.30)", "12.00 (11.90 to 12.30)", "1.09", "1.20", "100, 200"]
    assert cells[4][0] == "three masked"
    assert "layers that ran the kernel: one 16 of 16, one masked 16 of 16, three 16 of 16" in lines[2]
    assert "checked first: 4 of 4 enabled steps are within their error budget" in lines
    assert [line.split() for line in lines[-4:]] == [
        ["empty", "stock", "4.50", "1.50"],
        ["empty", "enabled", "5.50", "1.25"],
        ["full", "stock", "3.50", "1.50"],
        ["full", "enabled", "4.50", "1.25"],
    ]
    made["models"]["sdxl"] = {"side": 1024, "rows": [], "note": "not enough memory"}
    head, note = step_table("sdxl", made).splitlines()
    assert head == "sdxl UNet, 1024x1024 pixels, batch 2 (one picture with guidance), float16: not measured"
    assert note == "not enough memory"


@pytest.mark.parametrize("kernel", [True, False])
def test_the_plot_shows_the_numbers(kernel: bool) -> None:
    made = document(kernel)
    figure = bench_chart.draw(made)
    left, right = figure.axes
    bars = {round(bar.get_x() + bench_chart.WIDTH / 2, 3): bar.get_height() for bar in left.patches}
    assert bars == pytest.approx({0: 10, 0.8: 11, 1.2: 12, 1.8: 13, 2.2: 14, 2.8: 15, 3.2: 16, 3.8: 17, 4.2: 18})
    texts = {text.get_text() for text in left.texts}
    assert texts == {f"{ms}.0" for ms in range(10, 19)}
    (yardstick,) = [line for line in left.lines if line.get_label() == bench_chart.YARDSTICK]
    assert list(yardstick.get_ydata()) == [10, 10]
    assert [bar.get_height() for bar in right.patches] == [4.5, 3.5, 1.5, 5.5, 4.5, 1.25]
    assert left.get_title().endswith("one step" if kernel else "(the kernel did not run)")
    assert "ms per step" in left.get_ylabel()
    caption = figure.get_supxlabel()
    assert all(part in caption for part in ("a GPU, float16", "torch 1.0", "code aaaaaaaaaaaa."))
    assert ("the kernel did not run here" in caption) == (not kernel)
    stock, enabled = (bench_chart.STYLES[state]["color"] for state in ("stock", "enabled"))
    light, dark = (Image.new("RGB", (1, 1), color).convert("L").getpixel((0, 0)) for color in (stock, enabled))
    assert light - dark > 64, "they differ in grey"


def test_nothing_overlaps() -> None:
    """Numbers, ticks, titles and the legend of the largest plot, as they are drawn."""
    made = document()
    made["models"]["sdxl"] = made["models"]["sd15"]
    figure = bench_chart.draw(made)
    figure.draw_without_rendering()
    texts = [*figure.legends[0].get_texts(), figure.legends[0].get_title(), figure._supxlabel]
    for axis in figure.axes:
        texts += [axis.title, axis.yaxis.label, *axis.texts, *axis.get_xticklabels()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for i, (text, box) in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1, text
        for other_text, other in boxes[:i]:
            assert not box.overlaps(other), (text, other_text)


@pytest.mark.parametrize("kind", ["pipeline", "pipeline of SDXL"])
def test_the_first_image(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: two pictures, the enabled one as stock's; of another seed for the noise it is not."""
    if kind == "pipeline of SDXL":
        config = {
            **unet_models.MODELS["sdxl"].config,
            "sample_size": 16,
            "block_out_channels": (32, 64, 64),
            "layers_per_block": 1,
            "cross_attention_dim": 64,
            "attention_head_dim": (2, 4, 4),
            "transformer_layers_per_block": (1, 1, 1),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        }
        monkeypatch.setitem(unet_models.MODELS, "tiny", unet_models.Model(config, (32, 32), 64))
    job = first_image.Job("enabled", "tiny", 2, "float32", "cpu", 64)
    found = first_image.run(job)
    assert found["distance"] == 0
    assert found["within"]
    assert found["first"] > 0
    assert found["second"] > 0
    assert sum(found["layers"].values()) == found["layers"]["eager"] > 0
    pipes = []
    make = first_image._pipeline
    monkeypatch.setattr(first_image, "_pipeline", lambda unet: pipes.append(make(unet)) or pipes[-1])

    def wrong(way: str, pipe: Any, arguments: dict[str, Any]) -> None:
        pipe.set_ip_adapter_scale(0.59)

    monkeypatch.setattr(first_image, "_switch_on", wrong)
    assert not first_image.run(job)["within"]
    stock, changed = pipes
    assert stock.unet is not changed.unet


def test_the_first_image_in_a_process(tmp_path: Path) -> None:
    job = first_image.Job("stock", "tiny", 1, "float32", "cpu", 64)
    found = in_process(job, tmp_path)
    assert set(found) == {"first", "second", "distance", "within", "layers"}
    assert found["within"]


def test_a_unet_that_does_not_fit(fail: Fail, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    full = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to")

    def measure(model: unet_models.Model, *arguments: object) -> list[dict[str, Any]]:
        if model is unet_models.MODELS["sdxl"]:
            raise full
        return document()["models"]["sd15"]["rows"]

    monkeypatch.setattr(unet_step, "measure", measure)
    line = fail(*QUICK, "--unet", "sdxl")
    assert "not enough memory on cpu for the sdxl UNet at 64x64 in float32: a smaller --size or --unet sd15 needs less" in line
    assert is_about_memory(torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr(bench, "_draw", lambda *arguments: "")
    assert cli.main(["bench", *QUICK, "--unet", "sdxl", "sd15"]) == 0
    printed = capsys.readouterr().out
    assert "float32: not measured\nnot enough memory on cpu for the sdxl UNet" in printed
    assert "ms per step" in printed
    full = RuntimeError("another one")
    with pytest.raises(RuntimeError, match="another one"):
        cli.main(["bench", *QUICK, "--unet", "sdxl"])


def test_wrong_options(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--size: needs a multiple of 64 from 64 up, got '100'" in fail("--size", "100")
    assert "--size: needs a multiple of 64 from 64 up, got '0'" in fail("--size", "0")
    assert "--rounds: needs a whole number from 1 up, got '0'" in fail("--rounds", "0")
    assert "--unet: invalid choice: 'flux' (choose from" in fail("--unet", "flux")
    assert "--output bench.jpg: needs the name of a .png file" in fail("--output", "bench.jpg")
    assert "--output no/bench.png: needs the name of a .png file in a folder that exists" in fail("--output", "no/bench.png")
    assert "--json no/bench.json: needs the name of a file in a folder that exists" in fail("--json", "no/bench.json")
    assert "--json .: needs the name of a file" in fail("--json", ".")
    assert "--device toaster: needs cpu or cuda" in fail("--device", "toaster")
    assert "--device mps: needs cpu or cuda; of another" in fail("--device", "mps")
    assert "--dtype: invalid choice: 'float99'" in fail("--dtype", "float99")
    monkeypatch.setenv("IPA_KERNELS_DISABLE", "1")
    assert "IPA_KERNELS_DISABLE=1 is set: nothing would be enabled" in fail("--device", "cpu")


def test_the_parser_knows_the_architectures(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--help"])
    assert stop.value.code == 0
    assert "sd15, sdxl, tiny, one or several" in capsys.readouterr().out
    assert sorted(bench.UNETS) == sorted(unet_models.MODELS)
