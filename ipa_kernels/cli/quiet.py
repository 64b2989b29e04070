"""Silence around the libraries that a command runs."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
import transformers


@contextmanager
def quiet() -> Iterator[None]:
    """The libraries' own log lines, warnings and loading bars stay away: what matters is in the report or in an error line."""
    bars = [library.utils.logging for library in (diffusers, transformers)]
    shown = [bar for bar in bars if bar.is_progress_bar_enabled()]
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    for bar in shown:
        bar.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for bar in shown:
            bar.enable_progress_bar()
        logging.disable(level)
