"""A user's mistake, and an exception of a library, each in one line. Needs nothing but Python."""

import textwrap


class UserError(Exception):
    """A mistake in the command line or in a file that it names; the message is one line."""


def why(error: BaseException) -> str:
    """The message of a library in one line that is short enough to read."""
    if isinstance(error, KeyError):
        return f"nothing named {error} in it"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return textwrap.shorten(text, 240, placeholder=" ...")
