"""`graphed`: the steps of a UNet as CUDA graphs, without a compiler.

A graph holds addresses and numbers: those of weights, of `StaticStorage`, of its own inputs, and whatever Python passed to
a kernel. It is replayed only while everything that went into it is as it was (`model_guards`).
"""

import operator
import types
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..integration.api import enable, explain, unet_of
from ..ops import UnsupportedError
from ..report import GraphReport, Report
from .unet_call import Call, is_tensor

if TYPE_CHECKING:
    from ..integration.hooks import ModelState
    from ..integration.model_guards import ModelGuard
    from ..integration.static_storage import StaticStorage

GRAPHS = 8
"""The most shapes of steps that are captured for one UNet."""


def graphed(target: Any) -> Report:
    """Capture each step of a UNet that is new in its shapes in a CUDA graph, and replay it from then on.

    The first step of a shape runs as ever, the second is captured. A replay is given new latents, timestep and conditioning;
    scales, keys, values and masks it reads where they are kept (`prepare`). A step that no graph is for runs as ever, and
    `explain` says why: another device than a CUDA GPU, gradients, a compiled UNet, sizes of prompt or images that change in the
    middle of a generation, more than eight shapes. Weights, LoRAs, hooks or settings that change are captured anew. Ends with
    `disable`; does nothing where it is on already.

    Args:
        target: a diffusers pipeline with a UNet, or the UNet itself; it is enabled where it is not yet.

    Returns:
        A `Report`; `graphs` counts what was captured and replayed.

    Raises:
        TypeError: a target of a kind that is not known.
        ValueError: the UNet is offloaded or has another `forward` of its own: its weights do not stay where a graph reads them.
        ImportError: diffusers cannot be imported.
    """
    unet = unet_of(target)
    from ..integration import hooks

    own = vars(unet).get("forward")
    if own is not None and getattr(own, "__func__", None) is not hooks.forward:
        raise ValueError(
            "target: expected a UNet whose weights stay on the GPU, got one with a forward of its own (offloading installs "
            "one); a graph reads weights where they were when it was captured"
        )
    if hooks.of(unet) is None:
        report = enable(target)
        if not report.enabled:
            return report
    state = hooks.of(unet)
    assert state is not None, "it was enabled"
    with hooks.SWITCH:
        if state.graphs is None:
            state.graphs = Graphs()
            vars(unet)["forward"] = types.MethodType(hooks.forward, unet)
    return explain(target)


class Captured(NamedTuple):
    """A graph: what replays it, the tensors that it reads and those that it writes, and what it was captured from.

    tables: the tensors of the scales of each layer, beside what the guard has.
    """

    replay: Callable[[], None]
    inputs: list[Tensor]
    outputs: Any
    guard: "ModelGuard"
    static: "StaticStorage | None"
    tables: list[Tensor]

    def addresses_match(self, state: "ModelState") -> bool:
        """Whether all that it reads is where it was."""
        if self.static is not state.static or not self.guard.addresses_match():
            return False
        now = _tables(state)
        return len(now) == len(self.tables) and all(map(operator.is_, now, self.tables))


class Failed(NamedTuple):
    """A shape that could not be captured, why, and of which UNet: while that is as it was, it is not tried again."""

    reason: str
    guard: "ModelGuard"


class GraphPool(NamedTuple):
    """What all graphs of a UNet share: a stream of its GPU to record on, and memory."""

    stream: Any
    pool: Any

    @classmethod
    def on(cls, device: torch.device) -> "GraphPool":
        """A new one."""
        return cls(torch.cuda.Stream(device), torch.cuda.graph_pool_handle())  # type: ignore[no-untyped-call]


class Graphs:
    """The graphs of one UNet; a copy or a pickle of them is empty."""

    def __init__(self) -> None:
        self.replays = 0
        self.reason = ""
        self._pool: GraphPool | None = None
        # None: has run once
        self._entries: dict[Hashable, Captured | Failed | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def report(self) -> GraphReport:
        """What was captured and replayed; why the last step that was not replayed was not."""
        return GraphReport(sum(isinstance(entry, Captured) for entry in self._entries.values()), self.replays, self.reason)

    def drop(self) -> None:
        """Forget every graph."""
        self._entries, self._pool = {}, None

    @staticmethod
    def takes(device: Any) -> bool:
        """Whether steps on a device can be captured."""
        return isinstance(device, torch.device) and device.type == "cuda"

    def step(
        self, state: "ModelState", unet: Any, forward: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Run a step, in a graph where there is one or will be."""
        call = Call(state, unet, forward, arguments, options)
        self.reason = self._reason(call)
        if self.reason:
            return call.run()
        leaves, structure = call.flat()
        key = call.key(leaves, structure)
        if key is None:
            self.reason = (
                "an argument of the UNet is neither a plain value nor a tensor on its device: such steps are not captured"
            )
            return call.run()
        entry = self._entries.get(key)
        if isinstance(entry, Failed):
            if entry.guard.addresses_match() and entry.guard.matches():
                self.reason = entry.reason
                return call.run()
            del self._entries[key]
        if key not in self._entries:
            return self._warm_up(key, call)
        if isinstance(entry, Captured):
            return self._replay(key, entry, call, leaves)
        return self._capture(key, call, leaves, structure)

    def _reason(self, call: Call) -> str:
        """Why a step cannot be captured or replayed, as far as that is seen without a graph."""
        if not self.takes(call.device):
            return f"device {call.device}: CUDA graphs need a CUDA GPU"
        if torch.is_grad_enabled():
            return "gradients: a step that is differentiated is not captured; use torch.no_grad()"
        if torch.compiler.is_compiling() or call.unet._compiled_call_impl is not None:
            return "torch.compile: a compiled UNet is captured by mode='reduce-overhead'"
        place = _replaced_function(call)
        if place is not None:
            return f"{place}: replaced, and a replay would not call it; undo that"
        if len(call.arguments) > 3:
            return "more than three positional arguments of the UNet: such steps are not captured; pass keywords"
        if not all(layer.table.is_data for layer in call.state.layers()):
            return "adapter scales that are not numbers, or do not fit the masks: such steps are not captured"
        if not call.state.context.is_prepared:
            return str(call.state.unread)
        return ""

    def _warm_up(self, key: Hashable, call: Call) -> Any:
        """The first step of a shape."""
        if len(self._entries) >= GRAPHS:
            self.reason = f"more than {GRAPHS} shapes: clear_cache(pipe) makes room"
            return call.run()
        try:
            outputs = call.warm_up()
        except UnsupportedError as error:
            return self._fail(key, call, error)
        self._entries[key] = None
        return outputs

    def _capture(self, key: Hashable, call: Call, leaves: list[Any], structure: Any) -> Any:
        """The second step of a shape."""
        from ..integration.model_guards import ModelGuard, hooked, replaced

        place = hooked(call.unet)
        if place is not None:
            self.reason = f"hooks on {place}: a replay would not run them; remove them"
            return call.run()
        place = replaced(call.unet)
        if place is not None:
            self.reason = f"{place}: replaced, and a replay would not call it; undo that"
            return call.run()
        with torch.inference_mode(False):
            # those that are made in inference mode could not be written to outside
            own = [torch.empty_like(leaf).copy_(leaf) if is_tensor(leaf) else leaf for leaf in leaves]
        captured_call = call.given(own, structure)
        guard = ModelGuard(call.unet)
        self._pool = self._pool or GraphPool.on(call.device)
        try:
            with call.state.captured():
                replay, outputs = capture(captured_call.run, call.device, self._pool)
        except Exception as error:
            # what was left unfinished may keep the memory
            self._pool = None
            return self._fail(key, call, error)
        inputs = [leaf for leaf in own if is_tensor(leaf)]
        self._entries[key] = Captured(replay, inputs, outputs, guard, call.state.static, _tables(call.state))
        replay()
        self.replays += 1
        return pytree.tree_map_only(Tensor, torch.clone, outputs)

    def _replay(self, key: Hashable, entry: Captured, call: Call, leaves: list[Any]) -> Any:
        """Any other step."""
        if not entry.addresses_match(call.state):
            del self._entries[key]
            self.reason = "weights, modules or static storage have changed since the graph was captured: it is captured anew"
            return self._warm_up(key, call)
        for own, given in zip(entry.inputs, filter(is_tensor, leaves), strict=True):
            own.copy_(given)
        entry.replay()
        # while the GPU works: everything that Python passed on when the graph was captured
        if not entry.guard.matches():
            del self._entries[key]
            self.reason = "settings of a module have changed since the graph was captured: it is captured anew"
            return call.run()
        self.replays += 1
        return pytree.tree_map_only(Tensor, torch.clone, entry.outputs)

    def _fail(self, key: Hashable, call: Call, error: Exception) -> Any:
        from ..integration.model_guards import ModelGuard

        self.reason = f"the step cannot be captured: {error}; clear_cache(pipe) has it tried again"
        self._entries[key] = Failed(self.reason, ModelGuard(call.unet))
        return call.run()


def capture(run: Callable[[], Any], device: torch.device, pool: GraphPool) -> tuple[Callable[[], None], Any]:
    """(what replays it, its outputs): `run` as a CUDA graph. The current device and stream are afterwards as before."""
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(device),
        # torch leaves its own stream behind where a capture cannot be ended
        torch.cuda.stream(torch.cuda.current_stream(device)),
        # other threads may go on using the GPU
        torch.cuda.graph(graph, pool=pool.pool, stream=pool.stream, capture_error_mode="thread_local"),
    ):
        outputs = run()
    return graph.replay, outputs


def _replaced_function(call: Call) -> str | None:
    from ..integration.replaced import replaced_function

    return replaced_function(call.masks is not None)


def _tables(state: "ModelState") -> list[Tensor]:
    return [layer.table.tensor for layer in state.layers()]
