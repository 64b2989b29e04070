"""What of an IP-Adapter is loaded in a UNet: install it, and uninstall it again."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..ops import UnsupportedError
from . import attention_layers, image_projection
from .eligibility import expects_adapter, foreign_reason
from .processors import unet as families
from .state import ModelContext

if TYPE_CHECKING:
    import threading


def install_new(
    unet: nn.Module,
    attentions: dict[str, Any],
    context: ModelContext,
    switch: "threading.RLock",
    is_disabled: Callable[[], bool],
    undo: list[Callable[[], None]],
) -> None:
    """Install for every stock module of an IP-Adapter; `undo` collects, in the order of the changes, what reverts each.

    attentions: those of the UNet by name. switch: held for each change, as long as the UNet is not disabled meanwhile.
    """
    for module in image_projection.of(unet):
        if type(module) in image_projection.OURS:
            with switch:
                if type(module) in image_projection.OURS and not is_disabled():
                    image_projection.install(module, context, undo)
    loaded = attention_layers.is_loaded(unet)
    for name, attention in attentions.items():
        processor = attention.processor
        if families.is_new(processor, context):
            with switch:
                if families.is_new(processor, context) and not is_disabled():
                    families.install(processor, name, context, undo)
            continue
        foreign = foreign_reason(processor, loaded and expects_adapter(name))
        if foreign is None:
            continue
        if context.impl == "triton":
            raise UnsupportedError(f'{name}: impl="triton" cannot run this layer: {foreign}')
        if context.impl == "auto":
            context.warn_once(foreign, "the processor's own code runs instead")


def uninstall_all(unet: nn.Module, context: ModelContext) -> None:
    """Undo every `install`, of the processors in place and of those that diffusers has stashed."""
    # by identity: a user's own processor need not be hashable
    attentions = attention_layers.AttentionLayers(unet).attentions.values()
    in_place = {id(attention.processor): attention.processor for attention in attentions}
    stashed = {id(module): module for module in (*image_projection.of(unet), *context.installed)}
    for key, module in (in_place | stashed).items():
        if type(module) in image_projection.STOCK:
            image_projection.uninstall(module)
        # a processor that was put into another enabled UNet since belongs to that one
        elif families.context_of(module) is context or (key in in_place and type(module) in families.STOCK):
            families.uninstall(module)
