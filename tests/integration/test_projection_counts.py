"""How often keys, values and image tokens are computed: once for each text and each image tensor, in whatever loop."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPanoramaPipeline
from torch import Tensor, nn

import ipa_kernels
from ipa_kernels.testing import tiny_pipelines

from ..helpers.adapters import seeded
from ..helpers.controls import Control, binary
from ..helpers.generate import arguments, generate, target
from ..helpers.pipelines import ONE_TOKENIZER, build, ddim, load, unet, vae
from ..helpers.spies import LinearCalls

STEPS = 3
BOTH = ("base", "plus")


def drawn(pipe: Any, names: tuple[str, ...], seed: int, *, guidance: float = 5.0, **options: Any) -> Tensor:
    """A generation of a pipeline, with masks."""
    control = Control(masks=lambda n, rows: [binary(seed=seed + i) for i in range(n)], guidance=guidance)
    return generate(pipe, names, control, seed=seed, steps=STEPS, **options)


def panorama() -> Any:
    """Of four views; the pipeline's own are as large as SD's pictures."""
    pipe = StableDiffusionPanoramaPipeline(
        unet=unet(), vae=vae(), scheduler=ddim(), safety_checker=None, requires_safety_checker=False, **ONE_TOKENIZER
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.get_views = partial(pipe.get_views, window_size=8, stride=8)
    return pipe


def drawn_panorama(pipe: Any, names: tuple[str, ...], seed: int) -> Tensor:
    draw = seeded(seed)
    masks = Control(masks=lambda n, rows: [binary(seed=seed + i) for i in range(n)])
    given = arguments(pipe, names, masks, seed=seed, steps=STEPS)
    # a view is as large as 8 pixels of latents times diffusers' 8
    given |= {"latents": draw(1, 4, 8, 32), "height": 64, "width": 256}
    found: Tensor = pipe(**given)[0]
    return found


def modular_pag() -> Any:
    pipe = build("modular-pag")
    pipe.guider = "pag in every step"
    return pipe


class Inputs:
    """Of a loop around a bare UNet."""

    def __init__(self, seed: int, names: tuple[str, ...]) -> None:
        self.draw = seeded(seed)
        self.sample = self.draw(2, 4, 8, 8)
        self.masks = [binary(seed=seed + i) for i in range(len(names))]

    def text(self) -> Tensor:
        return self.draw(2, 77, tiny_pipelines.CROSS_ATTENTION_DIM)

    def images(self) -> list[Tensor]:
        """Of "base" and "plus"."""
        return [self.draw(2, 1, tiny_pipelines.IMAGE_EMBED_DIM), self.draw(2, 1, 9, tiny_pipelines.IMAGE_EMBED_DIM)]

    def noise(self, model: Any, time: Any, text: Tensor, images: list[Tensor]) -> Tensor:
        # diffusers empties the dictionary
        attention = {"ip_adapter_masks": self.masks}
        found: Tensor = model(
            self.sample, time, text, added_cond_kwargs={"image_embeds": images}, cross_attention_kwargs=attention
        ).sample
        return found


@torch.no_grad()
def k_diffusion(pipe: Any, names: tuple[str, ...], seed: int) -> Tensor:
    """A noise level for each row, in a tensor of each step's own."""
    inputs = Inputs(seed, names)
    text, images = inputs.text(), inputs.images()
    for sigma in (9.5, 4.25, 1.0):
        inputs.sample = inputs.sample - 0.1 * inputs.noise(pipe.unet, torch.full((2,), sigma), text, images)
    return inputs.sample


@torch.no_grad()
def two_calls(pipe: Any, names: tuple[str, ...], seed: int, *, own_images: bool, timestep: Callable[[int], Any]) -> Tensor:
    """Guidance by a call for the prompt and one for the negative prompt.

    own_images: whether the negative prompt has other images. timestep: from the number of the step.
    """
    inputs = Inputs(seed, names)
    texts, images = [inputs.text(), inputs.text()], [inputs.images()] * 2
    if own_images:
        images[1] = inputs.images()
    for step in range(STEPS):
        time = timestep(step)
        cond, uncond = (inputs.noise(pipe.unet, time, *given) for given in zip(texts, images, strict=True))
        inputs.sample = inputs.sample - 0.1 * (uncond + 5 * (cond - uncond))
    return inputs.sample


TIMES = torch.tensor([900, 600, 300])


def new_tensor(step: int) -> Tensor:
    return torch.full((2,), 1 + step / 4)


@dataclass(frozen=True)
class Case:
    """A pipeline or a loop. steps: calls of the UNet; texts, images: how many tensors of each it passes (per adapter);
    layers: with an adapter; resolutions: of those.
    """

    make: Callable[[], Any]
    run: Callable[[Any, tuple[str, ...], int], Tensor] = drawn
    names: tuple[str, ...] = BOTH
    steps: int = STEPS
    texts: int = 1
    images: int = 1
    layers: int = 4
    resolutions: int = 2

    def enabled(self) -> Any:
        pipe = self.make()
        load(pipe, *self.names)
        return pipe


def of(kind: str, **options: Any) -> Case:
    return Case(lambda: build(kind), **options)


def loop(run: Callable[..., Tensor], **options: Any) -> Case:
    return of("bare-unet", run=run, **options)


CASES: dict[str, Case] = {
    "SD 1.5": of("sd"),
    "SD 1.5, FaceID with its LoRA": of("sd", names=("faceid", "plus-face")),
    "SDXL": of("sdxl", layers=8, resolutions=1),
    "AnimateDiff": of("animatediff"),
    "Kolors": of("kolors", layers=8, resolutions=1),
    "ControlNet": of("controlnet"),
    "PAG": of("pag"),
    # its guider calls the UNet for each condition
    "modular": of("modular", steps=2 * STEPS, texts=2, images=2, layers=8, resolutions=1),
    # in all steps but the first, the prompt's tensors come again, for the perturbed call
    "modular PAG": Case(modular_pag, steps=3 * STEPS - 1, texts=2, images=2, layers=8, resolutions=1),
    # a text tensor for each view in each step
    "Panorama": Case(panorama, drawn_panorama, steps=4 * STEPS, texts=4 * STEPS),
    "k-diffusion": loop(k_diffusion),
    "two calls": loop(
        partial(two_calls, own_images=True, timestep=TIMES.__getitem__), steps=2 * STEPS, texts=2, images=2
    ),
    "two calls with the same images": loop(
        partial(two_calls, own_images=False, timestep=TIMES.__getitem__), steps=2 * STEPS, texts=2
    ),
    "two calls, new timesteps": loop(
        partial(two_calls, own_images=True, timestep=new_tensor), steps=2 * STEPS, texts=2, images=2
    ),
    "two calls with the same images, new timesteps": loop(
        partial(two_calls, own_images=False, timestep=new_tensor), steps=2 * STEPS, texts=2
    ),
}  # fmt: skip


def expected_calls(model: nn.Module, case: Case, texts: int, images: int) -> dict[str, int]:
    """By the name of each linear layer that an IP-Adapter has to do with."""
    places: dict[str, int] = {"encoder_hid_proj.": images, "text_encoder_hid_proj": texts}
    layers = [name.removesuffix(".processor") for name, module in model.named_modules() if hasattr(module, "to_k_ip")]
    assert len(layers) == case.layers
    for layer in layers:
        for part, count in (("q", case.steps), ("out", case.steps), ("k", texts), ("v", texts)):
            places[f"{layer}.to_{part}."] = count
        places |= {f"{layer}.processor.to_{part}_ip.": images for part in "kv"}
    linears = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = {name[:-1]: count for name in linears for place, count in places.items() if name.startswith(place)}
    # to_q, to_out, to_k, to_v and the keys and values of each adapter; a LoRA has more
    assert sum("attn2" in name for name in found) >= case.layers * (4 + 2 * len(case.names))
    return found


def counted(pipe: Any, case: Case, seed: int, texts: int, images: int) -> tuple[Tensor, int]:
    """(what a run returns, how many masks it resized), after a look at the calls of its linear layers."""
    spy = LinearCalls(pipe.unet)
    with spy:
        found = case.run(pipe, case.names, seed)
    expected = expected_calls(pipe.unet, case, texts, images)
    assert {name: spy.calls[name] for name in expected} == expected
    return found, spy.resizes


def checked(case: Case, impl: str) -> None:
    pipe = case.enabled()
    seed = int(torch.randint(1000, ()))
    # the spies count, and each layer's every step
    stock, resizes = counted(pipe, case, seed, case.steps, case.steps)
    assert resizes == case.layers * case.steps * len(case.names)
    ipa_kernels.enable(target(pipe), impl=impl)
    found, resizes = counted(pipe, case, seed, case.texts, case.images)
    report = ipa_kernels.explain(target(pipe))
    assert {layer.impl for layer in report.layers} == {impl}
    assert report.cache_reason == ""
    assert resizes == case.resolutions * len(case.names)
    if impl == "eager":
        assert torch.equal(found, stock)
    else:
        torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_each_projection_is_computed_once_for_each_input(case: Case) -> None:
    checked(case, "eager")


def test_each_projection_is_computed_once_for_the_kernel_too() -> None:
    # little to do: the interpreter is slow
    checked(of("sd", names=("base",), run=partial(drawn, guidance=1.0, size=4)), "triton")


def test_a_second_generation_computes_once_again() -> None:
    """Of new tensors; what the first one left answers for nothing."""
    case = CASES["SD 1.5"]
    pipe = case.enabled()
    ipa_kernels.enable(pipe, impl="eager")
    for seed in (1, 2):
        counted(pipe, case, seed, case.texts, case.images)
