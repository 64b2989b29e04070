"""A saved pipeline and adapters for it, as somebody would have them on the disk."""

from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file

from ipa_kernels.testing import tiny_pipelines


def save(folder: Path) -> None:
    """model, the same with no_encoder, adapters/base.safetensors and plus/plus.safetensors, base.bin, and another kind."""
    pipe = tiny_pipelines.stable_diffusion(encoders=True)
    pipe.save_pretrained(folder / "model")
    pipe.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)  # Stable Diffusion 1's
    pipe.image_encoder = None
    pipe.register_to_config(image_encoder=(None, None))
    pipe.save_pretrained(folder / "no_encoder")
    base, plus = tiny_pipelines.base_adapter(pipe.unet), tiny_pipelines.plus_adapter(pipe.unet)
    (folder / "adapters" / "plus").mkdir(parents=True)
    save_adapter(base, folder / "adapters" / "base.safetensors")
    save_adapter(plus, folder / "adapters" / "plus" / "plus.safetensors")
    torch.save(base, folder / "base.bin")
    unet = diffusers.UNet2DModel(
        block_out_channels=(32,), layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder / "unconditional")


def save_adapter(adapter: dict[str, dict[str, torch.Tensor]], path: Path) -> None:
    """The flat keys of a .safetensors checkpoint: image_proj.… and ip_adapter.…"""
    save_file({f"{part}.{name}": tensor for part, tensors in adapter.items() for name, tensor in tensors.items()}, path)
