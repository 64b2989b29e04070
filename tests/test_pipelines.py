"""Whole pipelines against stock diffusers: bit for bit on the eager path, within the error budget through the kernel."""

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor

import ipa_kernels
from ipa_kernels import reference

from .pipelines import build, picture, random_masks

SETS = [("base",), ("plus",), ("base", "plus")]


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("adapters", SETS, ids="+".join)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_enabled_is_stock_bit_for_bit(kind: str, adapters: tuple[str, ...], masked: bool) -> None:
    pipe = build(kind, adapters)
    options = {"masks": random_masks(adapters)} if masked else {}
    before = {name: (processor, type(processor)) for name, processor in pipe.unet.attn_processors.items()}
    parameters = dict(pipe.unet.named_parameters())
    keys = list(pipe.unet.state_dict())
    stock = picture(pipe, adapters, **options)

    ipa_kernels.enable(pipe)
    accelerated = picture(pipe, adapters, **options)
    report = ipa_kernels.explain(pipe)
    assert torch.equal(accelerated, stock)
    assert report.eager == len(report.layers) > 0, str(report)
    assert {layer.calls for layer in report.layers} == {3}
    assert list(pipe.unet.state_dict()) == keys

    ipa_kernels.disable(pipe)
    after = {name: (processor, type(processor)) for name, processor in pipe.unet.attn_processors.items()}
    assert after == before
    assert all(after[name][0] is before[name][0] for name in before)
    assert all(parameters[name] is parameter for name, parameter in pipe.unet.named_parameters())
    assert list(pipe.unet.state_dict()) == keys
    assert torch.equal(picture(pipe, adapters, **options), stock)

    # the adapter matters: without it the comparison above would prove nothing
    pipe.set_ip_adapter_scale([0.0] * len(adapters))
    assert not torch.equal(picture(pipe, adapters, **options), stock)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("adapters", SETS, ids="+".join)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_kernels_pictures_are_within_the_budget(kind: str, adapters: tuple[str, ...], masked: bool) -> None:
    # 8×8 latents: one program of the interpreter for each head
    options = {"size": 8, **({"masks": random_masks(adapters)} if masked else {})}
    pipe = build(kind, adapters)
    stock = picture(pipe, adapters, **options)
    with ipa_kernels.accelerated(pipe, impl="triton") as report:
        actual = picture(pipe, adapters, **options)
    truth = picture(build(kind, adapters, torch.float64), adapters, **options)
    assert report.triton == len(report.layers) > 0, str(report)
    assert not torch.equal(actual, stock), "the kernel did not run"
    result = reference.compare(actual, stock, truth.double())
    assert result.within, str(result)


CONTROLS = {
    "three images in one softmax": ({"images": 3}, [0.7]),
    "masks for three images, a scale each": ({"images": 3, "mask_images": 3}, [[0.5, 0.0, -1.0]]),
    "masks for three images, one scale": ({"images": 3, "mask_images": 3}, [0.5]),
    "negative scale": ({}, [-0.5]),
    "integer scale": ({}, [1]),
    "scale 0": ({}, [0.0]),
    "scale 42": ({}, [42.0]),
    "per layer": ({}, {"up": {"block_1": [0.0, 1.0]}}),
    "no guidance": ({"guidance": 1.0}, [0.7]),
    "odd size": ({"size": 14}, [0.7]),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_are_stock_bit_for_bit(name: str) -> None:
    options, scales = CONTROLS[name]
    options = dict(options)
    pipe = build("sd", ("plus",))
    if "mask_images" in options:
        options["masks"] = random_masks(("plus",), options.pop("mask_images"))
    set_scales(pipe, scales)
    stock = picture(pipe, ("plus",), **options)
    with ipa_kernels.accelerated(pipe) as report:
        assert torch.equal(picture(pipe, ("plus",), **options), stock)
    assert report.stock == 0, str(report)


def test_one_adapter_masked_and_one_not() -> None:
    adapters = ("base", "plus")
    pipe = build("sd", adapters)
    masks = [None, *random_masks(("plus",))]
    stock = picture(pipe, adapters, masks=masks)
    with ipa_kernels.accelerated(pipe):
        assert torch.equal(picture(pipe, adapters, masks=masks), stock)


def test_a_mask_of_another_aspect_ratio_warns_as_stock_does() -> None:
    pipe = build("sd", ("base",))
    masks = [torch.rand(1, 1, 24, 31)]
    with pytest.warns(UserWarning, match="aspect ratio of the mask"):
        stock = picture(pipe, ("base",), masks=masks)
    with ipa_kernels.accelerated(pipe), pytest.warns(UserWarning, match="aspect ratio of the mask"):
        assert torch.equal(picture(pipe, ("base",), masks=masks), stock)


WRONG = {
    "number of masks": {"masks": random_masks(("base", "base"))},
    "number of images": {"masks": random_masks(("base",), 2)},
    "rank of a mask": {"masks": [torch.rand(24, 24)]},
    "scales per image without masks": {"scales": [[0.5, 0.5]]},
    "scale of None": {"scales": [None]},
    "masks in a tuple": {"masks": tuple(random_masks(("base",)))},
    "masks of 5": {"masks": 5},
}


@pytest.mark.parametrize("name", WRONG)
def test_where_stock_raises_enabled_raises_the_same(name: str) -> None:
    options = dict(WRONG[name])
    pipe = build("sd", ("base",))
    set_scales(pipe, options.pop("scales", [0.7]))
    with pytest.raises(Exception) as stock:  # noqa: PT011 (whatever stock raises)
        picture(pipe, ("base",), **options)
    ipa_kernels.enable(pipe)
    with pytest.raises(type(stock.value)) as enabled:
        picture(pipe, ("base",), **options)
    assert str(enabled.value) == str(stock.value)


def test_a_scale_changed_in_the_middle_of_a_generation() -> None:
    def cut_off(pipe: object, step: int, timestep: int, tensors: dict) -> dict:
        if step == 1:
            pipe.set_ip_adapter_scale(0.0)
        return tensors

    pipe = build("sd", ("plus",))
    stock = picture(pipe, ("plus",), callback_on_step_end=cut_off)
    pipe.set_ip_adapter_scale(0.7)
    ipa_kernels.enable(pipe)
    assert torch.equal(picture(pipe, ("plus",), callback_on_step_end=cut_off), stock)


def test_the_oldest_processor_class_runs_the_kernel_or_stock() -> None:
    pipe = build("sd", ("plus",))
    for name, processor in pipe.unet.attn_processors.items():
        if name.endswith("attn2.processor"):
            old = IPAdapterAttnProcessor(processor.hidden_size, processor.cross_attention_dim, (16,), 0.7)
            old.load_state_dict(processor.state_dict())
            pipe.unet.get_submodule(name.removesuffix(".processor")).set_processor(old)
    stock = picture(pipe, ("plus",))
    with ipa_kernels.accelerated(pipe) as report:
        assert torch.equal(picture(pipe, ("plus",)), stock)
    assert report.stock == len(report.layers)
    with ipa_kernels.accelerated(pipe, impl="triton") as report:
        actual = picture(pipe, ("plus",), size=8)
    assert report.triton == len(report.layers)
    torch.testing.assert_close(actual, picture(pipe, ("plus",), size=8), rtol=1e-4, atol=1e-5)


def set_scales(pipe: object, scales: object) -> None:
    """As `set_ip_adapter_scale`, which refuses some of the values that a test wants to see refused later."""
    if isinstance(scales, dict):
        pipe.set_ip_adapter_scale(scales)
        return
    for processor in pipe.unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = list(scales)
