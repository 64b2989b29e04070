"""The functional op: arguments are validated, an implementation is chosen, the result is allocated. No diffusers here."""

from . import registered as registered
from .decoupled_attention import decoupled_attention
from .support import UnsupportedError

__all__ = ["UnsupportedError", "decoupled_attention"]
