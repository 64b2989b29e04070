"""`processor.scale` where a compiled or captured graph can read it: a tensor for each layer, written before each step.

Stock reads the list while a graph is traced, so that each value is compiled in (diffusers `attention_processor.py`,
`IPAdapterAttnProcessor2_0.__call__`). A graph of ours reads the tensor: a new scale is new data. The list stays the user's.
"""

from typing import Any

import torch
from torch import Tensor
from torch._dynamo import mark_static_address

from .guards import number

IMAGES = 16
"""The images of one adapter that have a column from the start; more make a larger tensor, and a graph is compiled anew."""


class ScaleTable:
    """The scales of one layer as data: `tensor` [adapters, 1 + images], float32, rewritten in place.

    Column 0 is for an adapter without masks, column 1 + i for image i of one with masks. is_data: whether the scales are
    numbers that fit the masks; what diffusers reads otherwise, or refuses, is for its own code.
    """

    def __init__(self) -> None:
        self.tensor = torch.empty(0, 0)
        self.is_data = False
        self._known: Any = None

    def update(self, scales: Any, masks: list[Any] | None, device: torch.device) -> None:
        """Take over what a list holds now, for a step with these masks; does nothing where it is known."""
        if torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            # nobody reads the table, and sizes are tensors
            return
        images = _images(masks)
        rows = _rows(scales, images)
        now = device, images, rows
        if now == self._known:
            return
        # forgotten first: what raises in the middle leaves a table that nobody takes for written
        self._known = None
        self.is_data = rows is not None
        if rows is not None:
            self._write(rows, device)
        self._known = now

    def _write(self, rows: list[list[float]], device: torch.device) -> None:
        shape = len(rows), max(self.tensor.shape[1], 1 + IMAGES, *map(len, rows))
        if self.tensor.shape != shape or self.tensor.device != device:
            # one that was made in inference mode could not be written to outside
            with torch.inference_mode(False):
                self.tensor = torch.zeros(shape, dtype=torch.float32, device=device)
            mark_static_address(self.tensor, guard=False)
        padded = torch.tensor([row + [row[0]] * (shape[1] - len(row)) for row in rows], dtype=torch.float32, device="cpu")
        # from pinned memory the copy does not wait for what the GPU is doing
        self.tensor.copy_(padded.pin_memory() if device.type == "cuda" else padded, non_blocking=True)

    def branches(self, images: list[int | None]) -> Tensor:
        """[1, n] for the branches of each adapter: one for None, else one for each of so many images."""
        rows = [
            self.tensor[i : i + 1, :1] if count is None else self.tensor[i : i + 1, 1 : 1 + count]
            for i, count in enumerate(images)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _images(masks: list[Any] | None) -> tuple[int | None, ...] | None:
    """The images of each adapter's mask, None for an adapter without."""
    if not isinstance(masks, list):
        return None
    return tuple(mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 4 else None for mask in masks)


def _rows(scales: Any, images: tuple[int | None, ...] | None) -> list[list[float]] | None:
    """One row per adapter, or None where a scale is no number, or where diffusers refuses it."""
    if not isinstance(scales, list) or not scales or (images is not None and len(images) != len(scales)):
        return None
    rows = []
    for scale, count in zip(scales, images or (None,) * len(scales), strict=True):
        ones = scale if isinstance(scale, list) else [scale] * (count or 1)
        values = [value for value in map(number, ones) if value is not None]
        if len(values) != len(ones):
            return None
        if isinstance(scale, list) and (any(values) if count is None else len(values) != count):
            return None
        shared = 0.0 if isinstance(scale, list) else values[0]
        rows.append([shared, *values])
    return rows
