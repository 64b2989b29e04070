"""How far a command is, in one line on stderr. Needs nothing but Python."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE, _BAR = 79, 24


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields what to call, with its name, before each of `total` pieces of work. Writes nothing where stderr is no terminal."""
    shown = sys.stderr.isatty()
    done = 0

    def step(name: str) -> None:
        nonlocal done
        bar = "#" * (_BAR * done // total)
        done = min(done + 1, total)
        if shown:
            line = f"[{bar:.<{_BAR}}] {done}/{total} {name}"
            print(f"\r{line:<{_LINE}.{_LINE}}", end="", file=sys.stderr, flush=True)

    try:
        yield step
    finally:
        if shown:
            print(f"\r{'':{_LINE}}\r", end="", file=sys.stderr, flush=True)
