"""The functional op: arguments are validated, an implementation is chosen, the result is allocated. No diffusers here."""

from . import torch_library as torch_library
from .api import decoupled_attention
from .dispatch import UnsupportedError

__all__ = ["UnsupportedError", "decoupled_attention"]
