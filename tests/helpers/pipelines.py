"""The pipelines that take a UNet's IP-Adapter: diffusers' own classes around UNets with four or six IP-Adapter layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    KolorsPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)

from ipa_kernels.testing import tiny_pipelines

from .adapters import load
from .own import ModularXL, OwnLoop

Builder = Callable[[], Any]

CHANNELS = (32, 64)
ONE_TOKENIZER = dict.fromkeys(("tokenizer", "text_encoder", "image_encoder", "feature_extractor"))
TWO_TOKENIZERS = {**ONE_TOKENIZER, "tokenizer_2": None, "text_encoder_2": None}


def unet(**config: Any) -> UNet2DConditionModel:
    """Four IP-Adapter layers: one on the way down, one in the middle, two on the way up."""
    torch.manual_seed(0)
    defaults = {
        "block_out_channels": CHANNELS,
        "layers_per_block": 1,
        "sample_size": 8,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": tiny_pipelines.CROSS_ATTENTION_DIM,
        "attention_head_dim": 4,  # the number of heads, in configs of this age: head dims 8 and 16
    }
    return UNet2DConditionModel(**{**defaults, **config})


def unet_21(**config: Any) -> UNet2DConditionModel:
    """Like SD 2.1: one head dim at every width, linear projections, upcast attention."""
    return unet(attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True, **config)


def unet_xl(**config: Any) -> UNet2DConditionModel:
    """Like SDXL: no attention on the way in, two blocks in each layer of the lower level, pooled text and sizes."""
    defaults = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + tiny_pipelines.IMAGE_EMBED_DIM,
    }
    return unet(**{**defaults, **config})


def unet_kolors() -> UNet2DConditionModel:
    """Like Kolors: an SDXL whose text comes through a projection of its own."""
    return unet_xl(encoder_hid_dim=KOLORS_TEXT_DIM, encoder_hid_dim_type="text_proj")


KOLORS_TEXT_DIM = 48


def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        sample_size=16,
    )


def scheduler(kind: type = DDIMScheduler, **config: Any) -> Any:
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **config)


def ddim(**config: Any) -> DDIMScheduler:
    return scheduler(clip_sample=False, steps_offset=1, **config)


def controlnet(model: UNet2DConditionModel, seed: int = 2) -> ControlNetModel:
    """A ControlNet for a UNet; it sees the text alone. Its last layers are random: as initialised, they are zero."""
    net = ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(8, 8))
    torch.manual_seed(seed)
    for layer in [*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out]:
        torch.nn.init.normal_(layer.weight, std=0.1)
    return net


def motion_adapter(**config: Any) -> MotionAdapter:
    torch.manual_seed(3)
    defaults = {
        "block_out_channels": CHANNELS,
        "motion_layers_per_block": 1,
        "motion_mid_block_layers_per_block": 1,
        "motion_norm_num_groups": 8,
        "motion_num_attention_heads": 4,
        "motion_max_seq_length": 4,
    }
    return MotionAdapter(**{**defaults, **config})


def _sd(pipeline: type, make: Callable[[], Any] = unet, schedule: Callable[[], Any] = ddim, **parts: Any) -> Builder:
    """A builder of a pipeline with one tokenizer."""

    def build() -> Any:
        model = make()
        more = {name: part(model) if callable(part) else part for name, part in parts.items()}
        if "safety_checker" in pipeline.__init__.__code__.co_varnames:
            more |= {"safety_checker": None, "requires_safety_checker": False}
        return pipeline(unet=model, vae=vae(), scheduler=schedule(), **ONE_TOKENIZER, **more)

    return build


def _xl(pipeline: type, make: Callable[[], Any] = unet_xl, **parts: Any) -> Builder:
    """A builder of a pipeline with two tokenizers."""

    def build() -> Any:
        model = make()
        more = {name: part(model) if callable(part) else part for name, part in parts.items()}
        if "add_watermarker" in pipeline.__init__.__code__.co_varnames:
            more |= {"add_watermarker": False}
        return pipeline(unet=model, vae=vae(), scheduler=ddim(), **TWO_TOKENIZERS, **more)

    return build


def _modular(guider: str) -> Builder:
    return lambda: ModularXL(unet_xl(), vae(), ddim(), guider)


def _velocity() -> DDIMScheduler:
    return ddim(prediction_type="v_prediction")


def _t2i_adapter(_: Any) -> T2IAdapter:
    torch.manual_seed(4)
    return T2IAdapter(channels=CHANNELS, num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl")


BUILDERS: dict[str, Builder] = {
    "sd": _sd(StableDiffusionPipeline),
    "sd-img2img": _sd(StableDiffusionImg2ImgPipeline),
    "sd-inpaint": _sd(StableDiffusionInpaintPipeline),
    "sd21": _sd(StableDiffusionPipeline, unet_21, _velocity),
    "sd21-img2img": _sd(StableDiffusionImg2ImgPipeline, unet_21, _velocity),
    "sd21-inpaint": _sd(StableDiffusionInpaintPipeline, unet_21, _velocity),
    "sdxl": _xl(StableDiffusionXLPipeline),
    "sdxl-img2img": _xl(StableDiffusionXLImg2ImgPipeline),
    "sdxl-inpaint": _xl(StableDiffusionXLInpaintPipeline),
    "kolors": lambda: KolorsPipeline(unet=unet_kolors(), vae=vae(), scheduler=ddim(), **ONE_TOKENIZER),
    "lcm": _sd(LatentConsistencyModelPipeline, lambda: unet(time_cond_proj_dim=16), lambda: scheduler(LCMScheduler)),
    "animatediff": _sd(AnimateDiffPipeline, motion_adapter=lambda _: motion_adapter()),
    "animatediff-sdxl": _xl(AnimateDiffSDXLPipeline, motion_adapter=lambda _: motion_adapter(use_motion_mid_block=False)),
    "controlnet": _sd(StableDiffusionControlNetPipeline, controlnet=controlnet),
    "multi-controlnet": _sd(
        StableDiffusionControlNetPipeline, controlnet=lambda model: [controlnet(model, 2), controlnet(model, 5)]
    ),
    "controlnet-sdxl": _xl(StableDiffusionXLControlNetPipeline, controlnet=controlnet),
    "t2i-adapter": _xl(StableDiffusionXLAdapterPipeline, adapter=_t2i_adapter),
    "pag": _sd(StableDiffusionPAGPipeline),
    "pag-sdxl": _xl(StableDiffusionXLPAGPipeline),
    "modular": _modular("cfg"),
    "modular-pag": _modular("pag"),
    "bare-unet": lambda: OwnLoop(unet(), ddim()),
}

QUICK = ("sd", "sdxl-inpaint", "kolors", "animatediff", "controlnet", "pag", "modular", "bare-unet")
"""The kinds that stand for their relatives in `make test`; `make test-slow` runs those."""

KINDS = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in BUILDERS]
"""Every kind, to be a parameter of a test."""


def build(kind: str, names: tuple[str, ...] = (), dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline with these adapters at scale 0.7; the same weights every time."""
    pipe = BUILDERS[kind]()
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(dtype)
    if names:
        load(pipe, *names)
    return pipe
