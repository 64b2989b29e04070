"""enable, disable, accelerated, explain, clear_cache: the switch on a diffusers pipeline or UNet.

State belongs to the UNet: pipelines that share one are switched together. The UNet gets one attribute and one forward pre-hook,
which takes over IP-Adapters that are loaded later; each processor gets another class and one attribute.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .conditioning import Memory
from .ops.decoupled_attention import UnsupportedError, check_impl
from .report import CacheReport, LayerReport, Report
from .session import Session

_STATE = "_ipa_kernels"
_OFF = "IPA_KERNELS_DISABLE"


# the first parameters of every UNet's forward
_STEP = ("sample", "timestep", "encoder_hidden_states")

# Steps of one UNet may run in several threads, and each may find a new adapter.
_SWITCH = threading.RLock()


class _Watch:
    """The hooks of an enabled UNet: before a step they take over what was loaded since the last one, and open the memory."""

    def __init__(self, unet: nn.Module, session: Session) -> None:
        self.session = session
        self.attentions = dict(_attentions(unet))
        self.handles: list[Any] = []

    def attach(self, unet: nn.Module) -> None:
        """Watch the steps of a UNet."""
        self.handles = [
            unet.register_forward_pre_hook(self.before, with_kwargs=True),
            unet.register_forward_hook(self.after, always_call=True),
        ]
        setattr(unet, _STATE, self)

    def detach(self, unet: nn.Module) -> None:
        """The inverse of `attach`; does nothing where that was not done."""
        for handle in self.handles:
            handle.remove()
        vars(unet).pop(_STATE, None)

    def before(self, unet: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """A step begins."""
        if torch.compiler.is_compiling():
            return
        self.take_over_new(unet, [])
        if self.session.cache:
            named = dict(zip(_STEP, arguments, strict=False)) | options
            images = (named.get("added_cond_kwargs") or {}).get("image_embeds")
            tensors = [named.get("encoder_hidden_states"), *(images if isinstance(images, list) else [images])]
            self.session.memory.enter(named.get("timestep"), tuple(map(id, tensors)))

    def after(self, *arguments: Any) -> None:
        """A step has ended, whether it returned or raised."""
        if not torch.compiler.is_compiling():
            self.session.memory.leave()

    def take_over_new(self, unet: nn.Module, undo: list[Callable[[], None]]) -> None:
        """Take over every stock module of an IP-Adapter; `undo` collects, in the order of the changes, what reverts each."""
        families, projections = _families(), _projections()
        for module in projections.of(unet):
            if type(module) in projections.OURS:
                with _SWITCH:
                    if type(module) in projections.OURS:
                        undo.append(projections.take_over(module, self.session))
        for name, attention in self.attentions.items():
            processor = attention.processor
            if families.is_new(processor, self.session):
                with _SWITCH:
                    if families.is_new(processor, self.session):
                        undo.append(families.take_over(processor, name, self.session))
                continue
            foreign = families.foreign_reason(processor)
            if foreign is None:
                continue
            if self.session.impl == "triton":
                raise UnsupportedError(f'{name}: impl="triton" cannot run this layer: {foreign}')
            if self.session.impl == "auto":
                self.session.warn_once(foreign, "its own code runs")


def enable(target: Any, *, impl: str = "auto", cache: bool = True) -> Report:
    """Run the IP-Adapter layers of a pipeline in one kernel each; a second call replaces the options.

    Args:
        target: a diffusers pipeline with a UNet, or the UNet itself. It need not have an IP-Adapter yet: one that is loaded
            later is taken over on the next step.
        impl: "auto" is the kernel where it runs, else eager attention, which is bit for bit stock's; each distinct reason warns
            once (`ipa_kernels.FallbackWarning`). "triton" never falls back. "eager" never uses the kernel.
        cache: whether to keep what is constant during a generation: keys, values, image tokens, mask vectors. An edit through
            `weight.data` in the middle of a generation is not seen; every other change is, and this one between generations.

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
    unet = _unet(target)
    if os.environ.get(_OFF) == "1":
        report = explain(target)
        report.note = f"{_OFF}=1: enable did nothing"
        return report
    if impl == "triton":
        _demand_kernel(unet)
    found = _watch(unet)
    watch = found or _Watch(unet, Session(impl, cache))
    session = watch.session
    before = session.impl, session.cache
    undo: list[Callable[[], None]] = []
    try:
        session.impl, session.cache = impl, cache
        watch.take_over_new(unet, undo)
        if found is None:
            watch.attach(unet)
        session.memory = Memory()
        return _report(unet, type(target).__name__)
    except BaseException:
        session.impl, session.cache = before
        for revert in reversed(undo):
            revert()
        if found is None:
            watch.detach(unet)
        raise


def disable(target: Any) -> None:
    """Undo `enable` exactly: the same processor objects with their own class again. Does nothing where it is not enabled.

    Raises TypeError for a target of a kind that is not known, ImportError without diffusers.
    """
    unet = _unet(target)
    watch = _watch(unet)
    if watch is None:
        return
    families, projections = _families(), _projections()
    installed = {attention.processor for attention in watch.attentions.values()}
    for module in installed | set(watch.session.taken):
        ours = type(module) in families.STOCK
        # a processor that was put into another enabled UNet since belongs to that one
        if ours and (module in installed or module._ipa_layer.session is watch.session):
            families.give_back(module)
        elif type(module) in projections.STOCK:
            projections.give_back(module)
    for module in projections.of(unet):
        if type(module) in projections.STOCK:
            projections.give_back(module)
    watch.detach(unet)
    watch.session.memory.forget()


@contextmanager
def accelerated(target: Any, *, impl: str = "auto", cache: bool = True) -> Iterator[Report]:
    """`enable` for the length of a with-block; the state that it found comes back, the report is refreshed on exit."""
    unet = _unet(target)
    found = _watch(unet)
    before = None if found is None else {"impl": found.session.impl, "cache": found.session.cache}
    report = enable(target, impl=impl, cache=cache)
    try:
        yield report
    finally:
        try:
            note = report.note
            vars(report).update(vars(_report(unet, report.target)))
            report.note = note or report.note
        finally:
            if before is None:
                disable(unet)
            elif _watch(unet) is None:
                enable(unet, **before)
            else:
                # not through enable(): what was in force before needs no new permission
                vars(_watch(unet).session).update(before)


def explain(target: Any) -> Report:
    """A snapshot of which layer runs what, and why not the kernel.

    Raises TypeError for a target of a kind that is not known, ImportError without diffusers.
    """
    return _report(_unet(target), type(target).__name__)


def _report(unet: Any, target: str) -> Report:
    families = _families()
    watch = _watch(unet)
    impl = watch.session.impl if watch is not None else "auto"
    device, dtype = _execution_device(unet), unet.dtype
    layers = []
    for name, attention in _attentions(unet):
        processor = attention.processor
        if not families.is_adapter(processor):
            continue
        planned, reasons = families.layer_plan(attention, processor, impl, device, dtype)
        layer = getattr(processor, "_ipa_layer", None)
        if watch is None:
            layers.append(LayerReport(name, "stock", None, "not enabled", 0))
        elif type(processor) in families.FUSED:
            waiting = "loaded since: taken over by the next step that is not compiled, until then stock"
            layers.append(LayerReport(name, planned, None, "; ".join([waiting, *reasons]), 0))
        elif layer is None or layer.impl is None:
            layers.append(LayerReport(name, planned, None, "; ".join(reasons), 0))
        else:
            layers.append(LayerReport(name, planned, layer.impl, layer.reason, layer.calls))
    memory = watch.session.memory if watch is not None else None
    note = "" if layers else _why_no_layers(unet)
    return Report(
        target=target,
        enabled=watch is not None,
        impl=None if watch is None else impl,
        note=note if watch is not None else "",
        layers=layers,
        cache=CacheReport() if memory is None else CacheReport(memory.hits, memory.misses, memory.bytes),
    )


def _why_no_layers(unet: Any) -> str:
    if unet.config.encoder_hid_dim_type == "ip_image_proj":
        return (
            "an IP-Adapter is loaded, but other processors (set_attn_processor, attention slicing, fused QKV projections) took "
            "the place of its own: diffusers cannot run it until those are back or it is loaded again"
        )
    return "no IP-Adapter is loaded: one that is loaded later is taken over on the next step"


def clear_cache(target: Any) -> None:
    """Drop everything remembered from earlier generations, and count from 0 again.

    Raises TypeError for a target of a kind that is not known, ImportError without diffusers.
    """
    watch = _watch(_unet(target))
    if watch is not None:
        watch.session.memory = Memory()


def _families() -> ModuleType:
    try:
        from .processors import unet
    except ImportError as error:
        raise ImportError(f"ipa_kernels.enable needs diffusers: pip install 'ipa-kernels[diffusers]' ({error})") from error
    return unet


def _projections() -> ModuleType:
    from .processors import projections

    return projections


def _unet(target: Any) -> Any:
    """The UNet of a pipeline, a compiled UNet's original, or the UNet itself."""
    _families()
    from diffusers.loaders import UNet2DConditionLoadersMixin

    unet = target if isinstance(target, nn.Module) else getattr(target, "unet", None)
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, UNet2DConditionLoadersMixin):
        raise TypeError(
            "target: expected a diffusers pipeline with a UNet that takes IP-Adapters, or that UNet (UNet2DConditionModel, "
            f"UNetMotionModel), got {type(target).__name__}"
        )
    return unet


def _watch(unet: nn.Module) -> Any:
    return vars(unet).get(_STATE)


def _attentions(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, Attention) of every attention layer of the blocks, in the order of the modules."""
    for name, module in unet.named_modules():
        if hasattr(module, "set_processor") and not name.startswith("encoder_hid_proj"):
            yield name, module


def _execution_device(unet: Any) -> torch.device:
    """Where the UNet computes: an offloaded one keeps its weights elsewhere."""
    for module in unet.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device(unet.device)


def _demand_kernel(unet: Any) -> None:
    families = _families()
    device, dtype = _execution_device(unet), unet.dtype
    refused: dict[str, list[str]] = {}
    for name, attention in _attentions(unet):
        if families.is_adapter(attention.processor):
            _, reasons = families.layer_plan(attention, attention.processor, "triton", device, dtype)
            for reason in reasons:
                refused.setdefault(reason, []).append(name)
    if refused:
        lines = (f"{reason} ({len(names)} layers, first {names[0]})" for reason, names in refused.items())
        raise UnsupportedError(f'impl="triton" cannot run this model ({dtype}, {device}): ' + "; ".join(lines))
