"""What diffusers' own IP-Adapter tests check, with `enable` called before or after every load.

The originals are not in the wheel: `TestUNet2DConditionIPAdapter` of tests/models/unets/test_models_unet_2d_condition.py, and
the two `IPAdapterTesterMixin` of tests/pipelines. Like them, these tests know diffusers' names and nothing of ipa_kernels.
"""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import UNet2DConditionLoadersMixin
from torch import Tensor

import ipa_kernels
from ipa_kernels.testing import tiny_pipelines

from ..helpers.adapters import CHECKPOINTS, load
from ..helpers.controls import Control, binary
from ..helpers.generate import generate
from ..helpers.pipelines import KINDS, build, unet


@pytest.fixture(autouse=True, params=["before", "after"])
def enabled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`enable` on every UNet, before or after every load."""
    original = UNet2DConditionLoadersMixin._load_ip_adapter_weights

    def loading(self: Any, *arguments: Any, **options: Any) -> None:
        if request.param == "before":
            ipa_kernels.enable(self)
        original(self, *arguments, **options)
        if request.param == "after":
            ipa_kernels.enable(self)

    monkeypatch.setattr(UNet2DConditionLoadersMixin, "_load_ip_adapter_weights", loading)


def predict(model: UNet2DConditionModel, embeds: list[Tensor] | None = None, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 77, tiny_pipelines.CROSS_ATTENTION_DIM, generator=generator)
    added = {} if embeds is None else {"added_cond_kwargs": {"image_embeds": embeds}}
    with torch.no_grad():
        return model(sample, 10, text, **added, **options).sample


def cross_attention_processors(model: UNet2DConditionModel) -> list[Any]:
    return [p for name, p in model.attn_processors.items() if name.endswith("attn2.processor")]


def set_scale(model: UNet2DConditionModel, scale: list[int]) -> None:
    for processor in cross_attention_processors(model):
        assert type(processor).__name__ in ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0")
        processor.scale = scale


def test_load_ip_adapter() -> None:
    model = unet()
    model._load_ip_adapter_weights([tiny_pipelines.base_adapter(model)])
    assert model.config.encoder_hid_dim_type == "ip_image_proj"
    assert model.encoder_hid_proj is not None
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    assert block.attn2.processor.__class__.__name__ in ("IPAdapterAttnProcessor2_0", "IPAdapterAttnProcessor")


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_ip_adapter(kind: str) -> None:
    model = unet()
    plain = predict(model)
    first, second = (CHECKPOINTS[kind](model, seed) for seed in range(2))
    second["ip_adapter"] = {name: 2 * weight for name, weight in second["ip_adapter"].items()}
    shape = (2, 1, tiny_pipelines.IMAGE_EMBED_DIM) if kind == "base" else (2, 1, 9, tiny_pipelines.IMAGE_EMBED_DIM)
    embeds = torch.randn(shape, generator=torch.Generator().manual_seed(5))

    model._load_ip_adapter_weights([first])
    assert model.config.encoder_hid_dim_type == "ip_image_proj"
    with_first = predict(model, [embeds])
    model._load_ip_adapter_weights([second])
    with_second = predict(model, [embeds])
    model._load_ip_adapter_weights([first, second])
    set_scale(model, [1, 0])
    first_of_both = predict(model, [embeds, embeds])
    set_scale(model, [0, 1])
    second_of_both = predict(model, [embeds, embeds])
    model._load_ip_adapter_weights([first])
    set_scale(model, [1])
    first_again = predict(model, [embeds])

    assert not torch.allclose(plain, with_first, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(with_first, with_second, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(first_again, with_first, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(first_of_both, with_first, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second_of_both, with_second, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "names", [("base",), ("base", "light"), ("plus", "plus-face"), ("faceid",), ("faceid", "base")], ids="+".join
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_with_scale_0_and_scale_42(kind: str, names: tuple[str, ...]) -> None:
    pipe = build(kind)
    plain = generate(pipe)
    load(pipe, *names)
    pipe.set_ip_adapter_scale([0.0] * len(names))
    without = generate(pipe, names)
    pipe.set_ip_adapter_scale([42.0] * len(names))
    strong = generate(pipe, names)
    if "faceid" not in names:  # its LoRA works at scale 0 too
        torch.testing.assert_close(without, plain, atol=5e-4, rtol=5e-4)
    assert (strong - without).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["sd", "sdxl", "kolors", "animatediff", "controlnet", "pag"])
def test_a_pipeline_with_and_without_guidance(kind: str) -> None:
    pipe = build(kind, ("base",))
    pipe.set_ip_adapter_scale(1.0)
    alone = generate(pipe, ("base",), Control(guidance=1.0))
    guided = generate(pipe, ("base",), Control(guidance=2.0))
    assert alone.shape == guided.shape
    assert not torch.allclose(alone, guided)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_with_masks(kind: str) -> None:
    control = Control(masks=lambda n, rows: [binary()] * n)
    pipe = build(kind, ("base",))
    pipe.set_ip_adapter_scale(0.0)
    without = generate(pipe, ("base",), control)
    pipe.set_ip_adapter_scale(42.0)
    masked = generate(pipe, ("base",), control)
    everywhere = generate(pipe, ("base",))
    assert (masked - without).abs().max() > 1e-2
    assert (masked - everywhere).abs().max() > 1e-2


def test_the_tests_above_run_enabled() -> None:
    pipe = build("sd", ("base",))
    generate(pipe, ("base",))
    report = ipa_kernels.explain(pipe)
    assert report.enabled
    assert report.eager == len(report.layers) > 0
