"""A call of a UNet's forward, as `graphed` sees it: what in it is data of a graph, and what a graph is only valid for."""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..integration import steps
from ..ops.dispatch import allows_tf32

if TYPE_CHECKING:
    from ..integration.hooks import ModelState


class Call(NamedTuple):
    """Of a step that has begun. state: the `ModelState` of the UNet; forward: the UNet's own."""

    state: "ModelState"
    unet: Any
    forward: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def device(self) -> Any:
        """Of the latents; None where there are none."""
        return getattr(steps.named(self.arguments, self.options).get("sample"), "device", None)

    @property
    def masks(self) -> Any:
        """As they were given, or None."""
        return (self.options.get("cross_attention_kwargs") or {}).get("ip_adapter_masks")

    def run(self) -> Any:
        """Without a graph."""
        return self.forward(*self.arguments, **self.options)

    def warm_up(self) -> Any:
        """As it will be captured: kernels are compiled and workspaces allocated before. What is given stays as it is, for
        another run: diffusers empties a list of residuals.
        """
        with self.state.captured():
            return self.forward(*self.arguments, **pytree.tree_map(lambda leaf: leaf, self.options))

    def flat(self) -> tuple[list[Any], Any]:
        """The leaves of the arguments and their structure: the timestep as a tensor beside the latents, masks left out.

        A number would stay the same in every replay, and a graph reads what the static storage holds of masks.
        """
        named = steps.named(self.arguments, self.options)
        sample, timestep = named["sample"], named["timestep"]
        if not isinstance(timestep, Tensor):
            # as `UNet2DConditionModel.get_time_embed`
            timestep = torch.tensor(timestep, dtype=torch.float64 if isinstance(timestep, float) else torch.int64)
        timestep = (timestep[None] if timestep.ndim == 0 else timestep).to(sample.device)
        arguments, options = self.arguments, _with_masks(self.options, None)
        if len(arguments) > 1:
            arguments = (arguments[0], timestep, *arguments[2:])
        else:
            options = {**options, "timestep": timestep}
        return pytree.tree_flatten((arguments, options))

    def given(self, leaves: list[Any], structure: Any) -> "Call":
        """The same call of other leaves, with these masks."""
        arguments, options = pytree.tree_unflatten(leaves, structure)
        return self._replace(arguments=arguments, options=_with_masks(options, self.masks))

    def key(self, leaves: list[Any], structure: Any) -> Hashable | None:
        """Everything about the arguments, and about torch, that a graph is only valid for; None where that cannot be told."""
        device = next(leaf.device for leaf in leaves if is_tensor(leaf))
        parts: list[Hashable] = []
        for leaf in leaves:
            if is_tensor(leaf):
                if leaf.device != device:
                    return None
                parts.append((tuple(leaf.shape), leaf.dtype, leaf.device))
            elif isinstance(leaf, bool | int | float | str | None):
                parts.append((type(leaf).__name__, leaf))
            else:
                return None
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        modes = allows_tf32(device), torch.is_inference_mode_enabled()
        return (str(structure), tuple(parts), self.masks is None, autocast, modes, self.state.context.impl)


def is_tensor(leaf: Any) -> bool:
    """Whether a leaf is data."""
    return isinstance(leaf, Tensor)


def _with_masks(options: dict[str, Any], masks: Any) -> dict[str, Any]:
    given = options.get("cross_attention_kwargs") or {}
    return (
        {**options, "cross_attention_kwargs": {**given, "ip_adapter_masks": masks}} if "ip_adapter_masks" in given else options
    )
