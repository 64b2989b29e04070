"""`graphed`: what is captured, what a replay is given, and when a graph is not replayed.

On the CPU a "graph" is the operations of a step, run again on the same tensors: whatever Python decided is frozen, as in a CUDA
graph. On a GPU the tests run real ones.
"""

import copy
import gc
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ipa_kernels
from ipa_kernels.graphs import cuda_graphs
from ipa_kernels.integration import static_storage

from ..helpers.adapters import load
from ..helpers.compiled import MASKED, PLAIN, as_stock, step_with_loras
from ..helpers.controls import Control, binary
from ..helpers.generate import arguments, generate
from ..helpers.pipelines import build
from ..helpers.recorder import Recorder, pair, runs, stand_in


@pytest.mark.parametrize("kind", ["sd", "sdxl", "animatediff", "kolors", "controlnet", "t2i-adapter", "lcm", "pag"])
def test_replays_are_given_what_is_new(kind: str, recorded: list[Recorder]) -> None:
    names = ("base", "plus")
    graphed, twin = pair(kind, names)
    for seed, control in enumerate(PLAIN):
        as_stock(graphed, twin, names, control, seed=seed)
    report = ipa_kernels.explain(graphed)
    assert report.graphs == (1, 2 * len(PLAIN) - 1, ""), "two steps each, of which the very first is none"
    assert runs(recorded) == [2 * len(PLAIN) - 1]


def test_masks_and_sizes(recorded: list[Recorder]) -> None:
    names = ("base", "plus")
    graphed, twin = pair("sd", names)
    for size in (8, 12, 8):
        for seed, control in enumerate(MASKED):
            as_stock(graphed, twin, names, control, seed=seed, size=size)
    assert len(recorded) == 2
    assert ipa_kernels.explain(graphed).graphs.reason == ""


def test_a_prompt_that_was_written_over(recorded: list[Recorder]) -> None:
    """In place, with nothing else that is new."""
    graphed, twin = pair()
    for pipe in (graphed, twin):
        pipe.set_ip_adapter_scale([0.7, 0.7])

    def nudge(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["prompt_embeds"].mul_(1.5)
        return tensors

    options = {"callback_on_step_end": nudge, "callback_on_step_end_tensor_inputs": ["prompt_embeds"], "steps": 4}
    found, expected = (generate(pipe, ("base", "plus"), **options) for pipe in (graphed, twin))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert runs(recorded) == [3]


def other_weight(pipe: Any) -> None:
    pipe.unet.conv_in.weight = torch.nn.Parameter(pipe.unet.conv_in.weight * 1.5)


def moved_weight(pipe: Any) -> None:
    pipe.unet.conv_in.weight.data = pipe.unet.conv_in.weight * 1.5


def written_weight(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(1.5)


def free_u(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def hook(pipe: Any) -> None:
    pipe.unet.conv_in.register_forward_hook(lambda module, inputs, output: output * 1.2)


def setting(pipe: Any) -> None:
    pipe.unet.mid_block.resnets[0].output_scale_factor = 1.3


def processors(pipe: Any) -> None:
    pipe.unet.set_attn_processor(
        dict(pipe.unet.attn_processors) | {name: Louder() for name in pipe.unet.attn_processors if "attn1" in name}
    )


class Louder:
    """Self-attention of a user."""

    def __call__(self, attn: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return attn.to_v(hidden_states) * 0.5


def another_adapter(pipe: Any) -> None:
    pipe.unload_ip_adapter()
    load(pipe, "base", "plus", seed=5)
    pipe.set_ip_adapter_scale([0.7, 0.7])


def class_forward(pipe: Any) -> None:
    """Of one class that the UNet alone has."""
    module = pipe.unet.mid_block.resnets[0].nonlinearity
    module.__class__ = type("SiLU", (torch.nn.SiLU,), {"forward": lambda self, rows: torch.relu(rows)})


def lora(pipe: Any) -> None:
    pipe.unet.mid_block.attentions[0].proj_in.forward = lambda rows: rows * 0.3


CHANGES = [other_weight, moved_weight, written_weight, free_u, hook, setting, processors, another_adapter, class_forward, lora]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_is_not_replayed_as_it_was(change: Callable[[Any], None], recorded: list[Recorder]) -> None:
    graphed, twin = pair()
    as_stock(graphed, twin, ("base", "plus"), Control())
    before = generate(twin, ("base", "plus"), Control())
    for pipe in (graphed, twin):
        change(pipe)
    for seed in (1, 2):
        as_stock(graphed, twin, ("base", "plus"), Control(), seed=seed)
    assert not torch.equal(generate(twin, ("base", "plus"), Control()), before), "makes no difference: proves nothing"
    # a graph reads what was written into a weight, and where there are hooks none is captured; anything else is not in it
    assert len(recorded) == (1 if change in (written_weight, hook, lora) else 2)


def test_prepare_refills_what_graphs_read(recorded: list[Recorder]) -> None:
    graphed, twin = pair(names=("base",))
    as_stock(graphed, twin, ("base",), Control())
    held = ipa_kernels.integration.hooks.of(graphed.unet).static
    ipa_kernels.prepare(graphed, **arguments(graphed, ("base",), seed=9))
    as_stock(graphed, twin, ("base",), Control(), seed=9)
    assert ipa_kernels.integration.hooks.of(graphed.unet).static is held
    assert len(recorded) == 1


def test_two_images_after_one(recorded: list[Recorder]) -> None:
    """Other sizes of what is constant: new buffers with the next generation, and a new graph."""
    graphed, twin = pair(names=("base",))
    for images in (1, 2, 1):
        as_stock(graphed, twin, ("base",), Control(images=images))
        as_stock(graphed, twin, ("base",), Control(images=images), seed=3)
    assert len(recorded) == 3
    assert ipa_kernels.explain(graphed).graphs == (1, 3 * 3, "")


def test_it_ends_with_disable(recorded: list[Recorder]) -> None:
    graphed, twin = pair(names=("base",))
    assert "forward" in vars(graphed.unet)
    copied = copy.deepcopy(graphed.unet)
    assert vars(copied)["forward"].__self__ is copied
    buffer = io.BytesIO()
    torch.save(graphed.unet, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    assert getattr(vars(saved).get("forward"), "__func__", None) is not ipa_kernels.integration.hooks.forward
    ipa_kernels.graphed(graphed)
    ipa_kernels.disable(graphed)
    assert "forward" not in vars(graphed.unet)
    assert ipa_kernels.explain(graphed).graphs is None
    as_stock(graphed, twin, ("base",), Control())
    assert recorded == []


def test_what_cannot_be_captured_runs_and_says_why() -> None:
    graphed, twin = pair(names=("base",))
    as_stock(graphed, twin, ("base",), Control())
    assert ipa_kernels.explain(graphed).graphs == (0, 0, "device cpu: CUDA graphs need a CUDA GPU")
    assert "graphs: 0 captured, 0 replays; last step not replayed: device cpu" in str(ipa_kernels.explain(graphed))


@pytest.mark.parametrize("scale", [torch.tensor([0.3]), [0.3, 0.4]], ids=["tensor", "list"])
def test_scales_that_are_no_data_are_not_replayed(scale: Any, recorded: list[Recorder]) -> None:
    graphed, twin = pair(names=("base",))
    as_stock(graphed, twin, ("base",), Control())
    if isinstance(scale, Tensor):
        as_stock(graphed, twin, ("base",), Control(scales=lambda n: scale))
    else:
        for pipe in (graphed, twin):
            pipe.set_ip_adapter_scale([scale])
            with pytest.raises(TypeError):
                generate(pipe, ("base",))
    assert runs(recorded) == [1]
    as_stock(graphed, twin, ("base",), Control(), seed=4)
    assert runs(recorded) == [3]


def test_numbers_of_numpy_and_tensors_are_data(recorded: list[Recorder]) -> None:
    graphed, twin = pair(names=("base",))
    written = torch.tensor(0.3)
    for scale in (*np.linspace(0, 1, 4), np.bool_(True), written):
        as_stock(graphed, twin, ("base",), Control(scales=lambda n, scale=scale: scale))
    written.mul_(3)
    as_stock(graphed, twin, ("base",), Control(scales=lambda n: written))
    assert len(recorded) == 1


def test_the_scale_of_loras_is_not_captured_in_keys(recorded: list[Recorder]) -> None:
    """`cross_attention_kwargs={"scale": s}` scales the LoRAs of to_k while the UNet runs."""
    from peft import LoraConfig

    graphed, twin = pair(names=("base",))
    for pipe in (graphed, twin):
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q"], init_lora_weights=False))
        pipe.set_ip_adapter_scale(0.7)
    for scale in (1.0, 0.4, 0.4, 0.4, 0.0, 0.0, 1.0, 1.0):
        found, expected = (step_with_loras(pipe, scale) for pipe in (graphed, twin))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_failed_capture_runs_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again when the UNet has changed, or the buffers were dropped."""
    attempts: list[Any] = []

    def refused(run: Callable[[], Any], *_: Any) -> Any:
        attempts.append(run())
        raise RuntimeError("operation not permitted when stream is capturing")

    stand_in(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "capture", refused)
    graphed, twin = pair(names=("base",))
    for tried in (1, 2, 3):
        for seed in (1, 2):
            as_stock(graphed, twin, ("base",), Control(), seed=seed)
        assert "not permitted" in ipa_kernels.explain(graphed).graphs.reason
        assert ipa_kernels.explain(graphed).graphs.captured == 0
        assert len(attempts) == tried
        if tried == 1:
            for pipe in (graphed, twin):
                setting(pipe)
        else:
            ipa_kernels.clear_cache(graphed)


@pytest.mark.parametrize("kind", ["sd", "t2i-adapter"])
def test_masks_for_queries_that_do_not_follow_from_the_latents(
    kind: str, recorded: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is refused while it runs is run again, with all that it was given."""
    monkeypatch.setattr(static_storage, "_queries", lambda unet, inputs: set())
    graphed, twin = pair(kind, ("base",))
    as_stock(graphed, twin, ("base",), MASKED[0])
    assert "none were prepared for" in ipa_kernels.explain(graphed).graphs.reason
    assert recorded == []


class Streams:
    """The current stream of each GPU, as torch.cuda keeps them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = 0
        self.current = {0: "stream of GPU 0", 1: "stream of GPU 1"}
        for name, value in {
            "device": self.guard,
            "stream": self.switch,
            "current_stream": lambda device: self.current[device.index],
            "CUDAGraph": lambda: None,
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def guard(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        try:
            yield
        finally:
            self.device = before

    @contextmanager
    def switch(self, stream: str) -> Iterator[None]:
        before = self.current[self.device]
        self.current[self.device] = stream
        try:
            yield
        finally:
            self.current[self.device] = before

    @contextmanager
    def graph(self, graph: Any, pool: Any, capture_error_mode: str, stream: str = "torch's") -> Iterator[None]:
        """As torch's: where `capture_end` raises, its stream stays."""
        self.current[self.device] = stream
        yield
        raise RuntimeError("Invalid capture.")


def test_a_capture_that_cannot_be_ended_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPU of the latents, whichever is the current one."""
    streams = Streams(monkeypatch)
    found: list[Any] = []

    def run() -> None:
        found.append((streams.device, streams.current[1]))

    with pytest.raises(RuntimeError, match="Invalid capture"):
        cuda_graphs.capture(run, torch.device("cuda:1"), cuda_graphs.GraphPool("its own", None))
    assert found == [(1, "its own")]
    assert streams.device == 0
    assert streams.current == {0: "stream of GPU 0", 1: "stream of GPU 1"}


def test_gradients_run_as_ever(recorded: list[Recorder]) -> None:
    graphed, _ = pair(names=("base",))
    sample, text = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(1, 77, 64)
    added = {"image_embeds": [torch.randn(1, 1, 32)]}
    graphed.unet(sample, 3, text, added_cond_kwargs=added).sample.sum().backward()
    assert sample.grad is not None
    assert recorded == []


def test_an_offloaded_unet_is_refused() -> None:
    pipe = build("sd", ("base",))
    pipe.unet.forward = pipe.unet.forward
    with pytest.raises(ValueError, match="forward of its own"):
        ipa_kernels.graphed(pipe)
    assert not ipa_kernels.explain(pipe).enabled


@pytest.mark.gpu
def test_twenty_replays_on_a_gpu() -> None:
    """Real graphs: changing scales, masks and images equal eager, nothing is allocated anew, `prepare` leaves them valid."""
    names = ("base", "plus")
    graphed, twin = build("sdxl", names, torch.float16).to("cuda"), build("sdxl", names, torch.float16).to("cuda")
    ipa_kernels.graphed(graphed)
    ipa_kernels.enable(twin)
    sizes = []
    for seed in range(10):
        masks = [binary(seed=seed)] * 2
        control = Control(scales=lambda n, seed=seed: [[0.1 * seed]] * n, masks=lambda n, rows, masks=masks: masks)
        if seed % 3 == 1:
            ipa_kernels.prepare(graphed, **arguments(graphed, names, control, seed=seed, generator=None))
        outcomes = []
        for pipe in (graphed, twin):
            pipe.set_ip_adapter_scale(control.scales(2))
            outcomes.append(generate(pipe, names, control, seed=seed, generator=None))
        torch.testing.assert_close(outcomes[0], outcomes[1], rtol=2e-2, atol=2e-2)
        gc.collect()
        sizes.append(torch.cuda.memory_allocated())
    assert ipa_kernels.explain(graphed).graphs == (1, 19, "")
    assert sizes[-1] <= sizes[3]
