"""What someone has put in the place of the functions that stock computes an attention layer with.

Who replaces `scaled_dot_product_attention` (SageAttention) or `Attention.get_attention_scores` (attention maps) means to be
called. Diffusers' own code calls the replacement, the kernel would not.
"""

from typing import Any, NamedTuple

import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models import attention_processor
from diffusers.models.attention_processor import Attention
from torch import nn

from .provenance import AND_EXTRAS, is_own, runs_own

_SCORES = ("get_attention_scores", "head_to_batch_dim", "batch_to_head_dim")


class Part(NamedTuple):
    """A function by its place, a class or a module, and its name; own: what is there where nobody has replaced it, if known."""

    place: Any
    name: str
    own: object

    @classmethod
    def of(cls, place: Any, name: str) -> "Part":
        """Whatever is there now."""
        part = cls(place, name, None)
        return part._replace(own=None if part.is_replaced() else getattr(place, name))

    def is_replaced(self) -> bool:
        """Whether it is neither torch's nor diffusers' own. It may have been when this module was imported."""
        function = getattr(self.place, self.name)
        if function is self.own:
            return False
        if isinstance(self.place, type):
            return not runs_own(self.place, self.name, AND_EXTRAS)
        return not is_own(function, AND_EXTRAS)

    def __str__(self) -> str:
        return f"{self.place.__name__}.{self.name}"


SDPA = Part.of(F, "scaled_dot_product_attention")
SCORES = tuple(Part.of(Attention, name) for name in _SCORES)
LINEAR = Part.of(F, "linear")
_PROJECTIONS = Part.of(nn.Linear, "forward"), Part.of(nn.Linear, "__call__"), LINEAR
_MASKS = Part.of(IPAdapterMaskProcessor, "downsample")


def _xformers() -> tuple[Part, ...]:
    found = attention_processor.xformers
    return () if found is None else (Part.of(found.ops, "memory_efficient_attention"),)


_CALLED: dict[type, tuple[Part, ...]] = {
    attention_processor.IPAdapterAttnProcessor: SCORES,
    attention_processor.IPAdapterAttnProcessor2_0: (Part(attention_processor, "F", F), SDPA),
    attention_processor.IPAdapterXFormersAttnProcessor: (*SCORES[1:], *_xformers()),
}
_PARTS = {kind: (Part.of(kind, "__call__"), *called) for kind, called in _CALLED.items()}
_READ = {kind: (*parts, *_PROJECTIONS) for kind, parts in _PARTS.items()}
_ALL = tuple(dict.fromkeys(part for parts in (*_READ.values(), (_MASKS, Part.of(F, "dropout"))) for part in parts))


def is_anything_replaced(kind: type, attn: Attention, masked: bool) -> bool:
    """Whether a call may run another function than its last one did, be it one that projects: in each call of each layer.

    kind: diffusers' class of the processor.
    """
    for place, name, own in _READ[kind]:
        if getattr(place, name) is not own and Part(place, name, own).is_replaced():
            return True
    return (masked and _MASKS.is_replaced()) or (SCORES[-1] in _CALLED[kind] and has_scores_of_its_own(attn))


def are_functions_own() -> bool:
    """Whether no function is replaced that a call of any layer, or the resizing of a mask, may run: once in each step."""
    return not any(getattr(place, name) is not own and Part(place, name, own).is_replaced() for place, name, own in _ALL)


def has_scores_of_its_own(attn: Attention) -> bool:
    """Whether someone has put a method that computes scores on an `Attention` itself."""
    own = vars(attn)
    return any(name in own for name in _SCORES)


def replaced_reasons(kind: type, attn: Attention, masked: bool) -> list[str]:
    """Why only diffusers' own code may run a call: what it calls is no longer what the kernel stands for."""
    own = vars(attn)
    parts = _PARTS[kind] + ((_MASKS,) if masked else ())
    return [
        f"{part}: replaced by a function that is not torch's or diffusers' own, which diffusers' code calls and the kernel "
        "does not; undo that to use the kernel"
        for part in parts
        if part.is_replaced() or (part in SCORES and part.name in own)
    ]


def replaced_function(masked: bool) -> str | None:
    """Which function that belongs to no class of a UNet's modules is replaced, of those that its layers call."""
    parts = [part for called in _CALLED.values() for part in called if part not in SCORES] + [_MASKS] * masked
    return next((str(part) for part in parts if part.is_replaced()), None)
