"""The steps of UNets that each thread is in, and the arguments of the first one that a pipeline runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .step_lock import is_running

# the first parameters of every UNet's forward
NAMES = ("sample", "timestep", "encoder_hidden_states")


class Step(NamedTuple):
    """watch: of the UNet that runs it; has_turn: whether it holds the turn of that; frame: of the call of the UNet; stream: as
    `stream_of` its latents.
    """

    watch: Any
    has_turn: bool
    frame: FrameType
    stream: Any


class _Thread(threading.local):
    """Of each thread: its steps, the innermost last; the sessions whose steps it records; whether its next step is stopped."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.recorded: list[object] = []
        self.stops = False


_THREAD = _Thread()


class Stopped(BaseException):
    """Raised in the place of a UNet's step; args: its positional and its keyword arguments."""


def named(arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a step by name, as far as they are looked at."""
    return dict(zip(NAMES, arguments, strict=False)) | options


def first(call: Callable[[], object]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the first step that a pipeline runs. The pipeline is stopped there.

    Raises RuntimeError where no enabled UNet is called.
    """
    _THREAD.stops = True
    try:
        call()
    except Stopped as step:
        arguments, options = step.args
        return arguments, options
    finally:
        _THREAD.stops = False
    raise RuntimeError(
        "pipe: expected a pipeline that runs its UNet with these arguments, got one that returned without a step"
    )


def stop_if_asked(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Raise `Stopped` within `first`."""
    if _THREAD.stops:
        raise Stopped(arguments, options)


def stream_of(tensor: Any) -> Any:
    """The CUDA stream on which a tensor is computed with now. None on other devices, and while a graph is recorded: before that
    begins, all else is through.
    """
    if type(tensor) is not Tensor or tensor.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(tensor.device)


@contextmanager
def recorded(session: object) -> Iterator[None]:
    """Steps that this thread runs in this block, of the UNet of a session, are those that a CUDA graph is recorded from."""
    _THREAD.recorded.append(session)
    try:
        yield
    finally:
        _THREAD.recorded.pop()


def is_recorded(session: object) -> bool:
    """Whether this thread is in `recorded`. Steps of other threads are not."""
    return session in _THREAD.recorded


def running() -> list[Step]:
    """The steps that this thread is in, the innermost last; the list itself."""
    return _THREAD.steps


def take_interrupted() -> list[Step]:
    """Take out the steps of this thread that were left in a way that torch runs no hooks for."""
    return _take([step for step in running() if not is_running(step.frame)])


def take_all(watch: Any) -> list[Step]:
    """Take out the steps of this thread that belong to a UNet."""
    return _take([step for step in running() if step.watch is watch])


def _take(taken: list[Step]) -> list[Step]:
    steps = running()
    for step in taken:
        steps.remove(step)
    return taken
