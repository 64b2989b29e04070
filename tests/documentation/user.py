"""Somebody who types what the pages say, on a machine without a GPU and without the hub.

What stands in for real weights: the models below, random and narrow, with the blocks of the real ones; adapters in
the checkpoint format that a load reads; pictures in an empty folder. A generation takes two steps, `.to("cuda")` stays on the
CPU, and `torch.compile` compiles with the backend "eager". All else is what a user gets.
"""

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import IPAdapterMixin
from PIL import Image

from ipa_kernels.cli.pictures import draw_reference
from ipa_kernels.testing import tiny_pipelines

from ..helpers.life import Life, lora
from .pages import Block
from .shell import command, commands

STEPS = 2
"""Of a generation; a page whose output counts them has as many as a pipeline takes by itself."""

ALL_STEPS = ("README.md", "docs/commands.md")


def stable_diffusion() -> Any:
    """The 16 cross-attentions of Stable Diffusion 1.5, of width 32 and 64."""
    pipe = tiny_pipelines.stable_diffusion(encoders=True)
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 64, 64),
        sample_size=16,
        cross_attention_dim=tiny_pipelines.CROSS_ATTENTION_DIM,
        attention_head_dim=4,
    )
    return pipe


def stable_diffusion_xl() -> Any:
    """The blocks of SDXL, of width 32 and 64, with one layer in each: 11 cross-attentions, not 70."""
    pipe = tiny_pipelines.stable_diffusion_xl(encoders=True)
    config = dict(pipe.unet.config) | {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": 1,
    }
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(**{name: value for name, value in config.items() if not name.startswith("_")})
    return pipe


MODELS: dict[str, Callable[[], Any]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion,
    "stabilityai/stable-diffusion-xl-base-1.0": stable_diffusion_xl,
}
ADAPTERS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("models", "ip-adapter_sd15.safetensors"): tiny_pipelines.base_adapter,
    ("models", "ip-adapter-plus_sd15.safetensors"): tiny_pipelines.plus_adapter,
    ("sdxl_models", "ip-adapter_sdxl_vit-h.safetensors"): tiny_pipelines.base_adapter,
    ("sdxl_models", "ip-adapter-plus_sdxl_vit-h.safetensors"): tiny_pipelines.plus_adapter,
}
"""By folder and name in this repository:"""
ADAPTER_REPOSITORY = "h94/IP-Adapter"
TRAINED = "run"
"""The folder that examples/train_ip_adapter.py wrote to."""
LORAS = ("style.safetensors",)


class User:
    """Runs blocks in one folder and one namespace, which is what a page has.

    The namespace holds what a reader of README has: `pipe`, a Stable Diffusion 1.5 without an IP-Adapter; `reference`, a
    picture; and `query`, `key`, `value`, `image_key`, `image_value` of a layer.
    """

    def __init__(self) -> None:
        for name, colour in (("style.png", "orange"), ("red.png", "red"), ("blue.png", "blue")):
            Image.new("RGB", (64, 48), colour).save(name)
        draw_reference().save("reference.png")
        for name, left in (("left.png", 0), ("right.png", 32)):
            mask = Image.new("L", (64, 64))
            mask.paste(255, (left, 0, left + 32, 64))
            mask.save(name)
        torch.manual_seed(0)
        layer = {name: torch.randn(2, 4, length, 8) for name, length in (("query", 64), ("key", 77), ("value", 77))}
        image = {name: torch.randn(2, 4, 4, 8) for name in ("image_key", "image_value")}
        self.names: dict[str, Any] = {"pipe": quiet(stable_diffusion()), "reference": draw_reference(), **layer, **image}
        self.printed = ""

    def do(self, block: Block) -> None:
        """Run a block, check its arguments, or compare it with what the block before printed."""
        if block.kind == "output compared":
            same_output(block, self.printed)
        elif block.kind == "run" and block.language == "python":
            self.printed = self._python(block)
        elif block.language == "sh":
            self.printed = "".join(command(block, words) for words in commands(block.text))

    def _python(self, block: Block) -> str:
        code = compile("\n" * block.line + block.text, str(block.page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, self.names)
        return out.getvalue()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def without_hub_and_gpu(page: str = "") -> Iterator[None]:
    """The stand-ins of this module, in the places of what they stand in for."""
    most = 1000 if page in ALL_STEPS else STEPS
    read, load, to, timesteps, compiler = (
        diffusers.DiffusionPipeline.from_pretrained,
        IPAdapterMixin.load_ip_adapter,
        diffusers.DiffusionPipeline.to,
        diffusers.DDIMScheduler.set_timesteps,
        torch.compile,
    )

    def from_pretrained(kind: Any, path: Any, **options: Any) -> Any:
        if str(path) not in MODELS:
            return read.__func__(kind, path, **options)
        pipe = MODELS[str(path)]()
        return quiet(pipe if isinstance(pipe, kind) else kind.from_pipe(pipe))

    def load_ip_adapter(pipe: Any, repository: Any, subfolder: Any, weight_name: Any, **options: Any) -> None:
        if repository not in (ADAPTER_REPOSITORY, TRAINED):
            return load(pipe, repository, subfolder, weight_name, **options)
        folders, names = ([x] if isinstance(x, str) else x for x in (subfolder, weight_name))
        folders = folders * len(names) if len(folders) == 1 else folders
        known = ADAPTERS if repository == ADAPTER_REPOSITORY else {("", "ip_adapter.safetensors"): tiny_pipelines.base_adapter}
        adapters = [known[key](pipe.unet) for key in zip(folders, names, strict=True)]
        if pipe.image_encoder is None:
            pipe.register_modules(**tiny_pipelines._image_encoder())
        blanks = [""] * len(adapters)
        load(pipe, adapters, subfolder=blanks, weight_name=blanks, image_encoder_folder=None)

    def load_lora_weights(pipe: Any, path: str, **options: Any) -> None:
        assert path in LORAS, f"no stand-in for {path}"
        with pytest.MonkeyPatch.context() as real:
            real.setattr(type(pipe), "load_lora_weights", loras[type(pipe)])
            life = Life.__new__(Life)
            life.pipe = pipe
            lora(life)

    def stays(pipe: Any, *places: Any, **options: Any) -> Any:
        return to(pipe, *(place for place in places if place != "cuda"), **options)

    def compiled(*arguments: Any, **options: Any) -> Any:
        return compiler(*arguments, **{"backend": "eager", **options})

    kinds = (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline)
    loras = {kind: kind.load_lora_weights for kind in kinds}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
        patch.setattr(diffusers.DiffusionPipeline, "to", stays)
        patch.setattr(IPAdapterMixin, "load_ip_adapter", load_ip_adapter)
        for kind in kinds:
            patch.setattr(kind, "load_lora_weights", load_lora_weights)
        patch.setattr(diffusers.DDIMScheduler, "set_timesteps", lambda s, n, **o: timesteps(s, min(n, most), **o))
        patch.setattr(torch, "compile", compiled)
        # as on a machine without a GPU, where nobody has set TRITON_INTERPRET
        patch.setattr("ipa_kernels.kernels.launch.INTERPRETED", False)
        yield


def same_output(block: Block, printed: str) -> None:
    """Compare a page's output with the real one: times aside, and what is above or below a line of dots."""
    expected = re.escape(_without_times(block.text).strip() + "\n").replace(re.escape("...\n"), r"(?:.*\n)*?")
    assert re.fullmatch(expected, _without_times(printed).strip() + "\n"), f"{block} says\n{block.text}\nprinted was\n{printed}"


def _without_times(text: str) -> str:
    lines = (line.rstrip() for line in text.splitlines())
    return re.sub(r"\d+(\.\d+)? (ms|s)\b", "# \\2", "\n".join(lines))
