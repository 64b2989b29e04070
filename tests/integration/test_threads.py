"""Two threads with two prompts on one UNet: each draws what it draws alone, and an interrupt of one is its own affair."""

import copy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ipa_kernels
from ipa_kernels.integration import running_step
from ipa_kernels.testing import tiny_pipelines

from ..helpers.adapters import seeded
from ..helpers.compiled import blocks, close, prepare, whole
from ..helpers.controls import binary
from ..helpers.generate import generate
from ..helpers.pipelines import build
from ..helpers.spies import AtLayers

NAMES = ("base",)
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"
LAST_LAYER = "up_blocks.1.attentions.1.transformer_blocks.0.attn2"
TIMES = (900, 600, 300, 50)
ROUNDS = 2
SOON = 60.0
"""Seconds for what takes a fraction of one: where a thread waits for nothing, a test fails."""


class Prompt:
    """A text, an image, a mask, and the noise to begin with."""

    def __init__(self, seed: int, size: int = 8) -> None:
        self.draw = seeded(seed)
        self.sample = self.draw(2, 4, size, size)
        self.text = self.draw(2, 77, tiny_pipelines.CROSS_ATTENTION_DIM)
        self.images = [self.draw(2, 1, tiny_pipelines.IMAGE_EMBED_DIM)]
        self.masks = [binary(seed=seed)]

    @torch.no_grad()
    def step(self, unet: Any, sample: Tensor, timestep: Any) -> Tensor:
        noise: Tensor = unet(
            sample, timestep, self.text, added_cond_kwargs={"image_embeds": self.images},
            cross_attention_kwargs={"ip_adapter_masks": self.masks},
        ).sample  # fmt: skip
        return sample - 0.1 * noise

    def picture(self, unet: Any) -> Tensor:
        sample = self.sample
        for timestep in TIMES:
            sample = self.step(unet, sample, timestep)
        return sample


def seed() -> int:
    return int(torch.randint(10_000, ()))


def unets() -> tuple[Any, Any]:
    """One that is enabled, and a stock twin."""
    found = build("bare-unet", NAMES).unet, build("bare-unet", NAMES).unet
    ipa_kernels.enable(found[0], impl="eager")
    return found


def in_threads(*tasks: Callable[[], Any], seconds: float = 5 * SOON) -> list[Any]:
    """The results of tasks in a thread each, whose switches are frequent. Raises what a task raised."""
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            results[i] = tasks[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(tasks))]
    with frequent_switches():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=seconds)
    if errors:
        raise errors[0]
    assert len(results) == len(tasks), "a thread waits for another that waits, too"
    return [results[i] for i in range(len(tasks))]


@contextmanager
def frequent_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def crossings(unet: nn.Module, *ends: str) -> set[str]:
    """The names of such projections of the layers with an adapter."""
    layers = [name.removesuffix(".processor") for name, module in unet.named_modules() if hasattr(module, "to_k_ip")]
    return {f"{layer}.{end}" for layer in layers for end in ends}


def far_apart(first: Tensor, second: Tensor) -> None:
    """So that one in the place of the other is no small error."""
    assert (first - second).abs().max() > 1e-3 * first.abs().max()


SHARED: dict[str, Callable[[Prompt, Prompt], None]] = {
    "nothing": lambda one, other: None,
    "the text": lambda one, other: setattr(other, "text", one.text),
    "the images and the masks": lambda one, other: vars(other).update(images=one.images, masks=one.masks),
}


@pytest.mark.parametrize("shared", SHARED)
def test_steps_that_overlap_in_every_layer(shared: str) -> None:
    """The threads meet after each layer's queries and before it returns: between them, both look up and attend."""
    unet, twin = unets()
    meetings: list[int] = []
    for _ in range(ROUNDS):
        prompts = Prompt(seed()), Prompt(seed())
        SHARED[shared](*prompts)
        # drawn twice, so that the second time finds what the first one kept; then with a text that was written to
        for again in range(3):
            if again == 2:
                prompts[0].text.mul_(-0.5)
            expected = [prompt.picture(twin) for prompt in prompts]
            far_apart(*expected)
            barrier = threading.Barrier(2, action=lambda: meetings.append(1), timeout=SOON)

            def draw(prompt: Prompt, barrier: threading.Barrier = barrier) -> Tensor:
                with AtLayers(unet, crossings(unet, "to_q", "to_out.0"), lambda name: barrier.wait()):
                    return prompt.picture(unet)

            found = in_threads(*(lambda prompt=prompt: draw(prompt) for prompt in prompts))
            assert all(map(torch.equal, found, expected))
    assert len(meetings) == ROUNDS * 3 * len(TIMES) * 4 * 2


def test_steps_of_two_sizes_that_overlap_as_they_come() -> None:
    unet, twin = unets()
    for _ in range(ROUNDS):
        prompts = Prompt(seed(), 8), Prompt(seed(), 12)
        expected = [prompt.picture(twin) for prompt in prompts]
        barrier = threading.Barrier(2, timeout=SOON)

        def draw(prompt: Prompt, barrier: threading.Barrier = barrier) -> list[Tensor]:
            barrier.wait()
            return [prompt.picture(unet) for _ in range(2)]

        found = in_threads(*(lambda prompt=prompt: draw(prompt) for prompt in prompts))
        for pictures, picture in zip(found, expected, strict=True):
            assert all(torch.equal(one, picture) for one in pictures)


IMAGES = "encoder_hid_proj.image_projection_layers.0.image_embeds"
EDITED = [IMAGES, *(f"{LAYER}.{name}" for name in ("to_k", "to_v", "processor.to_k_ip.0", "processor.to_v_ip.0"))]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", EDITED)
def test_a_weight_that_another_thread_edits_while_a_value_is_computed(name: str, when: str) -> None:
    """Just before the product, or just after: what was computed with the one weight does not answer for the other."""

    def drawn(unet: Any) -> list[Tensor]:
        edits: list[str] = []

        @torch.no_grad()
        def edit() -> None:
            unet.get_submodule(name).weight.mul_(-1)

        def once(layer: str) -> None:
            if not edits:
                edits.append(layer)
                in_threads(edit)

        prompt = Prompt(3)
        pictures = [prompt.sample]
        for timestep in TIMES:
            with AtLayers(unet, {name}, **{when: once}):
                pictures.append(prompt.step(unet, pictures[-1], timestep))
        assert edits == [name]
        return pictures

    unet, twin = unets()
    assert all(map(torch.equal, drawn(unet), drawn(twin)))


def test_a_weight_that_is_put_back_after_a_value_was_computed_with_another() -> None:
    """Before anyone looks again: what was computed with the other does not answer for it."""

    def drawn(unet: Any) -> list[Tensor]:
        module = unet.get_submodule(f"{LAYER}.to_v")
        own, other = module.weight, nn.Parameter(-module.weight.detach())
        exchanged: list[str] = []

        def exchange(name: str) -> None:
            is_first = name.endswith("to_k")
            if exchanged == ([] if is_first else [f"{LAYER}.to_k"]):
                module.weight = other if is_first else own
                exchanged.append(name)

        prompt = Prompt(3)
        pictures = [prompt.sample]
        for timestep in TIMES:
            with AtLayers(unet, {f"{LAYER}.to_k", f"{LAYER}.processor.to_k_ip.0"}, before=exchange):
                pictures.append(prompt.step(unet, pictures[-1], timestep))
        assert len(exchanged) == 2
        return pictures

    unet, twin = unets()
    assert all(map(torch.equal, drawn(unet), drawn(twin)))


def pipes(how: Callable[..., None] | None, backend: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """Two prepared pipelines on one UNet, compiled or not, and a stock twin."""
    pipe, twin = build("sd", NAMES), build("sd", NAMES)
    prepare(pipe, NAMES)
    if how is not None:
        how(pipe, backend=backend)
    generate(pipe, NAMES, steps=1)
    other = copy.copy(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    return pipe, other, twin


def slow(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
    """A graph that the other thread's step begins during, if it can."""

    def run(*arguments: Any) -> Any:
        time.sleep(0.02)
        return graph.forward(*arguments)

    return run


HOW = [
    pytest.param(None, id="prepared"),
    pytest.param(whole, id="compiled"),
    pytest.param(blocks, id="compiled blocks", marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", HOW)
def test_prepared_steps_that_begin_together(how: Callable[..., None] | None) -> None:
    pipe, other, twin = pipes(how, slow)
    for _ in range(ROUNDS):
        seeds = seed(), seed()
        expected = [generate(twin, NAMES, seed=one, steps=4) for one in seeds]
        far_apart(*expected)
        barrier = threading.Barrier(2, timeout=SOON)

        def meet(pipe: Any, step: int, timestep: Any, tensors: Any, barrier: threading.Barrier = barrier) -> Any:
            barrier.wait()
            return tensors

        def draw(each: Any, seed: int, meet: Callable[..., Any] = meet) -> Tensor:
            return generate(each, NAMES, seed=seed, steps=4, callback_on_step_end=meet)

        found = in_threads(lambda one=seeds[0]: draw(pipe, one), lambda one=seeds[1]: draw(other, one))
        for picture, reference in zip(found, expected, strict=True):
            (same if how is None else close)(picture, reference)
    report = ipa_kernels.explain(pipe)
    assert report.prepared > 0
    assert how is None or report.prepared_reason == ""


def same(picture: Tensor, reference: Tensor) -> None:
    assert torch.equal(picture, reference)


def test_a_prepared_step_that_is_not_compiled_waits_for_no_other() -> None:
    """It runs without the storage that the other step reads."""
    pipe, other, twin = pipes(None, slow)
    expected = [generate(twin, NAMES, seed=one) for one in (1, 2)]
    barrier = threading.Barrier(2, timeout=10)

    def draw(each: Any, seed: int) -> Tensor:
        with AtLayers(pipe.unet, {f"{LAYER}.to_q"}, lambda name: barrier.wait()):
            return generate(each, NAMES, seed=seed)

    found = in_threads(lambda: draw(pipe, 1), lambda: draw(other, 2))
    assert all(map(torch.equal, found, expected))


def test_a_step_is_that_of_its_thread() -> None:
    unet, _ = unets()
    found: list[object] = []

    def look(name: str) -> None:
        found.append(running_step.THREAD.step)
        found.extend(in_threads(lambda: running_step.THREAD.step))

    prompt = Prompt(3)
    with AtLayers(unet, {f"{LAYER}.to_q"}, look):
        prompt.step(unet, prompt.sample, TIMES[0])
    mine, other = found
    assert isinstance(mine, running_step.Step)
    assert other is None


class Interrupts:
    """Raises a KeyboardInterrupt in the thread that asks for it, where it is called next."""

    def __init__(self) -> None:
        self._asked = threading.local()

    @contextmanager
    def here(self) -> Iterator[None]:
        self._asked.now = True
        with pytest.raises(KeyboardInterrupt):
            yield
        assert not self._asked.now

    def __call__(self, *arguments: Any) -> None:
        if getattr(self._asked, "now", False):
            self._asked.now = False
            raise KeyboardInterrupt

    def backend(self, graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            time.sleep(0.02)
            self()
            return graph.forward(*arguments)

        return run


def test_an_interrupt_in_a_layer_that_both_threads_are_in() -> None:
    unet, twin = unets()
    interrupts = Interrupts()
    for _ in range(ROUNDS):
        prompts = Prompt(seed()), Prompt(seed())
        expected = [prompt.picture(twin) for prompt in prompts]
        barrier = threading.Barrier(2, timeout=SOON)

        def meet(name: str, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            interrupts()

        def interrupted(meet: Callable[[str], None] = meet, prompts: tuple[Prompt, Prompt] = prompts) -> Tensor:
            sample = prompts[0].step(unet, prompts[0].sample, TIMES[0])
            with interrupts.here(), AtLayers(unet, {f"{LAYER}.to_q"}, meet):
                prompts[0].step(unet, sample, TIMES[1])
            return prompts[0].picture(unet)

        def beside(meet: Callable[[str], None] = meet, prompts: tuple[Prompt, Prompt] = prompts) -> Tensor:
            sample = prompts[1].step(unet, prompts[1].sample, TIMES[0])
            with AtLayers(unet, {f"{LAYER}.to_q"}, meet):
                sample = prompts[1].step(unet, sample, TIMES[1])
            for timestep in TIMES[2:]:
                sample = prompts[1].step(unet, sample, timestep)
            return sample

        assert all(map(torch.equal, in_threads(interrupted, beside), expected))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", HOW)
def test_an_interrupt_of_a_prepared_step_beside_another(how: Callable[..., None] | None) -> None:
    interrupts = Interrupts()
    pipe, other, twin = pipes(how, interrupts.backend)
    for _ in range(ROUNDS):
        seeds = seed(), seed()
        expected = [generate(twin, NAMES, seed=one, steps=4) for one in seeds]
        barrier = threading.Barrier(2, timeout=SOON)

        def meet(pipe: Any, step: int, timestep: Any, tensors: Any, barrier: threading.Barrier = barrier) -> Any:
            if step == 0:
                barrier.wait()
            return tensors

        def interrupted(one: int = seeds[0], meet: Callable[..., Any] = meet) -> Tensor:
            def then(*arguments: Any) -> Any:
                result = meet(*arguments)
                asked.enter_context(interrupts.here())
                return result

            with ExitStack() as asked:
                if how is None:
                    asked.enter_context(AtLayers(pipe.unet, {f"{LAYER}.to_q"}, interrupts))
                generate(pipe, NAMES, seed=one, steps=4, callback_on_step_end=then)
            return generate(pipe, NAMES, seed=one, steps=4)

        def beside(one: int = seeds[1], meet: Callable[..., Any] = meet) -> Tensor:
            return generate(other, NAMES, seed=one, steps=4, callback_on_step_end=meet)

        for picture, reference in zip(in_threads(interrupted, beside), expected, strict=True):
            (same if how is None else close)(picture, reference)


def call_of_a_layer(unet: Any, prompt: Prompt, tokens: list[Tensor]) -> Tensor:
    hidden = seeded(5)(2, 16, 64)
    found: Tensor = unet.get_submodule(LAYER)(
        hidden, encoder_hidden_states=(prompt.text, tokens), ip_adapter_masks=prompt.masks
    )
    return found


def call_of_forward(unet: Any, prompt: Prompt, tokens: list[Tensor]) -> Tensor:
    """Without the hooks that tell of a step."""
    return prompt.step(unet.forward, prompt.sample, TIMES[2])


def nothing(attention: Any) -> None:
    pass


def edit_with_a_trace(attention: Any) -> None:
    with torch.no_grad():
        attention.to_k.weight.mul_(-1)
        attention.processor.to_v_ip[0].weight.mul_(-1)


def edit_without_a_trace(attention: Any) -> None:
    attention.to_k.weight.data.mul_(-1)
    attention.processor.to_v_ip[0].weight.data.mul_(-1)


def hook(attention: Any) -> None:
    attention.to_v.register_forward_hook(lambda module, arguments, result: result * 2)


def forward_of_ones_own(attention: Any) -> None:
    keys = attention.processor.to_k_ip[0]
    keys.forward = lambda rows: nn.functional.linear(rows, keys.weight) * 2


def interrupt(unet: Any, prompt: Prompt) -> None:
    """A step, after which the last layer has not been."""

    def raises(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), AtLayers(unet, {f"{LAST_LAYER}.to_q"}, raises):
        prompt.step(unet, prompt.sample, TIMES[2])


class Interrupted:
    """A UNet whose third step was interrupted, and what its layer was given."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.prompt = unet, Prompt(7)
        self.tokens: list[Tensor] = []

        def see(module: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
            self.tokens = list(options["encoder_hidden_states"][1])

        handle = self.attention.register_forward_pre_hook(see, with_kwargs=True)
        self.prompt.step(unet, self.prompt.sample, TIMES[0])
        handle.remove()
        self.prompt.step(unet, self.prompt.sample, TIMES[1])
        interrupt(unet, self.prompt)

    @property
    def attention(self) -> Any:
        return self.unet.get_submodule(LAYER)


Call = Callable[[Any, Prompt, list[Tensor]], Tensor]


@pytest.mark.parametrize("thread", ["the same thread", "another thread"])
@pytest.mark.parametrize("call", [call_of_a_layer, call_of_forward])
@pytest.mark.parametrize("edit", [nothing, edit_with_a_trace, edit_without_a_trace, hook, forward_of_ones_own])
def test_what_an_interrupted_step_found_is_not_found_without_a_step(
    edit: Callable[[Any], None], call: Call, thread: str
) -> None:
    """By content: a direct call after the interrupt runs what is there by then."""
    found = []
    for unet in unets():
        scene = Interrupted(unet)
        edit(scene.attention)

        def direct(scene: Interrupted = scene) -> Tensor:
            with torch.no_grad():
                return call(scene.unet, scene.prompt, scene.tokens)

        found.append(direct() if thread == "the same thread" else in_threads(direct)[0])
        found.append(scene.prompt.step(unet, scene.prompt.sample, TIMES[3]))
    result, after, expected, expected_after = found
    assert torch.equal(result, expected)
    # a step sees all but the edit that leaves no trace
    assert edit is edit_without_a_trace or torch.equal(after, expected_after)


@pytest.mark.parametrize("call", [call_of_a_layer, call_of_forward])
def test_no_hit_is_counted_without_a_step(call: Call) -> None:
    unet, _ = unets()
    scene = Interrupted(unet)
    before = ipa_kernels.explain(unet).cache.hits
    assert before > 0, "nothing was found, so that this proves nothing"
    with torch.no_grad():
        call(unet, scene.prompt, scene.tokens)
    assert ipa_kernels.explain(unet).cache.hits == before
