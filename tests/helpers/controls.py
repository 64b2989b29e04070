"""What a user can turn: scales, masks, numbers of images and prompts, guidance, callbacks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
    SDXLControlnetCFGCutoffCallback,
)
from torch import Tensor

Masks = Callable[[int, int], list[Any]]


@dataclass(frozen=True)
class Control:
    """One setting.

    scales: from the number of adapters to what `set_ip_adapter_scale` takes. masks: from (adapters, rows of the UNet's batch)
    to `ip_adapter_masks`. stock: why every layer runs diffusers' own code, "" where it need not. raises: whether diffusers
    refuses the setting with so many adapters.
    """

    scales: Callable[[int], Any] = lambda adapters: [0.7] * adapters
    masks: Masks | None = None
    images: int = 1
    negative: bool = True
    prompts: int = 1
    images_per_prompt: int = 1
    guidance: float = 5.0
    callback: str = ""
    stock: str = ""
    raises: Callable[[int], bool] = lambda adapters: False


def binary(images: int = 1, height: int = 16, width: int = 16, rows: int = 1, seed: int = 0) -> Tensor:
    """[rows, images, height, width] of 0 and 1, overlapping; bicubic resizing makes values outside [0, 1] of them."""
    return (torch.rand(rows, images, height, width, generator=torch.Generator().manual_seed(seed)) > 0.5).float()


def soft(images: int = 1) -> Tensor:
    return torch.rand(1, images, 16, 16, generator=torch.Generator().manual_seed(3))


def always(adapters: int) -> bool:
    return True


CONTROLS: dict[str, Control] = {
    "one scale": Control(),
    "a scale per adapter": Control(scales=lambda n: [0.3 + 0.5 * i for i in range(n)]),
    "scale 0": Control(scales=lambda n: [0.0] * n),
    "scale 0 for the first": Control(scales=lambda n: [0.0, *[0.6] * (n - 1)]),
    "negative scale": Control(scales=lambda n: [-0.6] * n),
    "integer scale": Control(scales=lambda n: [1] * n),
    "scale 42": Control(scales=lambda n: [42.0] * n),
    "InstantStyle": Control(scales=lambda n: [{"up": 1.1}, *[{"down": 0.4, "mid": -0.2}] * (n - 1)]),
    "too many scales": Control(scales=lambda n: [0.5] * (n + 1), raises=always),
    "scale changed by a callback": Control(callback="scale"),
    "scale cut off": Control(callback="scale cut-off", raises=lambda n: n > 1),
    "mask": Control(masks=lambda n, rows: [binary(seed=i) for i in range(n)]),
    "mask for the last alone": Control(masks=lambda n, rows: [*[None] * (n - 1), binary()]),
    "no mask in the list": Control(masks=lambda n, rows: [None] * n),
    "masks for two images": Control(images=2, masks=lambda n, rows: [binary(2, seed=i) for i in range(n)]),
    "masks and scales for two images": Control(
        images=2,
        masks=lambda n, rows: [binary(2, seed=i) for i in range(n)],
        scales=lambda n: [[0.5, 0.0], *[[-0.4, 1.2]] * (n - 1)],
    ),
    "scales for two images, no masks": Control(images=2, scales=lambda n: [[0.5, 0.2]] * n, raises=always),
    "soft overlapping masks": Control(images=2, masks=lambda n, rows: [soft(2)] * n),
    "masks of another aspect ratio": Control(masks=lambda n, rows: [binary(1, 16, 23)] * n),
    "mask per row": Control(masks=lambda n, rows: [binary(rows=rows, seed=i) for i in range(n)]),
    "one mask too many": Control(masks=lambda n, rows: [binary()] * (n + 1), raises=always),
    "mask without its image": Control(masks=lambda n, rows: [binary(2)] * n, raises=always),
    "mask of three dimensions": Control(masks=lambda n, rows: [binary()[0]] * n, raises=always),
    "three images in one softmax": Control(images=3),
    "negative embeddings of zero": Control(negative=False),
    "two images per prompt": Control(images_per_prompt=2),
    "two prompts": Control(prompts=2),
    "two prompts, two images each, masks": Control(prompts=2, images_per_prompt=2, masks=lambda n, rows: [binary()] * n),
    "no guidance": Control(guidance=1.0),
    "guidance cut off": Control(callback="guidance cut-off", stock="batch sizes of queries, text and images"),
}


def callback(kind: str, pipe: Any) -> Any:
    """The `callback_on_step_end` of a control, on the first of two steps."""
    if kind == "scale":

        def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            adapters = len(pipe.unet.encoder_hid_proj.image_projection_layers)
            pipe.set_ip_adapter_scale([0.2] * adapters)
            return tensors

        return change
    if kind == "scale cut-off":
        return IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    known = pipe._callback_tensor_inputs
    families = (SDXLControlnetCFGCutoffCallback, SDXLCFGCutoffCallback, SDCFGCutoffCallback)
    family = next(family for family in families if set(family.tensor_inputs) <= set(known))
    return family(cutoff_step_ratio=None, cutoff_step_index=0)
