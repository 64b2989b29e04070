"""What a script does to a pipeline between two generations: operations by name, for stock and enabled ones alike."""

import copy
import gc
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AnimateDiffPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPAGPipeline, UNetMotionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from ipa_kernels.testing import tiny_pipelines

from .adapters import load
from .generate import Outcome, outcome
from .pipelines import build, motion_adapter

Result = Outcome | list[str] | None


class Life:
    """A pipeline, the names of the adapters in it, and what its script has put aside."""

    def __init__(self) -> None:
        self.pipe = build("sd")
        self.names: tuple[str, ...] = ()
        self.aside: dict[str, Any] = {}

    def load(self, *names: str) -> None:
        self.names = names
        load(self.pipe, *names)

    def unload(self) -> None:
        self.pipe.unload_ip_adapter()
        self.names = ()

    def picture(self) -> Outcome:
        return plain(outcome(self.pipe, self.names, steps=1))

    def do(self, name: str) -> Result:
        """Run an operation; what it returns, or the error it raised."""
        try:
            return OPERATIONS[name](self)
        except Exception as error:
            return plain((type(error), str(error)))


def plain(result: Outcome) -> Outcome:
    """An outcome without the addresses of objects."""
    return result if isinstance(result, Tensor) else (result[0], re.sub(r"0x[0-9a-f]+", "0x", result[1]))


def lora(life: Life) -> None:
    random = tiny_pipelines.Random(11)
    state = {}
    for name in life.pipe.unet.attn_processors:
        if name.startswith("encoder_hid_proj"):
            continue
        layer = name.removesuffix(".processor")
        attention = life.pipe.unet.get_submodule(layer)
        for kind in ("to_q", "to_k", "to_v"):
            linear = getattr(attention, kind)
            state[f"unet.{layer}.{kind}.lora_A.weight"] = random(2, linear.in_features)
            state[f"unet.{layer}.{kind}.lora_B.weight"] = random(linear.out_features, 2)
    life.pipe.load_lora_weights(state, adapter_name="style")


def put_aside_and_back(life: Life) -> None:
    saved = life.pipe.unet.attn_processors
    life.pipe.unet.set_attn_processor(AttnProcessor2_0())
    life.pipe.unet.set_attn_processor(saved)


def put_aside(life: Life) -> None:
    life.aside = life.pipe.unet.attn_processors


def copy_aside(life: Life) -> None:
    life.aside = copy.deepcopy(life.pipe.unet.attn_processors)


def put_back(life: Life) -> None:
    life.pipe.unet.set_attn_processor(dict(life.aside))


def pickled(life: Life) -> None:
    life.pipe.unet = pickle.loads(pickle.dumps(life.pipe.unet))


def copied(life: Life) -> None:
    life.pipe.unet = copy.deepcopy(life.pipe.unet)


def saved(life: Life) -> list[str]:
    """The file names and the weights that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        life.pipe.unet.save_pretrained(folder)
        return [f"{path.name} {hash(path.read_bytes())}" for path in sorted(Path(folder).iterdir())]


def state(life: Life) -> list[str]:
    return [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in life.pipe.unet.state_dict().items()]


def other_pipeline(kind: type) -> Callable[[Life], Outcome]:
    """A picture of another pipeline on the same UNet."""

    def operate(life: Life) -> Outcome:
        options = {"pag_applied_layers": ["mid"]} if kind is StableDiffusionPAGPipeline else {}
        other = kind.from_pipe(life.pipe, **options)
        other.set_progress_bar_config(disable=True)
        return plain(outcome(other, life.names, steps=1))

    return operate


def animated(life: Life) -> Outcome:
    """A film of a motion UNet that is made of this UNet; it shares the image projection and the lists of scales."""
    motion = UNetMotionModel.from_unet2d(life.pipe.unet, motion_adapter())
    parts = {name: part for name, part in life.pipe.components.items() if name not in ("unet", "safety_checker")}
    pipe = AnimateDiffPipeline(unet=motion, motion_adapter=None, **parts)
    pipe.set_progress_bar_config(disable=True)
    return plain(outcome(pipe, life.names, steps=1))


def group_offload(onload: str) -> Callable[[Life], None]:
    """Weights of each leaf go to a device for its call, and back to the CPU."""

    def operate(life: Life) -> None:
        devices = {"onload_device": torch.device(onload), "offload_device": torch.device("cpu")}
        life.pipe.unet.enable_group_offload(**devices, offload_type="leaf_level")

    return operate


def layerwise_casting(life: Life) -> None:
    life.pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


LOADS: dict[str, Callable[[Life], Any]] = {
    "load base": lambda life: life.load("base"),
    "load plus": lambda life: life.load("plus"),
    "load two": lambda life: life.load("base", "plus"),
    "load faceid": lambda life: life.load("faceid"),
    "unload": Life.unload,
}

OPERATIONS: dict[str, Callable[[Life], Any]] = {
    **LOADS,
    "scale": lambda life: life.pipe.set_ip_adapter_scale([0.3, -0.5][: len(life.names)]),
    "scale 0": lambda life: life.pipe.set_ip_adapter_scale([0.0] * len(life.names)),
    "InstantStyle": lambda life: life.pipe.set_ip_adapter_scale([{"up": 0.9}] * len(life.names)),
    "plain processors": lambda life: life.pipe.unet.set_attn_processor(AttnProcessor2_0()),
    "default processors": lambda life: life.pipe.unet.set_default_attn_processor(),
    "processors aside and back": put_aside_and_back,
    "processors aside": put_aside,
    "copies of processors aside": copy_aside,
    "processors back": put_back,
    "xFormers on": lambda life: life.pipe.enable_xformers_memory_efficient_attention(),
    "xFormers off": lambda life: life.pipe.disable_xformers_memory_efficient_attention(),
    "slicing on": lambda life: life.pipe.enable_attention_slicing(),
    "slicing off": lambda life: life.pipe.disable_attention_slicing(),
    "fuse QKV": lambda life: life.pipe.fuse_qkv_projections(),
    "unfuse QKV": lambda life: life.pipe.unfuse_qkv_projections(),
    "load LoRA": lora,
    "fuse LoRA": lambda life: life.pipe.fuse_lora(),
    "unfuse LoRA": lambda life: life.pipe.unfuse_lora(),
    "scale LoRA": lambda life: life.pipe.set_adapters(["style"], [0.4]),
    "disable LoRA": lambda life: life.pipe.disable_lora(),
    "enable LoRA": lambda life: life.pipe.enable_lora(),
    "unload LoRA": lambda life: life.pipe.unload_lora_weights(),
    "to float64": lambda life: life.pipe.to(torch.float64) and None,
    "to float32": lambda life: life.pipe.to(torch.float32) and None,
    "to the CPU": lambda life: life.pipe.to("cpu") and None,
    "channels last": lambda life: life.pipe.unet.to(memory_format=torch.channels_last) and None,
    "FreeU on": lambda life: life.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "FreeU off": lambda life: life.pipe.disable_freeu(),
    "model offload": lambda life: life.pipe.enable_model_cpu_offload(),
    "sequential offload": lambda life: life.pipe.enable_sequential_cpu_offload(),
    "group offload": group_offload("cpu"),
    "group offload to a GPU": group_offload("cuda"),
    "layerwise casting": layerwise_casting,
    "save": saved,
    "state dict": state,
    "pickle": pickled,
    "deepcopy": copied,
    "image to image on the same UNet": other_pipeline(StableDiffusionImg2ImgPipeline),
    "PAG on the same UNet": other_pipeline(StableDiffusionPAGPipeline),
    "AnimateDiff of this UNet": animated,
    "collect garbage": lambda life: gc.collect() * 0,
}
