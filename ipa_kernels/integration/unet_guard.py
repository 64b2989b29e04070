"""Whether a step of a UNet is closed, which is found out before it begins: then its layers need not check again."""

import operator
from itertools import chain

from torch import nn

from . import image_projection
from .attention_layers import AttentionLayers
from .guards import LayerGuard, ModuleGuard, have_hooks, layer_guard
from .known_modules import runs_own_functions, settings_of
from .model_guards import StructureGuard
from .replaced import are_functions_own
from .state import ModelContext, layer_of


class LayersGuard:
    """The guards of all layers of a UNet, column by column: what they look at, in a fraction of the time.

    It is for a `StructureGuard` that matches, which knows the modules of the UNet itself. Here are the modules of the adapters,
    and of both the weights and the settings.
    """

    def __init__(self, layers: list[LayerGuard], others: list[ModuleGuard]) -> None:
        self._guards: list[LayerGuard | ModuleGuard] = [*layers, *others]
        self._is_pure = all(guard.is_pure for guard in layers) and not any(guard.doubt for guard in others)
        self._attentions = [guard.attention for guard in layers]
        self._settings = [value for guard in layers for value in guard.settings]
        self._processors = [guard.processor for guard in layers]
        self._kinds = [guard.kind for guard in layers]
        # as `_in_place` finds them
        self._adapters = [pair[side] for guard in layers for side in (0, 1) for pair in guard.images]
        modules = [*chain.from_iterable(layer.projections() for layer in layers), *others]
        self._called: set[type] = set().union(*(guard.kinds for guard in modules))
        parts = [part for guard in modules for part in guard.parts]
        linear = [part for part in parts if part.is_linear]
        self._linear = [part.module for part in linear]
        self._sizes = [len(vars(part.module())) for part in linear]
        self._weights = [guard for part in linear for _, guard in part.tensors if guard is not None]
        self._versions = [guard.version for guard in self._weights]
        self._addresses = [guard.address for guard in self._weights]
        self._others = [part for part in parts if not part.is_linear]

    def matches(self) -> bool:
        """Whether all is as it was. False once a guard is not valid, whoever found that."""
        if not all(guard.valid for guard in self._guards):
            return False
        try:
            return self._match_layers() and self._match_weights() and all(part.matches() for part in self._others)
        except (AttributeError, KeyError):
            # a module is gone
            return False

    def are_pure(self) -> bool:
        """Whether no projection is in doubt, or runs a function that is not torch's or diffusers' own by now."""
        return self._is_pure and all(map(runs_own_functions, self._called))

    def _match_layers(self) -> bool:
        now = [settings_of(attention()) for attention in self._attentions]
        if not all(map(operator.is_, chain.from_iterable(now), self._settings)):
            return False
        processors = [processor() for processor in self._processors]
        if list(map(type, processors)) != self._kinds:
            return False
        in_place = [
            module
            for processor in processors
            for place in ("to_k_ip", "to_v_ip")
            for module in processor._modules[place]._modules.values()
        ]
        return len(in_place) == len(self._adapters) and all(
            guard.parts[0].module() is module for guard, module in zip(self._adapters, in_place, strict=True) if guard.parts
        )

    def _match_weights(self) -> bool:
        modules = [module() for module in self._linear]
        own = [module.__dict__ for module in modules]
        if list(map(len, own)) != self._sizes or any(type(module) is not nn.Linear for module in modules):
            return False
        if have_hooks(own):
            return False
        parameters = [attributes["_parameters"] for attributes in own]
        weights = [tensors["weight"] for tensors in parameters]
        if not all(guard.tensor() is weight for guard, weight in zip(self._weights, weights, strict=True)):
            return False
        if [weight._version for weight in weights] != self._versions:
            return False
        if [weight.data_ptr() for weight in weights] != self._addresses:
            return False
        return not any(tensors["bias"] is not None for tensors in parameters)


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
