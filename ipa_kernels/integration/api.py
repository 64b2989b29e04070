"""enable, disable, accelerated, explain, clear_cache: the switch on a diffusers pipeline or UNet.

State belongs to the UNet: pipelines that share one are switched together. The UNet gets one attribute and two hooks (`hooks`),
each module of an IP-Adapter another class (`processors`).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..ops.dispatch import UnsupportedError, check_impl
from ..report import CacheReport, LayerReport, Report, plural

if TYPE_CHECKING:
    from .hooks import ModelState, Options

OFF = "IPA_KERNELS_DISABLE"


def enable(target: Any, *, impl: str = "auto", cache: bool = True) -> Report:
    """Run the IP-Adapter layers of a pipeline in one kernel each; a second call replaces the options.

    Args:
        target: a diffusers pipeline with a UNet, or the UNet itself. It need not have an IP-Adapter yet: one that is loaded
            later is enabled by the next uncompiled step.
        impl: "auto" is the kernel where it runs, else eager attention, which is bit for bit stock's; each distinct reason warns
            once (`ipa_kernels.FallbackWarning`). "triton" never falls back. "eager" never uses the kernel.
        cache: whether to keep what is constant during a generation: keys, values, image tokens, mask vectors.
            Not seen is an edit in place through `.data` or a NumPy view, which leaves no trace in torch: of a
            weight, while a loop of your own keeps its prompt and image tensors; of such a tensor; and of a mask
            that you keep. `pipe(...)` makes new tensors of prompt and images, so that weights edited between
            two calls of it are seen. `clear_cache` is the remedy.

    Returns:
        A `Report` of what is planned, layer by layer.

    Raises:
        TypeError: a target of a kind that is not known.
        ValueError: an unknown `impl`.
        UnsupportedError: `impl="triton"` and a layer cannot run the kernel; the message lists every reason.
        ImportError: diffusers is not installed.

    Whatever is raised, the target is as before. With IPA_KERNELS_DISABLE=1 in the environment nothing is done, and the report
    says so.
    """
    check_impl(impl)
    unet = unet_of(target)
    if os.environ.get(OFF) == "1":
        report = explain(target)
        report.note = f"{OFF}=1 in the environment: enable did nothing; unset it"
        return report
    from .hooks import SWITCH, Options

    with SWITCH:
        options = Options(impl, cache)
        report, state = _switch_on(unet, type(target).__name__, options)
        state.base = options
    return report


def disable(target: Any) -> None:
    """Undo `enable` exactly: the same processor objects with their own class again. Does nothing where it is not enabled.

    Raises TypeError for a target of a kind that is not known, ImportError without diffusers.
    """
    unet = unet_of(target)
    from .adapters import uninstall_all
    from .hooks import SWITCH, of

    with SWITCH:
        found = of(unet)
        if found is None:
            return
        found.detach(unet)
        uninstall_all(unet, found.context)
        found.context.conditioning.forget()
        found.drop_static()


@contextmanager
def accelerated(target: Any, *, impl: str = "auto", cache: bool = True) -> Iterator[Report]:
    """`enable` for the length of a with-block; the state that it found comes back, the report is refreshed on exit.

    Blocks may overlap, in one thread or several: the UNet stays enabled until the last one ends.
    """
    unet = unet_of(target)
    from .hooks import SWITCH, Options, of

    if os.environ.get(OFF) == "1":
        report = enable(target, impl=impl, cache=cache)
        try:
            yield report
        finally:
            vars(report).update(vars(_report(unet, report.target)) | {"note": report.note})
        return
    check_impl(impl)
    block = [Options(impl, cache)]
    with SWITCH:
        found = of(unet)
        base = None if found is None else found.base
        report, state = _switch_on(unet, type(target).__name__, block[0])
        state.blocks.append(block)
    try:
        yield report
    finally:
        try:
            vars(report).update(vars(_report(unet, report.target)))
        finally:
            with SWITCH:
                _end_block(unet, block, base)


def _end_block(unet: Any, block: "list[Options]", base: "Options | None") -> None:
    """Bring back what an `accelerated` block found, or what another block that is still open asks for."""
    from .hooks import of

    found = of(unet)
    if found is None:
        # disabled inside the block
        if base is not None:
            enable(unet, impl=base.impl, cache=base.cache)
        return
    found.blocks = [other for other in found.blocks if other is not block]
    found.base = base
    options = found.blocks[-1][0] if found.blocks else base
    if options is None:
        disable(unet)
    else:
        # not through enable(): what was in force before needs no new permission
        found.context.impl, found.context.cache = options


def _switch_on(unet: Any, target: str, options: "Options") -> "tuple[Report, ModelState]":
    """What `enable` and `accelerated` share; whatever is raised, the UNet is as before."""
    from .hooks import ModelState, of

    if options.impl == "triton":
        _demand_kernel(unet)
    found = of(unet)
    state = found or ModelState(unet)
    context = state.context
    before = context.impl, context.cache
    undo: list[Callable[[], None]] = []
    try:
        context.impl, context.cache = options
        state.install_new(unet, undo)
        state.attach(unet)
        report = _report(unet, target)
        context.forget()
        report.cache, report.cache_reason = CacheReport(), _cache_reason(state)
        return report, state
    except BaseException:
        context.impl, context.cache = before
        for revert in reversed(undo):
            revert()
        if found is None:
            state.detach(unet)
        raise


def explain(target: Any) -> Report:
    """A snapshot of which layer runs what, and why not the kernel.

    Raises TypeError for a target of a kind that is not known, ImportError without diffusers.
    """
    return _report(unet_of(target), type(target).__name__)


def _report(unet: Any, target: str) -> Report:
    from .attention_layers import adapter_layers
    from .hooks import of
    from .image_projection import unkept_reasons
    from .processors import unet as families
    from .state import layer_of

    state = of(unet)
    impl = state.context.impl if state is not None else "auto"
    device, dtype = execution_device(unet), unet.dtype
    layers = []
    switch = f"unset {OFF}" if os.environ.get(OFF) == "1" else "call ipa_kernels.enable"
    for name, attention in adapter_layers(unet):
        processor = attention.processor
        planned, reasons = families.layer_plan(attention, processor, impl, device, dtype)
        layer = layer_of(processor)
        if state is None:
            layers.append(LayerReport(name, "stock", None, f"not enabled: {switch}", 0))
        elif type(processor) in families.FUSED:
            waiting = "loaded after enable(): runs stock until the next uncompiled step"
            layers.append(LayerReport(name, planned, None, "; ".join([waiting, *reasons]), 0))
        elif layer is None or layer.impl is None:
            layers.append(LayerReport(name, planned, None, "; ".join(reasons), 0))
        else:
            layers.append(LayerReport(name, planned, layer.impl, layer.reason, layer.calls))
    note = ""
    if state is not None and not layers:
        note = "no IP-Adapter is loaded: one loaded later is enabled by the next uncompiled step"
    elif state is not None and state.context.cache:
        note = "\n  ".join(unkept_reasons(unet))
    kept = None if state is None else state.context.conditioning
    # read once: another thread may `disable`
    graphs, static = (None, None) if state is None else (state.graphs, state.static)
    return Report(
        target=target,
        enabled=state is not None,
        impl=None if state is None else impl,
        note=note,
        layers=layers,
        cache=CacheReport() if kept is None else CacheReport(kept.hits, kept.misses, kept.bytes),
        graphs=None if graphs is None else graphs.report(),
        prepared=0 if static is None else static.bytes,
        cache_reason=_cache_reason(state),
        prepared_reason="" if state is None or static is None else state.unread,
    )


def _cache_reason(state: "ModelState | None") -> str:
    if state is None:
        return ""
    return state.context.conditioning.reason if state.context.cache else "cache=False"


def clear_cache(target: Any) -> None:
    """Drop everything remembered from earlier generations, and what was prepared; count from 0 again.

    Raises TypeError for a target of a kind that is not known, ImportError without diffusers.
    """
    unet = unet_of(target)
    from .hooks import of

    state = of(unet)
    if state is not None:
        state.context.forget()
        state.drop_static()


def _require_diffusers() -> None:
    try:
        from . import hooks as hooks
    except ImportError as error:
        raise ImportError(
            f"diffusers: cannot be imported ({error}); it is missing, broken or older than 0.35.2, the oldest that was run: "
            "pip install 'ipa-kernels[diffusers]' installs or upgrades it"
        ) from error


def unet_of(target: Any) -> Any:
    """The UNet of a pipeline, a compiled UNet's original, or the UNet itself."""
    _require_diffusers()
    from diffusers import UNet2DConditionModel, UNetMotionModel

    given = target if isinstance(target, nn.Module) else getattr(target, "unet", None)
    unet, path = _original(given), ""
    while not isinstance(unet, UNet2DConditionModel | UNetMotionModel):
        # DataParallel and its relatives keep what they wrap under this name
        inside = getattr(unet, "module", None) if isinstance(unet, nn.Module) else None
        if inside is None:
            has = "" if given is target or given is None else f" with a {type(given).__name__} as its unet"
            raise TypeError(
                "target: expected a diffusers pipeline with a UNet that takes IP-Adapters, or that UNet (UNet2DConditionModel, "
                f"UNetMotionModel), got {type(target).__name__}{has}"
            )
        unet, path = _original(inside), f"{path}.module"
    if path:
        kind, name = type(_original(given)).__name__, "target" if given is target else "pipe.unet"
        raise TypeError(f"target: expected the UNet itself, got it inside a {kind}; pass {name}{path}")
    return unet


def _original(module: Any) -> Any:
    """What was compiled, of a compiled module; any other itself."""
    return getattr(module, "_orig_mod", module)


def execution_device(unet: Any) -> torch.device:
    """Where the UNet computes: an offloaded one keeps its weights elsewhere."""
    for module in unet.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device(unet.device)


def _demand_kernel(unet: Any) -> None:
    from .attention_layers import adapter_layers
    from .processors import unet as families

    device, dtype = execution_device(unet), unet.dtype
    refused: dict[str, list[str]] = {}
    for name, attention in adapter_layers(unet):
        _, reasons = families.layer_plan(attention, attention.processor, "triton", device, dtype)
        for reason in reasons:
            refused.setdefault(reason, []).append(name)
    if refused:
        lines = (f"{reason} ({len(names)} layer{plural(len(names))}, first {names[0]})" for reason, names in refused.items())
        raise UnsupportedError(f'impl="triton" cannot run this model ({dtype}, {device}): ' + "; ".join(lines))
