"""`torch.compile` around an enabled UNet: one graph per shape, nothing compiled anew, nothing stale."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ipa_kernels

from ..helpers.adapters import load
from ..helpers.compiled import MASKED, PLAIN, as_stock, blocks, close, in_place, whole
from ..helpers.controls import Control
from ..helpers.generate import generate
from ..helpers.pipelines import build

KINDS = ("sd", "sdxl", "animatediff", "kolors")


pytestmark = pytest.mark.usefixtures("fresh_compiler")


SLOW = (("sd", 1), ("sdxl", 1), ("sdxl", 2), ("animatediff", 1), ("animatediff", 2), ("kolors", 1), ("kolors", 2))
"""Kinds and numbers of adapters that `make test` leaves to `make test-slow`: others show the same."""


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        pytest.param(kind, names, marks=pytest.mark.slow if (kind, len(names)) in SLOW else (), id=f"{kind}-{'+'.join(names)}")
        for kind in KINDS
        for names in (("base",), ("base", "plus"))
    ],
)
def test_what_changes_during_a_generation_is_data(kind: str, names: tuple[str, ...]) -> None:
    """One graph without masks and one with: scales to 0, to integers, per image and per layer, images, prompts and masks."""
    compiled, twin = build(kind, names), build(kind, names)
    ipa_kernels.enable(compiled)
    whole(compiled, backend="eager")
    for controls in (PLAIN, MASKED):
        as_stock(compiled, twin, names, controls[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed, control in enumerate(controls):
                as_stock(compiled, twin, names, control, seed=seed)
    report = ipa_kernels.explain(compiled)
    assert {(layer.impl, layer.calls) for layer in report.layers} == {("eager", 0)}


@pytest.mark.parametrize("how", [in_place, blocks])
def test_other_ways_to_compile(how: Callable[..., None]) -> None:
    """Repeated blocks share a graph between layers of one width, whatever the scales of each."""
    compiled, twin = build("sd", ("base",)), build("sd", ("base",))
    ipa_kernels.enable(compiled)
    how(compiled, backend="eager")
    as_stock(compiled, twin, ("base",), PLAIN[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, control in enumerate(PLAIN):
            as_stock(compiled, twin, ("base",), control, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_inductor(impl: str) -> None:
    """The kernel, in Triton's interpreter, and the eager twin inside a graph of the default backend."""
    compiled, twin = build("sd", ("base", "plus")), build("sd", ("base", "plus"))
    ipa_kernels.enable(compiled, impl=impl)
    blocks(compiled)
    as_stock(compiled, twin, ("base", "plus"), MASKED[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, control in enumerate(MASKED):
            as_stock(compiled, twin, ("base", "plus"), control, seed=seed)
    assert {layer.impl for layer in ipa_kernels.explain(compiled).layers} == {"eager" if impl == "auto" else impl}


def test_the_kernel_in_a_whole_graph() -> None:
    """`impl="triton"` is one op for each layer, also where a scale is 0."""
    names = ("base", "plus")
    compiled, twin = build("sd", names), build("sd", names)
    ipa_kernels.enable(compiled, impl="triton")
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    whole(compiled, backend=backend)
    for control in PLAIN[:3]:
        as_stock(compiled, twin, names, control)
    (graph,) = graphs
    ops = [node for node in graph.graph.nodes if node.target is torch.ops.ipa_kernels.decoupled_attention]
    report = ipa_kernels.explain(compiled)
    assert len(ops) == report.triton == len(report.layers) == 4


def test_two_sizes_in_one_process() -> None:
    compiled, twin = build("sd", ("base",)), build("sd", ("base",))
    ipa_kernels.enable(compiled)
    whole(compiled, backend="eager", dynamic=False)
    for size in (8, 12):
        as_stock(compiled, twin, ("base",), MASKED[0], size=size)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (12, 8):
            as_stock(compiled, twin, ("base",), MASKED[1], size=size)


def test_enabled_after_it_was_compiled_and_disabled_again() -> None:
    compiled, twin = build("sd", ("base",)), build("sd", ("base",))
    whole(compiled, backend="eager")
    expected = generate(compiled, ("base",), Control())
    ipa_kernels.enable(compiled, impl="triton")
    as_stock(compiled, twin, ("base",), Control())
    assert ipa_kernels.explain(compiled).triton == 4
    ipa_kernels.disable(compiled)
    compiled.set_ip_adapter_scale(0.7)
    assert torch.equal(generate(compiled, ("base",), Control()), expected)
    assert type(compiled.unet._orig_mod.mid_block.attentions[0].transformer_blocks[0].attn2.processor).__module__.startswith(
        "diffusers"
    )


def test_an_adapter_loaded_behind_a_graph_runs_stock_until_the_next_enable() -> None:
    compiled, twin = build("sd", ()), build("sd", ())
    ipa_kernels.enable(compiled)
    whole(compiled, backend="eager")
    as_stock(compiled, twin, (), Control())
    for pipe in (compiled, twin):
        load(pipe, "base")  # the loaders of a pipeline look through the compiled UNet
    as_stock(compiled, twin, ("base",), Control())
    assert all("loaded after enable()" in layer.reason for layer in ipa_kernels.explain(compiled).layers)
    ipa_kernels.enable(compiled)
    as_stock(compiled, twin, ("base",), Control())
    assert {layer.impl for layer in ipa_kernels.explain(compiled).layers} == {"eager"}


@pytest.mark.parametrize(
    "scales",
    [[["loud"]], *(pytest.param(scales, marks=pytest.mark.slow) for scales in ([[0.5, 0.7]], [[0.5, 0.7, 0.9]]))],
    ids=str,
)
def test_scales_that_diffusers_refuses_are_refused(scales: Any) -> None:
    """By diffusers' own code, which is traced for them: they are no data."""
    compiled, twin = build("sd", ("base",)), build("sd", ("base",))
    ipa_kernels.enable(compiled)
    whole(compiled, backend="eager")
    as_stock(compiled, twin, ("base",), Control())
    control = Control() if len(scales[0]) == 2 else MASKED[0]
    for pipe in (twin, compiled):
        pipe.set_ip_adapter_scale(scales)
        with pytest.raises(
            (TypeError, ValueError, IndexError, torch._dynamo.exc.TorchRuntimeError, torch._dynamo.exc.Unsupported)
        ):
            generate(pipe, ("base",), control)
    as_stock(compiled, twin, ("base",), Control())


@pytest.mark.parametrize(
    "scale",
    [np.float32(0.3), *(pytest.param(scale, marks=pytest.mark.slow) for scale in (np.float64(0.3), True, torch.tensor(0.3)))],
    ids=lambda scale: type(scale).__name__,
)
def test_scales_that_are_no_python_numbers(scale: Any) -> None:
    compiled, twin = build("sd", ("base",)), build("sd", ("base",))
    ipa_kernels.enable(compiled)
    whole(compiled, backend="eager")
    for one in (0.7, scale, 0.1):
        for pipe in (compiled, twin):
            pipe.set_ip_adapter_scale(one)
        if isinstance(one, Tensor):
            continue  # stock's `scale == 0` breaks the graph
        close(generate(compiled, ("base",)), generate(twin, ("base",)))


def test_the_list_of_scales_stays_the_users() -> None:
    """One list for all layers, that its owner goes on to write to: eager and compiled."""
    pipes = compiled, eager, twin = [build("sd", ("base",)) for _ in range(3)]
    for pipe in (compiled, eager):
        ipa_kernels.enable(pipe)
    unets = [pipe.unet for pipe in pipes]
    whole(compiled, backend="eager")
    shared = [0.7]
    for unet in unets:
        for processor in unet.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = shared
    generate(compiled, ("base",))
    with torch._dynamo.config.patch(error_on_recompile=True):
        shared[0] = 0.1
        expected = generate(twin, ("base",))
        close(generate(compiled, ("base",)), expected)
        close(generate(eager, ("base",)), expected)
    ipa_kernels.disable(compiled)
    processors = unets[0].attn_processors.values()
    assert all(processor.scale is shared for processor in processors if hasattr(processor, "scale"))


def test_inside_another_compiled_function() -> None:
    """The hooks are in the graph as well: scales are compiled in, as in stock."""
    unet, twin = build("sd", ("base",)).unet, build("sd", ("base",)).unet
    ipa_kernels.enable(unet)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, 64)
    embeds = {"image_embeds": [torch.randn(1, 1, 32)]}

    @torch.compile(fullgraph=True, backend="eager")
    def call(*arguments: Tensor) -> Tensor:
        return unet(*arguments, added_cond_kwargs=embeds).sample * 2

    for scale in (0.7, 0.2, 0.0):
        for each in (unet, twin):
            for processor in each.attn_processors.values():
                if hasattr(processor, "scale"):
                    processor.scale[0] = scale
        with torch.no_grad():
            close(call(*inputs), twin(*inputs, added_cond_kwargs=embeds).sample * 2)
