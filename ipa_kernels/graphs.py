"""`graphed`: the steps of a UNet as CUDA graphs, without a compiler.

A graph holds addresses and numbers: those of weights, of what `Buffers` keeps, of its own inputs, and whatever Python passed to
a kernel. It is replayed only while everything that went into it is as it was (`fingerprint`).
"""

import operator
import types
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import steps
from .fingerprint import Fingerprint, hooked
from .integration import enable, explain, unet_of, watch_module
from .ops import UnsupportedError
from .ops.support import allows_tf32
from .report import GraphReport, Report

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
    watch = watch_module()
    own = vars(unet).get("forward")
    if own is not None and getattr(own, "__func__", None) is not watch.forward:
        raise ValueError(
            "target: expected a UNet whose weights stay on the GPU, got one with a forward of its own (offloading installs "
            "one); a graph reads weights where they were when it was captured"
        )
    if watch.of(unet) is None:
        report = enable(target)
        if not report.enabled:
            return report
    state = watch.of(unet)
    with watch.SWITCH:
        if state.graphs is None:
            state.graphs = Graphs()
            vars(unet)["forward"] = types.MethodType(watch.forward, unet)
    return explain(target)


class Captured(NamedTuple):
    """A graph: what replays it, the tensors that it reads and those that it writes, and what it was captured from.

    tables: the tensors of the scales of each layer, beside what the fingerprint has.
    """

    replay: Callable[[], None]
    inputs: list[Tensor]
    outputs: Any
    fingerprint: Fingerprint
    buffers: Any
    tables: list[Tensor]

    def addresses_are_still(self, state: Any) -> bool:
        """Whether all that it reads is where it was."""
        if self.buffers is not state.buffers or not self.fingerprint.addresses_are_still():
            return False
        now = _tables(state)
        return len(now) == len(self.tables) and all(map(operator.is_, now, self.tables))


class Graphs:
    """The graphs of one UNet; a copy or a pickle of them is empty."""

    def __init__(self) -> None:
        self.replays = 0
        self.reason = ""
        self._pool: Any = None
        self._captured: dict[Hashable, Captured | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def report(self) -> GraphReport:
        """What was captured and replayed; why the last step that was not replayed was not."""
        return GraphReport(sum(entry is not None for entry in self._captured.values()), self.replays, self.reason)

    def drop(self) -> None:
        """Forget every graph."""
        self._captured = {}

    @staticmethod
    def takes(device: torch.device) -> bool:
        """Whether steps on a device can be captured."""
        return is_supported(device)

    def step(self, state: Any, unet: Any, run: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Run a step, in a graph where there is one or will be."""
        self.reason = _reason(state, unet, arguments, options)
        if self.reason:
            return run(*arguments, **options)
        plain_arguments, plain_options = _plain(arguments, options)
        leaves, structure = pytree.tree_flatten((plain_arguments, plain_options))
        key = _key(state, structure, leaves, options)
        if key is None:
            self.reason = (
                "an argument of the UNet is neither a plain value nor a tensor on its device: such steps are not captured"
            )
            return run(*arguments, **options)
        entry = self._captured.get(key)
        if entry is not None and not entry.addresses_are_still(state):
            del self._captured[key]
            entry = None
            self.reason = "weights, modules or buffers have changed since the graph was captured: it is captured anew"
        if entry is None:
            return self._first_or_second(state, unet, run, arguments, options, key, leaves, structure)
        for own, given in zip(entry.inputs, filter(_is_tensor, leaves), strict=True):
            own.copy_(given)
        entry.replay()
        # while the GPU works: everything that Python passed on when the graph was captured
        if not entry.fingerprint.is_still():
            del self._captured[key]
            self.reason = "settings of a module have changed since the graph was captured: it is captured anew"
            return run(*arguments, **options)
        self.replays += 1
        return pytree.tree_map_only(Tensor, torch.clone, entry.outputs)

    def _first_or_second(
        self,
        state: Any,
        unet: Any,
        run: Callable[..., Any],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        key: Hashable,
        leaves: list[Any],
        structure: Any,
    ) -> Any:
        if key not in self._captured:
            if len(self._captured) >= GRAPHS:
                self.reason = f"more than {GRAPHS} shapes: clear_cache(pipe) makes room"
                return run(*arguments, **options)
            # kernels are compiled and workspaces allocated before anything is captured
            self._captured[key] = None
            try:
                with state.captured():
                    return run(*arguments, **options)
            except UnsupportedError as error:
                self.reason = f"the step cannot be captured: {error}"
                return run(*arguments, **options)
        place = hooked(unet)
        if place is not None:
            self.reason = f"hooks on {place}: a replay would not run them; remove them"
            return run(*arguments, **options)
        with torch.inference_mode(False):
            # those that are made in inference mode could not be written to outside
            own = [torch.empty_like(leaf).copy_(leaf) if _is_tensor(leaf) else leaf for leaf in leaves]
        masks = (options.get("cross_attention_kwargs") or {}).get("ip_adapter_masks")

        def record() -> Any:
            # anew each time: diffusers empties a list of residuals while it runs
            static, named = pytree.tree_unflatten(own, structure)
            return run(*static, **_with_masks(named, masks))

        fingerprint = Fingerprint(unet)
        if self._pool is None:
            self._pool = new_pool()
        try:
            with state.captured():
                replay, outputs = capture(record, self._pool)
        except Exception as error:
            self.reason = f"the step cannot be captured: {error}"
            return run(*arguments, **options)
        inputs = [leaf for leaf in own if _is_tensor(leaf)]
        self._captured[key] = Captured(replay, inputs, outputs, fingerprint, state.buffers, _tables(state))
        replay()
        self.replays += 1
        return pytree.tree_map_only(Tensor, torch.clone, outputs)


def new_pool() -> Any:
    """Memory that all graphs of a UNet share."""
    return torch.cuda.graph_pool_handle()


def capture(run: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """(what replays it, its outputs): `run` as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    # other threads may go on using the GPU
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = run()
    return graph.replay, outputs


def is_supported(device: torch.device) -> bool:
    """Whether steps on a device can be captured."""
    return device.type == "cuda"


def _reason(state: Any, unet: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """Why a step cannot be captured or replayed, as far as that is seen without a graph."""
    sample = steps.named(arguments, options).get("sample")
    if not isinstance(sample, Tensor) or not is_supported(sample.device):
        return f"device {getattr(sample, 'device', None)}: CUDA graphs need a CUDA GPU"
    if torch.is_grad_enabled():
        return "gradients: a step that is differentiated is not captured; use torch.no_grad()"
    if torch.compiler.is_compiling() or unet._compiled_call_impl is not None:
        return "torch.compile: a compiled UNet is captured by mode='reduce-overhead'"
    if len(arguments) > 3:
        return "more than three positional arguments of the UNet: such steps are not captured; pass keywords"
    if not all(layer.table.is_data for layer in state.layers()):
        return "adapter scales that are not numbers, or do not fit the masks: such steps are not captured"
    if not state.session.is_prepared:
        return "prompt, images or masks of other sizes than the generation began with, or none: such steps are not captured"
    return ""


def _tables(state: Any) -> list[Tensor]:
    return [layer.table.tensor for layer in state.layers()]


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _plain(arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the timestep as a tensor on the device of the latents, and without masks.

    A number would stay the same in every replay, and a graph reads what the buffers hold of masks.
    """
    named = steps.named(arguments, options)
    sample, timestep = named["sample"], named["timestep"]
    if not isinstance(timestep, Tensor):
        # as `UNet2DConditionModel.get_time_embed`
        timestep = torch.tensor(timestep, dtype=torch.float64 if isinstance(timestep, float) else torch.int64)
    timestep = (timestep[None] if timestep.ndim == 0 else timestep).to(sample.device)
    options = _with_masks(options, None)
    if len(arguments) > 1:
        return (arguments[0], timestep, *arguments[2:]), options
    return arguments, {**options, "timestep": timestep}


def _with_masks(options: dict[str, Any], masks: Any) -> dict[str, Any]:
    given = options.get("cross_attention_kwargs") or {}
    return (
        {**options, "cross_attention_kwargs": {**given, "ip_adapter_masks": masks}} if "ip_adapter_masks" in given else options
    )


def _key(state: Any, structure: Any, leaves: list[Any], options: dict[str, Any]) -> Hashable | None:
    """Everything about the arguments, and about torch, that a graph is only valid for; None where that cannot be told."""
    device = next(leaf.device for leaf in leaves if _is_tensor(leaf))
    parts: list[Hashable] = []
    for leaf in leaves:
        if _is_tensor(leaf):
            if leaf.device != device:
                return None
            parts.append((tuple(leaf.shape), leaf.dtype, leaf.device))
        elif isinstance(leaf, bool | int | float | str | None):
            parts.append((type(leaf).__name__, leaf))
        else:
            return None
    masks = (options.get("cross_attention_kwargs") or {}).get("ip_adapter_masks")
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    modes = allows_tf32(device), torch.is_inference_mode_enabled()
    return (str(structure), tuple(parts), masks is None, autocast, modes, state.session.impl)
