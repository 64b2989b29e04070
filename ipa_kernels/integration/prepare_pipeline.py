"""`prepare`: what a pipeline needs before its first compiled or captured step, found by running it up to that step."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..report import Report
from . import steps
from .api import OFF, disable, enable, execution_device, explain, unet_of

if TYPE_CHECKING:
    from .hooks import ModelState

_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def prepare(pipe: Any, **arguments: Any) -> Report:
    """Compile what `pipe(**arguments)` will launch, and keep its keys, values and mask vectors where graphs can read them.

    Graphs that are compiled or captured afterwards read static storage, which never moves, in place of projecting the prompt
    and the images in every step. Before each step it is compared with what the step was given, and filled anew where that has
    changed: a pipeline may go on to any prompt, image, mask or scale without being prepared again. What does not fit runs
    without them.

    Args:
        pipe: a diffusers pipeline with a UNet and an IP-Adapter; it is enabled where it is not yet.
        arguments: those of `pipe(...)`. The pipeline runs with them up to its first step: text and images are encoded, nothing
            is drawn. The states of `generator` and of torch's own generators are put back. Not for a callback of the same
            pipeline: its scheduler would begin anew.

    Returns:
        A `Report`; `prepared` is the size of the static storage in bytes.

    Raises:
        TypeError: `pipe` is not a pipeline, or an argument is none of the pipeline's.
        ValueError: no IP-Adapter is loaded; an argument does not fit the storage of an earlier call (`clear_cache` drops it,
            graphs are then compiled anew), or is none that can be prepared; hooks or code that is neither torch's nor
            diffusers' own between the UNet and its layers.
        RuntimeError: the pipeline runs no step with these arguments.
        ImportError: diffusers cannot be imported.
        Also what the pipeline itself raises.

    Whatever is raised, the storage of these layers that was there before stays. It holds what it held, or what this call was
    given: each step compares that with its own.
    """
    if isinstance(pipe, nn.Module) or not callable(pipe):
        raise TypeError(f"pipe: expected a diffusers pipeline, whose arguments these are, got {type(pipe).__name__}")
    unet = unet_of(pipe)
    _check_names(pipe, arguments)
    if os.environ.get(OFF) == "1":
        return enable(pipe)
    from .attention_layers import is_loaded
    from .hooks import SWITCH, of

    if not is_loaded(unet):
        raise ValueError("pipe: expected a pipeline with an IP-Adapter, got one without; load_ip_adapter comes first")
    was_enabled = of(unet) is not None
    if not was_enabled:
        enable(pipe)
    state = of(unet)
    assert state is not None, "it was enabled"
    try:
        with SWITCH:
            state.install_new(unet, [])
        with torch.no_grad(), _left_alone(pipe, unet, arguments.get("generator")):
            given, options = steps.first(lambda: pipe(**arguments))
            _fill(state, unet, given, options)
    except BaseException:
        if not was_enabled:
            disable(pipe)
        raise
    return explain(pipe)


def _check_names(pipe: Any, arguments: dict[str, Any]) -> None:
    """Some pipelines take any name, for the sake of old ones, and do nothing with it."""
    kind = type(pipe)
    known = [name for name, parameter in inspect.signature(kind.__call__).parameters.items() if parameter.kind not in _ANY]
    for name in arguments:
        if name not in known[1:]:
            raise TypeError(f"{kind.__name__}.__call__() got an unexpected argument {name!r}: expected those of pipe(...)")


def _fill(state: "ModelState", unet: Any, given: tuple[Any, ...], options: dict[str, Any]) -> None:
    """New static storage, or what is there with new contents; then the kernels."""
    from .static_storage import StaticStorage, StepInputs

    step = steps.named(given, options)
    inputs = StepInputs.of(step)
    if inputs is None:
        raise ValueError(StepInputs.refusal(step))
    stream = steps.stream_of(inputs.sample)
    state.lock.acquire()
    before = static = state.static
    try:
        state.close_interrupted()
        if static is not None and static.are_current():
            mismatch = static.mismatch(inputs)
            if mismatch is not None:
                raise ValueError(f"{mismatch}; clear_cache(pipe) drops it, graphs are then compiled anew")
            static.begin(stream)
            static.refill(inputs)
            state.unread = ""
        else:
            static = StaticStorage(unet, state.attention_layers, state.context, inputs)
            state.put_static(static)
        static.end(stream)
        _compile(state, unet, given, options)
    except BaseException:
        if static is not before:
            state.drop_static()
        raise
    finally:
        state.lock.release()


def _compile(state: "ModelState", unet: Any, given: tuple[Any, ...], options: dict[str, Any]) -> None:
    """The kernels of a step as eager calls run it, and as graphs do: they differ where a scale is 0."""
    if steps.named(given, options)["sample"].device.type != "cuda":
        return
    _run(unet, given, options)
    with state.captured():
        _run(unet, given, options)


def _run(unet: Any, given: tuple[Any, ...], options: dict[str, Any]) -> None:
    """A step with its hooks, not compiled; with lists of its own, which diffusers empties while it runs."""
    unet._call_impl(*given, **pytree.tree_map(lambda leaf: leaf, options))


@contextmanager
def _left_alone(pipe: Any, unet: Any, generators: Any) -> Iterator[None]:
    """Random numbers, progress bar, attention processors and offloading are afterwards as before."""
    processors = dict(unet.attn_processors)
    generators = generators if isinstance(generators, list) else [] if generators is None else [generators]
    states = [generator.get_state() for generator in generators]
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    device = execution_device(unet)
    pipe.set_progress_bar_config(**(bar | {"disable": True}))
    try:
        # the GPU that latents are drawn on need not be the current one
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        pipe._progress_bar_config = bar
        if any(unet.attn_processors[name] is not processor for name, processor in processors.items()):
            # perturbed attention guidance puts others in their places while it runs
            unet.set_attn_processor(processors)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        pipe.maybe_free_model_hooks()
