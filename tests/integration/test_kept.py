"""Loops of users' own: stock's pictures whatever they pass, and where nothing can be kept the report says why."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ipa_kernels
from ipa_kernels.integration.conditioning_cache import ConditioningCache
from ipa_kernels.integration.processors import fused
from ipa_kernels.testing import tiny_pipelines

from ..helpers.adapters import seeded
from ..helpers.controls import binary
from ..helpers.generate import generate
from ..helpers.pipelines import build

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"
TIMES = (900, 600, 300)


@dataclass
class Loop:
    """A loop around a bare UNet. mode: what it runs in; lora_scale: of all LoRAs."""

    unet: Any
    mode: Callable[[], AbstractContextManager[object]] = torch.no_grad
    draw: Callable[..., Tensor] = field(default_factory=lambda: seeded(2))
    lora_scale: float = 1.0

    def __post_init__(self) -> None:
        self.text = self.draw(2, 77, tiny_pipelines.CROSS_ATTENTION_DIM)
        self.images = self.draw(2, 1, tiny_pipelines.IMAGE_EMBED_DIM)
        self.masks = [binary()]

    def step(self, timestep: Any, **options: Any) -> Tensor:
        sample = self.draw(2, 4, 8, 8)
        scale = {} if self.lora_scale == 1 else {"scale": self.lora_scale}
        found: Tensor = self.unet(
            sample, timestep, self.text, added_cond_kwargs={"image_embeds": [self.images]},
            cross_attention_kwargs={"ip_adapter_masks": self.masks, **scale}, **options,
        ).sample  # fmt: skip
        return found


Story = Callable[[Loop], Iterator[Tensor]]


def numbers(loop: Loop) -> Iterator[Tensor]:
    for time in TIMES:
        yield loop.step(time)


def elements(loop: Loop) -> Iterator[Tensor]:
    for time in torch.tensor(TIMES):
        yield loop.step(time)


def rows(loop: Loop) -> Iterator[Tensor]:
    """k-diffusion's: a noise level for each row of the batch, in a tensor of each step's own."""
    for time in TIMES:
        yield loop.step(torch.full((2,), time))


def expanded_rows(loop: Loop) -> Iterator[Tensor]:
    for time in TIMES:
        yield loop.step(torch.tensor(time).expand(2))


def levels_in_one_batch(loop: Loop) -> Iterator[Tensor]:
    """StreamDiffusion's: each row is at another step, the next frame passes the same tensor again."""
    levels = torch.tensor([900, 600])
    for _ in range(3):
        yield loop.step(levels)


def tiles(loop: Loop) -> Iterator[Tensor]:
    """MultiDiffusion's: each step several times, for parts of the picture."""
    for time in TIMES:
        for _ in range(3):
            yield loop.step(time)


def tiles_with_texts(loop: Loop) -> Iterator[Tensor]:
    """Panorama's: a text tensor for each tile; here in the same place, as memory is given again."""
    for time in TIMES:
        for _ in range(3):
            with torch.inference_mode(False), torch.no_grad():
                loop.text.copy_(seeded(4)(2, 77, tiny_pipelines.CROSS_ATTENTION_DIM))
            yield loop.step(time)


def ascending(loop: Loop) -> Iterator[Tensor]:
    """DDIM inversion's."""
    for time in reversed(TIMES):
        yield loop.step(time)


def one_step_pictures(loop: Loop) -> Iterator[Tensor]:
    for _ in range(3):
        yield loop.step(999)


STORIES: list[Story] = [
    numbers, elements, rows, expanded_rows, levels_in_one_batch, tiles, tiles_with_texts, ascending, one_step_pictures,
]  # fmt: skip


def played(story: Story, change: Callable[[Loop], object] = lambda loop: None, **options: Any) -> ipa_kernels.Report:
    """The report of a story that went as with stock, bit for bit."""
    expected: list[Tensor] = []
    for enabled in (False, True):
        unet = build("bare-unet", ("base",)).unet
        loop = Loop(unet)
        change(loop)
        if enabled:
            ipa_kernels.enable(unet, impl="eager", **options)
        with loop.mode():
            pictures = list(story(loop))
        if enabled:
            assert all(map(torch.equal, pictures, expected))
        expected = pictures
    return ipa_kernels.explain(unet)


def once() -> int:
    """What one step computes: misses."""
    unet = build("bare-unet", ("base",)).unet
    ipa_kernels.enable(unet, impl="eager")
    with torch.no_grad():
        Loop(unet).step(5)
    return ipa_kernels.explain(unet).cache.misses


@pytest.mark.parametrize(
    "story", [story for story in STORIES if story is not tiles_with_texts], ids=lambda story: story.__name__
)
def test_any_loop_computes_once(story: Story) -> None:
    """Whatever the timesteps, for inputs that are unchanged."""
    report = played(story)
    assert report.cache.misses == once()
    assert report.cache.hits >= 2 * once()
    assert report.cache_reason == ""
    assert "not kept" not in str(report)


def test_images_are_computed_once_beside_texts_that_change() -> None:
    report = played(tiles_with_texts)
    layers, calls = len(report.layers), 9
    # the text in each layer in each call; once the image tokens, their keys in each layer, the mask at two resolutions
    assert report.cache.misses == layers * calls + 1 + layers + 2


class Quantised(nn.Linear):
    """A layer that computes in a way of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, (self.weight * 8).round() / 8)


class Int8Tensor(Tensor):
    """A weight of a class of its own, as torchao's."""


def in_mode(mode: Callable[[], AbstractContextManager[object]]) -> Callable[[Loop], None]:
    return lambda loop: setattr(loop, "mode", mode)


def inputs_of_inference(loop: Loop) -> None:
    with torch.inference_mode():
        loop.text, loop.images = loop.text.clone(), loop.images.clone()


def quantised_keys(loop: Loop) -> None:
    loop.unet.get_submodule(LAYER).to_k.__class__ = Quantised


def quantised_adapter(loop: Loop) -> None:
    loop.unet.get_submodule(LAYER).processor.to_v_ip[0].__class__ = Quantised


def quantised_projection(loop: Loop) -> None:
    loop.unet.encoder_hid_proj.image_projection_layers[0].image_embeds.__class__ = Quantised


def weight_of_a_class(loop: Loop) -> None:
    linear = loop.unet.get_submodule(LAYER).to_v
    weight = linear.weight.detach().as_subclass(Int8Tensor)
    linear.weight = nn.Parameter(weight, requires_grad=False)


def hooked_keys(loop: Loop) -> None:
    loop.unet.get_submodule(LAYER).to_k.register_forward_hook(lambda module, arguments, result: result)


def text_that_requires_grad(loop: Loop) -> None:
    loop.text.requires_grad_()


DOUBTS: dict[str, tuple[Story, Callable[[Loop], object], str]] = {
    "inference mode": (numbers, in_mode(torch.inference_mode), r"torch.inference_mode.*use torch.no_grad\(\)"),
    "inputs made in inference mode": (numbers, inputs_of_inference, r"torch.inference_mode.*use torch.no_grad\(\)"),
    "gradients": (numbers, in_mode(nullcontext), r"gradients.*use torch.no_grad\(\)"),
    "a text that requires grad": (numbers, text_that_requires_grad, r"requires_grad: .*use .detach"),
    "a quantised to_k": (numbers, quantised_keys, rf"{LAYER}: .*Quantised"),
    "a quantised to_v_ip": (numbers, quantised_adapter, rf"{LAYER}: .*Quantised"),
    "a quantised image projection": (numbers, quantised_projection, r"encoder_hid_proj.*Quantised"),
    "a weight of another class": (numbers, weight_of_a_class, rf"{LAYER}: .*Int8Tensor"),
    "a hook": (numbers, hooked_keys, rf"{LAYER}: .*Linear.*hook"),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_the_report_says_why_values_are_not_kept(name: str) -> None:
    story, change, reason = DOUBTS[name]
    report = played(story, change)
    line = next(line for line in str(report).splitlines() if "cache:" in line)
    head, _, told = line.partition("; not kept: ")
    assert head.startswith("  cache: ")
    assert told == report.cache_reason
    assert report.to_dict()["cache_reason"] == report.cache_reason
    assert re.search(reason, told), told


def test_hooks_on_every_module_are_named() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, arguments, result: None)
    try:
        report = played(numbers)
    finally:
        handle.remove()
    assert report.cache.hits == 0
    assert "hooks on every module" in report.cache_reason


def test_a_cache_that_is_off_is_named() -> None:
    report = played(numbers, cache=False)
    assert report.cache_reason == "cache=False"
    assert "not kept: cache=False" in str(report)


def test_a_prompt_tensor_for_each_tile() -> None:
    """MultiDiffusion's with regions: each is computed once."""

    def story(loop: Loop) -> Iterator[Tensor]:
        texts = [loop.text.clone() for _ in range(3)]
        for time in TIMES:
            for loop.text in texts:
                yield loop.step(time)

    report = played(story)
    # all of a step, and then the text in each layer
    assert report.cache.misses == once() + 2 * len(report.layers)
    assert report.cache_reason == ""


@pytest.mark.parametrize("steps", [1, 3])
def test_no_reason_where_there_is_nothing_to_keep_or_all_is_kept(steps: int) -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    assert ipa_kernels.explain(pipe).cache_reason == ""
    for seed in range(3):
        generate(pipe, ("base",), steps=steps, seed=seed)
        report = ipa_kernels.explain(pipe)
        assert report.cache_reason == ""
        assert "not kept" not in str(report)


def test_a_reason_goes_with_its_cause() -> None:
    unet = build("bare-unet", ("base",)).unet
    loop = Loop(unet)
    ipa_kernels.enable(unet, impl="eager")
    loop.step(900)
    assert "gradients" in ipa_kernels.explain(unet).cache_reason
    with torch.no_grad():
        loop.step(800)
        assert ipa_kernels.explain(unet).cache_reason == ""
    loop.step(700)
    ipa_kernels.clear_cache(unet)
    assert ipa_kernels.explain(unet).cache_reason == ""


def test_a_second_generation_from_the_same_tensors_is_no_reason() -> None:
    unet = build("bare-unet", ("base",)).unet
    loop = Loop(unet)
    ipa_kernels.enable(unet, impl="eager")
    with torch.no_grad():
        for _ in range(2):
            list(numbers(loop))
    assert ipa_kernels.explain(unet).cache_reason == ""


def test_what_changes_in_every_step_is_no_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Residuals of a ControlNet, the timestep: each layer checks everything once, and finds what it ran in later steps."""
    unet, twin = build("bare-unet", ("base",)).unet, build("bare-unet", ("base",)).unet
    shapes: list[torch.Size] = []
    twin.mid_block.register_forward_pre_hook(lambda module, given: shapes.append(given[0].shape))
    checked: list[object] = []
    choose = fused.choose

    def seen(*problem: Any) -> Any:
        checked.append(problem)
        return choose(*problem)

    monkeypatch.setattr(fused, "choose", seen)
    ipa_kernels.enable(unet, impl="eager")
    loop = Loop(unet)
    with torch.no_grad():
        Loop(twin).step(900)
        for time in TIMES:
            residual = loop.draw(*shapes[0])
            loop.step(torch.full((2,), time), mid_block_additional_residual=residual)
    assert len(checked) == len(ipa_kernels.explain(unet).layers)


def test_the_scale_of_loras_is_of_the_condition() -> None:
    """Nothing is shared between two: their weights are scaled within the UNet's forward, after it was looked at."""
    unet = build("bare-unet", ("base",)).unet
    loop = Loop(unet)
    ipa_kernels.enable(unet, impl="eager")
    misses = []
    with torch.no_grad():
        for loop.lora_scale in (1.0, 1.0, 0.25, 0.25, 1.0, 0.25):
            loop.step(5)
            misses.append(ipa_kernels.explain(unet).cache.misses)
    assert misses == [misses[0]] * 2 + [2 * misses[0]] * 4


@pytest.mark.parametrize(("steps", "is_kept"), [(16, True), (17, False)])
def test_a_condition_that_many_steps_did_not_have(steps: int, is_kept: bool) -> None:
    """It is dropped when a new one comes, though its prompt lives on."""
    unet = build("bare-unet", ("base",)).unet
    loop = Loop(unet)
    ipa_kernels.enable(unet, impl="eager")
    first, second, third = (loop.draw(2, 77, tiny_pipelines.CROSS_ATTENTION_DIM) for _ in range(3))
    with torch.no_grad():
        for loop.text in (first, *(second for _ in range(steps - 1)), third):
            loop.step(5)
        before = ipa_kernels.explain(unet).cache.misses
        loop.text = first
        loop.step(5)
    report = ipa_kernels.explain(unet)
    assert report.cache.misses - before == (0 if is_kept else len(report.layers))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_step_within_a_transform_of_torch_func_keeps_nothing() -> None:
    """What is computed there is of that transform."""
    unet = build("bare-unet", ("base",)).unet
    loop = Loop(unet)
    samples = loop.draw(3, 2, 4, 8, 8)

    def step(sample: Tensor) -> Tensor:
        found: Tensor = unet(sample, 5, loop.text, added_cond_kwargs={"image_embeds": [loop.images]}).sample
        return found

    with torch.no_grad():
        expected = torch.func.vmap(step)(samples)
        ipa_kernels.enable(unet, impl="eager")
        assert torch.equal(torch.func.vmap(step)(samples), expected)
        report = ipa_kernels.explain(unet)
        assert report.cache == (0, 0, 0)
        assert "torch.func" in report.cache_reason


def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By anyone's code; ours says so to itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)


@pytest.mark.parametrize("how", [captured, traced])
def test_nothing_is_kept_of_what_is_recorded(how: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, text = ConditioningCache(), torch.zeros(2)
    with torch.no_grad():
        assert cache.open([text], ()) is not None
        how(monkeypatch)
        assert cache.open([text], ()) is None
    assert cache.reason.startswith("recording: torch.jit.trace")
