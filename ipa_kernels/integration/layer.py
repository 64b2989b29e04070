"""The layer of a processor: what `take_over` leaves on it."""

from typing import Any

from .state import Layer


def layer_of(processor: Any) -> Layer | None:
    """None where it was not taken over; a user's own may have slots, and nothing to look into."""
    return getattr(processor, "__dict__", {}).get("_ipa_layer")
