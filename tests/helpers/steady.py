"""What keeps the outcome of a test from chance: how busy the machine is, and what other tests left behind."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEVER = 1800.0
"""Seconds after which what has not come will not come: a test fails instead of hanging. No test passes or fails by less."""


@contextmanager
def no_collection() -> Iterator[None]:
    """No cycles are collected meanwhile: when they are depends on all that the process did before."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def others_set_aside() -> Iterator[None]:
    """`gc.get_objects` and collections see nothing that is older."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
