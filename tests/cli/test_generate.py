"""`ipa-kernels generate`, through the command line: the picture of direct diffusers calls, and one line for each mistake."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image, ImageDraw

from ipa_kernels import cli
from ipa_kernels.cli import pipeline_run
from ipa_kernels.cli.errors import UserError
from ipa_kernels.cli.generate import _memory_advice
from ipa_kernels.cli.loading import build_pipeline, move_to_device
from ipa_kernels.cli.masks import check_layout
from ipa_kernels.cli.pictures import Panel, compose
from ipa_kernels.testing import tiny_pipelines

from .saved_weights import save_adapter

Mistake = Callable[..., str]

GAP, HEAD, PANEL = 12, 32, 256


@pytest.fixture(autouse=True)
def pictures(empty_folder: None) -> None:
    """Three references and three masks of a picture's right half, left half, and all of one that is wider."""
    for name, color in (("a.png", "red"), ("b.jpg", "green"), ("c.png", "blue")):
        picture = Image.new("RGB", (60, 40), color)
        ImageDraw.Draw(picture).ellipse((20, 10, 40, 30), fill="yellow")
        picture.save(name)
    for name, box in (("left.png", (0, 0, 48, 64)), ("right.png", (48, 0, 96, 64))):
        mask = Image.new("L", (96, 64))
        mask.paste(255, box)
        mask.save(name)
    Image.new("L", (64, 64), 255).save("square.png")


@pytest.fixture
def fail(mistake: Mistake) -> Mistake:
    """Runs a generation that has to fail as a user's mistake does, and returns its one line."""
    return lambda *arguments: mistake("generate", "--steps", "2", "--device", "cpu", *arguments)


def generate(*arguments: object) -> None:
    assert cli.main([*map(str, ("generate", "--steps", 2, "--device", "cpu", *arguments))]) == 0


def read(name: str = "generated.png") -> Image.Image:
    with Image.open(name) as picture:
        return picture.convert("RGB")


def test_the_picture_of_diffusers(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two adapters of two images each, one of them masked, each with its scale: pixel for pixel what direct calls give."""
    words = ("--prompt", "a cat", "--negative-prompt", "a dog", "--guidance", 5, "--seed", 3, "--width", 48, "--height", 32)
    first = ("--ip-adapter", weights / "base.bin", "--image", "a.png", "b.jpg", "--mask", "left.png", "right.png")
    second = ("--ip-adapter", weights / "adapters", "--ip-adapter-weight", "plus/plus.safetensors", "--image", "c.png", "a.png")
    generate("--model", weights / "model", *first, "--scale", 0.9, 0.4, *second, "--scale", 0.5, *words, "--compare")
    printed = capsys.readouterr().out
    assert "\nmax difference: 0\n" in printed
    assert "0 triton, 7 eager, 0 stock" in printed
    assert "\ntime per step: stock " in printed
    assert "no speedup" in printed

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(weights / "model", safety_checker=None)
    places = [weights.as_posix(), (weights / "adapters" / "plus").as_posix()]
    pipe.load_ip_adapter(places, subfolder=["", ""], weight_name=["base.bin", "plus.safetensors"])
    pipe.set_ip_adapter_scale([[0.9, 0.4], 0.5])
    masks = [Image.open(name) for name in ("left.png", "right.png")]
    mask = IPAdapterMaskProcessor().preprocess(masks, height=32, width=48).reshape(1, 2, 32, 48)
    a, b, c = (read(name) for name in ("a.png", "b.jpg", "c.png"))
    expected = pipe(
        "a cat",
        negative_prompt="a dog",
        guidance_scale=5,
        num_inference_steps=2,
        width=48,
        height=32,
        ip_adapter_image=[[a, b], [c, a]],
        cross_attention_kwargs={"ip_adapter_masks": [mask, None]},
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert read().size == (48, 32)
    assert read().tobytes() == expected.tobytes()

    sheet = read("generated-compare.png")  # 4 panels of images and masks, 2 more, then stock, accelerated, difference
    width, height, head = 5 * 48, 5 * 32, HEAD + 18
    assert sheet.size == (GAP + 4 * (256 + GAP), GAP + 3 * (head + height) + 2 * GAP)
    top, left = 2 * (head + height + GAP) + head, GAP + 256 + GAP
    for x in (GAP, left):
        panel = sheet.crop((x, top, x + width, top + height)).resize((48, 32), Image.Resampling.NEAREST)
        assert panel.tobytes() == expected.tobytes()


def test_what_is_given_matters() -> None:
    """Each option changes the picture, and only order does not: else equality with diffusers would mean little."""
    masked = ("--image", "a.png", "b.jpg", "--mask", "left.png", "right.png", "--width", 48)
    settings = {
        "image": ("--image", "a.png"),
        "images": ("--image", "a.png", "b.jpg"),
        "scale": ("--image", "a.png", "--scale", 0.3),
        "adapter": ("--ip-adapter", "plus", "--image", "a.png"),
        "adapters": ("--ip-adapter", "plus", "--image", "a.png", "--ip-adapter", "base", "--image", "b.jpg"),
        "prompt": ("--image", "a.png", "--prompt", "a cat"),
        "masks": masked,
        "scales": (*masked, "--scale", 0.8, 0.1),
    }
    drawn = {}
    for name, arguments in settings.items():
        generate(*arguments)
        drawn[name] = read().tobytes()
    assert len(set(drawn.values())) == len(settings)
    assert not list(Path().glob("*-compare.png"))
    generate("--scale", 0.3, "--image", "a.png", "--ip-adapter", "base")
    assert read().tobytes() == drawn["scale"]


def test_settings_in_the_png(tmp_path: Path) -> None:
    """A run can be repeated from its picture, which knows nothing of the folders of the one who made it."""
    generate("--image", tmp_path / "a.png", "--prompt", "ein Kätzchen", "--seed", 7, "--output", "one.png")
    with Image.open("one.png") as picture:
        text = picture.info["ipa-kernels"]
    assert str(tmp_path) not in text
    settings = json.loads(text)
    used = {"ip_adapter": "base", "weight": None, "images": ["a.png"], "masks": [], "scale": 0.8}
    assert settings["adapters"] == [used]
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("ein Kätzchen", 7, 2)
    assert (settings["width"], settings["height"]) == (32, 32)
    generate("--image", "a.png", "--prompt", "ein Kätzchen", "--seed", 7, "--output", "two.png")
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()


def test_notes(capsys: pytest.CaptureFixture[str]) -> None:
    """One step has no end before it; a prompt that is too long is cut."""
    generate("--image", "a.png", "--steps", 1, "--prompt", "a cat " * 20)
    printed = capsys.readouterr().out
    assert "time per step: not measured in one step" in printed
    assert "note: the pipeline reads the first 77 tokens of the prompt" in printed
    generate("--image", "a.png")
    printed = capsys.readouterr().out
    assert "\ntime per step: " in printed
    assert "max difference" not in printed
    assert "note:" not in printed


def test_pairing(fail: Mistake) -> None:
    base, plus, image = ("--ip-adapter", "base"), ("--ip-adapter", "plus"), ("--image", "a.png")
    assert "--image: none given for the IP-Adapter" in fail()
    assert "--image: none given for --ip-adapter base; each of several" in fail(*base, *plus, *image)
    assert "--image: comes before the first of 2 --ip-adapter" in fail(*image, *base, *plus, *image)
    assert "--scale: comes before the first of 2" in fail("--scale", 1, *base, *image, *plus, *image)
    assert "--scale: 2 given for --ip-adapter base: needs one" in fail(*base, *image, "--scale", 1, 0.5)
    mask = ("--mask", "square.png")
    assert "--mask: 2 given for the IP-Adapter, 1 for --image" in fail(*image, *mask, *mask)
    assert "--mask: 1 given for the IP-Adapter, 2 for --image" in fail(*image, *image, *mask)
    assert "--scale: 3 given for the IP-Adapter, 2 for" in fail(*image, *image, *mask, *mask, "--scale", 1, 0, 1)
    weight = ("--ip-adapter-weight", "x.bin")
    assert "--ip-adapter-weight: 2 given for --ip-adapter base" in fail(*base, *weight, *weight, *image)
    assert "--ip-adapter-weight x.bin: needs --model" in fail(*base, *weight, *image)
    assert "--ip-adapter here.bin: needs --model; without it: base or plus" in fail("--ip-adapter", "here.bin", *image)


def test_broken_pictures(fail: Mistake) -> None:
    Image.new("RGBA", (32, 32)).save("clear.png")
    Path("text.png").write_text("no picture")
    image = ("--image", "a.png", "--mask")
    assert "--image text.png: no picture that can be read" in fail("--image", "text.png")
    assert "--image gone.png: no picture" in fail("--image", "gone.png")
    assert "--mask gone.png: no picture" in fail(*image, "gone.png")
    assert "--mask a.png: a picture in colours" in fail(*image, "a.png")
    assert "--mask clear.png: has transparent parts" in fail(*image, "clear.png")
    assert "--mask left.png: 96x64, the picture 32x32: needs the picture's aspect" in fail(*image, "left.png")
    assert "--mask square.png: 64x64, the picture 64x32: needs" in fail(*image, "square.png", "--width", 64)


def test_broken_adapters(fail: Mistake, weights: Path, tmp_path: Path) -> None:
    def refused(*adapter: object) -> str:
        return fail("--model", weights / "model", "--image", "a.png", *(["--ip-adapter", *adapter] if adapter else ()))

    assert "--model and --ip-adapter go together" in refused()
    assert "--ip-adapter ../gone: no such file or folder" in refused("../gone")
    assert f"--ip-adapter {weights}: no gone.bin in it" in refused(weights, "--ip-adapter-weight", "gone.bin")

    unet = tiny_pipelines.stable_diffusion().unet
    save_adapter(_face(unet), tmp_path / "face.safetensors")
    assert "cannot load face.safetensors for this model: it is a FaceID adapter" in refused("face.safetensors")
    narrow = tiny_pipelines.base_adapter(unet)
    narrow["ip_adapter"] = {name: weight[:, :48].clone() for name, weight in narrow["ip_adapter"].items()}
    save_adapter(narrow, tmp_path / "narrow.safetensors")
    line = refused("narrow.safetensors")
    assert "it is for 7 layers and text 48 wide, the UNet has 7 layers and text 64 wide" in line
    torch.save(tiny_pipelines.plus_adapter(unet, image_dim=48), "wide.bin")
    assert "wide.bin reads image embeddings 48 wide, the image encoder gives 32" in refused("wide.bin")
    both = ("--ip-adapter", weights / "base.bin", "--image", "a.png", "--ip-adapter", "face.safetensors", "--image", "b.jpg")
    assert "--ip-adapter face.safetensors: cannot" in fail("--model", weights / "model", *both)


def test_broken_models(fail: Mistake, weights: Path, tmp_path: Path) -> None:
    rest = ("--ip-adapter", weights / "base.bin", "--image", "a.png")
    assert "--model ../gone: no such file or folder" in fail("--model", "../gone", *rest)
    assert "model_index.json" in fail("--model", weights / "adapters", *rest)
    parts = {**build_pipeline(torch.float32).components, "scheduler": diffusers.LCMScheduler()}
    parts["unet"] = tiny_pipelines.stable_diffusion().unet
    consistency = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    consistency.save_pretrained("lcm")
    line = fail("--model", "lcm", *rest, "--negative-prompt", "a dog")
    assert "--model lcm: a LatentConsistencyModelPipeline takes no negative_prompt" in line


def test_broken_options(fail: Mistake) -> None:
    image = ("--image", "a.png")
    assert "--width: needs a multiple of 8 in pixels, got '100'" in fail(*image, "--width", 100)
    assert "--height: needs a multiple of 8" in fail(*image, "--height", 0)
    assert "--steps: needs a whole number from 1 up" in fail(*image, "--steps", 0)
    assert "--seed: needs a whole number from 0" in fail(*image, "--seed", -1)
    assert "--scale: needs a finite number, got 'nan'" in fail(*image, "--scale", "nan")
    assert "--device toaster" in fail(*image, "--device", "toaster")
    assert "--offload model: moves models between a GPU" in fail(*image, "--offload", "model")
    assert "--output gone/x.png: needs the name of a .png file in a folder" in fail(*image, "--output", "gone/x.png")
    assert "--output x.jpg: needs" in fail(*image, "--output", "x.jpg")
    assert "--output: a.png would replace another file" in fail(*image, "--output", "./a.png")
    assert "--steps 2000: the scheduler has only 1000 steps; use fewer" in fail(*image, "--steps", 2000)


def test_not_enough_memory(fail: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be more than the machine has is told before it is tried, for the system ends what tries it; a GPU's own error
    in the UNet; the advice names what is not used yet."""
    for size, takes in (
        ((800_000_000,), "800000000x32 takes 6554"),
        ((8_000_000, 8_000_000), "8000000x8000000 takes 16384000"),
    ):
        huge = fail("--image", "a.png", *chain(*zip(("--width", "--height"), size, strict=False)))
        assert "--device cpu: not enough memory; what would help: a smaller --width and --height (" in huge
        assert f"(a picture of {takes} GB to decode; there are " in huge

    def forward(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", forward)
    for more in ((), ("--compare",)):
        assert "--device cpu: not enough memory; " in fail("--image", "a.png", *more)

    def advice(offload: str, dtype: torch.dtype) -> list[str]:
        return _memory_advice(SimpleNamespace(offload=offload), torch.device("cuda"), dtype)[1:]

    assert advice("none", torch.float32) == ["--dtype float16", "--offload model"]
    assert advice("model", torch.float16) == ["--offload sequential"]
    assert advice("sequential", torch.float16) == []


def test_only_what_stock_refuses_too_is_the_user_s_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(pipe: object) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(pipeline_run, "accelerated", ours)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        generate("--image", "a.png")
    assert not Path("generated.png").exists()


def test_a_full_disk_leaves_the_old_picture(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    generate("--image", "a.png")
    old = Path("generated.png").read_bytes()

    def save(picture: Image.Image, path: Path, *args: Any, **kwargs: Any) -> None:
        path.write_bytes(old[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    line = mistake("generate", "--steps", 2, "--device", "cpu", "--image", "b.jpg")
    assert "--output generated.png: No space left on device" in line
    assert Path("generated.png").read_bytes() == old


def test_offloading_changes_no_picture() -> None:
    """The hooks of model offloading, from the CPU to the CPU: what a GPU adds is the way between them."""
    drawn = []
    for offload in ("none", "model"):
        pipe, device = build_pipeline(torch.float32), torch.device("cpu")
        move_to_device(pipe, device, offload)
        arguments = {"prompt": "a cat", "ip_adapter_image": [[read("a.png")]]}
        result, report = pipeline_run.accelerate(pipeline_run.Request(pipe, device, arguments, 2, 0))
        assert report.eager == 7
        drawn.append(result.picture.tobytes())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading_needs_accelerate(offload: str) -> None:
    """accelerate is in none of our extras."""
    calls = []
    name, device = f"enable_{offload}_cpu_offload", torch.device("cuda", 1)
    move_to_device(SimpleNamespace(**{name: lambda device: calls.append(device)}), device, offload)
    assert calls == [device]

    def missing(device: torch.device) -> None:
        raise ImportError

    with pytest.raises(UserError, match=f"--offload {offload}: needs accelerate"):
        move_to_device(SimpleNamespace(**{name: missing}), device, offload)


def test_layouts_that_diffusers_bends(fail: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a picture of 256x312 SD 1.5's layers of 39x32 would read a mask as 32x39, each row a query further on."""
    blocks = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    unet = SimpleNamespace(config=SimpleNamespace(down_block_types=blocks))
    pipe = SimpleNamespace(unet=unet, vae_scale_factor=8)
    for width, height in ((512, 512), (512, 768), (768, 512), (904, 512), (1216, 832)):
        check_layout(pipe, width, height)
    with pytest.raises(UserError, match="misplaces masks in a picture of 256x312"):
        check_layout(pipe, 256, 312)
    lost = staticmethod(lambda mask, batch, queries, width: torch.zeros(batch, queries, width))
    monkeypatch.setattr(IPAdapterMaskProcessor, "downsample", lost)
    assert "misplaces masks in a picture of 32x32" in fail("--image", "a.png", "--mask", "square.png")


def test_captions_stay_over_their_pictures() -> None:
    """A caption that is too long ends within its column, however narrow the picture is."""
    stock = Image.new("RGB", (16, 32), "black")
    sheet = compose([Panel("w" * 200 + "\nsecond line", stock)] * 2, Panel("stock", stock), Panel("accelerated", stock))
    assert sheet.size == (GAP + 3 * (256 + GAP), GAP + 2 * (HEAD + 18 + PANEL) + GAP)
    for column in range(3):
        left = column * (256 + GAP)
        gap = sheet.crop((left, 0, left + GAP - 2, sheet.height))
        assert gap.getextrema() == ((255, 255),) * 3


def _face(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Enough of a FaceID checkpoint to be known as one."""
    adapter = tiny_pipelines.base_adapter(unet)
    adapter["image_proj"] = {name: torch.zeros(4, 4) for name in ("proj.0.weight", "proj.2.weight", "norm.weight")}
    return adapter
