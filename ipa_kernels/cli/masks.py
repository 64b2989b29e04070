"""Region masks as picture files: light where an image applies. What diffusers would bend silently is a mistake here."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image, ImageChops
from torch import Tensor

from .errors import UserError
from .loading import read_picture

_TINT = 32
"""Levels of 255 by which the channels of a grey picture may differ, after JPEG."""


def read_mask(path: str) -> Image.Image:
    """A grey picture. Raises UserError for colours, which are mostly a picture in the wrong place, and for transparency."""
    picture = read_picture(path, "--mask", "RGBA")
    red, green, blue, alpha = picture.split()
    if alpha.getextrema() != (255, 255):
        raise UserError(f"--mask {path}: has transparent parts; needs a grey picture, white where its image applies")
    if max(max(ImageChops.difference(red, other).tobytes()) for other in (green, blue)) > _TINT:
        raise UserError(f"--mask {path}: a picture in colours; needs a grey one, white where its image applies")
    return picture.convert("L")


def mask_tensor(masks: Sequence[Image.Image], paths: Sequence[str], width: int, height: int) -> Tensor:
    """The masks of one adapter's images in the form that pipelines take, [1, images, height, width] of 0 and 1.

    Raises UserError for a mask whose aspect ratio is not the picture's, to within a pixel: diffusers would stretch it.
    """
    for mask, path in zip(masks, paths, strict=True):
        if abs(mask.height * width / mask.width - height) >= 1:
            raise UserError(
                f"--mask {path}: {mask.width}x{mask.height}, the picture {width}x{height}: needs the picture's aspect ratio"
            )
    tensor: Tensor = IPAdapterMaskProcessor().preprocess(list(masks), height=height, width=width)
    return tensor.reshape(1, len(masks), height, width)


def check_layout(pipe: Any, width: int, height: int) -> None:
    """Raises UserError where diffusers would misplace masks: it guesses a layer's size from its area and the aspect ratio.

    A mask of the right half has to arrive as a right half in every layer.
    """
    mask = torch.zeros(1, height, width)
    mask[..., width // 2 :] = 1
    blocks = pipe.unet.config.down_block_types
    rows, columns = height // pipe.vae_scale_factor, width // pipe.vae_scale_factor
    for i, block in enumerate(blocks):
        if "CrossAttn" in block or i == len(blocks) - 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # diffusers' own, of the cases that it notices
                layer = IPAdapterMaskProcessor.downsample(mask, 1, rows * columns, 1).view(rows, columns)
            if (layer - layer[0]).abs().max() > 0.5 or not layer.any():
                raise UserError(f"--mask: diffusers misplaces masks in a picture of {width}x{height}; try multiples of 64")
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
