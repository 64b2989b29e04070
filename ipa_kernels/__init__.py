"""IP-Adapters (image prompts) in diffusers as one fused Triton kernel per attention layer: `ipa_kernels.enable(pipe)`.

Importing this package does nothing: no device query, no import of triton or diffusers. A name is loaded when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import reference as reference
    from .graphs.cuda_graphs import graphed
    from .integration.api import accelerated, clear_cache, disable, enable, explain
    from .integration.prepare_pipeline import prepare
    from .ops import UnsupportedError, decoupled_attention
    from .report import FallbackWarning, GraphReport, LayerReport, Report

    __version__: str

_HOMES = {
    "accelerated": "integration.api",
    "clear_cache": "integration.api",
    "disable": "integration.api",
    "enable": "integration.api",
    "explain": "integration.api",
    "graphed": "graphs.cuda_graphs",
    "prepare": "integration.prepare_pipeline",
    "decoupled_attention": "ops",
    "UnsupportedError": "ops",
    "LayerReport": "report",
    "Report": "report",
    "FallbackWarning": "report",
    "GraphReport": "report",
}

__all__ = [
    "FallbackWarning",
    "GraphReport",
    "LayerReport",
    "Report",
    "UnsupportedError",
    "accelerated",
    "clear_cache",
    "decoupled_attention",
    "disable",
    "enable",
    "explain",
    "graphed",
    "prepare",
]


def _version() -> str:
    """The version that is installed; "0+uninstalled" where a source tree runs that is not."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ipa-kernels")
    except PackageNotFoundError:
        return "0+uninstalled"


if not TYPE_CHECKING:  # a type checker that saw this would take every name for one of ours

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return _version()
        if name == "reference":
            return importlib.import_module(".reference", __name__)
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
