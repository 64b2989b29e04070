"""A step of a UNet: what runs in this thread, and the arguments of the first step that a pipeline runs."""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..report import GraphReport
from . import step_lock

if TYPE_CHECKING:
    from .conditioning_cache import Entry
    from .state import ModelContext

# the first parameters of every UNet's forward
NAMES = ("sample", "timestep", "encoder_hidden_states")


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
        context: "ModelContext",
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
    """Of each thread: the step that runs, the innermost; the contexts whose steps are captured; whether its next step is
    stopped.
    """

    def __init__(self) -> None:
        self.step: Step | None = None
        self.capturing: list[object] = []
        self.stops = False


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


def depth_below(frame: FrameType | None) -> int | None:
    """How far below a frame the caller is in this thread's stack; None where that frame is not on it.

    `sys._getframe` finds the frame again by this number in a fraction of a microsecond, and no other: so a step that was
    interrupted, for which torch runs no hooks, is told from one that runs.
    """
    if frame is None:
        return None
    depth, above = 0, sys._getframe(1)
    while above is not frame:
        if above.f_back is None:
            return None
        depth, above = depth + 1, above.f_back
    return depth


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


class Stopped(BaseException):
    """Raised in the place of a UNet's step; args: its positional and its keyword arguments."""


def named(arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a step by name, as far as they are looked at."""
    return dict(zip(NAMES, arguments, strict=False)) | options


def first(call: Callable[[], object]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the first step that a pipeline runs. The pipeline is stopped there.

    Raises RuntimeError where no enabled UNet is called.
    """
    THREAD.stops = True
    try:
        call()
    except Stopped as step:
        arguments, options = step.args
        return arguments, options
    finally:
        THREAD.stops = False
    raise RuntimeError(
        "pipe: expected a pipeline that runs its UNet with these arguments, got one that returned without a step"
    )


def stop_if_asked(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Raise `Stopped` within `first`."""
    if THREAD.stops:
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
    THREAD.capturing.append(context)
    try:
        yield
    finally:
        THREAD.capturing.pop()


def is_capturing(context: object) -> bool:
    """Whether this thread is in `capturing`. Steps of other threads are not."""
    return context in THREAD.capturing
