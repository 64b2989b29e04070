"""UNets: the three IP-Adapter processors of diffusers 0.35.2 to 0.42.1 (`models/attention_processor.py`).

A processor is installed by changing its class to a subclass that adds no parameter: it stays the same object with the same
weights, and giving the class back undoes it. What a subclass cannot do exactly it hands to the class that it came from.

The subclasses have the names of the classes that they replace: diffusers looks for "IPAdapter", "Added" and "XFormers" in them,
its users print and compare them.
"""

import inspect
from collections.abc import Callable
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
from ..conditioning_cache import active
from ..eligibility import Installed, foreign_reason, stock_reasons
from ..prepared_call import find, guard_call, keep
from ..replaced import is_anything_replaced, replaced_reasons
from ..state import Layer, ModelContext, is_traced_or_captured, layer_of
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
        return object.__new__, (STOCK[_ours(self)],), state

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
        layer = layer_of(self)
        kind = _ours(self)

        def replaced() -> Tensor:
            # diffusers names the last parameters and drops arguments that a processor does not name
            call = type(self).__call__ if kind is None else STOCK[kind].__call__
            out: Tensor = call(self, attn, hidden_states, encoder_hidden_states, attention_mask, temb, scale, ip_adapter_masks)
            return out

        if layer is None or kind is None:
            return replaced()
        if is_traced_or_captured(layer.context):
            out = _traced_call(kind, layer, self, attn, hidden_states, encoder_hidden_states, attention_mask, ip_adapter_masks)
            return replaced() if out is None else out
        impl = layer.context.impl
        memory = active()
        query: Tensor | None = None
        masked = ip_adapter_masks is not None
        if memory is not None and attention_mask is None and not is_anything_replaced(STOCK[kind], attn, masked):
            ready = find(memory, layer, self, attn, hidden_states, encoder_hidden_states, ip_adapter_masks)
            if ready is not None:
                query = attn.to_q(hidden_states)
                if ready.takes(query):
                    memory.hits += ready.values
                    layer.impl, layer.reason = ready.impl, ready.reason
                    layer.calls += 1
                    return _project_out(attn, ready.attend(query))
        reasons = _class_reasons(kind, attn, ip_adapter_masks)
        reasons += stock_reasons(self, attn, hidden_states, encoder_hidden_states, attention_mask, ip_adapter_masks, self.scale)
        if not reasons and not kind.eager_is_exact and impl != "triton":
            _, reasons = layer_plan(attn, self, impl, hidden_states.device, hidden_states.dtype)
        problem, photo = None, None
        if not reasons:
            text, images = encoder_hidden_states
            inputs = text, images, ip_adapter_masks
            reads = self, attn, hidden_states, images, ip_adapter_masks, impl
            unkept = None if memory is None else memory.unkept
            if memory is not None:
                # before anything is read: another thread may write while this one computes
                photo = guard_call(*reads)

            def runs_kernel(states: Tensor) -> bool:
                return layer_plan(attn, self, impl, states.device, states.dtype)[0] == "triton"

            try:
                query = attn.to_q(hidden_states) if query is None else query
                problem = branches.problem(layer, self, attn, query, inputs, kind.softmax_scale(attn), runs_kernel)
            except (TypeError, ValueError) as error:
                # for the replaced class to run or to refuse, in its own words
                reasons = [f"unusual input: {error}"]
        if problem is None:
            if impl == "triton":
                raise UnsupportedError(_cannot(layer, attn, hidden_states, reasons))
            layer.note_call("stock", reasons)
            return replaced()
        chosen, reasons = choose(problem, impl)
        if chosen == "eager" and not kind.eager_is_exact:
            layer.note_call("stock", reasons)
            return replaced()
        layer.note_call(chosen, reasons)
        if memory is not None and photo is not None and memory.unkept == unkept and photo.matches(*reads):
            ready = keep(memory, layer, attn, inputs, photo, problem, chosen)
            if ready is not None and query is not None:
                return _project_out(attn, ready.attend(query))
        return _project_out(attn, _merge(run(problem, chosen)))

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
                problem = branches.problem(layer, processor, attn, query, inputs, scale, lambda states: False)
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
    return _project_out(attn, _merge(run(problem, chosen) if chosen == "eager" else traced_op(problem, impl)))


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


def _class_reasons(kind: Any, attn: Attention, masks: Any) -> list[str]:
    """Why only the replaced class may run a call, as far as that is about the class."""
    reasons = replaced_reasons(STOCK[kind], attn, masks is not None)
    refusal = kind.refuses_masks()
    if masks is not None and refusal is not None:
        reasons.append(refusal)
    return reasons


class IPAdapterAttnProcessor(_Fused, stock.IPAdapterAttnProcessor):  # type: ignore[misc]
    """In the place of the class that computes its scores by baddbmm."""


class IPAdapterAttnProcessor2_0(_Fused, stock.IPAdapterAttnProcessor2_0):  # type: ignore[misc]
    """In the place of the class that every load of an IP-Adapter installs."""

    eager_is_exact = True

    @staticmethod
    def softmax_scale(attn: Attention) -> float | None:
        """The replaced class ignores attn.scale."""
        return None


class IPAdapterXFormersAttnProcessor(_Fused, stock.IPAdapterXFormersAttnProcessor):  # type: ignore[misc]
    """In the place of the class that `enable_xformers_memory_efficient_attention` installs."""

    @staticmethod
    def refuses_masks() -> str | None:
        """Diffusers rounds them."""
        switch = "disable_xformers_memory_efficient_attention()"
        return f"ip_adapter_masks with xFormers: diffusers rounds them to float16 first; call {switch}"


FUSED: dict[type, Any] = {
    stock.IPAdapterAttnProcessor: IPAdapterAttnProcessor,
    stock.IPAdapterAttnProcessor2_0: IPAdapterAttnProcessor2_0,
    stock.IPAdapterXFormersAttnProcessor: IPAdapterXFormersAttnProcessor,
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
