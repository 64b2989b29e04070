"""What `enable` leaves on a UNet: one attribute and two hooks, which run before and after each step."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.decorators import disable
from torch._dynamo.eval_frame import skip_code

from . import adapters, attention_layers, running_step, steps
from .state import Layer, ModelContext, layer_of
from .static_storage import StaticStorage, StepInputs
from .step_lock import StepLock
from .unet_guard import UNetGuard

_STATE = "_ipa_kernels"

SWITCH = threading.RLock()
"""Held by whoever changes what is enabled: steps of one UNet may run in several threads, each may find a new adapter."""


class Options(NamedTuple):
    """The options of `enable`."""

    impl: str = "auto"
    cache: bool = True


class ModelState:
    """The state of an enabled UNet.

    base: the options of `enable`, None where only `accelerated` blocks are open; blocks: the options of those, oldest first;
    guard: the UNet as the last eager step found it; static: what was prepared, if anything; graphs: of `graphed`, None where it
    is off; lock: held by a step that reads static storage, and by whoever changes it; unread: why the last such step did not
    read it, "" where it did; steps: those that run, of all threads, the innermost of each last; is_disabled: perhaps by another
    thread in the middle of a step, which then installs nothing more.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.context = ModelContext(*Options())
        self.attention_layers = attention_layers.AttentionLayers(unet)
        self.base: Options | None = None
        self.blocks: list[list[Options]] = []
        self.handles: list[Any] = []
        self.guard = UNetGuard()
        self.static: StaticStorage | None = None
        self.graphs: steps.Graphs[ModelState] | None = None
        self.lock = StepLock()
        self.unread = ""
        self.steps: list[running_step.Step] = []
        self.is_disabled = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is of a UNet that runs no step."""
        return vars(self) | {"steps": [], "guard": UNetGuard()}

    def attach(self, unet: nn.Module) -> None:
        """Put the hooks on a UNet; does nothing where that is done already."""
        if self._is_attached(unet):
            return
        for handle in self.handles:
            handle.remove()
        self.handles = [
            unet.register_forward_pre_hook(self.before, with_kwargs=True),
            unet.register_forward_hook(self.after, always_call=True),
        ]
        setattr(unet, _STATE, self)

    def detach(self, unet: nn.Module) -> None:
        """The inverse of `attach`; does nothing where that was not done."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.is_disabled = True
        for step in [step for step in self.steps if step.is_of_this_thread]:
            # the hook that would end it is gone
            self._close(step)
        self.lock.end()
        self.graphs = None
        if getattr(vars(unet).get("forward"), "__func__", None) is forward:
            del vars(unet)["forward"]
        vars(unet).pop(_STATE, None)

    def _is_attached(self, unet: nn.Module) -> bool:
        hooks = (unet._forward_pre_hooks, unet._forward_hooks)
        return len(self.handles) == 2 and all(handle.id in there for handle, there in zip(self.handles, hooks, strict=True))

    # Around a compiled UNet the hooks run outside its graph: see the end of this file.
    def before(self, unet: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """A step begins."""
        if not torch.compiler.is_compiling():
            # the frame of the call of the UNet, which calls its hooks
            self._begin(unet, arguments, options, get_eval_frame_callback() is None, sys._getframe(1))

    def after(self, *arguments: Any) -> None:
        """A step has ended, whether it returned or raised."""
        if not torch.compiler.is_compiling():
            self._end()

    @disable  # type: ignore[untyped-decorator]
    def _begin(
        self, unet: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], is_eager: bool, frame: FrameType
    ) -> None:
        steps.stop_if_asked(arguments, options)
        if is_eager and not self.guard.matches(unet):
            self.guard.forget()
            self.install_new(unet, [])
            self.guard.renew(unet, self.attention_layers, self.context, __name__)
        # nothing that a compiler made can run in it
        is_plain = is_eager and not self.guard.foreign
        named = steps.named(arguments, options)
        step = self._open(named, frame, is_plain)
        self._condition(unet, step, named, is_plain)
        if self.graphs is not None or not is_plain or steps.is_capturing(self.context):
            self._write_scales(named)
        if step.has_lock:
            self.unread = self._refill(unet, arguments, named, step)
            self.context.is_prepared = not self.unread

    def _open(self, named: dict[str, Any], frame: FrameType, is_plain: bool) -> running_step.Step:
        """Wait for the lock, where the step may read static storage."""
        sample = named.get("sample")
        device_type = sample.device.type if isinstance(sample, Tensor) else "cpu"
        scale = (named.get("cross_attention_kwargs") or {}).get("scale")
        step = running_step.Step(self.context, frame, steps.stream_of(sample), device_type, 1 if scale is None else scale)
        with SWITCH:
            reads = self.static is not None or self.graphs is not None
            step.may_read = reads and not (is_plain and self.graphs is None)
            step.has_lock = step.may_read
            self.steps.append(step)
        if reads:
            try:
                step.has_lock = self.lock.acquire(frame, waits=step.may_read)
            except BaseException:
                self._remove(step)
                raise
        self.close_interrupted()
        running_step.enter(step)
        static = self.static
        if step.has_lock and static is not None:
            static.begin(step.stream)
        return step

    def _condition(self, unet: nn.Module, step: running_step.Step, named: dict[str, Any], is_plain: bool) -> None:
        """Find what is kept for the condition of a step, and whether all of it was computed with what is there now."""
        context = self.context
        if not context.cache or steps.is_capturing(context):
            return
        images = (named.get("added_cond_kwargs") or {}).get("image_embeds")
        masks = (named.get("cross_attention_kwargs") or {}).get("ip_adapter_masks")
        inputs = [named.get("encoder_hidden_states")]
        for several in (images, masks):
            inputs += several if isinstance(several, list) else [several]
        stream = step.stream and step.stream.cuda_stream
        if not isinstance(step.lora_scale, int | float):
            context.conditioning.reason = "cross_attention_kwargs: a scale of LoRAs that is no number; pass one"
            return
        step.entry = context.conditioning.open(inputs, (step.modes, stream, step.lora_scale))
        step.is_closed = step.entry is not None and is_plain and step.lora_scale == 1 and self.guard.is_pure(unet, self.context)

    def _refill(self, unet: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], step: running_step.Step) -> str:
        """Let the static storage hold what the step that begins was given. "" where it may read it, else why not."""
        if any(other.may_read and not other.has_lock for other in list(self.steps)):
            return "a step of another thread began before there was static storage, and runs still"
        if len(arguments) > len(steps.NAMES):
            return f"more than {len(steps.NAMES)} positional arguments of the UNet; pass keywords"
        inputs = StepInputs.of(named)
        if inputs is None:
            return str(StepInputs.refusal(named))
        graphs = self.graphs
        is_new = step.entry is None or step.entry.is_new
        if graphs is not None and is_new and graphs.takes(inputs.sample.device):
            refusal = self._renew(unet, inputs)
            if refusal:
                return refusal
        static = self.static
        if static is None:
            return self.unread or "no static storage was made when the generation began"
        return static.refresh(inputs, anew=step.entry is None)

    def _write_scales(self, step: dict[str, Any]) -> None:
        """Bring the tables of scales up to date, for the masks of this step: graphs read them, eager layers do not."""
        sample = step.get("sample")
        if type(sample) is not Tensor or sample.is_meta:
            return
        masks = (step.get("cross_attention_kwargs") or {}).get("ip_adapter_masks")
        for attention in self.attention_layers.attentions.values():
            layer = layer_of(attention.processor)
            if layer is not None:
                layer.table.update(vars(attention.processor).get("scale"), masks, sample.device)
        self.context.is_stepping = True

    def layers(self) -> list[Layer]:
        """What the installed processors remember, in the order of the modules."""
        found = (layer_of(attention.processor) for attention in self.attention_layers.attentions.values())
        return [layer for layer in found if layer is not None]

    @disable  # type: ignore[untyped-decorator]
    def _end(self) -> None:
        mine = [step for step in list(self.steps) if step.is_of_this_thread]
        if mine:
            self._close(mine[-1])

    def _close(self, step: running_step.Step) -> None:
        """Does nothing where another thread has found that it was interrupted, and closed it."""
        if step.is_of_this_thread:
            running_step.leave(step)
        with SWITCH:
            if step not in self.steps:
                return
            self._remove(step)
            if step.has_lock:
                static = self.static
                if static is not None:
                    static.end(step.stream)
                self.context.is_prepared = False
        if step.has_lock and step.frame is not None:
            self.lock.release(step.frame)

    def _remove(self, step: running_step.Step) -> None:
        with SWITCH:
            self.steps.remove(step)
            if not self.steps:
                self.context.is_stepping = False

    def close_interrupted(self) -> None:
        """Close the steps that no longer run, of any thread. Whoever holds the lock calls this before anything else: what those
        launched may still read the static storage.
        """
        for step in [step for step in list(self.steps) if not step.is_running]:
            self._close(step)

    def _renew(self, unet: nn.Module, inputs: StepInputs) -> str:
        """A condition that is new, to be captured: storage of its sizes, where what is there does not fit. Why not, if so."""
        static = self.static
        if torch.is_grad_enabled() or (static is not None and static.are_current() and static.mismatch(inputs) is None):
            return ""
        try:
            new = StaticStorage(unet, self.attention_layers, self.context, inputs)
        except (TypeError, ValueError, RuntimeError) as error:
            # for the step to refuse, in diffusers' words
            return str(error)
        self.put_static(new)
        return ""

    def put_static(self, static: StaticStorage) -> None:
        """Let the layers have this, in the place of another. Whoever calls holds the lock."""
        self.drop_static()
        self.static = static
        static.hand_out()

    def drop_static(self) -> None:
        """Forget what was prepared, and the graphs that read it."""
        self.lock.acquire()
        try:
            self.close_interrupted()
            static, self.static, self.unread = self.static, None, ""
            if static is not None:
                static.drop()
            graphs = self.graphs
            if graphs is not None:
                graphs.drop()
        finally:
            self.lock.release()

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Steps of this thread in this block run as those that a graph is captured from: nothing is kept, and nothing found."""
        with steps.capturing(self.context), running_step.suspended():
            yield

    def install_new(self, unet: nn.Module, undo: list[Callable[[], None]]) -> None:
        """`adapters.install_new` for all attentions that the UNet has now."""
        if not self.attention_layers.are_current():
            self.attention_layers = attention_layers.AttentionLayers(unet)
        attentions = self.attention_layers.attentions
        adapters.install_new(unet, attentions, self.context, SWITCH, lambda: self.is_disabled, undo)


def forward(unet: Any, *arguments: Any, **options: Any) -> Any:
    """In the place of a UNet's own, while it is graphed. A copy of the UNet has a copy; a pickle of it has the UNet's own."""
    state, run = of(unet), MethodType(type(unet).forward, unet)
    if state is None or torch.compiler.is_compiling():
        return run(*arguments, **options)
    # read once: another thread may `disable`
    graphs = state.graphs
    return run(*arguments, **options) if graphs is None else graphs.step(state, unet, run, arguments, options)


def of(unet: nn.Module) -> ModelState | None:
    """None where a UNet is not enabled."""
    return vars(unet).get(_STATE)


# Not compiled as graphs of their own around a compiled UNet; within another compiled function they are traced.
for _hook in (ModelState.before, ModelState.after):
    skip_code(_hook.__code__)
