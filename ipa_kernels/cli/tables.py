"""Plain text in columns. Needs nothing but Python."""

import textwrap
from collections.abc import Sequence

WIDTH = 98


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows in columns that are as wide as they need to be; the first row may be a head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def wrapped(text: str) -> str:
    """A sentence in lines of the width of a table; those after the first are indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
