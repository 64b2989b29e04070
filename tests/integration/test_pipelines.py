"""What the matrix has no column for: sizes, dtypes, wrong input, the oldest processor class, guiders."""

from typing import Any

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeZeroStarGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.hooks import SmoothedEnergyGuidanceConfig
from diffusers.models.attention_processor import IPAdapterAttnProcessor

import ipa_kernels

from ..helpers import own
from ..helpers.controls import CONTROLS, Control, binary
from ..helpers.generate import generate, outcome, same, target
from ..helpers.pipelines import build


@pytest.mark.parametrize("size", [12, 20], ids=lambda size: f"{size}x{size} latents")
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_sizes_that_no_tile_divides(kind: str, size: int) -> None:
    control = CONTROLS["masks for two images"]
    pipe = build(kind, ("base", "plus"))
    stock = generate(pipe, ("base", "plus"), control, size=size)
    with ipa_kernels.accelerated(pipe):
        assert torch.equal(generate(pipe, ("base", "plus"), control, size=size), stock)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["sd", "sdxl", "animatediff"])
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    control = CONTROLS["soft overlapping masks"]
    pipe = build(kind, ("base", "plus"), dtype)
    stock = generate(pipe, ("base", "plus"), control)
    with ipa_kernels.accelerated(pipe) as report:
        assert torch.equal(generate(pipe, ("base", "plus"), control), stock)
    assert report.eager == len(report.layers) > 0


def test_a_picture_with_its_decoder() -> None:
    pipe = build("sd", ("plus",))
    stock = generate(pipe, ("plus",), output_type="pt")
    with ipa_kernels.accelerated(pipe):
        assert torch.equal(generate(pipe, ("plus",), output_type="pt"), stock)


def test_autocast() -> None:
    pipe = build("sd", ("plus",))
    with torch.autocast("cpu", torch.bfloat16):
        stock = generate(pipe, ("plus",))
        with ipa_kernels.accelerated(pipe) as report:
            assert torch.equal(generate(pipe, ("plus",)), stock)
    assert report.eager == len(report.layers) > 0


def test_blocks_and_layers_of_one_pipeline_by_instantstyle() -> None:
    pipe = build("sdxl", ("plus",))
    pipe.set_ip_adapter_scale({"down": {"block_1": 0.3}, "up": {"block_0": [0.0, 1.2]}})
    stock = generate(pipe, ("plus",))
    with ipa_kernels.accelerated(pipe):
        assert torch.equal(generate(pipe, ("plus",)), stock)
    pipe.set_ip_adapter_scale({"up": {"block_0": [1.2, 0.0]}})
    assert not torch.equal(generate(pipe, ("plus",)), stock)


def test_a_mask_of_another_aspect_ratio_warns_as_stock_does() -> None:
    control = CONTROLS["masks of another aspect ratio"]
    pipe = build("sd", ("base",))
    with pytest.warns(UserWarning, match="aspect ratio of the mask"):
        stock = generate(pipe, ("base",), control)
    with ipa_kernels.accelerated(pipe), pytest.warns(UserWarning, match="aspect ratio of the mask"):
        assert torch.equal(generate(pipe, ("base",), control), stock)


WRONG = {
    "masks in a tuple": (Control(masks=lambda n, rows: (binary(),)), [0.7]),
    "masks of 5": (Control(masks=lambda n, rows: 5), [0.7]),
    "masks of 5 in a list": (Control(masks=lambda n, rows: [5]), [0.7]),
    "masks in a tensor of three dimensions": (Control(masks=lambda n, rows: binary()[0]), [0.7]),
    "masks of three rows": (Control(masks=lambda n, rows: [binary(rows=3)]), [0.7]),
    "scale of None": (Control(), [None]),
    "scale in a string": (Control(), ["1"]),
    "no scale": (Control(), []),
    "a bare number": (Control(), 0.5),
    "three scales for two images": (Control(images=2, masks=lambda n, rows: [binary(2)]), [[0.1, 0.2, 0.3]]),
}


@pytest.mark.parametrize("name", WRONG)
def test_where_stock_raises_enabled_raises_the_same(name: str) -> None:
    control, scale = WRONG[name]
    pipe = build("sd", ("base",))
    set_scale(pipe, scale)
    stock = outcome(pipe, ("base",), control)
    ipa_kernels.enable(pipe)
    enabled = outcome(pipe, ("base",), control)
    assert same(enabled, stock), f"{enabled}, stock {stock}"


@pytest.mark.parametrize("masks", [torch.stack([binary(seed=i) for i in range(2)])], ids=["[adapters, 1, 1, H, W]"])
def test_masks_in_one_tensor(masks: torch.Tensor) -> None:
    control = Control(masks=lambda n, rows: masks[:, 0])
    pipe = build("sd", ("base", "plus"))
    stock = generate(pipe, ("base", "plus"), control)
    with ipa_kernels.accelerated(pipe) as report:
        assert torch.equal(generate(pipe, ("base", "plus"), control), stock)
    assert {layer.impl for layer in report.layers} == {"stock"}


def test_the_oldest_processor_class_runs_the_kernel_or_stock() -> None:
    pipe = build("sd", ("plus",))
    for name, processor in pipe.unet.attn_processors.items():
        if name.endswith("attn2.processor"):
            old = IPAdapterAttnProcessor(processor.hidden_size, processor.cross_attention_dim, (16,), 0.7)
            old.load_state_dict(processor.state_dict())
            pipe.unet.get_submodule(name.removesuffix(".processor")).set_processor(old)
    stock = generate(pipe, ("plus",))
    with ipa_kernels.accelerated(pipe) as report:
        assert torch.equal(generate(pipe, ("plus",)), stock)
    assert report.stock == len(report.layers)
    with ipa_kernels.accelerated(pipe, impl="triton") as report:
        actual = generate(pipe, ("plus",))
    assert report.triton == len(report.layers)
    torch.testing.assert_close(actual, stock, rtol=1e-4, atol=1e-5)


GUIDERS = {
    "adaptive projected": lambda scale: AdaptiveProjectedGuidance(guidance_scale=scale),
    "zero star": lambda scale: ClassifierFreeZeroStarGuidance(guidance_scale=scale),
    "tangential": lambda scale: TangentialClassifierFreeGuidance(guidance_scale=scale),
    "smoothed energy": lambda scale: SmoothedEnergyGuidance(
        guidance_scale=scale,
        seg_guidance_config=SmoothedEnergyGuidanceConfig(indices=[0], fqn="mid_block.attentions.0.transformer_blocks"),
    ),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_every_guider_of_the_modular_pipeline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(own.GUIDERS, "cfg", GUIDERS[name])
    pipe = build("modular", ("plus",))
    stock = generate(pipe, ("plus",))
    with ipa_kernels.accelerated(target(pipe)) as report:
        assert torch.equal(generate(pipe, ("plus",)), stock)
    assert report.eager == len(report.layers) > 0


def set_scale(pipe: Any, scale: Any) -> None:
    """As a script that writes to the processors: `set_ip_adapter_scale` refuses some of these itself."""
    for processor in pipe.unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = scale
