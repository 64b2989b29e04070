"""`ipa-kernels demo`, through the command line: what it prints and writes, and one line for each mistake."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ipa_kernels import cli
from ipa_kernels.cli.pictures import Panel, compose, draw_reference
from ipa_kernels.testing import tiny_pipelines

from .saved_weights import save_adapter

Fail = Callable[..., str]

GAP, HEAD, PANEL = 12, 32, 256


pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def fail(mistake: Callable[..., str]) -> Fail:
    """Runs a demo that has to fail as a user's mistake does, and returns its one line."""
    return lambda *arguments: mistake("demo", "--steps", "2", *arguments)


def test_default(capsys: pytest.CaptureFixture[str], device: torch.device) -> None:
    """Two runs in a row print the same, but for the times, and write the same pictures."""
    pictures, prints = [], []
    for _ in range(2):
        assert cli.main(["demo", "--steps", "3"]) == 0
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        prints.append([line for line in lines if not line.startswith("time per step: ")])
        assert len(prints[-1]) == len(lines) - 1
        assert "stock" in captured.err
        assert "accelerated" in captured.err
        assert "Warning" not in captured.err
        with Image.open("demo.png") as picture:
            pictures.append(picture.convert("RGB"))
    assert prints[0] == prints[1]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert pictures[0].size == (GAP + 4 * (PANEL + GAP), HEAD + PANEL + GAP)
    text = "\n".join(prints[0])
    assert f"on {device}" in text
    assert "7 IP-Adapter layers: " in text
    if device.type == "cpu":
        assert "\nmax difference: 0\n" in text
        assert "0 triton, 7 eager, 0 stock" in text
        assert "calls each: " in text  # followed by the reason
        assert "the kernel did not run here" in text


def test_reference_and_prompt_matter() -> None:
    """They go through the encoders into the picture; if they did not, agreement would mean little."""
    Image.new("RGB", (40, 60), "red").save("red.png")
    stocks = []
    for arguments in ([], ["--image", "red.png"], ["--prompt", "a red square"], ["--seed", "1"]):
        assert cli.main(["demo", "--steps", "2", "--device", "cpu", *arguments]) == 0
        with Image.open("demo.png") as picture:
            left = GAP + PANEL + GAP
            stocks.append(picture.crop((left, HEAD, left + PANEL, HEAD + PANEL)).tobytes())
    assert len(set(stocks)) == len(stocks)


@pytest.mark.parametrize(
    ("adapter", "more"),
    [
        ("adapters", ()),
        ("adapters/base.safetensors", ()),
        ("base.bin", ()),
        ("adapters", ("--ip-adapter-weight", "plus/plus.safetensors", "--dtype", "bfloat16")),
    ],
)
def test_files(adapter: str, more: tuple[str, ...], weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(weights / "model"), "--ip-adapter", str(weights / adapter), *more]
    assert cli.main(["demo", "--steps", "2", "--device", "cpu", *arguments]) == 0
    captured = capsys.readouterr()
    assert "\nmax difference: 0\n" in captured.out
    assert str(weights / "model") in captured.out
    assert Path("demo.png").is_file()


def test_a_difference_is_amplified() -> None:
    """One value of 32x16 pixels differs by 3: its panel, 8 times the size, shows it at full strength, and in print."""
    stock = Image.new("RGB", (32, 16), (10, 20, 30))
    fused = stock.copy()
    fused.putpixel((5, 7), (10, 23, 30))
    sheet = compose([Panel("reference", draw_reference())], Panel("stock", stock), Panel("accelerated", fused))
    assert sheet.size == (GAP + 4 * (PANEL + GAP), HEAD + PANEL // 2 + GAP)
    left = GAP + 3 * (PANEL + GAP)
    assert sheet.crop((left, HEAD, left + PANEL, HEAD + PANEL // 2)).getbbox() == (40, 56, 48, 64)
    assert sheet.getpixel((left + 40, HEAD + 56)) == (255, 255, 255)


def test_files_give_the_picture_of_the_pipeline_in_memory(weights: Path) -> None:
    """Nothing is lost on the way through the files: weights and picture are those of the default."""
    assert cli.main(["demo", "--steps", "2", "--device", "cpu"]) == 0
    files = ["--model", str(weights / "model"), "--ip-adapter", str(weights / "base.bin"), "--output", "files.png"]
    assert cli.main(["demo", "--steps", "2", "--device", "cpu", *files]) == 0
    assert Path("demo.png").read_bytes() == Path("files.png").read_bytes()


def test_image_encoder_beside_the_adapter(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model without an image encoder gets the one of the adapter, wherever that is."""
    files = ["--model", str(weights / "no_encoder"), "--ip-adapter", str(weights), "--ip-adapter-weight", "base.bin"]
    encoder = ["--image-encoder", "model/image_encoder"]
    assert cli.main(["demo", "--steps", "2", "--device", "cpu", *files, *encoder]) == 0
    assert "\nmax difference: 0\n" in capsys.readouterr().out


def test_broken_images(fail: Fail, weights: Path) -> None:
    assert "--image missing.png" in fail("--image", "missing.png")
    assert "--image " in fail("--image", weights)
    assert "base.bin" in fail("--image", weights / "base.bin")


def test_broken_models(fail: Fail, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ("--ip-adapter", weights / "base.bin")
    assert "--ip-adapter" in fail("--model", weights / "model")
    assert "--model" in fail(*adapter)
    assert "--model ../nowhere: no such" in fail("--model", "../nowhere", *adapter)
    assert "base.bin: a file" in fail("--model", weights / "base.bin", *adapter)
    assert "model_index.json" in fail("--model", weights / "adapters", *adapter)
    assert "a DDPMPipeline has no UNet that takes" in fail("--model", weights / "unconditional", *adapter)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "--model nobody/nothing: no such folder here; from the hub: " in fail("--model", "nobody/nothing", *adapter)

    broken = tmp_path / "broken"
    shutil.copytree(weights / "model", broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    assert f"--model {broken}: Unable to load weights" in fail("--model", broken, *adapter)
    (broken / "model_index.json").write_text("{")
    assert "not a valid JSON file" in fail("--model", broken, *adapter)


def test_broken_adapters(fail: Fail, weights: Path, tmp_path: Path) -> None:
    model = ("--model", weights / "model")
    assert "--ip-adapter nowhere.bin: no such file" in fail(*model, "--ip-adapter", "nowhere.bin")
    assert "no weights" in fail(*model, "--ip-adapter", weights / "model")
    assert "x.bin" in fail(*model, "--ip-adapter", weights / "adapters", "--ip-adapter-weight", "x.bin")

    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"not weights")
    assert "cannot load a.safetensors" in fail(*model, "--ip-adapter", folder)
    save_file({"lora": torch.zeros(1)}, folder / "b.safetensors")
    assert "a.safetensors, b.safetensors" in fail(*model, "--ip-adapter", folder)
    assert "cannot load b.safetensors" in fail(*model, "--ip-adapter", folder / "b.safetensors")
    other = tiny_pipelines.base_adapter(tiny_pipelines.stable_diffusion_xl().unet)
    save_adapter(other, folder / "c.safetensors")
    assert "cannot load c.safetensors for this model" in fail(*model, "--ip-adapter", folder / "c.safetensors")

    without = ("--model", weights / "no_encoder")
    assert "no image encoder" in fail(*without, "--ip-adapter", weights / "base.bin")


def test_broken_options(fail: Fail) -> None:
    assert "--dtype: invalid choice: 'float99'" in fail("--dtype", "float99")
    assert "--steps" in fail("--steps", "1")
    assert "--steps 2000: the scheduler has only 1000 steps; use fewer" in fail("--steps", "2000", "--device", "cpu")
    assert "--device toaster: not available here; torch has cpu" in fail("--device", "toaster")
    assert "--device meta: not available here; torch has cpu" in fail("--device", "meta")
    assert "--output no/demo.png" in fail("--output", "no/demo.png")
    assert "--no-such-option" in fail("--no-such-option")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(fail: Fail) -> None:
    assert "--device cuda: not available here" in fail("--device", "cuda")


def test_what_would_compare_or_replace_the_wrong_thing(fail: Fail, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw_reference().save(tmp_path.parent / "own.png")
    assert "own.png would replace another file" in fail("--image", "../own.png", "--output", str(tmp_path.parent / "own.png"))
    monkeypatch.setenv("IPA_KERNELS_DISABLE", "1")
    assert "IPA_KERNELS_DISABLE=1 is set: nothing would be enabled" in fail()


def test_without_diffusers(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in ("loading", "pipeline_run"):
        monkeypatch.delitem(sys.modules, f"ipa_kernels.cli.{name}", raising=False)
    assert "pip install 'ipa-kernels[diffusers]'" in fail()
