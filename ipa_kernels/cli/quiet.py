"""What libraries log, warn of and draw while they are imported or run is kept away. Needs nothing but Python until they run."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import UserError


@contextmanager
def importing(extra: str, option: str = "") -> Iterator[None]:
    """Import in this block what a command runs: the first one takes seconds, and --help should not.

    What libraries say meanwhile is about them, and not about the command. Raises UserError for one that is missing, with the
    extra that installs it, and the option that needs it, if any.
    """
    try:
        with _silence(logging.WARNING):
            yield
    except ModuleNotFoundError as error:
        needed_by = f"{option}: " if option else ""
        raise UserError(f"{needed_by}{error}; what it needs: pip install 'ipa-kernels[{extra}]'") from error


@contextmanager
def quiet() -> Iterator[None]:
    """The libraries' own log lines, warnings and loading bars stay away: what matters is in the report or in an error line."""
    import diffusers
    import transformers

    bars = [library.utils.logging for library in (diffusers, transformers)]
    shown = [bar for bar in bars if bar.is_progress_bar_enabled()]
    for bar in shown:
        bar.disable_progress_bar()
    try:
        with _silence(logging.ERROR):
            yield
    finally:
        for bar in shown:
            bar.enable_progress_bar()


@contextmanager
def _silence(level: int) -> Iterator[None]:
    """No warnings, and no log lines of this level or below."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
