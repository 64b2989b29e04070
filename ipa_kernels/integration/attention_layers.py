"""Where a UNet has attention layers, and which of them have an IP-Adapter."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from .processors import unet as families


class Places:
    """The attention layers of a UNet by name, and the links of the module tree that lead to them."""

    def __init__(self, unet: nn.Module) -> None:
        self.attentions: dict[str, Any] = {}
        links: dict[tuple[int, str], tuple[dict[str, nn.Module | None], str, nn.Module]] = {}
        for name, module in unet.named_modules():
            if not hasattr(module, "set_processor") or name.startswith("encoder_hid_proj"):
                continue
            self.attentions[name] = module
            parent = unet
            for part in name.split("."):
                child = parent._modules[part]
                assert child is not None
                links[id(parent), part] = (parent._modules, part, child)
                parent = child
        self._links = list(links.values())

    def on_the_way(self) -> Iterator[tuple[str, nn.Module]]:
        """(name within its parent, module) of each module between the UNet and its attentions, these included."""
        return ((name, child) for _, name, child in self._links)

    def are_current(self) -> bool:
        """Whether the same modules are still in their places; cheap enough for every step."""
        return all(modules.get(name) is child for modules, name, child in self._links)


def is_loaded(unet: Any) -> bool:
    """Whether an IP-Adapter is loaded."""
    return bool(unet.config.encoder_hid_dim_type == "ip_image_proj")


def adapter_layers(unet: Any) -> Iterator[tuple[str, Any]]:
    """(name, Attention) of every layer that has an IP-Adapter, or should have one, in the order of the modules."""
    loaded = is_loaded(unet)
    for name, attention in Places(unet).attentions.items():
        if families.is_adapter(attention.processor) or (loaded and families.expects_adapter(name)):
            yield name, attention
