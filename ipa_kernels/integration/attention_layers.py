"""Where a UNet has attention layers, and which of them have an IP-Adapter."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from .eligibility import expects_adapter, is_adapter
from .guards import is_hooked
from .provenance import runs_own
from .state import layer_of

_CALL = ("__call__", "_wrapped_call_impl", "_call_impl", "forward")
_OF_UNET = ("process_encoder_hidden_states", "get_aug_embed")
"""What a UNet's forward passes the text to."""


class AttentionLayers:
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

    def are_current(self) -> bool:
        """Whether the same modules are still in their places; cheap enough for every step."""
        return all(modules.get(name) is child for modules, name, child in self._links)

    def obstacle(self, unet: Any) -> str | None:
        """What takes part in a call of an attention, from the call of the UNet on, and may change what the attention is given,
        or where weights are: hooks, and functions that are neither torch's nor diffusers' own. None where there is nothing.
        """
        own = vars(unet)
        if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
            return "a hook on every module"
        # one pre-hook is ours, and so is a forward that replays graphs
        is_ours = getattr(own.get("forward"), "__module__", None) == "ipa_kernels.integration.hooks"
        if (
            len(unet._forward_pre_hooks) > 1
            or "_hf_hook" in own
            or "_diffusers_hook" in own
            or ("forward" in own and not is_ours)
        ):
            return "a hook on the UNet"
        for _, name, module in self._links:
            if is_hooked(module):
                return f"a hook on {name}"
        return self._foreign(unet)

    def _foreign(self, unet: Any) -> str | None:
        """A function in such a call that is neither torch's nor diffusers' own."""
        modules = [unet, *(module for _, _, module in self._links)]
        for module in modules:
            own = vars(module)
            compiled = own.get("_compiled_call_impl")
            if (
                "_call_impl" in own
                or "_wrapped_call_impl" in own
                or (compiled is not None and not _is_of_torch(compiled, module))
            ):
                return _not_own(type(module), "__call__")
        for kind in set(map(type, modules)):
            for name in _CALL:
                if not runs_own(kind, name):
                    return _not_own(kind, name)
        for name in _OF_UNET:
            if hasattr(unet, name) and (name in vars(unet) or not runs_own(type(unet), name)):
                return _not_own(type(unet), name)
        processors = [attention.processor for attention in self.attentions.values()]
        for kind in {type(processor) for processor in processors if layer_of(processor) is not None}:
            if not runs_own(kind, "__call__", ("ipa_kernels",)):
                return _not_own(kind, "__call__")
        return None


def _is_of_torch(compiled: Any, module: nn.Module) -> bool:
    """Whether this is what `module.compile()` made."""
    return bool(getattr(compiled, "_torchdynamo_orig_callable", None) == module._call_impl)


def _not_own(kind: type, name: str) -> str:
    return f"{kind.__name__}.{name}, which is not torch's or diffusers' own"


def is_loaded(unet: Any) -> bool:
    """Whether an IP-Adapter is loaded."""
    return bool(unet.config.encoder_hid_dim_type == "ip_image_proj")


def adapter_layers(unet: Any) -> Iterator[tuple[str, Any]]:
    """(name, Attention) of every layer that has an IP-Adapter, or should have one, in the order of the modules."""
    loaded = is_loaded(unet)
    for name, attention in AttentionLayers(unet).attentions.items():
        if is_adapter(attention.processor) or (loaded and expects_adapter(name)):
            yield name, attention
