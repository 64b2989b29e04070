"""The step of a UNet that runs in this thread, and what is kept in it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch

from . import step_lock
from .conditioning_cache import Entry, Keeper
from .state import ModelContext
from .steps import modes_of

T = TypeVar("T")


class Step:
    """One call of an enabled UNet, from its hooks before to those after.

    frame: of the call of the UNet; stream: as `stream_of` its latents; outer: the step of another UNet that this one runs in.
    entry: what is kept for its condition, None where nothing is kept or found. is_closed: whether nothing can run in it but
    torch's, diffusers' and our own functions, so that what was checked before it need not be checked in each layer. modes: as
    `modes_of` before it; lora_scale: the factor of all LoRAs while it runs. may_read: whether it may read static storage;
    has_lock: whether it holds the `StepLock` of its UNet.
    """

    __slots__ = (
        "context", "entry", "frame", "has_lock", "is_closed", "lora_scale", "may_read", "modes", "outer",
        "stream", "thread",
    )  # fmt: skip

    def __init__(
        self,
        context: ModelContext,
        frame: FrameType | None = None,
        stream: Any = None,
        device_type: str = "cpu",
        lora_scale: float = 1,
    ) -> None:
        self.context = context
        self.frame = frame
        self.thread = threading.current_thread()
        self.stream = stream
        self.modes = modes_of(device_type)
        self.lora_scale = lora_scale
        self.outer: Step | None = None
        self.entry: Entry | None = None
        self.is_closed = False
        self.may_read = False
        self.has_lock = False

    @property
    def is_running(self) -> bool:
        """False where it was left in a way that torch runs no hooks for."""
        return self.frame is None or step_lock.is_running(self.frame, self.thread)

    @property
    def is_of_this_thread(self) -> bool:
        """Whether the caller's thread runs it."""
        return self.thread is threading.current_thread()


class _Thread(threading.local):
    """Of each thread: the step that runs, the innermost."""

    step: Step | None = None


THREAD = _Thread()


def enter(step: Step) -> None:
    """The step runs in this thread from now on."""
    outer = THREAD.step
    # one that was interrupted is none
    step.outer = outer if outer is not None and outer.is_running else None
    THREAD.step = step


def leave(step: Step) -> None:
    """The step has ended, whether it returned or raised; does nothing where it is not the one that runs here."""
    if THREAD.step is step:
        THREAD.step = step.outer


@contextmanager
def suspended() -> Iterator[None]:
    """No step runs in this thread, for the length of this block."""
    before, THREAD.step = THREAD.step, None
    try:
        yield
    finally:
        THREAD.step = before


def keeper(device_type: str) -> Keeper | None:
    """Of the step that runs in this thread, for what is computed on such devices; None where nothing is kept."""
    step = None if torch.compiler.is_compiling() else THREAD.step
    # torch runs no hooks for a KeyboardInterrupt
    if step is None or step.entry is None or not step.is_running:
        return None
    return Keeper(step.context.conditioning, step.entry, modes_of(device_type), step.is_closed)
