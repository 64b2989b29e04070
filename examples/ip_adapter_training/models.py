"""The frozen models: how they are loaded, and what they make of a batch for the UNet."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from ipa_kernels.testing import tiny_pipelines

from .arguments import UsageError


def load(arguments: argparse.Namespace) -> Any:
    """A pipeline of Stable Diffusion 1.5, 2.1 or XL with an image encoder, on the CPU in float32. Raises UsageError."""
    if arguments.tiny:
        # the weights do not follow --seed: an adapter fits the model that it was trained with
        make = tiny_pipelines.stable_diffusion if arguments.tiny == "sd15" else tiny_pipelines.stable_diffusion_xl
        return make(encoders=True)
    try:
        pipe = DiffusionPipeline.from_pretrained(arguments.model, dtype=torch.float32)
    except Exception as error:  # diffusers, transformers, safetensors and the hub, each with errors of its own
        raise UsageError(f"--model {arguments.model}: {error}") from error
    if not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise UsageError(f"--model {arguments.model}: a {type(pipe).__name__}; expected Stable Diffusion 1.5, 2.1 or XL")
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise UsageError(f"--model {arguments.model}: its UNet takes {pipe.unet.config.in_channels} channels (inpainting?)")
    if pipe.image_encoder is None:
        place = arguments.image_encoder, arguments.image_encoder_subfolder
        try:
            encoder = CLIPVisionModelWithProjection.from_pretrained(place[0], subfolder=place[1])
        except Exception as error:  # as above
            raise UsageError(f"--image-encoder {place[0]} --image-encoder-subfolder {place[1]}: {error}") from error
        side = encoder.config.image_size
        processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
    return pipe


def place(pipe: Any, trained: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Freeze everything but what is trained, and bring it to the device: frozen weights in `dtype`, trained ones in float32.

    The VAE stays in float32: that of SDXL overflows in float16, and it is small.
    """
    keep = {id(tensor) for tensor in trained}
    for tensor in (*pipe.unet.parameters(), *pipe.unet.buffers()):
        tensor.data = tensor.data.to(device, torch.float32 if id(tensor) in keep else dtype)
    for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None), pipe.image_encoder):
        if encoder is not None:
            encoder.requires_grad_(False).to(device, dtype).eval()
    pipe.vae.requires_grad_(False).to(device).eval()


class Conditions:
    """What the UNet is given beside the noisy latents, and the latents themselves."""

    def __init__(self, pipe: Any, device: torch.device, dtype: torch.dtype, plus: bool) -> None:
        self.pipe, self.device, self.dtype, self.plus = pipe, device, dtype, plus
        self.is_xl = isinstance(pipe, StableDiffusionXLPipeline)
        # what the pipeline takes for guidance where there is no negative prompt: zeros in SDXL
        encoded = pipe.encode_prompt("", device=device, num_images_per_prompt=1, do_classifier_free_guidance=True)
        self.no_text = encoded[1::2]

    @torch.no_grad()
    def latents(self, batch: dict[str, Any]) -> Tensor:
        """A sample of the VAE's posterior, with noise that belongs to the example."""
        posterior = self.pipe.vae.encode(batch["pixels"].to(self.device)).latent_dist
        sample: Tensor = posterior.mean + posterior.std * batch["posterior"].to(self.device)
        return sample * self.pipe.vae.config.scaling_factor

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of the UNet."""
        text, pooled = self._text(batch["caption"], batch["drop_text"].to(self.device))
        added: dict[str, Any] = {"image_embeds": [self._image(batch["embedder_pixels"], batch["drop_image"])]}
        if pooled is not None:
            added |= {"text_embeds": pooled, "time_ids": batch["time_ids"].to(self.device, self.dtype)}
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}

    def _text(self, captions: Sequence[str], drop: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the captions, token by token and, for SDXL, pooled."""
        encoded = self.pipe.encode_prompt(
            list(captions), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        text, *pooled = (
            torch.where(drop.view(-1, *[1] * (with_text.ndim - 1)), without, with_text).to(self.dtype)
            for with_text, without in zip(encoded[::2], self.no_text, strict=True)
        )
        return text, pooled[0] if self.is_xl else None

    def _image(self, pixels: Tensor, drop: Tensor) -> Tensor:
        """[B, 1 image, ...] as the pipeline passes it: the pooled embedding or, for a resampler, hidden states.

        A dropped image is what the pipeline's guidance takes: an embedding of zeros, or the hidden states of a black picture
        after normalisation, zeros too.
        """
        pixels, drop = pixels.to(self.device, self.dtype), drop.to(self.device)
        if self.plus:
            pixels = pixels.masked_fill(drop.view(-1, 1, 1, 1), 0)
            return self.pipe.image_encoder(pixels, output_hidden_states=True).hidden_states[-2][:, None]
        embeds = self.pipe.image_encoder(pixels).image_embeds.masked_fill(drop.view(-1, 1), 0)
        return embeds[:, None]
