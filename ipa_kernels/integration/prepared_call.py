"""A call of a layer that ran, ready to run again in the steps that follow under the same entry. It keeps no input alive."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.api import run
from ..ops.validation import Problem
from ..ops.weights import make_launch
from .guards import LayerGuard, TensorGuard, is_plain, number


class PreparedCall:
    """Fast path: if nothing but hidden_states changed since this layer's last call under an entry, skip validation and launch.

    guard: of what the layer computes with; impl: what ran; option: what was asked for; modes: as `modes_of`
    before it; values: how many kept values it stands for; depth: of the layer's call below that of the UNet
    (`steps.depth_below`); computed: its keys, values and mask vectors.
    """

    __slots__ = (
        "_arguments", "_dtype", "_heads", "_images", "_launch", "_masks", "_query", "_scales", "_shape", "_text", "_versions",
        "computed", "depth", "device", "guard", "impl", "modes", "option", "reason", "values",
    )  # fmt: skip

    def __init__(self, hidden: Tensor, scales: list[Any], inputs: tuple[Tensor, Any, Any], modes: tuple[Any, ...]) -> None:
        """Raises Doubtful where something cannot be told apart from what it may become."""
        if type(hidden) is not Tensor or hidden.is_meta:
            raise Doubtful
        text, images, masks = inputs
        self.modes = modes
        self._shape, self._dtype, self.device = hidden.shape, hidden.dtype, hidden.device
        self._scales = [list(map(_seen, scale)) if isinstance(scale, list) else _seen(scale) for scale in scales]
        # an adapter of scale 0 is not read: whose its inputs are is known, not what is in them
        reads = [any(scale) if isinstance(scale, list) else bool(scale) for scale in self._scales]
        self._text = _guard(text, True)
        self._images = [_guard(image, read) for image, read in zip(images, reads, strict=True)]
        self._masks: list[TensorGuard | _Identity | None] | None = None
        if masks is not None:
            self._masks = [None if mask is None else _guard(mask, read) for mask, read in zip(masks, reads, strict=True)]

    @classmethod
    def of(
        cls, hidden: Tensor, scales: list[Any], inputs: tuple[Tensor, Any, Any], modes: tuple[Any, ...]
    ) -> "PreparedCall | None":
        """Of a call before anything is computed; None where something is in doubt."""
        try:
            return cls(hidden, scales, inputs, modes)
        except Doubtful:
            return None

    def prepare(self, problem: Problem, guard: LayerGuard, impl: str, option: str, reason: str, depth: int | None) -> bool:
        """Keep what was computed, to run again; False where that cannot be."""
        query = problem.query
        if not is_plain(query):
            return False
        batch, heads, queries, head_dim = query.shape
        self.guard = guard
        self.impl, self.option, self.reason, self.depth = impl, option, reason, depth
        masks = [mask for mask in problem.masks if mask is not None]
        self.values = len(problem.keys) + len(masks)
        self.computed = (*problem.keys, *problem.values, *masks)
        self._versions = [tensor._version for tensor in self.computed]
        self._query = torch.Size((batch, queries, heads * head_dim)), query.dtype, query.device
        self._heads = heads
        self._arguments = problem.keys, problem.values, problem.scales, problem.masks, problem.attn_mask, problem.softmax_scale
        self._launch = make_launch(problem) if impl == "triton" else None
        return True

    def matches(self, hidden: Any, states: Any, masks: Any, scales: Any) -> bool:
        """Whether a call reads the same inputs and scales."""
        if type(states) is not tuple or len(states) != 2 or not self._text.matches(states[0]):
            return False
        if type(hidden) is not Tensor or hidden.shape != self._shape:
            return False
        if hidden.dtype is not self._dtype or hidden.device != self.device:
            return False
        images = states[1]
        if type(images) not in (list, tuple) or len(images) != len(self._images) or not _are_same(scales, self._scales):
            return False
        for guard, image in zip(self._images, images, strict=True):
            if not guard.matches(image):
                return False
        if masks is None or self._masks is None:
            return masks is self._masks
        if type(masks) is not list or len(masks) != len(self._masks):
            return False
        for known, mask in zip(self._masks, masks, strict=True):
            if mask is not None if known is None else not known.matches(mask):
                return False
        return True

    def takes(self, query: Any) -> bool:
        """Whether a query [B, M, H·D] is like the first, and nobody has written to what was computed."""
        shape, dtype, device = self._query
        if type(query) is not Tensor or query.shape != shape or query.dtype is not dtype or query.device != device:
            return False
        if query.is_neg():
            return False
        return [tensor._version for tensor in self.computed] == self._versions

    def attend(self, query: Tensor) -> Tensor:
        """[B, M, H·D] to the same, before the output projection."""
        if self._launch is not None:
            return self._launch.packed(query)
        batch, queries, channels = query.shape
        heads = query.view(batch, queries, self._heads, -1).transpose(1, 2)
        return run(Problem(heads, *self._arguments), self.impl).transpose(1, 2).reshape(batch, queries, channels)


class Doubtful(Exception):
    """A call reads something that may change without a trace: it is prepared anew each time."""


class _Identity:
    """A tensor that is not read."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)

    def matches(self, tensor: Any) -> bool:
        return self.tensor() is tensor


def _guard(tensor: Tensor, read: bool) -> TensorGuard | _Identity:
    if not read:
        return _Identity(tensor)
    if not is_plain(tensor):
        raise Doubtful
    return TensorGuard(tensor)


class _SeenTensor(NamedTuple):
    """A tensor that is the scale of an adapter, as it was."""

    dtype: torch.dtype
    value: float

    def __bool__(self) -> bool:
        return self.value != 0


def _seen(scale: Any) -> Any:
    """A scale as it is now, to be compared: a number itself, of a tensor what it holds. Raises Doubtful for other things."""
    value = number(scale)
    if value is None:
        raise Doubtful
    return _SeenTensor(scale.dtype, value) if isinstance(scale, Tensor) else scale


def _are_same(scales: Any, known: list[Any]) -> bool:
    """By type and value: comparing tensors, which a scale may become, would wait for a GPU."""
    if not isinstance(scales, list) or len(scales) != len(known):
        return False
    for scale, before in zip(scales, known, strict=True):
        if isinstance(before, list):
            if not _are_same(scale, before):
                return False
        elif isinstance(before, _SeenTensor):
            if not isinstance(scale, Tensor) or (scale.dtype, number(scale)) != before:
                return False
        elif type(scale) is not type(before) or scale != before:
            return False
    return True
