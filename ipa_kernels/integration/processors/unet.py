"""UNets: the three IP-Adapter processors of diffusers 0.35.2 to 0.42.1 (`models/attention_processor.py`).

A processor is installed by changing its class to a subclass that adds no parameter: it stays the same object with the same
weights, and giving the class back undoes it. What a subclass cannot do exactly it hands to the class that it came from.

The subclasses have the names of the classes that they replace: diffusers looks for "IPAdapter", "Added" and "XFormers" in them,
its users print and compare them.
"""

import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from diffusers.models.unets import unet_2d_condition, unet_motion_model
from torch import Tensor, nn

from ...ops import UnsupportedError
from ...ops.api import choose, run, traced_op
from ...ops.dispatch import automatic_reasons, layer_reasons
from .. import patching
from ..conditioning_cache import Entry
from ..eligibility import foreign_reason, stock_reasons
from ..known_modules import Installed, is_hooked
from ..prepared_call import PreparedCall
from ..replaced import is_anything_replaced, replaced_reasons
from ..running_step import THREAD, depth_below
from ..state import Layer, ModelContext, is_traced_or_captured, layer_of
from ..steps import modes_of
from . import branches


class _Fused(Installed):
    """What the three subclasses share. A call works on what it read at its start: another thread may `disable` meanwhile."""

    # whether eager attention gives the result of the replaced class bit for bit
    eager_is_exact = False

    scale: list[Any]
    to_k_ip: nn.ModuleList
    to_v_ip: nn.ModuleList

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy or a pickle of a processor is a stock one; a UNet that is enabled takes it over on its next step."""
        state = {name: value for name, value in vars(self).items() if name != "_ipa_layer"}
        return object.__new__, (_ours(self).replaces,), state

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        """diffusers' processor call: hidden_states [B, M, C] and (text, [image tokens, ...]) to [B, M, C]."""
        layer: Layer | None = self.__dict__.get("_ipa_layer")
        query: Tensor | None = None
        if layer is not None and attention_mask is None and not torch.compiler.is_compiling():
            step, call = _prepared(self, layer, attn, ip_adapter_masks is not None)
            if call is not None and call.matches(hidden_states, encoder_hidden_states, ip_adapter_masks, self.scale):
                query = attn.to_q(hidden_states)
                if call.takes(query):
                    layer.context.conditioning.hits += call.values
                    layer.impl, layer.reason = call.impl, call.reason
                    layer.calls += 1
                    attended = call.attend(query)
                    return _project_out_closed(attn, attended) if step.is_closed else _project_out(attn, attended)
        kind = _ours(self)
        if layer is not None and kind is not None:
            inputs = encoder_hidden_states, attention_mask, ip_adapter_masks
            if is_traced_or_captured(layer.context):
                out = _traced_call(kind, layer, self, attn, hidden_states, *inputs)
            else:
                out = _eager_call(kind, layer, self, attn, hidden_states, *inputs, query)
            if out is not None:
                return _project_out(attn, out)
        # diffusers names the last parameters and drops arguments that a processor does not name
        replaced: Any = type(self) if kind is None else kind.replaces
        return replaced.__call__(  # type: ignore[no-any-return]
            self, attn, hidden_states, encoder_hidden_states, attention_mask, temb, scale, ip_adapter_masks
        )

    @staticmethod
    def softmax_scale(attn: Attention) -> float | None:
        """The factor of the scores; None is 1/sqrt(head dim)."""
        return float(attn.scale)

    @staticmethod
    def refuses_masks() -> str | None:
        """Why masks are for the replaced class alone."""
        return None


def _ours(processor: object) -> Any:
    """Which of the subclasses a processor has, perhaps below a class that someone else has put on it; None where none."""
    return next((kind for kind in type(processor).__mro__ if kind in STOCK), None)


def _prepared(processor: Any, layer: Layer, attn: Attention, masked: bool) -> tuple[Any, PreparedCall | None]:
    """The step that runs, and the call that this layer ran last in such a step, while what it computed with is unchanged."""
    step = THREAD.step
    if step is None or step.entry is None or step.context is not layer.context:
        return step, None
    guard = layer.guards.get(id(attn))
    call = None if guard is None else step.entry.calls.get(guard)
    if guard is None or call is None or call.option != layer.context.impl or not _is_below(step.frame, call.depth):
        return step, None
    if step.is_closed:
        # checked before the step
        return step, call if guard.valid else None
    if not guard.check() or is_anything_replaced(_ours(processor).replaces, attn, masked):
        return step, None
    to_q = attn._modules.get("to_q")
    is_same = to_q is not None and not is_hooked(to_q) and call.modes == modes_of(call.device.type)
    return step, call if is_same else None


def _is_below(frame: FrameType | None, depth: int | None) -> bool:
    """Whether the processor's call is so deep below that of the UNet: a step that was interrupted is not in the stack."""
    if frame is None or depth is None:
        return frame is None
    try:
        return sys._getframe(depth) is frame
    except ValueError:
        return False


def _eager_call(
    kind: Any,
    layer: Layer,
    processor: Any,
    attn: Attention,
    hidden_states: Tensor,
    states: Any,
    attention_mask: Any,
    masks: Any,
    query: Tensor | None,
) -> Tensor | None:
    """A call with everything checked, and kept where a step runs; None where that is for the replaced class.

    query: to_q of the hidden states, where that has run.
    """
    impl = layer.context.impl
    reasons = _class_reasons(kind, attn, masks)
    reasons += stock_reasons(processor, attn, hidden_states, states, attention_mask, masks, processor.scale)
    if not reasons and not kind.eager_is_exact and impl != "triton":
        _, reasons = layer_plan(attn, processor, impl, hidden_states.device, hidden_states.dtype)
    problem = None
    if not reasons:
        text, images = states
        inputs = text, images, masks
        entry, depth = _running_step(layer)
        guard, call = None, None
        if entry is not None:
            # before anything is read: another thread may write while this one computes
            guard, unkept = layer.guard(attn, processor), layer.context.conditioning.unkept
            call = PreparedCall.of(hidden_states, processor.scale, inputs, modes_of(hidden_states.device.type))

        def runs_kernel(states: Tensor) -> bool:
            return layer_plan(attn, processor, impl, states.device, states.dtype)[0] == "triton"

        try:
            query = attn.to_q(hidden_states) if query is None else query
            problem = branches.problem(layer, processor, attn, query, inputs, kind.softmax_scale(attn), guard, runs_kernel)
        except (TypeError, ValueError) as error:
            # for the replaced class to run or to refuse, in its own words
            reasons = [f"unusual input: {error}"]
    if problem is None:
        if impl == "triton":
            raise UnsupportedError(_cannot(layer, attn, hidden_states, reasons))
        layer.note_call("stock", reasons)
        return None
    chosen, reasons = choose(problem, impl)
    if chosen == "eager" and not kind.eager_is_exact:
        layer.note_call("stock", reasons)
        return None
    layer.note_call(chosen, reasons)
    if entry is not None and call is not None and guard is not None and query is not None:
        is_kept = layer.context.conditioning.unkept == unkept and isinstance(attn.to_q, nn.Module) and not is_hooked(attn.to_q)
        is_same = guard.check() and call.matches(hidden_states, states, masks, processor.scale)
        if is_kept and is_same and call.prepare(problem, chosen, impl, layer.reason, depth):
            entry.calls[guard] = call
            return call.attend(query)
    return _merge(run(problem, chosen))


def _running_step(layer: Layer) -> tuple[Entry | None, int | None]:
    """What is kept in the step of the layer's UNet that runs in this thread, and how deep the layer's call is below it."""
    step = THREAD.step
    if step is None or step.entry is None or step.context is not layer.context:
        return None, None
    depth = depth_below(step.frame)
    return (None, None) if depth is None and step.frame is not None else (step.entry, depth)


def _traced_call(
    kind: Any,
    layer: Layer,
    processor: Any,
    attn: Attention,
    hidden_states: Tensor,
    states: Any,
    attention_mask: Any,
    masks: Any,
) -> Tensor | None:
    """A call in a graph, which runs later and with other data; None where that is for the replaced class.

    No value of a scale is looked at: it would be compiled in. Nothing is counted: this runs once, when the graph is traced.
    """
    impl = layer.context.impl
    # where the hook before the step is in the graph too, a scale is what it is for this code: compiled in
    is_data = layer.context.is_stepping and layer.table.is_data
    scales = [None] * layer.table.tensor.shape[0] if is_data else processor.scale
    reasons = _class_reasons(kind, attn, masks)
    reasons += stock_reasons(processor, attn, hidden_states, states, attention_mask, masks, scales)
    chosen = "stock"
    if not reasons:
        query = attn.to_q(hidden_states)
        inputs = *states, masks
        scale = kind.softmax_scale(attn)
        try:
            if is_data:
                problem = branches.graph_problem(layer, processor, attn, query, inputs, scale)
            else:
                problem = branches.problem(layer, processor, attn, query, inputs, scale, None, lambda states: False)
            chosen, reasons = choose(problem, impl)
        except UnsupportedError:
            raise
        except (TypeError, ValueError):
            # what they say is no constant, which a graph's reason must be
            reasons = ["unusual input: a step that is not compiled names it"]
    if chosen == "eager" and not kind.eager_is_exact:
        chosen = "stock"
    if chosen == "stock" and impl == "triton":
        raise UnsupportedError(_cannot(layer, attn, hidden_states, reasons))
    layer.impl, layer.reason = chosen, "; ".join(reasons)
    if chosen == "stock":
        return None
    return _merge(run(problem, chosen) if chosen == "eager" else traced_op(problem, impl))


def _cannot(layer: Layer, attn: Attention, hidden_states: Tensor, reasons: list[str]) -> str:
    reasons = reasons + layer_reasons(hidden_states.device, hidden_states.dtype, attn.inner_dim // attn.heads)
    # sizes are tensors while torch.jit traces
    shape = "of any shape" if torch.jit.is_tracing() else list(hidden_states.shape)  # type: ignore[no-untyped-call]
    saw = f"hidden_states {shape}, {hidden_states.dtype}, {hidden_states.device}"
    return f'{layer.name}: impl="triton" cannot run {saw}: ' + "; ".join(reasons)


def _merge(out: Tensor) -> Tensor:
    """[B, H, M, D] to [B, M, H·D]."""
    return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)


def _project_out(attn: Any, out: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](out))  # type: ignore[no-any-return]


def _project_out_closed(attn: Any, out: Tensor) -> Tensor:
    """In a closed step, where nobody sees whether a dropout that does nothing is called."""
    linear, dropout, *_ = attn.to_out._modules.values()
    out = linear(out)
    return out if type(dropout) is nn.Dropout and not (dropout.p and dropout.training) else dropout(out)


def _class_reasons(kind: Any, attn: Attention, masks: Any) -> list[str]:
    """Why only the replaced class may run a call, as far as that is about the class."""
    reasons = replaced_reasons(kind.replaces, attn, masks is not None)
    refusal = kind.refuses_masks()
    if masks is not None and refusal is not None:
        reasons.append(refusal)
    return reasons


class IPAdapterAttnProcessor(_Fused, stock.IPAdapterAttnProcessor):  # type: ignore[misc]
    """In the place of the class that computes its scores by baddbmm."""

    replaces = stock.IPAdapterAttnProcessor


class IPAdapterAttnProcessor2_0(_Fused, stock.IPAdapterAttnProcessor2_0):  # type: ignore[misc]
    """In the place of the class that every load of an IP-Adapter installs."""

    replaces = stock.IPAdapterAttnProcessor2_0

    eager_is_exact = True

    @staticmethod
    def softmax_scale(attn: Attention) -> float | None:
        """The replaced class ignores attn.scale."""
        return None


class IPAdapterXFormersAttnProcessor(_Fused, stock.IPAdapterXFormersAttnProcessor):  # type: ignore[misc]
    """In the place of the class that `enable_xformers_memory_efficient_attention` installs."""

    replaces = stock.IPAdapterXFormersAttnProcessor

    @staticmethod
    def refuses_masks() -> str | None:
        """Diffusers rounds them."""
        switch = "disable_xformers_memory_efficient_attention()"
        return f"ip_adapter_masks with xFormers: diffusers rounds them to float16 first; call {switch}"


FUSED: dict[type, Any] = {
    kind.replaces: kind for kind in (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)
}
STOCK: dict[type, Any] = {ours: theirs for theirs, ours in FUSED.items()}

# `Attention.forward` asks for the signature in every call; a stored one is four times as fast to get
_signature: Any = inspect.signature(_Fused.__call__)
# torch.compile cannot trace a mapping proxy once the UNet's keyword arguments were changed, as diffusers does for masks
_signature._parameters = dict(_signature._parameters)
_Fused.__call__.__signature__ = _signature  # type: ignore[attr-defined]

# `set_default_attn_processor` compares exact classes with this registry, which is imported by name
for _module in (stock, unet_2d_condition, unet_motion_model):
    _known = tuple(FUSED[theirs] for theirs in _module.CROSS_ATTENTION_PROCESSORS if theirs in FUSED)
    _module.CROSS_ATTENTION_PROCESSORS += _known


def is_new(processor: Any, context: ModelContext) -> bool:
    """Whether a processor has yet to be installed for this UNet: a stock one, or one of another UNet's."""
    kind = type(processor)
    return kind in FUSED or (kind in STOCK and context_of(processor) is not context)


def context_of(processor: Any) -> ModelContext | None:
    """What a processor shares with the others of its UNet."""
    layer = layer_of(processor)
    return None if layer is None else layer.context


def install(processor: nn.Module, name: str, context: ModelContext, undo: list[Callable[[], None]]) -> None:
    """Install a processor for the UNet of this context; `undo` gets what reverts that, before anything is changed."""
    kind = type(processor)
    patching.install(processor, FUSED.get(kind, kind), context, undo, Layer(name, context))


def uninstall(processor: nn.Module) -> None:
    """Make a processor of ours a stock one again."""
    kind = type(processor)
    patching.uninstall(processor, STOCK.get(kind, kind))


def layer_plan(
    attn: Attention, processor: object, impl: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, list[str]]:
    """("triton", "eager" or "stock", why not the kernel) for a layer, as far as it is known before there are inputs."""
    foreign = foreign_reason(processor, expected=True)
    if foreign is not None:
        return "stock", [foreign]
    ours = _ours(processor)
    kind = type(processor) if ours is None else STOCK[ours]
    replaced = replaced_reasons(kind, attn, masked=False)
    if replaced:
        return "stock", replaced
    fallback = "eager" if FUSED[kind].eager_is_exact else "stock"
    if impl == "eager":
        return fallback, ['impl="eager"']
    reasons = layer_reasons(device, dtype, attn.inner_dim // attn.heads)
    if impl == "auto":
        reasons += automatic_reasons(device, dtype)
    return (fallback, reasons) if reasons else ("triton", [])
