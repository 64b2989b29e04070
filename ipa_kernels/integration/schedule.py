"""Where one generation ends and the next begins, told by the timesteps of the steps."""

from typing import Any

import torch
from torch import Tensor

_UNKNOWN = (
    "timestep: a tensor of several values, or of each step's own, does not tell a later step from a new generation; pass "
    "elements of one tensor (for t in scheduler.timesteps)"
)
_EARLIER = (
    "timestep: earlier than the one before, which looks like a new generation; pass elements of one tensor "
    "(for t in scheduler.timesteps)"
)
_AGAIN = (
    "timestep: the same again with the same prompt and images, which looks like a new generation; tiles may have a prompt "
    "tensor each, made once"
)


class Schedule:
    """Tells the next step of a generation from the first step of another, without reading a timestep from a GPU.

    reason: why the last step was taken for the first of a generation, in case it is none; "" where it follows another.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.timesteps: object = None
        self.position = float("-inf")
        self.conditions: set[tuple[int, ...]] = set()

    def follows(self, timestep: Any, condition: tuple[int, ...]) -> bool:
        """Whether this step is later than all before, or as late and for another condition."""
        timesteps, position = _position(timestep)
        same = timesteps is not None and _is_same(timesteps, self.timesteps)
        self.reason = ""
        if same and position == self.position and condition not in self.conditions:
            self.conditions.add(condition)
            return True
        later = same and position > self.position
        if not same:
            self.reason = _UNKNOWN
        elif not later:
            self.reason = _AGAIN if position == self.position else _EARLIER
        self.timesteps, self.position, self.conditions = timesteps, position, {condition}
        return later


def _position(timestep: Any) -> tuple[object, float]:
    """What a timestep is an element of, and how late it is there; (None, 0) where that cannot be told.

    Pipelines iterate over one tensor of timesteps, so that its elements are views: their offsets tell their order.
    """
    if isinstance(timestep, int | float):
        return "numbers", -float(timestep)
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        # sizes are tensors, whose values are not for a trace to depend on
        return None, 0.0
    if not isinstance(timestep, Tensor) or timestep.numel() == 0:
        return None, 0.0
    is_one = timestep.numel() == 1 or timestep.stride(0) == 0
    if is_one and timestep.untyped_storage().nbytes() > timestep.element_size():
        return timestep, float(timestep.storage_offset())
    if timestep.device.type == "cpu" and timestep.numel() == 1:
        return "numbers", -float(timestep)
    return None, 0.0


def _is_same(timesteps: object, others: object) -> bool:
    if isinstance(timesteps, Tensor) and isinstance(others, Tensor):
        # both are alive, so that equal addresses are one storage
        return timesteps.untyped_storage().data_ptr() == others.untyped_storage().data_ptr()
    return timesteps == others if isinstance(timesteps, str) and isinstance(others, str) else False
