"""Tiny pipelines with their inputs: one call runs three steps with guidance and returns the picture as a tensor."""

from typing import Any

import torch
from torch import Tensor

from ipa_kernels import tiny

BUILDERS = {"sd": tiny.stable_diffusion, "sdxl": tiny.stable_diffusion_xl}
ADAPTERS = {"base": tiny.base_adapter, "plus": tiny.plus_adapter}


def build(kind: str, adapters: tuple[str, ...] = (), dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline with random adapters at scale 0.7; the same weights every time."""
    pipe = BUILDERS[kind]()
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(dtype)
    if adapters:
        load(pipe, *adapters)
    return pipe


def load(pipe: Any, *adapters: str, seed: int = 0) -> None:
    """Load adapters by kind; their scale is 0.7."""
    tiny.load(pipe, *(ADAPTERS[name](pipe.unet, seed=seed + i) for i, name in enumerate(adapters)))
    pipe.set_ip_adapter_scale([0.7] * len(adapters))


def picture(
    pipe: Any, adapters: tuple[str, ...] = (), *, masks: list[Tensor | None] | None = None, images: int = 1, size: int = 12,
    steps: int = 3, seed: int = 1, guidance: float = 5.0, **options: Any,
) -> Tensor:  # fmt: skip
    """[1, 3, 2·size, 2·size] in the dtype of the pipeline, from inputs that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    dtype = pipe.unet.dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    width = tiny.CROSS_ATTENTION_DIM
    call = {"prompt_embeds": normal(1, 77, width), "negative_prompt_embeds": normal(1, 77, width)}
    if "XL" in type(pipe).__name__:
        call["pooled_prompt_embeds"] = normal(1, tiny.IMAGE_EMBED_DIM)
        call["negative_pooled_prompt_embeds"] = normal(1, tiny.IMAGE_EMBED_DIM)
    if adapters:
        halves = 2 if guidance > 1 else 1
        shapes = {"base": (halves, images, tiny.IMAGE_EMBED_DIM), "plus": (halves, images, 9, tiny.IMAGE_EMBED_DIM)}
        call["ip_adapter_image_embeds"] = [normal(*shapes[name]) for name in adapters]
    if masks is not None:
        call["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
    out = pipe(
        latents=normal(1, 4, size, size),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="pt",
        **{**call, **options},
    )
    return out.images


def random_masks(adapters: tuple[str, ...], images: int = 1, size: int = 24) -> list[Tensor]:
    """One binary mask per adapter and image; bicubic resizing makes values outside [0, 1] of them."""
    generator = torch.Generator().manual_seed(5)
    return [(torch.rand(1, images, size, size, generator=generator) > 0.5).float() for _ in adapters]
