"""UNets with random weights in the real architectures, with adapters made in code, and the inputs of a step.

Nothing is downloaded: the configs are those of the published checkpoints, written out. Weights are drawn on the device.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.image_processor import IPAdapterMaskProcessor
from torch import Tensor, nn

from . import tiny_pipelines

BATCH = 2
"""Classifier-free guidance for one picture."""

VAE_FACTOR = 8
"""Pixels on the side of a picture for each latent."""

SCALE = 0.6
PLUS_STATES = 257
"""Hidden states of CLIP ViT-H that an IP-Adapter Plus reads."""


@dataclass(frozen=True)
class Model:
    """An architecture and the adapters that go with it.

    config: of `UNet2DConditionModel`; image_dims: width of the pooled embedding and of the hidden states of the image encoder;
    resampler: width of an IP-Adapter Plus.
    """

    config: dict[str, Any]
    image_dims: tuple[int, int]
    resampler: int

    @property
    def side(self) -> int:
        """Of the pictures that it was made for, in pixels."""
        return int(VAE_FACTOR * self.config["sample_size"])

    @property
    def pooled(self) -> int:
        """Width of the pooled text embedding that goes with the time; 0 where there is none."""
        config = self.config
        if config.get("addition_embed_type") != "text_time":
            return 0
        return int(config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"])


MODELS = {
    "tiny": Model(
        {
            "sample_size": 16,
            "block_out_channels": (64, 128),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 64,
            "attention_head_dim": 4,
        },
        image_dims=(32, 32),
        resampler=64,
    ),
    # stable-diffusion-v1-5, unet/config.json
    "sd15": Model(
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        image_dims=(1024, 1280),
        resampler=768,
    ),
    # stable-diffusion-xl-base-1.0, unet/config.json
    "sdxl": Model(
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        image_dims=(1280, 1280),
        resampler=1280,
    ),
}


def build(model: Model, dtype: torch.dtype, device: torch.device) -> Any:
    """A UNet with random weights, drawn where and as what it will run."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return UNet2DConditionModel(**model.config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def clone(unet: Any) -> Any:
    """Another UNet around the same parameters: modules of its own, to be enabled or compiled apart, no memory for weights."""
    shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    return copy.deepcopy(unet, shared)


def load(unet: Any, model: Model, adapters: int) -> None:
    """One base adapter with 4 image tokens, or several of IP-Adapter Plus with 16 each; 0 leaves the UNet alone."""
    if not adapters:
        return
    pooled, hidden = model.image_dims
    if adapters == 1:
        made = [tiny_pipelines.base_adapter(unet, 0, pooled, device=unet.device)]
    else:
        made = [
            tiny_pipelines.plus_adapter(unet, seed, image_dim=hidden, width=model.resampler, device=unet.device)
            for seed in range(adapters)
        ]
    unet._load_ip_adapter_weights(made)
    unet.requires_grad_(False)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [SCALE] * adapters


class UNetInputs:
    """What a pipeline passes in every step of a generation: the same tensors each time, but for the timestep.

    side: of the picture in pixels, a multiple of 64; by default what the model was made for.
    """

    def __init__(
        self, model: Model, adapters: int, masked: bool, dtype: torch.dtype, device: torch.device, side: int | None = None
    ) -> None:
        generator = torch.Generator(device).manual_seed(1)
        config = model.config
        side = side or model.side
        size = side // VAE_FACTOR

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        self.sample = normal(BATCH, 4, size, size)
        self.text = normal(BATCH, 77, config["cross_attention_dim"])
        self.added: dict[str, Any] = {}
        if model.pooled:
            self.added["text_embeds"] = normal(BATCH, model.pooled)
            self.added["time_ids"] = torch.tensor([[side, side, 0, 0, side, side]] * BATCH, device=device, dtype=dtype)
        if adapters == 1:
            self.added["image_embeds"] = [normal(BATCH, 1, model.image_dims[0])]
        elif adapters:
            self.added["image_embeds"] = [normal(BATCH, 1, PLUS_STATES, model.image_dims[1]) for _ in range(adapters)]
        self.masks = _masks(adapters, side) if masked else None
        # a tensor whose elements are passed one after the other, as a scheduler's are
        self.timesteps = torch.arange(999, -1, -1, device=device)

    def double(self) -> "UNetInputs":
        """The same values in float64; the masks are exact as they are."""
        other = copy.copy(self)
        other.sample, other.text = self.sample.double(), self.text.double()
        other.added = {
            name: [tensor.double() for tensor in value] if isinstance(value, list) else value.double()
            for name, value in self.added.items()
        }
        return other

    def step(self, unet: nn.Module, i: int) -> Tensor:
        """[2, 4, H, W]: step `i` of a generation; after the last of 1,000 another generation begins."""
        options = {} if self.masks is None else {"cross_attention_kwargs": {"ip_adapter_masks": self.masks}}
        return unet(  # type: ignore[no-any-return]
            self.sample,
            self.timesteps[i % len(self.timesteps)],
            encoder_hidden_states=self.text,
            added_cond_kwargs=self.added,
            return_dict=False,
            **options,
        )[0]


def _masks(adapters: int, side: int) -> list[Tensor]:
    """As diffusers' documentation has it: [1, 1, H, W] in float32 on the CPU, one per adapter: stripes, at most halves."""
    stripes, parts = torch.zeros(adapters, 1, side, side), max(adapters, 2)
    for i in range(adapters):
        stripes[i, :, :, i * side // parts : (i + 1) * side // parts] = 1
    preprocessed = IPAdapterMaskProcessor().preprocess(stripes, height=side, width=side)
    return [mask[None] for mask in preprocessed]
