"""Install a subclass of ours in place of a module's class, and uninstall it: one way for processors and projections.

The module stays the same object with the same parameters. Only its `__class__` changes, as with torch's
`torch.nn.utils.parametrize` and FSDP 2 (`fully_shard`).
"""

from collections.abc import Callable

from torch import nn

from .state import Layer, ModelContext, layer_of


def install(
    module: nn.Module, kind: type, context: ModelContext, undo: list[Callable[[], None]], layer: Layer | None = None
) -> None:
    """Make a module one of class `kind`, for the UNet of this context.

    undo: gets what reverts that, before anything is changed. layer: what a processor remembers; None for a projection.
    """
    before, known = type(module), layer_of(module)

    def revert() -> None:
        context.installed.discard(module)
        module.__class__ = before
        _set_layer(module, known)

    undo.append(revert)
    context.installed.add(module)
    _set_layer(module, layer)
    module.__class__ = kind


def uninstall(module: nn.Module, kind: type) -> None:
    """Give a module its class back, and take away what it remembers."""
    module.__class__ = kind
    _set_layer(module, None)


def _set_layer(module: nn.Module, layer: Layer | None) -> None:
    if layer is None:
        vars(module).pop("_ipa_layer", None)
    else:
        vars(module)["_ipa_layer"] = layer
