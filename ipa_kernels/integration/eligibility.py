"""Which processors are those of an IP-Adapter, and why one is for its own code. Why a call is: `processors.branches`."""

from diffusers.models.attention_processor import (
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
)

from .known_modules import Installed

ADAPTERS = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)
"""diffusers' IP-Adapter processors for UNets."""


def is_adapter(processor: object) -> bool:
    """Whether a processor is one of an IP-Adapter: of diffusers' for UNets, derived from one, or from elsewhere."""
    return isinstance(processor, ADAPTERS) or _is_from_elsewhere(processor)


def _is_from_elsewhere(processor: object) -> bool:
    """Whether a processor does the work of an IP-Adapter's, as tencent's and InstantID's do, and is not diffusers'.

    Told by the names that their many copies share.
    """
    kind = type(processor)
    if kind.__module__.startswith("diffusers.") or isinstance(processor, Installed):
        return False
    named = "IPAttn" in kind.__name__ or "IPAdapter" in kind.__name__
    return named or (hasattr(processor, "to_k_ip") and hasattr(processor, "to_v_ip"))


def expects_adapter(name: str) -> bool:
    """Whether diffusers' loader puts an IP-Adapter into the attention of this name."""
    return not name.endswith("attn1") and "motion_modules" not in name


def foreign_reason(processor: object, expected: bool) -> str | None:
    """Why a processor is not installed, or None where it can be, or where no IP-Adapter's is expected."""
    kind = type(processor)
    if kind in ADAPTERS or isinstance(processor, Installed) or not (expected or is_adapter(processor)):
        return None
    load = "load the adapter by load_ip_adapter, or set_attn_processor with diffusers' own"
    return f"processor {kind.__name__}: not one of diffusers' IP-Adapter classes, the only ones supported; {load}"
