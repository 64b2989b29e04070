"""What `enable` leaves on a UNet: one attribute and two hooks, which take over what is loaded later and open the memory."""

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .ops import UnsupportedError
from .processors import projections
from .processors import unet as families
from .session import Session

_STATE = "_ipa_kernels"

# the first parameters of every UNet's forward
_STEP = ("sample", "timestep", "encoder_hidden_states")

SWITCH = threading.RLock()
"""Held by whoever changes what is enabled: steps of one UNet may run in several threads, each may find a new adapter."""


class Options(NamedTuple):
    """The options of `enable`."""

    impl: str = "auto"
    cache: bool = True


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

    def are_current(self) -> bool:
        """Whether the same modules are still in their places; cheap enough for every step."""
        return all(modules.get(name) is child for modules, name, child in self._links)


class Watch:
    """The state of an enabled UNet.

    base: the options of `enable`, None where only `accelerated` blocks are open; blocks: the options of those, oldest first;
    is_closed: disabled, perhaps by another thread in the middle of a step, which then takes over nothing more.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.session = Session(*Options())
        self.places = Places(unet)
        self.base: Options | None = None
        self.blocks: list[list[Options]] = []
        self.handles: list[Any] = []
        self.is_closed = False

    def attach(self, unet: nn.Module) -> None:
        """Watch the steps of a UNet; does nothing where that is done already."""
        if self._is_attached(unet):
            return
        for handle in self.handles:
            handle.remove()
        self.handles = [
            unet.register_forward_pre_hook(self.before, with_kwargs=True),
            unet.register_forward_hook(self.after, always_call=True),
        ]
        setattr(unet, _STATE, self)

    def detach(self, unet: nn.Module) -> None:
        """The inverse of `attach`; does nothing where that was not done."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.is_closed = True
        vars(unet).pop(_STATE, None)

    def _is_attached(self, unet: nn.Module) -> bool:
        hooks = (unet._forward_pre_hooks, unet._forward_hooks)
        return len(self.handles) == 2 and all(handle.id in there for handle, there in zip(self.handles, hooks, strict=True))

    def before(self, unet: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """A step begins."""
        if torch.compiler.is_compiling():
            return
        self.take_over_new(unet, [])
        if self.session.cache:
            named = dict(zip(_STEP, arguments, strict=False)) | options
            images = (named.get("added_cond_kwargs") or {}).get("image_embeds")
            tensors = [named.get("encoder_hidden_states"), *(images if isinstance(images, list) else [images])]
            self.session.memory.enter(named.get("timestep"), tuple(map(id, tensors)))

    def after(self, *arguments: Any) -> None:
        """A step has ended, whether it returned or raised."""
        if not torch.compiler.is_compiling():
            self.session.memory.leave()

    def take_over_new(self, unet: nn.Module, undo: list[Callable[[], None]]) -> None:
        """Take over every stock module of an IP-Adapter; `undo` collects, in the order of the changes, what reverts each."""
        session = self.session
        if not self.places.are_current():
            self.places = Places(unet)
        for module in projections.of(unet):
            if type(module) in projections.OURS:
                with SWITCH:
                    if type(module) in projections.OURS and not self.is_closed:
                        projections.take_over(module, session, undo)
        loaded = is_loaded(unet)
        for name, attention in self.places.attentions.items():
            processor = attention.processor
            if families.is_new(processor, session):
                with SWITCH:
                    if families.is_new(processor, session) and not self.is_closed:
                        families.take_over(processor, name, session, undo)
                continue
            foreign = families.foreign_reason(processor, loaded and families.expects_adapter(name))
            if foreign is None:
                continue
            if session.impl == "triton":
                raise UnsupportedError(f'{name}: impl="triton" cannot run this layer: {foreign}')
            if session.impl == "auto":
                session.warn_once(foreign, "its own code runs")

    def give_back(self, unet: nn.Module) -> None:
        """Undo every `take_over`, of what is installed and of what was put aside."""
        installed = {attention.processor for attention in Places(unet).attentions.values()}
        for module in installed | set(projections.of(unet)) | set(self.session.taken):
            if type(module) in projections.STOCK:
                projections.give_back(module)
            # a processor that was put into another enabled UNet since belongs to that one
            elif families.session_of(module) is self.session or (module in installed and type(module) in families.STOCK):
                families.give_back(module)


def of(unet: nn.Module) -> Any:
    """The `Watch` of a UNet, or None where it is not enabled."""
    return vars(unet).get(_STATE)


def is_loaded(unet: Any) -> bool:
    """Whether an IP-Adapter is loaded."""
    return bool(unet.config.encoder_hid_dim_type == "ip_image_proj")


def adapter_layers(unet: Any) -> Iterator[tuple[str, Any]]:
    """(name, Attention) of every layer that has an IP-Adapter, or should have one, in the order of the modules."""
    loaded = is_loaded(unet)
    for name, attention in Places(unet).attentions.items():
        if families.is_adapter(attention.processor) or (loaded and families.expects_adapter(name)):
            yield name, attention
