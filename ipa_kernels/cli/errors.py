"""A user's mistake, and an exception of a library, each in one line. Needs nothing but Python."""

import textwrap
from pathlib import Path


class UserError(Exception):
    """A mistake in the command line or in a file that it names; the message is one line."""


def why(error: BaseException) -> str:
    """The message of a library in one line that is short enough to read."""
    if isinstance(error, KeyError):
        return f"nothing named {error} in it"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return textwrap.shorten(text, 240, placeholder=" ...")


def elsewhere(place: str) -> str:
    """What to say before a message of the hub's about something that may have been meant as a folder."""
    return "" if Path(place).exists() else "no such folder here; from the hub: "
