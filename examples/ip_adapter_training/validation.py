"""What a run shows of itself: pictures, and a loss that is comparable from step to step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .checkpoints import write_file
from .data import generator, read_picture


@torch.no_grad()
def pictures(pipe: Any, references: Sequence[Path], prompt: str, steps: int, side: int, seed: int) -> list[Image.Image]:
    """One picture for each reference, always from the same noise."""
    device = pipe.unet.device
    pipe.set_progress_bar_config(disable=True)
    made = []
    for reference in references:
        latents = pipe(
            prompt,
            ip_adapter_image=read_picture(reference),
            num_inference_steps=steps,
            height=side,
            width=side,
            generator=generator(seed, "pictures"),
            output_type="latent",
        ).images
        # the pipeline would decode in the dtype of its UNet; the VAE is in float32
        with torch.autocast(device.type, enabled=False):
            decoded = pipe.vae.decode(latents.float() / pipe.vae.config.scaling_factor, return_dict=False)[0]
        made += pipe.image_processor.postprocess(decoded)
    return made


def save_pictures(references: Sequence[Path], made: Sequence[Image.Image], file: Path) -> None:
    """A sheet with the references in the upper row and what was made of them below."""
    width, height = made[0].size
    sheet = Image.new("RGB", (width * len(made), 2 * height), "white")
    for i, (reference, picture) in enumerate(zip(references, made, strict=True)):
        small = read_picture(reference)
        small.thumbnail((width, height))
        sheet.paste(small, (i * width, 0))
        sheet.paste(picture, (i * width, height))
    file.parent.mkdir(exist_ok=True)
    write_file(file, lambda path: sheet.save(path, format="PNG"))
