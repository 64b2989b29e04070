"""Two callers of a UNet that are not classic pipelines, behind the same call: a loop of one's own, and the modular SDXL."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import ClassifierFreeGuidance, PerturbedAttentionGuidance
from diffusers.hooks import LayerSkipConfig
from diffusers.loaders import IPAdapterMixin, StableDiffusionLoraLoaderMixin
from diffusers.modular_pipelines import SequentialPipelineBlocks
from torch import Tensor


class OwnLoop(DiffusionPipeline, IPAdapterMixin, StableDiffusionLoraLoaderMixin):
    """A denoising loop around a bare UNet, as a user writes it; the UNet itself is what such a user enables."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.text_encoder = None

    @torch.no_grad()
    def __call__(
        self,
        *,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        latents: Tensor,
        num_inference_steps: int,
        guidance_scale: float,
        num_images_per_prompt: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> tuple[Tensor]:
        guided = guidance_scale > 1
        text = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        if guided:
            text = torch.cat([negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0), text])
        rows = len(text)
        conditions = None
        if ip_adapter_image_embeds is not None:
            embeds = [tensor.repeat_interleave(rows // len(tensor), dim=0) for tensor in ip_adapter_image_embeds]
            conditions = {"image_embeds": embeds}
        self.scheduler.set_timesteps(num_inference_steps)
        for step, timestep in enumerate(self.scheduler.timesteps):
            sample = torch.cat([latents, latents]) if guided else latents
            noise = self.unet(
                sample, timestep, text, added_cond_kwargs=conditions, cross_attention_kwargs=cross_attention_kwargs
            ).sample
            if guided:
                uncond, cond = noise.chunk(2)
                noise = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, timestep, {})
        return (latents,)


def _perturbed(scale: float, **options: float) -> PerturbedAttentionGuidance:
    layers = LayerSkipConfig(
        indices=[0], fqn="mid_block.attentions.0.transformer_blocks", skip_attention=False, skip_ff=False,
        skip_attention_scores=True,
    )  # fmt: skip
    return PerturbedAttentionGuidance(
        guidance_scale=scale, perturbed_guidance_scale=2.0, perturbed_guidance_config=layers, **options
    )


GUIDERS = {
    "cfg": lambda scale: ClassifierFreeGuidance(guidance_scale=scale),
    "pag": _perturbed,
    # all but the first: by default, the first fifth of the steps but one
    "pag in every step": lambda scale: _perturbed(scale, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0),
}


class ModularXL:
    """The modular SDXL pipeline from prompt embeddings to latents; its guider calls the UNet once per condition."""

    def __init__(self, unet: Any, vae: Any, scheduler: Any, guider: str) -> None:
        xl = pytest.importorskip(
            "diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl",
            reason="diffusers' modular SDXL has these blocks from 0.37 on",
        )
        blocks = SequentialPipelineBlocks.from_blocks_dict({"denoise": xl.StableDiffusionXLCoreDenoiseStep()})
        self.guider = guider
        self.pipe = blocks.init_pipeline()
        self.pipe.update_components(unet=unet, vae=vae, scheduler=scheduler)
        # the blocks that encode text would register these; loading a LoRA looks for them
        self.pipe.text_encoder = self.pipe.text_encoder_2 = None

    @property
    def unet(self) -> Any:
        return self.pipe.unet

    def set_progress_bar_config(self, **options: Any) -> None:
        self.pipe.set_progress_bar_config(**options)

    def to(self, *arguments: Any) -> "ModularXL":
        self.pipe.to(*arguments)
        return self

    def load_ip_adapter(self, *arguments: Any, image_encoder_folder: None = None, **options: Any) -> None:
        self.pipe.load_ip_adapter(*arguments, **options)

    def unload_ip_adapter(self) -> None:
        self.pipe.unload_ip_adapter()

    def set_ip_adapter_scale(self, scale: Any) -> None:
        self.pipe.set_ip_adapter_scale(scale)

    def __call__(
        self,
        *,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        latents: Tensor,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        num_images_per_prompt: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor]:
        self.pipe.update_components(guider=GUIDERS[self.guider](guidance_scale))
        images: dict[str, Any] = {}
        if ip_adapter_image_embeds is not None:
            # unlike the classic pipelines, this one does not repeat them for several prompts
            rows = [1] * len(prompt_embeds)
            images["ip_adapter_embeds"] = [torch.cat([tensor[-1:] for _ in rows]) for tensor in ip_adapter_image_embeds]
            images["negative_ip_adapter_embeds"] = [torch.cat([tensor[:1] for _ in rows]) for tensor in ip_adapter_image_embeds]
        latents = self.pipe(
            prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds, negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            latents=latents, height=height, width=width, num_inference_steps=num_inference_steps,
            num_images_per_prompt=num_images_per_prompt, cross_attention_kwargs=cross_attention_kwargs, output="latents",
            **images,
        )  # fmt: skip
        return (latents,)
