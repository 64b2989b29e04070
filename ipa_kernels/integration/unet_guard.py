"""Whether a step of a UNet is closed, which is found out before it begins: then its layers need not check again."""

from torch import nn

from . import image_projection
from .attention_layers import AttentionLayers
from .guards import LayersGuard, layer_guard
from .model_guards import StructureGuard
from .replaced import are_functions_own
from .state import ModelContext, layer_of


class UNetGuard:
    """A UNet as the last eager step found it; before the first one nothing is known, and everything is foreign."""

    def __init__(self) -> None:
        self._structure: StructureGuard | None = None
        self._layers: LayersGuard | None = None
        self._attention_layers: AttentionLayers | None = None

    @property
    def foreign(self) -> str:
        """What can run in a step besides torch's, diffusers' and our own functions, "" where nothing can."""
        return "unknown" if self._structure is None else self._structure.foreign

    def matches(self, unet: nn.Module) -> bool:
        """Whether its modules, their classes and its processors are the same."""
        return self._structure is not None and self._structure.matches(unet)

    def forget(self) -> None:
        """Nothing is known."""
        self._structure = self._layers = self._attention_layers = None

    def renew(self, unet: nn.Module, attention_layers: AttentionLayers, context: ModelContext, ours: str) -> None:
        """Take the UNet as it is now. ours: the module of the function that we put on it."""
        self.forget()
        context.prune()
        self._attention_layers = attention_layers
        attentions = attention_layers.attentions.values()
        adapters = [*image_projection.of(unet), *(a.processor for a in attentions if layer_of(a.processor) is not None)]
        self._structure = StructureGuard(unet, attentions, adapters, ours)

    def is_pure(self, unet: nn.Module, context: ModelContext) -> bool:
        """Whether the adapters run nothing foreign, for a UNet that `matches`.

        Afterwards the guards of all its layers are of what is there now.
        """
        if not are_functions_own() or self._attention_layers is None:
            return False
        if self._layers is None or not self._layers.matches():
            guards = []
            for attention in self._attention_layers.attentions.values():
                layer = layer_of(attention.processor)
                if layer is not None:
                    guards.append(layer_guard(layer.guards, attention, attention.processor))
            self._layers = LayersGuard(guards, [context.guard(module) for module in image_projection.of(unet)])
        return self._layers.are_pure()
