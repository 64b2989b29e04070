"""Small pipelines and IP-Adapters with random weights, built in code: what the demo and the tests run without a hub.

The architectures are diffusers' own, only narrow; the adapters are state dicts in the checkpoint format of the original
IP-Adapter repository, so that `load_ip_adapter` does all the work that it does for real weights.
"""

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor

CROSS_ATTENTION_DIM = 64
IMAGE_EMBED_DIM = 32
"""Width of the pooled embeddings of the image encoder, and of its hidden states."""


def stable_diffusion(seed: int = 0, *, encoders: bool = False) -> Any:
    """A StableDiffusionPipeline like SD 1.5: the same number of heads at every width. With CLIP encoders on request."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        block_out_channels=(64, 128),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CROSS_ATTENTION_DIM,
        attention_head_dim=4,  # the number of heads, in configs of this age
    )
    parts = _encoders() if encoders else dict.fromkeys(("tokenizer", "text_encoder", "image_encoder", "feature_extractor"))
    return StableDiffusionPipeline(
        unet=unet,
        vae=_vae(),
        scheduler=_scheduler(),
        safety_checker=None,
        requires_safety_checker=False,
        **parts,
    )


def stable_diffusion_xl(seed: int = 0, *, encoders: bool = False) -> Any:
    """A StableDiffusionXLPipeline: head dim 16 at every width, several blocks per layer, time ids and pooled text.

    With CLIP encoders on request.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CROSS_ATTENTION_DIM,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + IMAGE_EMBED_DIM,
    )
    names = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "image_encoder", "feature_extractor")
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=_vae(),
        scheduler=_scheduler(),
        add_watermarker=False,
        **(_encoders_xl() if encoders else dict.fromkeys(names)),
    )


def base_adapter(
    unet: Any, seed: int = 0, image_dim: int = IMAGE_EMBED_DIM, device: torch.device | str = "cpu"
) -> dict[str, dict[str, Tensor]]:
    """The checkpoint of a base IP-Adapter: 4 image tokens from one linear projection of the pooled embedding."""
    random = Random(seed, device)
    text_dim = unet.config.cross_attention_dim
    projection = {
        "proj.weight": random(4 * text_dim, image_dim),
        "proj.bias": random(4 * text_dim),
        "norm.weight": 1 + random(text_dim),
        "norm.bias": random(text_dim),
    }
    return {"image_proj": projection, "ip_adapter": attention_weights(unet, random)}


def plus_adapter(
    unet: Any,
    seed: int = 0,
    tokens: int = 16,
    image_dim: int = IMAGE_EMBED_DIM,
    width: int = 64,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, Tensor]]:
    """The checkpoint of an IP-Adapter Plus: `tokens` image tokens from a four-layer resampler over the hidden states.

    width: of the resampler, a multiple of the 64 channels of its heads.
    """
    random = Random(seed, device)
    text_dim = unet.config.cross_attention_dim
    projection = {
        "latents": random(1, tokens, width),
        "proj_in.weight": random(width, image_dim),
        "proj_in.bias": random(width),
        "proj_out.weight": random(text_dim, width),
        "proj_out.bias": random(text_dim),
        "norm_out.weight": 1 + random(text_dim),
        "norm_out.bias": random(text_dim),
        **resampler_layers(random, width),
    }
    return {"image_proj": projection, "ip_adapter": attention_weights(unet, random)}


def load(pipe: Any, *adapters: dict[str, dict[str, Tensor]]) -> None:
    """`load_ip_adapter` with checkpoints from memory; no image encoder is looked for."""
    blanks = [""] * len(adapters)
    pipe.load_ip_adapter(list(adapters), subfolder=blanks, weight_name=blanks, image_encoder_folder=None)


class Random:
    """Random weights, scaled by their fan-in so that activations keep their size."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.generator.device) / math.sqrt(shape[-1])


def attention_weights(unet: Any, random: Random) -> dict[str, Tensor]:
    """to_k_ip and to_v_ip of every cross-attention, numbered as in the original checkpoints: 1, 3, 5, ..."""
    weights: dict[str, Tensor] = {}
    cross = [name for name in unet.attn_processors if name.endswith("attn2.processor") and "motion_modules" not in name]
    for i, name in enumerate(cross):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        with torch.device("meta"):
            blank = IPAdapterAttnProcessor2_0(attention.inner_dim, attention.cross_attention_dim).state_dict()
        for kind in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * i + 1}.{kind}.weight"] = random(*blank[f"{kind}.0.weight"].shape)
    return weights


def resampler_layers(random: Random, width: int) -> dict[str, Tensor]:
    """The four layers of a resampler of IP-Adapter Plus."""
    layers: dict[str, Tensor] = {}
    for i in range(4):
        for norm in (f"layers.{i}.0.norm1", f"layers.{i}.0.norm2", f"layers.{i}.1.0"):
            layers |= {f"{norm}.weight": 1 + random(width), f"{norm}.bias": random(width)}
        layers |= {
            f"layers.{i}.0.to_q.weight": random(width, width),
            f"layers.{i}.0.to_kv.weight": random(2 * width, width),
            f"layers.{i}.0.to_out.weight": random(width, width),
            f"layers.{i}.1.1.weight": random(4 * width, width),
            f"layers.{i}.1.3.weight": random(width, 4 * width),
        }
    return layers


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        sample_size=32,
    )


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


def _encoders() -> dict[str, Any]:
    """A byte-level CLIP tokenizer, and tiny random CLIP encoders for text and images."""
    from transformers import CLIPTextModel

    tokenizer = _tokenizer()
    text_encoder = CLIPTextModel(_text_config(tokenizer, CROSS_ATTENTION_DIM)).eval()
    return {"tokenizer": tokenizer, "text_encoder": text_encoder, **_image_encoder()}


def _encoders_xl() -> dict[str, Any]:
    """As above, with two text encoders, each of half the width of the UNet's text embeddings."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = _tokenizer()
    config = _text_config(tokenizer, CROSS_ATTENTION_DIM // 2)
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "text_encoder": CLIPTextModel(config).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(config).eval(),
        **_image_encoder(),
    }


def _tokenizer() -> Any:
    """A CLIP tokenizer whose words are bytes, read from files: its constructors differ between transformers 4 and 5."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    with TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _text_config(tokenizer: Any, width: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=IMAGE_EMBED_DIM,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _image_encoder() -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    vision = CLIPVisionConfig(
        hidden_size=IMAGE_EMBED_DIM,
        intermediate_size=2 * IMAGE_EMBED_DIM,
        projection_dim=IMAGE_EMBED_DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return {
        "image_encoder": CLIPVisionModelWithProjection(vision).eval(),
        "feature_extractor": CLIPImageProcessor(crop_size=32, size=32),
    }
