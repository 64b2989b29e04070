"""The IP-Adapter in a UNet: its first weights, its parameters, and the file format that `load_ip_adapter` reads.

The format is that of the original repository (https://github.com/tencent-ailab/IP-Adapter): "image_proj", the projection of the
image embedding, and "ip_adapter", to_k_ip and to_v_ip of each cross-attention under 1, 3, 5, ... in the order of
`unet.attn_processors`. diffusers' loader is `diffusers.loaders.unet.UNet2DConditionLoadersMixin._load_ip_adapter_weights`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from safetensors.torch import save_file
from torch import Tensor, nn

from .arguments import UsageError

Checkpoint = dict[str, dict[str, Tensor]]

_PROJECTION = "encoder_hid_proj.image_projection_layers.0."
_PLUS = (
    (r"^layers\.(\d)\.ln0\.", r"layers.\1.0.norm1."),
    (r"^layers\.(\d)\.ln1\.", r"layers.\1.0.norm2."),
    (r"^layers\.(\d)\.attn\.to_q\.", r"layers.\1.0.to_q."),
    (r"^layers\.(\d)\.attn\.to_out\.0\.", r"layers.\1.0.to_out."),
    (r"^layers\.(\d)\.ff\.0\.", r"layers.\1.1.0."),
    (r"^layers\.(\d)\.ff\.1\.net\.0\.proj\.", r"layers.\1.1.1."),
    (r"^layers\.(\d)\.ff\.1\.net\.2\.", r"layers.\1.1.3."),
)
"""Names of diffusers' resampler, and of the original one."""


def initial(unet: Any, kind: str, image_encoder: Any, tokens: int) -> Checkpoint:
    """An adapter to begin with: a random projection, and to_k_ip and to_v_ip that are the UNet's own to_k and to_v.

    As in the paper (section 4.1.2): what reads text reads image tokens to begin with.
    """
    width = unet.config.cross_attention_dim
    projection: nn.Module
    if kind == "plus":
        hidden = image_encoder.config.hidden_size
        # the published ones: 768 in 12 heads for SD 1.5, 1280 in 20 for SDXL; a head has 64 channels
        inner = max(64, min(width, 1280) // 64 * 64)
        projection = IPAdapterPlusImageProjection(hidden, width, inner, dim_head=64, heads=inner // 64, num_queries=tokens)
    else:
        # diffusers takes the number of tokens of a base adapter to be 4
        projection = ImageProjection(image_encoder.config.projection_dim, width, num_image_text_embeds=4)
    tensors = {_PROJECTION + name: tensor for name, tensor in projection.state_dict().items()}
    for name in _cross_attentions(unet):
        attention = unet.get_submodule(name)
        tensors |= {f"{name}.processor.to_{part}_ip.0.weight": getattr(attention, f"to_{part}").weight for part in "kv"}
    # copies: diffusers makes parameters of the very tensors that it loads, and to_k and to_v stay as they are
    return to_checkpoint(unet, {name: tensor.detach().clone() for name, tensor in tensors.items()})


def install(pipe: Any, adapter: Checkpoint | Path) -> dict[str, nn.Parameter]:
    """Load an adapter as any pipeline does; the UNet is frozen but for it. Returns the adapter's parameters by their names."""
    options = {"image_encoder_folder": None, "subfolder": ""}
    if isinstance(adapter, Path):
        try:
            pipe.load_ip_adapter(str(adapter.parent), weight_name=adapter.name, **options)
        except Exception as error:  # of files, pickles and shapes, each with errors of its own
            raise UsageError(f"--init-adapter {adapter}: {error}") from error
        _check(pipe, adapter)
    else:
        pipe.load_ip_adapter(adapter, weight_name="", **options)
    pipe.unet.requires_grad_(False)
    prefixes = (_PROJECTION, *(f"{name}.processor." for name in _cross_attentions(pipe.unet)))
    return {
        name: parameter.requires_grad_(True) for name, parameter in pipe.unet.named_parameters() if name.startswith(prefixes)
    }


def _check(pipe: Any, file: Path) -> None:
    """Raise UsageError unless a file held an adapter of a kind that is trained here, for this image encoder."""
    projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
    config = pipe.image_encoder.config
    if isinstance(projection, ImageProjection):
        takes, gives = projection.image_embeds.in_features, config.projection_dim
    elif isinstance(projection, IPAdapterPlusImageProjection):
        takes, gives = projection.proj_in.in_features, config.hidden_size
    else:
        raise UsageError(f"--init-adapter {file}: a {type(projection).__name__}; base and plus adapters are trained here")
    if takes != gives:
        raise UsageError(f"--init-adapter {file}: made for embeddings of {takes} channels, the image encoder gives {gives}")


def to_checkpoint(unet: Any, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """The adapter's parameters, by their names in the UNet, in the original format."""
    layers = {}
    for i, name in enumerate(_cross_attentions(unet)):
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * i + 1}.{part}.weight"] = tensors[f"{name}.processor.{part}.0.weight"]
    named = {name.removeprefix(_PROJECTION): tensor for name, tensor in tensors.items() if name.startswith(_PROJECTION)}
    projection = _plus(named) if "latents" in named else {k.replace("image_embeds.", "proj."): v for k, v in named.items()}
    return {"image_proj": projection, "ip_adapter": layers}


def _plus(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The resampler, whose keys and values are one matrix in the original."""
    projection = {}
    for name, tensor in named.items():
        if name.endswith("attn.to_k.weight"):
            both = [tensor, named[name.replace("to_k", "to_v")]]
            projection[name.replace("attn.to_k", "0.to_kv")] = torch.cat(both)
        elif not name.endswith("attn.to_v.weight"):
            for ours, original in _PLUS:
                name = re.sub(ours, original, name)
            projection[name] = tensor
    return projection


def save(adapter: Checkpoint, file: Path) -> None:
    """Write a .safetensors file for `load_ip_adapter`."""
    flat = {f"{part}.{name}": tensor for part, tensors in adapter.items() for name, tensor in tensors.items()}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in flat.items()}, file)


def _cross_attentions(unet: Any) -> list[str]:
    """The attentions over text, in the order in which the format numbers them."""
    return [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
