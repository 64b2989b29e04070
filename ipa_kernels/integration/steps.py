"""The arguments of a step of a UNet, what torch is set to while it runs, and the first step that a pipeline runs."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..report import GraphReport

# the first parameters of every UNet's forward
NAMES = ("sample", "timestep", "encoder_hidden_states")


S = TypeVar("S", contravariant=True)


class Graphs(Protocol[S]):
    """The CUDA graphs of a UNet (`ipa_kernels.graphs`, the room above), as the hooks around its steps know them."""

    @staticmethod
    def takes(device: Any) -> bool:
        """Whether steps on a device can be captured."""

    def step(
        self, state: S, unet: Any, forward: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Run a step of the UNet, in a graph where there is one or will be. state: what `enable` left on the UNet."""

    def report(self) -> GraphReport:
        """What was captured and replayed."""

    def drop(self) -> None:
        """Forget every graph."""


class _Thread(threading.local):
    """Of each thread: whether its next step is stopped."""

    stops = False


class _Capturing(threading.local):
    """Of each thread: the contexts whose steps are captured."""

    def __init__(self) -> None:
        self.contexts: list[object] = []


_THREAD = _Thread()
CAPTURING = _Capturing()


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
    """The CUDA stream on which a tensor is computed with now. None on other devices, and while a graph is captured: before that
    begins, all else is through.
    """
    if type(tensor) is not Tensor or tensor.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(tensor.device)


def modes_of(device_type: str) -> tuple[Any, ...]:
    """What torch is set to that changes a result, or how it may be computed."""
    return (
        torch.is_grad_enabled(),
        torch.autograd.forward_ad._current_level,
        _has_autocast(device_type) and torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        # not allow_tf32: reading it raises once a user has set this newer switch
        device_type == "cuda" and torch.backends.cuda.matmul.fp32_precision,
    )


@functools.cache
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


@contextmanager
def capturing(context: object) -> Iterator[None]:
    """Steps that this thread runs in this block, of the UNet of a context, are those that a CUDA graph is captured from."""
    CAPTURING.contexts.append(context)
    try:
        yield
    finally:
        CAPTURING.contexts.pop()


def is_capturing(context: object) -> bool:
    """Whether this thread is in `capturing`. Steps of other threads are not."""
    return context in CAPTURING.contexts
