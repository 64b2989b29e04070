"""A call that ran, ready to run again: in the steps of a generation that follow, a layer compares instead of preparing.

What is compared is everything that the first call read; what differs sends the call back through all checks. No prompt, image,
mask or module is kept alive by it.
"""

import weakref
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..ops.api import make_launch, run
from ..ops.dispatch import allows_tf32
from ..ops.validation import Problem
from .conditioning_cache import Memory
from .guards import Snapshot, State, is_hooked, is_plain
from .image_projection import pure_state
from .scale_table import number
from .state import Layer

_COMPARABLE = {bool, int, float, str, type(None)}


class Photo:
    """Everything that a call of a layer reads besides its queries and its text, as it was before the call read it.

    Raises Doubtful where something cannot be told apart from what it may become.
    """

    def __init__(self, processor: Any, attn: Attention, hidden_states: Tensor, images: Any, masks: Any, impl: str) -> None:
        if torch.is_grad_enabled() or type(hidden_states) is not Tensor or hidden_states.is_meta:
            raise Doubtful
        if not isinstance(attn.to_q, nn.Module) or is_hooked(attn.to_q):
            raise Doubtful
        self._impl = impl
        self._kind = type(processor)
        self._attn: Any = weakref.ref(attn)
        self._settings = _settings(attn)
        self._kinds = list(map(type, self._settings))
        if not all(kind in _COMPARABLE or issubclass(kind, nn.Module) for kind in self._kinds):
            raise Doubtful
        self._hidden = hidden_states.shape, hidden_states.dtype, hidden_states.device
        self._modes = _modes(hidden_states)
        self._scales = [list(map(_seen, scale)) if isinstance(scale, list) else _seen(scale) for scale in processor.scale]
        self._masked = None if masks is None else len(masks)
        inputs = [*images, *(masks or ())]
        # an adapter of scale 0 is not read: whose its inputs are is known, not what is in them
        read = [any(scale) if isinstance(scale, list) else bool(scale) for scale in self._scales]
        self._inputs = [_Input(tensor, reads) for tensor, reads in zip(inputs, read * 2, strict=False)]
        self._projections: list[_Projection | None] = [_Projection(attn.to_k), _Projection(attn.to_v)]
        for names in (processor.to_k_ip, processor.to_v_ip):
            self._projections += [_Projection(module) if reads else None for module, reads in zip(names, read, strict=True)]

    def matches(self, processor: Any, attn: Any, hidden_states: Tensor, images: Any, masks: Any, impl: str) -> bool:
        """Whether a call, with the same text and no attention mask, would read the same."""
        if impl != self._impl or type(processor) is not self._kind or self._attn() is not attn:
            return False
        if torch.is_grad_enabled() or type(hidden_states) is not Tensor:
            return False
        if (hidden_states.shape, hidden_states.dtype, hidden_states.device) != self._hidden:
            return False
        settings = _settings(attn)
        # types first: comparing tensors would wait for a GPU, and has no one answer
        if list(map(type, settings)) != self._kinds or settings != self._settings or _modes(hidden_states) != self._modes:
            return False
        modules: dict[str, Any] = attn._modules
        to_q = modules.get("to_q")
        if not _are_same_scales(processor.scale, self._scales) or to_q is None or is_hooked(to_q):
            return False
        if type(images) not in (list, tuple) or len(images) != len(self._scales):
            return False
        if (None if masks is None else len(masks) if type(masks) is list else -1) != self._masked:
            return False
        for known, tensor in zip(self._inputs, images if masks is None else (*images, *masks), strict=True):
            if not known.matches(tensor):
                return False
        own: dict[str, Any] = processor._modules
        adapters: list[Any] = [own.get("to_k_ip"), own.get("to_v_ip")]
        if None in adapters:
            return False
        places = [modules.get("to_k"), modules.get("to_v")]
        for each in adapters:
            places += each._modules.values()
        if len(places) != len(self._projections):
            return False
        return all(known is None or known.matches(module) for known, module in zip(self._projections, places, strict=True))


class Doubtful(Exception):
    """A call reads something that may change without a trace: it is prepared anew each time."""


class Ready:
    """A photo with what the call found: keys, values and weights.

    values: how many remembered values it stands for. reason: of the report.
    """

    def __init__(self, photo: Photo, problem: Problem, impl: str, reason: str) -> None:
        batch, heads, queries, head_dim = problem.query.shape
        if not is_plain(problem.query):
            raise Doubtful
        self.photo, self.impl, self.reason = photo, impl, reason
        masks = [mask for mask in problem.masks if mask is not None]
        self.values = len(problem.keys) + len(masks)
        self._computed = [(tensor, tensor._version) for tensor in (*problem.keys, *problem.values, *masks)]
        self._query = (batch, queries, heads * head_dim), problem.query.dtype, problem.query.device
        self._heads = heads
        self._problem = problem.keys, problem.values, problem.scales, problem.masks, problem.attn_mask, problem.softmax_scale
        self._launch = make_launch(problem) if impl == "triton" else None

    def takes(self, query: Tensor) -> bool:
        """Whether a query [B, M, H·D] is like the first, and nobody has written to what was found."""
        if type(query) is not Tensor or (query.shape, query.dtype, query.device) != self._query or query.is_neg():
            return False
        return all(tensor._version == version for tensor, version in self._computed)

    def attend(self, query: Tensor) -> Tensor:
        """[B, M, H·D] to the same, before the output projection."""
        if self._launch is not None:
            return self._launch.packed(query)
        batch, queries, channels = query.shape
        heads = query.view(batch, queries, self._heads, -1).transpose(1, 2)
        return run(Problem(heads, *self._problem), self.impl).transpose(1, 2).reshape(batch, queries, channels)


def find(
    memory: Memory, layer: Layer, processor: Any, attn: Attention, hidden_states: Tensor, states: Any, masks: Any
) -> Ready | None:
    """A call that this one differs from in nothing but its queries, or None."""
    if type(states) is not tuple or len(states) != 2:
        return None
    ready: Ready | None = memory.call(states[0], (layer, id(attn)))
    if ready is None:
        return None
    return ready if ready.photo.matches(processor, attn, hidden_states, states[1], masks, layer.context.impl) else None


def guard_call(*reads: Any) -> Photo | None:
    """The photo, or None where something is in doubt."""
    try:
        return Photo(*reads)
    except Doubtful:
        return None


def keep(
    memory: Memory, layer: Layer, attn: Attention, inputs: tuple[Any, ...], photo: Photo, problem: Problem, impl: str
) -> Ready | None:
    """Keep a call for as long as its inputs live: text, images and masks. None where something is in doubt."""
    text, images, masks = inputs
    try:
        ready = Ready(photo, problem, impl, layer.reason)
    except Doubtful:
        return None
    memory.keep_call(text, (*images, *(mask for mask in masks or () if mask is not None)), (layer, id(attn)), ready)
    return ready


def _settings(attn: Any) -> tuple[Any, ...]:
    """What a call reads from an Attention besides its projections."""
    return (
        attn.heads, attn.scale, attn.residual_connection, attn.rescale_output_factor, attn.norm_cross, attn.group_norm,
        attn.spatial_norm,
    )  # fmt: skip


def _modes(tensor: Tensor) -> tuple[Any, ...]:
    """What torch is set to that changes a result, or how it may be computed."""
    device = tensor.device.type
    return (
        torch.autograd.forward_ad._current_level,
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        tensor.dtype == torch.float32 and allows_tf32(tensor.device),
    )


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


def _are_same_scales(scales: Any, known: list[Any]) -> bool:
    """By type and value: comparing tensors, which a scale may become, would wait for a GPU."""
    if not isinstance(scales, list) or len(scales) != len(known):
        return False
    for scale, before in zip(scales, known, strict=True):
        if isinstance(before, list):
            if not _are_same_scales(scale, before):
                return False
        elif isinstance(before, _SeenTensor):
            if not isinstance(scale, Tensor) or (scale.dtype, number(scale)) != before:
                return False
        elif type(scale) is not type(before) or scale != before:
            return False
    return True


class _Input:
    """Image tokens or a mask, as they were, or None."""

    __slots__ = ("snapshot", "tensor")

    def __init__(self, tensor: Tensor | None, read: bool) -> None:
        if tensor is not None and read and not is_plain(tensor):
            raise Doubtful
        self.tensor = None if tensor is None else weakref.ref(tensor)
        self.snapshot = None if tensor is None or not read else Snapshot(tensor)

    def matches(self, tensor: Any) -> bool:
        if self.snapshot is not None:
            return self.snapshot.matches(tensor)
        return tensor is None if self.tensor is None else self.tensor() is tensor


class _Projection:
    """A module and its parameters, as they were."""

    __slots__ = ("linear", "module", "state")

    def __init__(self, module: Any) -> None:
        self.module: Any = weakref.ref(module)
        self.linear: list[tuple[str, Snapshot | None]] | None = None
        self.state: State | None = None
        state = pure_state(module)
        if state is None:
            raise Doubtful
        if type(module) is nn.Linear:
            self.linear = [
                (name, tensor if tensor is None else Snapshot(tensor)) for name, tensor in module._parameters.items()
            ]
        else:
            self.state = state

    def matches(self, module: Any) -> bool:
        if self.module() is not module:
            return False
        if self.state is not None:
            state = pure_state(module)
            return state is not None and state.marks == self.state.marks
        if type(module) is not nn.Linear or is_hooked(module):
            return False
        parameters = module._parameters
        for name, snapshot in self.linear or ():
            tensor = parameters.get(name)
            if tensor is not None if snapshot is None else not snapshot.matches(tensor):
                return False
        return True
