"""A call that ran, ready to run again: in the steps of a generation that follow, a layer compares instead of preparing.

What is compared is everything that the first call read; what differs sends the call back through all checks.
"""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..conditioning import Snapshot, State, is_hooked
from ..ops.arguments import Problem
from ..ops.decoupled_attention import prepare, run
from ..ops.support import allows_tf32
from .projections import pure_state


class Ready:
    """One layer for one prompt, its images and masks: keys, values and weights, and what they were computed from.

    values: how many remembered values it stands for. It keeps neither the prompt nor the images alive.
    """

    def __init__(
        self,
        processor: Any,
        attn: Attention,
        hidden_states: Tensor,
        states: tuple[Tensor, list[Tensor]],
        masks: list[Tensor | None] | None,
        problem: Problem,
        impl: str,
        reason: str,
        values: int,
    ) -> None:
        self.impl, self.reason, self.values = impl, reason, values
        self._kind = type(processor)
        self._scales = [list(scale) if isinstance(scale, list) else scale for scale in processor.scale]
        self._attention = _settings(attn)
        self._hidden = hidden_states.shape, hidden_states.dtype, hidden_states.device
        self._modes = _modes(hidden_states)
        self._inputs = [Snapshot(tensor) for tensor in (*states[1], *(mask for mask in masks or () if mask is not None))]
        self._images, self._masks = len(states[1]), None if masks is None else [mask is not None for mask in masks]
        self._computed = [
            (tensor, tensor._version) for tensor in (*problem.keys, *problem.values, *problem.masks) if tensor is not None
        ]
        places = [(attn._modules, name) for name in ("to_k", "to_v")]
        for adapter in range(len(states[1])):
            places += [(processor._modules[name]._modules, str(adapter)) for name in ("to_k_ip", "to_v_ip")]
        self._projections = [_projection(modules, name) for modules, name in places]
        self._query = problem.query.dtype, problem.query.device
        self._heads = problem.query.shape[1]
        self._problem = problem.keys, problem.values, problem.scales, problem.masks, problem.attn_mask, problem.softmax_scale
        self._launch = prepare(problem) if impl == "triton" else None

    def fits(self, processor: Any, attn: Attention, hidden_states: Tensor, states: Any, masks: Any) -> bool:
        """Whether a call with the same text, and without an attention mask, would prepare the same again."""
        if type(processor) is not self._kind or type(hidden_states) is not Tensor:
            return False
        if (hidden_states.shape, hidden_states.dtype, hidden_states.device) != self._hidden:
            return False
        if _settings(attn) != self._attention or _modes(hidden_states) != self._modes:
            return False
        images = states[1]
        if len(images) != self._images or not _are_same_scales(processor.scale, self._scales):
            return False
        if masks is not None or self._masks is not None:
            if type(masks) is not list or [mask is not None for mask in masks] != self._masks:
                return False
            images = (*images, *(mask for mask in masks if mask is not None))
        for known, tensor in zip(self._inputs, images, strict=True):
            if not known.is_still(tensor):
                return False
        for tensor, version in self._computed:
            if tensor._version != version:
                return False
        return all(projection.is_still() for projection in self._projections)

    def query(self, attn: Attention, hidden_states: Tensor) -> Tensor | None:
        """[B, M, H·D]; None where the projection does not return what it did."""
        query = attn._modules["to_q"](hidden_states)
        expected = type(query) is Tensor and (query.dtype, query.device) == self._query and query.ndim == 3
        return query if expected else None

    def attend(self, query: Tensor) -> Tensor:
        """[B, M, H·D] to the same, before the output projection."""
        if self._launch is not None:
            return self._launch.packed(query)
        batch, queries, channels = query.shape
        heads = query.view(batch, queries, self._heads, -1).transpose(1, 2)
        return run(Problem(heads, *self._problem), self.impl).transpose(1, 2).reshape(batch, queries, channels)


def _settings(attn: Any) -> tuple[Any, ...]:
    """What a call reads from an Attention besides its modules."""
    own, modules = attn.__dict__, attn._modules
    return (
        own["heads"], own["scale"], own["residual_connection"], own["rescale_output_factor"], own.get("norm_cross"),
        own.get("group_norm"), own.get("spatial_norm"), modules.get("group_norm"), modules.get("spatial_norm"),
        modules.get("norm_cross"),
    )  # fmt: skip


def _modes(tensor: Tensor) -> tuple[Any, ...]:
    """What torch is set to that changes a result, or how it may be computed."""
    device = tensor.device.type
    return (
        torch.is_grad_enabled(),
        torch.autograd.forward_ad._current_level,
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        tensor.dtype == torch.float32 and allows_tf32(tensor.device),
    )


def _are_same_scales(scales: Any, known: list[Any]) -> bool:
    """By type and value: comparing tensors, which a scale may become, would wait for a GPU."""
    if type(scales) is not list or len(scales) != len(known):
        return False
    for scale, before in zip(scales, known, strict=True):
        if type(scale) is not type(before):
            return False
        if type(scale) is list:
            if not _are_same_scales(scale, before):
                return False
        elif scale != before:
            return False
    return True


class _Linear:
    """A plain Linear at its place, as it was."""

    __slots__ = ("module", "modules", "name", "tensors")

    def __init__(self, modules: dict[str, Any], name: str) -> None:
        self.modules, self.name, self.module = modules, name, modules[name]
        self.tensors = [
            (key, tensor, None if tensor is None else (tensor._version, tensor.data_ptr()))
            for key, tensor in self.module._parameters.items()
        ]

    def is_still(self) -> bool:
        module = self.modules.get(self.name)
        if module is not self.module or type(module) is not nn.Linear or is_hooked(module):
            return False
        parameters = module._parameters
        for key, tensor, state in self.tensors:
            if parameters.get(key) is not tensor or (tensor is not None and (tensor._version, tensor.data_ptr()) != state):
                return False
        return True


class _Module:
    """Any other module at its place, as it was: with a LoRA, for instance."""

    def __init__(self, modules: dict[str, Any], name: str) -> None:
        self.modules, self.name, self.module = modules, name, modules[name]
        self.state: State | None = pure_state(self.module)

    def is_still(self) -> bool:
        module = self.modules.get(self.name)
        if module is not self.module or self.state is None:
            return False
        state = pure_state(module)
        return state is not None and state.marks == self.state.marks


def _projection(modules: dict[str, Any], name: str) -> _Linear | _Module:
    return (_Linear if type(modules[name]) is nn.Linear else _Module)(modules, name)
