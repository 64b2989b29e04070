"""Checkpoints of every kind of IP-Adapter in the format of the original repositories, and image embeddings for them.

"light" has the layers of "base", and "plus-face" those of "plus": other weights, other names.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ipa_kernels.testing import tiny_pipelines

FACE_DIM = 24
"""Width of a face recogniser's embedding."""
HIDDEN_TOKENS = 9
"""Hidden states per image of an image encoder: 257 in CLIP ViT-H."""

Draw = Callable[..., Tensor]
Checkpoint = dict[str, dict[str, Tensor]]


def full(unet: Any, seed: int) -> Checkpoint:
    """Full: as many image tokens as the encoder has hidden states, through one feed-forward layer."""
    random, width = tiny_pipelines.Random(seed), tiny_pipelines.CROSS_ATTENTION_DIM
    projection = {
        "proj.0.weight": random(tiny_pipelines.IMAGE_EMBED_DIM, tiny_pipelines.IMAGE_EMBED_DIM),
        "proj.0.bias": random(tiny_pipelines.IMAGE_EMBED_DIM),
        "proj.2.weight": random(width, tiny_pipelines.IMAGE_EMBED_DIM),
        "proj.2.bias": random(width),
        "proj.3.weight": 1 + random(width),
        "proj.3.bias": random(width),
    }
    return {"image_proj": projection, "ip_adapter": tiny_pipelines.attention_weights(unet, random)}


def faceid(unet: Any, seed: int) -> Checkpoint:
    """FaceID: 4 tokens from the embedding of a face recogniser, and a LoRA on every attention of the UNet."""
    random = tiny_pipelines.Random(seed)
    weights = tiny_pipelines.attention_weights(unet, random) | lora_weights(unet, random)
    return {"image_proj": face_tokens(random), "ip_adapter": weights}


def faceid_plus(unet: Any, seed: int) -> Checkpoint:
    """FaceID Plus: the face embedding as queries of a four-layer resampler over the hidden states. No LoRA."""
    random, width = tiny_pipelines.Random(seed), tiny_pipelines.CROSS_ATTENTION_DIM
    resampler = {
        "proj_in.weight": random(width, tiny_pipelines.IMAGE_EMBED_DIM),
        "proj_in.bias": random(width),
        "proj_out.weight": random(width, width),
        "proj_out.bias": random(width),
        "norm_out.weight": 1 + random(width),
        "norm_out.bias": random(width),
        **tiny_pipelines.resampler_layers(random, width),
    }
    projection = {
        **face_tokens(random),
        **{f"perceiver_resampler.{name}": weight for name, weight in resampler.items()},
    }
    return {"image_proj": projection, "ip_adapter": tiny_pipelines.attention_weights(unet, random)}


def face_tokens(random: Any) -> dict[str, Tensor]:
    """Two layers that make 4 tokens of the embedding of a face recogniser."""
    width = tiny_pipelines.CROSS_ATTENTION_DIM
    return {
        "proj.0.weight": random(2 * FACE_DIM, FACE_DIM),
        "proj.0.bias": random(2 * FACE_DIM),
        "proj.2.weight": random(4 * width, 2 * FACE_DIM),
        "proj.2.bias": random(4 * width),
        "norm.weight": 1 + random(width),
        "norm.bias": random(width),
    }


def lora_weights(unet: Any, random: Any, rank: int = 2) -> dict[str, Tensor]:
    """The LoRA of a FaceID checkpoint: numbered by attention processor, self-attention included."""
    weights = {}
    for i, name in enumerate(name for name in unet.attn_processors if not name.startswith("encoder_hid_proj")):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for kind in ("q", "k", "v", "out"):
            linear = attention.to_out[0] if kind == "out" else getattr(attention, f"to_{kind}")
            weights[f"{i}.to_{kind}_lora.down.weight"] = random(rank, linear.in_features)
            weights[f"{i}.to_{kind}_lora.up.weight"] = random(linear.out_features, rank)
    return weights


CHECKPOINTS: dict[str, Callable[[Any, int], Checkpoint]] = {
    "base": tiny_pipelines.base_adapter,
    "light": tiny_pipelines.base_adapter,
    "plus": tiny_pipelines.plus_adapter,
    "plus-face": tiny_pipelines.plus_adapter,
    "full": full,
    "faceid": faceid,
    "faceid-plus": faceid_plus,
}

SETS = (
    ("base",),
    ("plus",),
    ("full",),
    ("faceid",),
    ("faceid-plus",),
    ("base", "plus"),
    ("faceid", "plus-face"),
    ("light", "full", "faceid-plus"),
)
"""What is loaded together: each kind alone, two, two of which one brings a LoRA, three."""


def load(pipe: Any, *names: str, seed: int = 0) -> None:
    """Load adapters by kind; their scale is 0.7."""
    states = [CHECKPOINTS[name](pipe.unet, seed + i) for i, name in enumerate(names)]
    tiny_pipelines.load(pipe, *states)
    pipe.set_ip_adapter_scale([0.7] * len(names))


def embeddings(names: tuple[str, ...], draw: Draw, halves: int, images: int, *, negative: bool = True) -> list[Tensor]:
    """`ip_adapter_image_embeds`: [halves, images, ...] per adapter, the first half for the negative prompt (or zeros)."""
    shapes = {
        "base": (tiny_pipelines.IMAGE_EMBED_DIM,),
        "light": (tiny_pipelines.IMAGE_EMBED_DIM,),
        "faceid": (FACE_DIM,),
        "faceid-plus": (FACE_DIM,),
    }
    embeds = [draw(halves, images, *shapes.get(name, (HIDDEN_TOKENS, tiny_pipelines.IMAGE_EMBED_DIM))) for name in names]
    if halves == 2 and not negative:
        for tensor in embeds:
            tensor[0] = 0
    return embeds


def set_face_embeddings(pipe: Any, draw: Draw, rows: int, images: int) -> None:
    """What a user of FaceID Plus sets on its projection: the hidden states [rows, images, tokens, width] of the images."""
    for layer in pipe.unet.encoder_hid_proj.image_projection_layers:
        if hasattr(layer, "clip_embeds"):
            row = draw(1, images, HIDDEN_TOKENS, tiny_pipelines.IMAGE_EMBED_DIM)
            layer.clip_embeds = row.expand(rows, -1, -1, -1).contiguous()
            layer.shortcut = True
            layer.shortcut_scale = 0.8


def seeded(seed: int, dtype: torch.dtype = torch.float32) -> Draw:
    """Normal random tensors of any shape, from a generator of their own; drawn in float32 whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
