"""A call of a layer, as the processors of all families run it: warm, from what its last call prepared, or cold, all checked.

`traced` has the calls that a compiler or a CUDA graph records, `branches` what a call computes.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ...ops import UnsupportedError
from ...ops.api import run
from ...ops.dispatch import choose
from ..conditioning_cache import Keeper
from ..guards import is_hooked, layer_guard
from ..known_modules import Installed
from ..prepared_call import PreparedCall
from ..replaced import is_anything_replaced, replaced_reasons
from ..running_step import THREAD
from ..state import Layer
from ..steps import CAPTURING, modes_of
from .branches import Keeps, cannot, mask_reasons, merge, problem_of, softmax_scale, stock_reasons
from .traced import traced_call


class Fused(Installed):
    """What the subclasses share. A call works on what it read at its start: another thread may `disable` meanwhile."""

    # whether eager attention gives the result of the replaced class bit for bit
    eager_is_exact = False
    # whether the replaced class takes 1/sqrt(head dim) in the place of attn.scale
    ignores_scale = False
    # why masks are for the replaced class alone
    mask_refusal = ""
    # the family's `layer_plan`
    plan: Callable[..., tuple[str, list[str]]]

    scale: list[Any]
    to_k_ip: nn.ModuleList
    to_v_ip: nn.ModuleList

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy or a pickle of a processor is a stock one; an enabled UNet installs it again in its next step."""
        state = {name: value for name, value in vars(self).items() if name != "_ipa_layer"}
        return object.__new__, (ours(self).replaces,), state

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
        kind = ours(self)
        if layer is not None and kind is not None:
            inputs = encoder_hidden_states, attention_mask, ip_adapter_masks
            if torch.compiler.is_compiling() or layer.context in CAPTURING.contexts:
                out = traced_call(kind, layer, self, attn, hidden_states, *inputs)
            else:
                out = _eager_call(kind, layer, self, attn, hidden_states, *inputs, query)
            if out is not None:
                return _project_out(attn, out)
        # diffusers names the last parameters and drops arguments that a processor does not name
        replaced: Any = type(self) if kind is None else kind.replaces
        return replaced.__call__(  # type: ignore[no-any-return]
            self, attn, hidden_states, encoder_hidden_states, attention_mask, temb, scale, ip_adapter_masks
        )


def _prepared(processor: Any, layer: Layer, attn: Attention, masked: bool) -> tuple[Any, PreparedCall | None]:
    """The step that runs, and the call that this layer ran last in such a step, while what it computed with is unchanged."""
    step = THREAD.step
    if step is None or step.entry is None or step.context is not layer.context:
        return step, None
    call = step.entry.calls.get(id(attn))
    guard = layer.guards.get(id(attn))
    if call is None or guard is None or call.guard is not guard or call.option != layer.context.impl:
        return step, None
    if not _is_below(step.frame, call.depth):
        return step, None
    if step.is_closed:
        # checked before the step
        return step, call if guard.valid else None
    if not guard.check() or is_anything_replaced(ours(processor).replaces, attn, masked):
        return step, None
    is_same = not _is_hooked(attn._modules.get("to_q")) and call.modes == modes_of(call.device.type)
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
    keeps, depth = _keeps(layer, processor, attn, hidden_states)
    is_closed = keeps is not None and keeps.keeper.is_closed
    # before a closed step nothing was replaced
    reasons = [] if is_closed else replaced_reasons(kind.replaces, attn, masks is not None)
    reasons += mask_reasons(kind, masks)
    reasons += stock_reasons(processor, attn, hidden_states, states, attention_mask, masks, processor.scale)
    if not reasons and not kind.eager_is_exact and impl != "triton":
        _, reasons = kind.plan(attn, processor, impl, hidden_states.device, hidden_states.dtype)
    problem = call = None
    if not reasons:
        text, images = states
        if keeps is not None:
            # before anything is read: another thread may write while this one computes
            unkept = keeps.keeper.cache.unkept
            call = PreparedCall.of(hidden_states, processor.scale, (text, images, masks), keeps.keeper.modes)

        def runs_kernel(states: Tensor) -> bool:
            return bool(kind.plan(attn, processor, impl, states.device, states.dtype)[0] == "triton")

        try:
            query = attn.to_q(hidden_states) if query is None else query
            inputs = text, images, masks
            problem = problem_of(layer, processor, attn, query, inputs, softmax_scale(kind, attn), runs_kernel, keeps)
        except (TypeError, ValueError) as error:
            # for the replaced class to run or to refuse, in its own words
            reasons = [f"unusual input: {error}"]
    if problem is None:
        if impl == "triton":
            raise UnsupportedError(cannot(layer, attn, hidden_states, reasons))
        layer.note_call("stock", reasons)
        return None
    chosen, reasons = choose(problem, impl)
    if chosen == "eager" and not kind.eager_is_exact:
        layer.note_call("stock", reasons)
        return None
    if reasons:
        layer.note_call(chosen, reasons)
    else:
        layer.impl, layer.reason = chosen, ""
        layer.calls += 1
    if keeps is not None and call is not None and query is not None:
        is_kept = keeps.keeper.cache.unkept == unkept and (is_closed or not _is_hooked(attn.to_q))
        is_same = keeps.guard.check() and call.matches(hidden_states, states, masks, processor.scale)
        if is_kept and is_same and call.prepare(problem, keeps.guard, chosen, impl, layer.reason, depth):
            keeps.keeper.entry.calls[id(attn)] = call
            return call.attend(query)
    return merge(run(problem, chosen))


def _keeps(layer: Layer, processor: Any, attn: Attention, hidden_states: Tensor) -> tuple[Keeps | None, int | None]:
    """Where a call keeps what it computes, and how deep it is below the call of the UNet; None outside of a step."""
    step = THREAD.step
    if step is None or step.entry is None or step.context is not layer.context:
        return None, None
    depth = _depth_below(step.frame)
    if depth is None and step.frame is not None:
        return None, None
    modes = step.modes if step.is_closed else modes_of(hidden_states.device.type)
    keeper = Keeper(layer.context.conditioning, step.entry, modes, step.is_closed)
    return Keeps(keeper, layer_guard(layer.guards, attn, processor)), depth


def _is_hooked(module: Any) -> bool:
    return not isinstance(module, nn.Module) or is_hooked(module)


def _project_out(attn: Any, out: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](out))  # type: ignore[no-any-return]


def _project_out_closed(attn: Any, out: Tensor) -> Tensor:
    """In a closed step, where nobody sees whether a dropout that does nothing is called."""
    linear, dropout, *_ = attn.to_out
    out = linear(out)
    return out if type(dropout) is nn.Dropout and not (dropout.p and dropout.training) else dropout(out)


def ours(processor: object) -> Any:
    """Which of the subclasses a processor has, perhaps below a class that someone else has put on it; None where none."""
    return next((kind for kind in type(processor).__mro__ if issubclass(kind, Fused) and "replaces" in vars(kind)), None)


def _depth_below(frame: FrameType | None) -> int | None:
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
