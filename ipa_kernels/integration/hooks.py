"""What `enable` leaves on a UNet: one attribute and two hooks, which install what is loaded later and open the memory."""

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

from ..ops import UnsupportedError
from . import attention_layers, image_projection, steps
from .eligibility import expects_adapter, foreign_reason
from .processors import unet as families
from .state import Layer, ModelContext, layer_of
from .static_storage import Buffers, StepInputs
from .step_lock import Turn

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
    buffers: what was prepared, if anything; graphs: of `graphed`, None where it is off; turn: held by a step while there is one
    of these, and by whoever changes them; unread: why the last such step did not read the buffers, "" where it did; steps:
    those that run, of all threads, the innermost of each last; is_closed: disabled, perhaps by another thread in the middle of
    a step, which then takes over nothing more.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.context = ModelContext(*Options())
        self.attention_layers = attention_layers.AttentionLayers(unet)
        self.base: Options | None = None
        self.blocks: list[list[Options]] = []
        self.handles: list[Any] = []
        self.buffers: Buffers | None = None
        self.graphs: steps.Graphs[ModelState] | None = None
        self.turn = Turn()
        self.unread = ""
        self.steps: list[steps.Step] = []
        self.is_closed = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is of a UNet that runs no step."""
        return vars(self) | {"steps": []}

    def attach(self, unet: nn.Module) -> None:
        """ModelState the steps of a UNet; does nothing where that is done already."""
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
        self.is_closed = True
        for step in [step for step in self.steps if step.is_of_this_thread]:
            # the hook that would end it is gone
            self._close(step)
        self.turn.end()
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
        if is_eager:
            self.install_new(unet, [])
        named = steps.named(arguments, options)
        step = self._open(frame, steps.stream_of(named.get("sample")))
        follows = self._remember(named, step.stream)
        self._write_scales(named)
        if step.has_turn:
            self.unread = self._refill(unet, arguments, named, follows)
            self.context.is_prepared = not self.unread

    def _open(self, frame: FrameType, stream: Any) -> steps.Step:
        """Wait for the turn, where there is something to take turns for."""
        with SWITCH:
            has_turn = self.buffers is not None or self.graphs is not None
            step = steps.Step(has_turn, threading.current_thread(), frame, stream)
            self.steps.append(step)
        if has_turn:
            try:
                self.turn.take(frame)
            except BaseException:
                self._remove(step)
                raise
        self.close_interrupted()
        buffers = self.buffers
        if has_turn and buffers is not None:
            buffers.begin(stream)
        return step

    def _remember(self, step: dict[str, Any], stream: Any) -> bool:
        """Open the memory, or close what a step that was interrupted left open; whether a generation goes on."""
        memory = self.context.memory
        if not self.context.cache or steps.is_capturing(self.context):
            memory.leave()
            return False
        images = (step.get("added_cond_kwargs") or {}).get("image_embeds")
        tensors = [step.get("encoder_hidden_states"), *(images if isinstance(images, list) else [images])]
        return memory.enter(step.get("timestep"), tuple(map(id, tensors)), stream)

    def _refill(self, unet: nn.Module, arguments: tuple[Any, ...], step: dict[str, Any], follows: bool) -> str:
        """Let the buffers hold what the step that begins was given. "" where it may read them, else why not."""
        if not all(other.has_turn for other in list(self.steps)):
            return "a step of another thread began before there were buffers, and runs still"
        if len(arguments) > len(steps.NAMES):
            return f"more than {len(steps.NAMES)} positional arguments of the UNet; pass keywords"
        inputs = StepInputs.of(step)
        if inputs is None:
            return str(StepInputs.refusal(step))
        graphs = self.graphs
        if graphs is not None and not follows and graphs.takes(inputs.sample.device):
            refusal = self._renew(unet, inputs)
            if refusal:
                return refusal
        buffers = self.buffers
        if buffers is None:
            return self.unread or "no buffers were made when the generation began"
        return buffers.fit(inputs, anew=not follows)

    def _write_scales(self, step: dict[str, Any]) -> None:
        """Bring the tables of scales up to date, for the masks of this step."""
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

    def _close(self, step: steps.Step) -> None:
        """Does nothing where another thread has found that it was interrupted, and closed it."""
        if step.is_of_this_thread:
            self.context.memory.leave()
        with SWITCH:
            if step not in self.steps:
                return
            self._remove(step)
            if step.has_turn:
                buffers = self.buffers
                if buffers is not None:
                    buffers.end(step.stream)
                self.context.is_prepared = False
        if step.has_turn:
            self.turn.give(step.frame)

    def _remove(self, step: steps.Step) -> None:
        with SWITCH:
            self.steps.remove(step)
            if not self.steps:
                self.context.is_stepping = False

    def close_interrupted(self) -> None:
        """Close the steps that no longer run, of any thread. Whoever took the turn calls this before anything else: what those
        launched may still read the buffers.
        """
        for step in [step for step in list(self.steps) if not step.is_running]:
            self._close(step)

    def _renew(self, unet: nn.Module, inputs: StepInputs) -> str:
        """A generation begins, to be captured: buffers of its sizes, where those that are there do not fit. Why not, if so."""
        buffers = self.buffers
        if torch.is_grad_enabled() or (buffers is not None and buffers.are_current() and buffers.mismatch(inputs) is None):
            return ""
        try:
            new = Buffers(unet, self.attention_layers, inputs)
        except (TypeError, ValueError, RuntimeError) as error:
            # for the step to refuse, in diffusers' words
            return str(error)
        self.put_buffers(new)
        return ""

    def put_buffers(self, buffers: Buffers) -> None:
        """Let the layers have these, in the place of others. Whoever calls holds the turn."""
        self.drop_buffers()
        self.buffers = buffers
        buffers.hand_out()

    def drop_buffers(self) -> None:
        """Forget what was prepared, and the graphs that read it."""
        self.turn.take()
        try:
            self.close_interrupted()
            buffers, self.buffers, self.unread = self.buffers, None, ""
            if buffers is not None:
                buffers.drop()
            graphs = self.graphs
            if graphs is not None:
                graphs.drop()
        finally:
            self.turn.give()

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Steps of this thread in this block run as those that a graph is captured from."""
        with steps.capturing(self.context), self.context.memory.suspended():
            yield

    def install_new(self, unet: nn.Module, undo: list[Callable[[], None]]) -> None:
        """Take over every stock module of an IP-Adapter; `undo` collects, in the order of the changes, what reverts each."""
        context = self.context
        if not self.attention_layers.are_current():
            self.attention_layers = attention_layers.AttentionLayers(unet)
        for module in image_projection.of(unet):
            if type(module) in image_projection.OURS:
                with SWITCH:
                    if type(module) in image_projection.OURS and not self.is_closed:
                        image_projection.install(module, context, undo)
        loaded = attention_layers.is_loaded(unet)
        for name, attention in self.attention_layers.attentions.items():
            processor = attention.processor
            if families.is_new(processor, context):
                with SWITCH:
                    if families.is_new(processor, context) and not self.is_closed:
                        families.install(processor, name, context, undo)
                continue
            foreign = foreign_reason(processor, loaded and expects_adapter(name))
            if foreign is None:
                continue
            if context.impl == "triton":
                raise UnsupportedError(f'{name}: impl="triton" cannot run this layer: {foreign}')
            if context.impl == "auto":
                context.warn_once(foreign, "the processor's own code runs instead")

    def uninstall(self, unet: nn.Module) -> None:
        """Undo every `install`, of the processors in place and of those that diffusers has stashed."""
        # by identity: a user's own processor need not be hashable
        attentions = attention_layers.AttentionLayers(unet).attentions.values()
        in_place = {id(attention.processor): attention.processor for attention in attentions}
        stashed = {id(module): module for module in (*image_projection.of(unet), *self.context.installed)}
        for key, module in (in_place | stashed).items():
            if type(module) in image_projection.STOCK:
                image_projection.uninstall(module)
            # a processor that was put into another enabled UNet since belongs to that one
            elif families.context_of(module) is self.context or (key in in_place and type(module) in families.STOCK):
                families.uninstall(module)


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
