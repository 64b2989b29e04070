"""Training with an enabled UNet: its gradients are stock's, bit for bit where eager attention runs."""

import itertools
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from peft import LoraConfig
from torch import Tensor

import ipa_kernels
from ipa_kernels.integration.processors import unet as processors
from ipa_kernels.testing import tiny_pipelines

from ..helpers.pipelines import build

Gradients = dict[str, Tensor]


def step(unet: Any, adapters: int = 1, *, images: int = 1, masks: Any = None) -> Gradients:
    """The gradients of one training step, by parameter."""
    random = torch.Generator().manual_seed(2)
    text = torch.randn(1, 7, tiny_pipelines.CROSS_ATTENTION_DIM, generator=random)
    embeds = [torch.randn(1, images, tiny_pipelines.IMAGE_EMBED_DIM, generator=random) for _ in range(adapters)]
    noise = torch.randn(1, 4, 8, 8, generator=random)
    options = {} if masks is None else {"cross_attention_kwargs": {"ip_adapter_masks": masks}}
    unet.zero_grad(set_to_none=True)
    out = unet(noise, 7, text, added_cond_kwargs={"image_embeds": embeds}, **options).sample
    (out.float() - 1).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in unet.named_parameters() if parameter.grad is not None}


def only_adapters(unet: Any) -> None:
    """Train what IP-Adapter training trains: the projections of the image, and those of its keys and values."""
    unet.requires_grad_(False)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("_ip." in name or name.startswith("encoder_hid_proj"))


def assert_equal(actual: Gradients, expected: Gradients) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def assert_close(actual: Gradients, expected: Gradients, tolerance: float = 2e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        distance = (actual[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert distance < tolerance, f"{name}: {float(distance):.1e}"


def impls(unet: Any) -> set[str | None]:
    """What the layers ran."""
    return {layer.impl for layer in ipa_kernels.explain(unet).layers}


def mask(images: int = 1) -> Tensor:
    return torch.rand(1, images, 16, 16, generator=torch.Generator().manual_seed(3))


SETTINGS: dict[str, dict[str, Any]] = {
    "one adapter": {},
    "two adapters": {"adapters": 2},
    "two adapters, masked": {"adapters": 2, "masks": [mask(), mask()]},
    "two images, masked": {"images": 2, "masks": [mask(2)]},
    "two images in one softmax": {"images": 2},
}


@pytest.mark.parametrize(
    ("setting", "impl"),
    [*((setting, "eager") for setting in SETTINGS), ("two adapters, masked", "triton"), ("two images, masked", "triton")],
)
def test_gradients_are_stocks(setting: str, impl: str) -> None:
    options = SETTINGS[setting]
    unet = build("sd", ("base",) * options.get("adapters", 1)).unet
    only_adapters(unet)
    expected = step(unet, **options)
    assert all(("_ip." in name) or name.startswith("encoder_hid_proj") for name in expected)
    ipa_kernels.enable(unet, impl=impl)
    (assert_equal if impl == "eager" else assert_close)(step(unet, **options), expected)
    assert impls(unet) == {impl}
    assert ipa_kernels.explain(unet).cache.bytes == 0


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_every_parameter_of_the_unet(impl: str) -> None:
    unet = build("sd", ("base",)).unet
    expected = step(unet)
    ipa_kernels.enable(unet, impl=impl)
    (assert_equal if impl == "auto" else assert_close)(step(unet), expected)


def test_a_scale_of_zero_trains_nothing() -> None:
    pipe = build("sd", ("base", "base"))
    pipe.set_ip_adapter_scale([0.0, 0.7])
    only_adapters(pipe.unet)
    expected = step(pipe.unet, adapters=2)
    ipa_kernels.enable(pipe.unet, impl="triton")
    assert_close(step(pipe.unet, adapters=2), expected)


def test_the_older_class_trains_in_stock_and_in_the_kernel() -> None:
    unet = build("sd", ("base",)).unet
    for module in unet.modules():
        if type(module) is stock.IPAdapterAttnProcessor2_0:
            module.__class__ = stock.IPAdapterAttnProcessor
    expected = step(unet)
    ipa_kernels.enable(unet, impl="eager")
    assert_equal(step(unet), expected)
    assert impls(unet) == {"stock"}
    ipa_kernels.enable(unet, impl="triton")
    assert_close(step(unet), expected)
    assert impls(unet) == {"triton"}


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_lora_on_all_projections(impl: str) -> None:
    unet = build("sd", ("base",)).unet
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_k_ip.0", "to_v_ip.0"], init_lora_weights=False)
    )
    expected = step(unet)
    assert any("to_k_ip" in name for name in expected)
    assert any("attn2.to_k.lora" in name for name in expected)
    ipa_kernels.enable(unet, impl=impl)
    (assert_equal if impl == "eager" else assert_close)(step(unet), expected)
    assert impls(unet) == {impl}


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_hooks_of_projections_take_part(impl: str) -> None:
    unet = build("sd", ("base",)).unet
    only_adapters(unet)
    seen: list[Tensor] = []
    for module in unet.modules():
        if isinstance(module, stock.IPAdapterAttnProcessor2_0):
            module.to_v_ip[0].register_forward_hook(lambda module, inputs, output: output * 3)
            module.to_k_ip[0].register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    expected, passed = step(unet), len(seen)
    ipa_kernels.enable(unet, impl=impl)
    (assert_equal if impl == "eager" else assert_close)(step(unet), expected)
    assert len(seen) == 2 * passed > 0


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_gradient_checkpointing(impl: str) -> None:
    unet = build("sd", ("base",)).unet
    only_adapters(unet)
    ipa_kernels.enable(unet, impl=impl)
    unet.train()
    expected = step(unet)
    calls = ipa_kernels.explain(unet).layers[0].calls
    unet.enable_gradient_checkpointing()
    assert_equal(step(unet), expected)
    assert ipa_kernels.explain(unet).layers[0].calls == 3 * calls, "run once more for the backward"


@pytest.mark.parametrize(
    ("impl", "dtype"), [("auto", torch.bfloat16), ("auto", torch.float16), ("triton", torch.float16)], ids=str
)
def test_autocast(impl: str, dtype: torch.dtype) -> None:
    unet = build("sd", ("base",)).unet
    only_adapters(unet)
    exact = step(unet)
    with torch.autocast("cpu", dtype):
        expected = step(unet)
        ipa_kernels.enable(unet, impl=impl)
        actual = step(unet)
    if impl == "auto":
        return assert_equal(actual, expected)
    # no farther from float32 than stock under autocast
    for name, gradient in exact.items():
        assert actual[name].dtype == torch.float32
        assert (actual[name] - gradient).norm() <= 1.5 * (expected[name] - gradient).norm(), name


def test_steps_without_grad_in_between_use_the_caches_and_change_nothing() -> None:
    unet = build("sd", ("base",)).unet
    only_adapters(unet)
    ipa_kernels.enable(unet, impl="triton")
    expected = step(unet)
    text, embeds = torch.randn(1, 7, tiny_pipelines.CROSS_ATTENTION_DIM), [torch.randn(1, 1, tiny_pipelines.IMAGE_EMBED_DIM)]
    with torch.no_grad():
        for timestep in (2, 1):
            unet(torch.ones(1, 4, 8, 8), timestep, text, added_cond_kwargs={"image_embeds": embeds})
    cache = ipa_kernels.explain(unet).cache
    assert cache.hits > 0
    assert_equal(step(unet), expected)
    assert ipa_kernels.explain(unet).cache.hits == cache.hits


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_a_layer_trains_whichever_input_needs_it(needs: tuple[bool, bool, bool]) -> None:
    """Hidden states, text and image tokens, with frozen weights."""
    torch.manual_seed(0)
    attention = Attention(32, cross_attention_dim=24, heads=2, dim_head=16).requires_grad_(False)
    processor = IPAdapterAttnProcessor2_0(32, 24, [4], [0.6]).requires_grad_(False)
    attention.set_processor(processor)
    tensors = [torch.randn(2, 9, 32), torch.randn(2, 7, 24), torch.randn(2, 1, 4, 24)]
    leaves = [tensor.requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]

    def run() -> list[Tensor]:
        out = attention(leaves[0], encoder_hidden_states=(leaves[1], [leaves[2]]))
        return list(torch.autograd.grad(out.square().sum(), [leaf for leaf in leaves if leaf.requires_grad]))

    expected = run()
    for impl, check in (("eager", torch.equal), ("triton", lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-5))):
        processors.install(processor, "layer", processors.ModelContext(impl, cache=True), [])
        assert all(check(actual, gradient) for actual, gradient in zip(run(), expected, strict=True))
        assert processor._ipa_layer.impl == impl


@pytest.mark.parametrize("impl", [pytest.param("auto", marks=pytest.mark.slow), "triton"])
def test_in_a_compiled_graph(impl: str) -> None:
    """The kernel and its backward are one op each; the eager twin is differentiated by the compiler."""
    torch._dynamo.reset()
    ours, theirs = build("sd", ("base", "plus")), build("sd", ("base", "plus"))
    for pipe in (ours, theirs):
        only_adapters(pipe.unet)
    ipa_kernels.enable(ours, impl=impl)
    compiled = torch.compile(ours.unet, fullgraph=True, backend="aot_eager")
    embeds = [torch.randn(1, 1, tiny_pipelines.IMAGE_EMBED_DIM), torch.randn(1, 1, 9, tiny_pipelines.IMAGE_EMBED_DIM)]
    noise, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, tiny_pipelines.CROSS_ATTENTION_DIM)
    gradients = []
    for unet, called in ((ours.unet, compiled), (theirs.unet, theirs.unet)):
        called(noise, 7, text, added_cond_kwargs={"image_embeds": embeds}).sample.square().mean().backward()
        named = unet.named_parameters()
        gradients.append({name: parameter.grad for name, parameter in named if parameter.grad is not None})
    assert_close(*gradients)
    assert impls(ours.unet) == {"eager" if impl == "auto" else "triton"}
    torch._dynamo.reset()
