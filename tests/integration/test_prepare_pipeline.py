"""`prepare`: buffers that graphs read, filled with what a step is given, or not read."""

import copy
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from peft import LoraConfig
from torch import Tensor

import ipa_kernels
from ipa_kernels.graphs import cuda_graphs
from ipa_kernels.integration import hooks, prepare_pipeline, scale_table, steps
from ipa_kernels.integration.static_storage import StaticStorage
from ipa_kernels.integration.steps import is_capturing

from ..helpers.adapters import load
from ..helpers.compiled import BOTH, MASKED, PLAIN, Stream, as_stock, prepare, step_with_loras, whole
from ..helpers.controls import Control, binary
from ..helpers.generate import arguments, generate, outcome, same
from ..helpers.pipelines import build
from ..helpers.steady import NEVER

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def buffers(pipe: Any) -> Any:
    return hooks.of(getattr(pipe.unet, "_orig_mod", pipe.unet)).static


def pair(kind: str = "sd", names: tuple[str, ...] = BOTH) -> tuple[Any, Any]:
    return build(kind, names), build(kind, names)


def spoil(pipe: Any) -> None:
    """Write NaN into every buffer: whatever reads one says so."""
    for held in buffers(pipe)._static:
        for tensor in (*held.keys, *held.values):
            tensor.fill_(float("nan"))


@pytest.mark.parametrize("kind", ["sd", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("animatediff", "kolors"))])
def test_a_graph_reads_the_buffers_and_they_follow(kind: str) -> None:
    """Prompts, images, scales and masks that change: the graph that was compiled first stays the only one."""
    compiled, twin = pair(kind)
    report = prepare(compiled, control=MASKED[0])
    assert report.prepared > 0
    assert report.enabled
    cuda_graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        cuda_graphs.append(graph)
        return graph.forward

    whole(compiled, backend=backend)
    for seed, control in enumerate(MASKED):
        as_stock(compiled, twin, BOTH, control, seed=seed)
    assert len(cuda_graphs) == 1
    ops = [str(node.target) for node in cuda_graphs[0].graph.nodes]
    assert not any("mask_vector" in op for op in ops), "masks are resized once per generation"


def test_the_graph_projects_no_prompt_and_no_image() -> None:
    """What a graph does not use is no longer in it: the projections are gone."""
    counts = {}
    for name in ("prepared", "not"):
        compiled, _ = pair()
        ipa_kernels.enable(compiled)
        if name == "prepared":
            prepare(compiled)
        sizes: list[int] = []

        def backend(graph: torch.fx.GraphModule, inputs: Any, sizes: list[int] = sizes) -> Any:
            sizes.append(sum(node.target is torch.ops.aten.addmm.default or node.target is torch.ops.aten.mm.default
                             for node in graph.graph.nodes))  # fmt: skip
            return graph.forward

        from torch._dynamo.backends.common import aot_autograd

        whole(compiled, backend=aot_autograd(fw_compiler=backend))
        generate(compiled, BOTH)
        (counts[name],) = sizes
    # 4 layers, text and two adapters, keys and values; and the projections of the images themselves
    assert counts["not"] - counts["prepared"] > 4 * 3 * 2


def test_a_prompt_that_does_not_fit_is_not_read_from_the_buffers() -> None:
    compiled, twin = pair()
    prepare(compiled)
    whole(compiled, backend="eager")
    as_stock(compiled, twin, BOTH, Control())
    spoil(compiled)
    as_stock(compiled, twin, BOTH, Control(images=2))
    as_stock(compiled, twin, BOTH, Control(prompts=2))
    as_stock(compiled, twin, BOTH, MASKED[0])
    as_stock(compiled, twin, BOTH, Control())


def test_the_graph_does_read_them() -> None:
    """In the middle of a generation, where nothing that a tensor tells has changed."""
    compiled, twin = pair()
    prepare(compiled)
    whole(compiled, backend="eager")

    def ruin(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if hasattr(pipe.unet, "_orig_mod"):
            spoil(pipe)
        return tensors

    assert generate(compiled, BOTH, callback_on_step_end=ruin).isnan().all()
    as_stock(compiled, twin, BOTH, Control(), seed=1)


def test_called_again_it_fills_the_same_buffers() -> None:
    compiled, twin = pair()
    prepare(compiled, seed=1)
    held = buffers(compiled)
    whole(compiled, backend="eager")
    as_stock(compiled, twin, BOTH, Control(), seed=1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        prepare(compiled, seed=2)
        assert buffers(compiled) is held
        as_stock(compiled, twin, BOTH, Control(), seed=2)


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (Control(images=2), r"ip_adapter_image \(embeddings of each adapter\): expected \[\[2, 1, 32\]"),
        (Control(prompts=2), r"prompt \(embeddings\): expected \[2, 77, 64\], for which the .* made, got \[4, 77, 64\]"),
        (MASKED[0], r"ip_adapter_masks \(batch and images of each adapter\): expected \[None, None\]"),
    ],
    ids=["images", "prompts", "masks"],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_that_changes_nothing(control: Control, message: str) -> None:
    pipe, _ = pair()
    prepare(pipe)
    before = [tensor.clone() for held in buffers(pipe)._static for tensor in held.keys]
    held = buffers(pipe)
    with pytest.raises(ValueError, match=message) as raised:
        prepare(pipe, control=control, seed=5)
    assert "clear_cache(pipe) drops it" in str(raised.value)
    assert buffers(pipe) is held
    assert all(map(torch.equal, before, [tensor for held in buffers(pipe)._static for tensor in held.keys]))
    ipa_kernels.clear_cache(pipe)
    assert prepare(pipe, control=control).prepared > 0


@pytest.mark.parametrize(
    ("names", "masks", "message"),
    [
        ((), None, "ip_adapter_image: expected one for each adapter, or ip_adapter_image_embeds, got none"),
        (BOTH, binary(), "ip_adapter_masks: expected a list with an entry for each of the 2 adapters, got Tensor"),
        (BOTH, [None], "ip_adapter_masks: expected a list with an entry for each of the 2 adapters, got a list of 1"),
        (BOTH, [None, torch.ones(8, 8)], "ip_adapter_masks: expected a tensor [1, images, height, width] or None for each "
         "adapter, got [8, 8]"),
    ],
    ids=["images", "one tensor", "too few", "dimensions"],
)  # fmt: skip
def test_what_cannot_be_prepared_is_named(names: tuple[str, ...], masks: Any, message: str) -> None:
    pipe, _ = pair()
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(pipe, names, Control(masks=lambda n, rows: masks) if masks is not None else None)


def test_wrong_targets_and_arguments() -> None:
    pipe = build("sd", ("base",))
    with pytest.raises(TypeError, match="pipe: expected a diffusers pipeline"):
        ipa_kernels.prepare(pipe.unet)
    with pytest.raises(TypeError, match=r"StableDiffusionPipeline\.__call__\(\) got an unexpected argument 'promt_embeds'"):
        ipa_kernels.prepare(pipe, promt_embeds=None)
    with pytest.raises(ValueError, match="without; load_ip_adapter comes first"):
        prepare(build("sd"), ())
    with pytest.raises(Exception, match=r"prompt"):
        ipa_kernels.prepare(pipe)
    assert ipa_kernels.explain(pipe).prepared == 0
    assert pipe._progress_bar_config == {"disable": True}


def test_it_leaves_random_numbers_as_they_were() -> None:
    pipe, twin = pair("sd", ("base",))
    for each in (pipe, twin):
        each.set_ip_adapter_scale(0.7)
    generator = torch.Generator().manual_seed(3)
    state, torch_state = generator.get_state(), torch.get_rng_state()
    ipa_kernels.prepare(pipe, **arguments(pipe, ("base",)) | {"generator": generator, "latents": None})
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.equal(generate(pipe, ("base",)), generate(twin, ("base",)))


def test_weights_that_change_are_read_anew() -> None:
    compiled, twin = pair("sd", ("base",))
    prepare(compiled, ("base",))
    whole(compiled, backend="eager")
    as_stock(compiled, twin, ("base",), Control())
    for pipe in (compiled, twin):
        with torch.no_grad():
            pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(2)
            pipe.unet.encoder_hid_proj.image_projection_layers[0].norm.bias.add_(1)
    as_stock(compiled, twin, ("base",), Control())


def test_an_adapter_that_was_loaded_since() -> None:
    compiled, twin = pair("sd", ("base",))
    prepare(compiled, ("base",))
    whole(compiled, backend="eager")
    as_stock(compiled, twin, ("base",), Control())
    for pipe in (compiled, twin):
        pipe.unload_ip_adapter()
        load(pipe, "light")
    as_stock(compiled, twin, ("light",), Control())
    assert {layer.impl for layer in ipa_kernels.explain(compiled).layers} == {None}
    prepare(compiled, ("light",))
    as_stock(compiled, twin, ("light",), Control(), seed=4)
    assert {layer.impl for layer in ipa_kernels.explain(compiled).layers} == {"eager"}


def test_two_threads_take_turns() -> None:
    """Both have a UNet's buffers to themselves for a step."""
    pipe, twin = pair("sd", ("base",))
    for each in (pipe, twin):
        each.set_ip_adapter_scale(0.7)
    prepare(pipe, ("base",))
    blocks_of = pipe.unet
    blocks_of.compile_repeated_blocks(fullgraph=True, backend="eager")
    expected = [generate(twin, ("base",), seed=seed, steps=4) for seed in (1, 2)]
    generate(pipe, ("base",), seed=1)
    found: dict[int, list[Tensor]] = {1: [], 2: []}
    pipes = [pipe, copy.copy(pipe)]
    pipes[1].scheduler = copy.deepcopy(pipe.scheduler)

    def draw(each: Any, seed: int) -> None:
        for _ in range(3):
            found[seed].append(generate(each, ("base",), seed=seed, steps=4))

    threads = [threading.Thread(target=draw, args=(each, seed)) for each, seed in zip(pipes, (1, 2), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, picture in zip((1, 2), expected, strict=True):
        for one in found[seed]:
            torch.testing.assert_close(one, picture, rtol=1e-4, atol=1e-5)
        assert len(found[seed]) == 3


def test_a_copy_and_the_end() -> None:
    pipe, _ = pair("sd", ("base",))
    prepare(pipe, ("base",))
    assert hooks.of(copy.deepcopy(pipe.unet)).static is None
    ipa_kernels.disable(pipe)
    assert ipa_kernels.explain(pipe).prepared == 0


def test_eager_steps_are_as_ever() -> None:
    pipe, twin = pair()
    prepare(pipe)
    for control in PLAIN[:3]:
        for each in (pipe, twin):
            each.set_ip_adapter_scale(control.scales(2))
        assert torch.equal(generate(pipe, BOTH, control), generate(twin, BOTH, control))


def hook_on_the_unet(pipe: Any, change: Any) -> None:
    def edit(module: Any, given: Any, options: Any) -> Any:
        return given, options | {"encoder_hidden_states": change(options["encoder_hidden_states"])}

    getattr(pipe.unet, "_orig_mod", pipe.unet).register_forward_pre_hook(edit, with_kwargs=True)


def forward_of_the_unet(pipe: Any, change: Any) -> None:
    unet = getattr(pipe.unet, "_orig_mod", pipe.unet)
    inner = unet.forward
    unet.forward = lambda *given, **options: inner(
        *given, **options | {"encoder_hidden_states": change(options["encoder_hidden_states"])}
    )


def hook_on_a_layer(pipe: Any, change: Any) -> None:
    def edit(module: Any, given: Any, options: Any) -> Any:
        text, images = options["encoder_hidden_states"]
        return given, options | {"encoder_hidden_states": (change(text), images)}

    unet = getattr(pipe.unet, "_orig_mod", pipe.unet)
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.register_forward_pre_hook(edit, with_kwargs=True)


@pytest.mark.parametrize("place", [hook_on_the_unet, forward_of_the_unet, hook_on_a_layer], ids=lambda place: place.__name__)
def test_a_prompt_that_someone_changes_on_the_way(place: Any) -> None:
    compiled, twin = pair("sd", ("base",))
    prepare(compiled, ("base",))
    compiled.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    as_stock(compiled, twin, ("base",), Control())
    for pipe in (compiled, twin):
        place(pipe, lambda text: text * 1.5)
    as_stock(compiled, twin, ("base",), Control())
    ipa_kernels.clear_cache(compiled)
    with pytest.raises(ValueError, match="got a hook on"):
        prepare(compiled, ("base",))


def test_the_scale_of_loras() -> None:
    compiled, twin = pair("sd", ("base",))
    for pipe in (compiled, twin):
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q"], init_lora_weights=False))
        pipe.set_ip_adapter_scale(0.7)
    prepare(compiled, ("base",))
    compiled.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    for scale in (1.0, 0.4, 0.0):
        found, expected = (step_with_loras(pipe, scale) for pipe in (compiled, twin))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    told = "cross_attention_kwargs: expected no scale of LoRAs, got 0.4; use pipe.set_adapters(name, strength)"
    assert hooks.StepInputs.refusal({"cross_attention_kwargs": {"scale": 0.4}}) == told


def test_an_attention_that_was_exchanged() -> None:
    compiled, twin = pair("sd", ("base",))
    prepare(compiled, ("base",))
    compiled.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    for pipe in (compiled, twin):
        block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
        processor = block.attn2.processor
        block.attn2 = copy.deepcopy(block.attn2)
        block.attn2.processor = processor
        with torch.no_grad():
            block.attn2.to_k.weight.mul_(2)
    as_stock(compiled, twin, ("base",), Control())


def test_masks_by_position() -> None:
    compiled, twin = pair("sd", ("base",))
    prepare(compiled, ("base",))
    compiled.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 64)
    added = {"image_embeds": [torch.randn(2, 1, 32)]}
    with torch.no_grad():
        for masks in (None, {"ip_adapter_masks": [torch.rand(1, 1, 16, 16)]}):
            found, expected = (
                pipe.unet(noise, 5, text, None, None, None, masks, added_cond_kwargs=added).sample for pipe in (compiled, twin)
            )
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_interrupt_in_a_step_holds_up_nobody() -> None:
    """torch runs no hooks for a KeyboardInterrupt: the next step of the thread cleans up, and one in another thread runs."""
    pipe, twin = pair("sd", ("base",))
    for each in (pipe, twin):
        each.set_ip_adapter_scale(0.7)
    prepare(pipe, ("base",))

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    def interrupted() -> None:
        handle = pipe.unet.mid_block.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, ("base",))
        handle.remove()

    expected = generate(twin, ("base",), seed=3)
    interrupted()
    assert torch.equal(generate(pipe, ("base",), seed=3), expected)
    # a thread that ends without another step
    thread = threading.Thread(target=interrupted)
    thread.start()
    thread.join()
    assert torch.equal(generate(pipe, ("base",), seed=3), expected)


def test_disable_in_the_middle_of_a_step() -> None:
    pipe, twin = pair("sd", ("base",))
    prepare(pipe, ("base",))
    state = hooks.of(pipe.unet)
    handle = pipe.unet.mid_block.register_forward_pre_hook(lambda *arguments: ipa_kernels.disable(pipe))
    generate(pipe, ("base",))
    handle.remove()
    assert not state.steps
    as_stock(pipe, twin, ("base",), Control())


def test_an_interrupt_while_a_step_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = pair("sd", ("base",))
    prepare(pipe, ("base",))
    state = hooks.of(pipe.unet)

    def interrupt(frame: Any, waits: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(state.lock, "acquire", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, ("base",))
    assert (state.steps, state.context.is_stepping) == ([], False)


def test_a_copy_that_is_made_in_a_step_runs_none() -> None:
    pipe, _ = pair("sd", ("base",))
    ipa_kernels.enable(pipe)
    copies: list[Any] = []
    handle = pipe.unet.mid_block.register_forward_pre_hook(lambda *arguments: copies.append(copy.deepcopy(pipe.unet)))
    generate(pipe, ("base",), steps=1)
    handle.remove()
    state = hooks.of(copies[0])
    assert not state.steps


def test_disable_in_another_thread_as_a_step_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, twin = pair("sd", ("base",))
    ipa_kernels.graphed(pipe)
    state = hooks.of(pipe.unet)
    reads = [state.graphs]

    class Vanishing:
        cuda_graphs = property(lambda self: reads.pop() if reads else None)

        def __getattr__(self, name: str) -> Any:
            return getattr(state, name)

    sample, text, added = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 64), {"image_embeds": [torch.randn(2, 1, 32)]}
    monkeypatch.setattr(hooks, "of", lambda unet: Vanishing())
    with torch.no_grad():
        found, expected = (each.unet(sample, 5, text, added_cond_kwargs=added).sample for each in (pipe, twin))
    assert torch.equal(found, expected)


def test_another_thread_runs_as_ever_while_a_graph_is_recorded() -> None:
    """Its masks were not prepared, and need not be."""
    pipe, twin = pair("sd", ("base",))
    for each in (pipe, twin):
        each.set_ip_adapter_scale(0.7)
    expected = generate(twin, ("base",), MASKED[0])
    ipa_kernels.enable(pipe)
    state = hooks.of(pipe.unet)
    begun, recording = threading.Event(), threading.Event()
    found: list[Tensor] = []

    def pause(*arguments: Any) -> None:
        begun.set()
        assert recording.wait(NEVER)

    handle = pipe.unet.conv_in.register_forward_hook(pause)
    thread = threading.Thread(target=lambda: found.append(outcome(pipe, ("base",), MASKED[0])))
    thread.start()
    assert begun.wait(NEVER)
    with state.captured():
        with state.captured():
            pass
        recording.set()
        thread.join()
        assert is_capturing(state.context)
    handle.remove()
    assert not is_capturing(state.context)
    assert same(found[0], expected)


def test_what_graphs_read_is_written_after_all_steps_on_other_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them steps that do not fit the buffers."""
    pipe, _ = pair("sd", ("base",))
    streams, begun = [Stream(0), Stream(1)], 0
    current, late = streams[0], []
    monkeypatch.setattr(steps, "stream_of", lambda tensor: current)
    prepare(pipe, ("base",))

    def run(*arguments: Any) -> None:
        nonlocal begun
        begun += 1
        current.through.add(begun)

    def watched(kind: Any, name: str) -> None:
        write = getattr(kind, name)

        def checked(self: Any, *arguments: Any) -> Any:
            late.append(set(range(1, begun + 1)) - current.through)
            return write(self, *arguments)

        monkeypatch.setattr(kind, name, checked)

    watched(scale_table.ScaleTable, "update")
    watched(StaticStorage, "_fill")
    pipe.unet.conv_out.register_forward_hook(run)
    other = Control(images=2)
    for stream, control, seed in [(0, None, 1), (1, other, 1), (0, None, 5), (1, other, 1), (1, None, 1), (0, other, 1)]:
        current = streams[stream]
        generate(pipe, ("base",), control, seed=seed)
    assert begun == 12
    assert len(late) > 12
    assert not any(late)


def test_a_hook_that_was_added_since() -> None:
    """What cannot be filled anew is no silent success."""
    pipe, _ = pair("sd", ("base",))
    prepare(pipe, ("base",), seed=1)
    held = buffers(pipe)
    hook_on_a_layer(pipe, lambda text: text)
    with pytest.raises(ValueError, match="got a hook on attn2; remove it"):
        prepare(pipe, ("base",), seed=2)
    assert buffers(pipe) is held


class Own(IPAdapterAttnProcessor2_0):
    """A processor of a user."""


def test_processors_of_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, twin = pair("sd", ("base",))
    for each in (pipe, twin):
        for processor in each.unet.attn_processors.values():
            if isinstance(processor, IPAdapterAttnProcessor2_0):
                processor.__class__ = Own
    with pytest.raises(ValueError, match=r"expected IP-Adapter processors of diffusers' own, got others"):
        prepare(pipe, ("base",))
    assert not ipa_kernels.explain(pipe).enabled
    ipa_kernels.graphed(pipe)
    monkeypatch.setattr(cuda_graphs.Graphs, "takes", staticmethod(lambda device: True))
    as_stock(pipe, twin, ("base",), Control())


def test_a_prepare_that_fails_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it runs a step when the buffers are filled."""
    pipe, twin = pair("sd", ("base",))
    ipa_kernels.enable(pipe)
    works = prepare_pipeline._compile

    def fails(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("of the step")

    for held in (None, "those of the first"):
        monkeypatch.setattr(prepare_pipeline, "_compile", fails)
        before = buffers(pipe)
        assert (before is None) == (held is None)
        with pytest.raises(torch.OutOfMemoryError):
            prepare(pipe, ("base",), seed=2)
        assert buffers(pipe) is before
        monkeypatch.setattr(prepare_pipeline, "_compile", works)
        prepare(pipe, ("base",))
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    as_stock(pipe, twin, ("base",), Control(), seed=3)


def test_everything_is_projected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = pair("sd", ("base",))
    computed: list[Any] = []
    compute = StaticStorage._compute

    def counted(self: Any, inputs: Any) -> Any:
        computed.append(inputs)
        return compute(self, inputs)

    monkeypatch.setattr(StaticStorage, "_compute", counted)
    prepare(pipe, ("base",))
    assert len(computed) == 1


def test_the_random_numbers_of_the_gpu_that_the_unet_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = pair("sd", ("base",))
    forked: list[Any] = []

    @contextmanager
    def fork(devices: Any) -> Iterator[None]:
        forked.append(devices)
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    prepare(pipe, ("base",))
    monkeypatch.setattr(prepare_pipeline, "execution_device", lambda unet: torch.device("cuda:1"))
    prepare(pipe, ("base",))
    assert forked == [[], [torch.device("cuda:1")]]


def test_perturbed_attention_leaves_its_processors_as_they_were() -> None:
    pipe = build("pag", ("base",))
    before = {name: type(processor) for name, processor in pipe.unet.attn_processors.items()}
    ipa_kernels.prepare(pipe, **arguments(pipe, ("base",)))
    ipa_kernels.disable(pipe)
    assert {name: type(processor) for name, processor in pipe.unet.attn_processors.items()} == before


def test_a_prepare_that_fails_enables_nothing() -> None:
    pipe = build("sd", ("base",))
    with pytest.raises(ValueError, match="prompt"):
        ipa_kernels.prepare(pipe)
    assert not ipa_kernels.explain(pipe).enabled
