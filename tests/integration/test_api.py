"""enable, disable, accelerated, explain: what the contract says about the switch itself."""

import copy
import gc
import json
import linecache
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0

import ipa_kernels
from ipa_kernels import Report, UnsupportedError
from ipa_kernels.integration.processors import unet as families
from ipa_kernels.kernels import launch as kernel
from ipa_kernels.report import FallbackWarning

from ..helpers.adapters import load
from ..helpers.generate import arguments, generate, traces
from ..helpers.pipelines import build


def classes(pipe: object) -> list[type]:
    return [type(processor) for processor in pipe.unet.attn_processors.values()]


def test_enable_reports_and_disable_leaves_no_trace() -> None:
    pipe = build("sd", ("base",))
    before = classes(pipe)
    report = ipa_kernels.enable(pipe)
    assert report.enabled
    assert report.impl == "auto"
    assert [layer.planned for layer in report.layers] == ["eager"] * before.count(IPAdapterAttnProcessor2_0)
    assert {(layer.impl, layer.calls) for layer in report.layers} == {(None, 0)}
    assert all("device cpu" in layer.reason or "interpreter" in layer.reason for layer in report.layers)
    assert traces(pipe.unet)
    ipa_kernels.disable(pipe)
    assert classes(pipe) == before
    assert not traces(pipe.unet)
    assert not ipa_kernels.explain(pipe).enabled


def test_twice_is_once_and_replaces_the_options() -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    installed = classes(pipe)
    report = ipa_kernels.enable(pipe, impl="eager")
    assert report.impl == "eager"
    assert classes(pipe) == installed
    assert len(pipe.unet._forward_pre_hooks) == 1
    ipa_kernels.disable(pipe)
    ipa_kernels.disable(pipe)
    assert not traces(pipe.unet)


def test_a_bare_unet_is_a_target_and_is_shared_with_its_pipeline() -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe.unet)
    assert ipa_kernels.explain(pipe).enabled
    ipa_kernels.disable(pipe)
    assert not ipa_kernels.explain(pipe.unet).enabled


def test_without_an_adapter_enable_says_so_and_waits() -> None:
    pipe = build("sd")
    report = ipa_kernels.enable(pipe)
    assert not report.layers
    assert "no IP-Adapter is loaded" in str(report)
    generate(pipe)
    load(pipe, "base")
    assert {layer.impl for layer in ipa_kernels.explain(pipe).layers} == {None}
    accelerated = generate(pipe, ("base",))
    report = ipa_kernels.explain(pipe)
    assert report.eager == len(report.layers) > 0
    assert {layer.calls for layer in report.layers} == {2}
    ipa_kernels.disable(pipe)
    assert torch.equal(generate(pipe, ("base",)), accelerated)


def test_a_second_load_and_an_unload_keep_working() -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    generate(pipe, ("base",))
    load(pipe, "plus", "base", seed=7)
    accelerated = generate(pipe, ("plus", "base"))
    assert ipa_kernels.explain(pipe).eager > 0
    pipe.unload_ip_adapter()
    assert not ipa_kernels.explain(pipe).layers
    generate(pipe)
    ipa_kernels.disable(pipe)
    assert set(classes(pipe)) == {AttnProcessor2_0}
    assert torch.equal(generate(build_with(("plus", "base"), seed=7), ("plus", "base")), accelerated)


def build_with(adapters: tuple[str, ...], seed: int) -> object:
    pipe = build("sd")
    load(pipe, *adapters, seed=seed)
    return pipe


def test_processors_put_aside_and_back_are_given_back_too() -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    aside = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    ipa_kernels.disable(pipe)
    assert set(map(type, aside.values())) == {AttnProcessor2_0, IPAdapterAttnProcessor2_0}


@pytest.mark.parametrize(
    ("target", "kind"),
    [(object(), "object"), (None, "NoneType"), (torch.nn.Linear(2, 2), "Linear"), ("sdxl", "str")],
    ids=["object", "None", "Linear", "str"],
)
@pytest.mark.parametrize("function", ["enable", "disable", "explain", "clear_cache"])
def test_an_unknown_target_names_the_known_ones(function: str, target: object, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"target: expected a diffusers pipeline with a UNet .*UNet2DCondition.*got {kind}"):
        getattr(ipa_kernels, function)(target)


def test_a_transformer_is_not_a_known_target() -> None:
    flux = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    with pytest.raises(TypeError, match="got FluxTransformer2DModel"):
        ipa_kernels.enable(flux)


def test_an_unknown_impl_changes_nothing() -> None:
    pipe = build("sd", ("base",))
    with pytest.raises(ValueError, match="impl: expected one of 'auto', 'triton', 'eager', got 'fast'"):
        ipa_kernels.enable(pipe, impl="fast")
    assert not traces(pipe.unet)


def test_demanding_the_kernel_where_it_cannot_run_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    pipe = build("sd", ("base",), torch.float64)
    with pytest.raises(UnsupportedError) as caught:
        ipa_kernels.enable(pipe, impl="triton")
    for reason in ("device cpu: the kernel needs a GPU", "dtype torch.float64", "down_blocks.0"):
        assert reason in str(caught.value)
    assert not traces(pipe.unet)
    ipa_kernels.enable(pipe, impl="eager")
    with pytest.raises(UnsupportedError):
        ipa_kernels.enable(pipe, impl="triton")
    assert ipa_kernels.explain(pipe).impl == "eager"


def test_demanding_the_kernel_never_falls_back_in_a_call() -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe, impl="triton")
    pipe.to(torch.float64)
    with pytest.raises(UnsupportedError, match=r"dtype torch.float64.*computes in"):
        generate(pipe, ("base",))
    unet = build("sd", ("base",)).unet
    ipa_kernels.enable(unet, impl="triton")
    with pytest.raises(UnsupportedError, match="attention_mask"):
        forward(unet, encoder_attention_mask=torch.ones(1, 7))


def test_a_failure_halfway_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("sd", ("base",))
    before = classes(pipe)
    install = families.install
    calls = iter(range(100))

    def fail_at_the_third(*arguments: object) -> object:
        if next(calls) == 2:
            raise MemoryError("out of memory")
        return install(*arguments)

    monkeypatch.setattr(families, "install", fail_at_the_third)
    with pytest.raises(MemoryError):
        ipa_kernels.enable(pipe)
    assert classes(pipe) == before
    assert not traces(pipe.unet)


def test_a_failure_of_the_report_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("CUDA driver went away")

    pipe = build("sd", ("base",))
    ipa_kernels.enable(enabled := build("sd", ("base",)), impl="eager")
    monkeypatch.setattr(families, "layer_plan", fail)
    for target in (pipe, enabled):
        with pytest.raises(RuntimeError, match="went away"):
            ipa_kernels.enable(target)
    monkeypatch.undo()
    assert not traces(pipe.unet)
    assert ipa_kernels.explain(enabled).impl == "eager"


def test_a_refused_call_lists_every_reason_and_what_it_saw() -> None:
    unet = build("sd", ("base",)).unet
    ipa_kernels.enable(unet, impl="triton")
    unet.to(torch.float64)
    latents, text, image = (torch.randn(shape, dtype=torch.float64) for shape in ((1, 4, 8, 8), (1, 7, 64), (1, 1, 32)))
    embeds = {"image_embeds": [image]}
    with pytest.raises(UnsupportedError) as caught:
        unet(latents, 7, text, encoder_attention_mask=torch.ones(1, 7), added_cond_kwargs=embeds)
    for reason in ("hidden_states [1, 64, 32], torch.float64, cpu", "attention_mask", "dtype torch.float64"):
        assert reason in str(caught.value)


def test_accelerated_restores_over_a_disable_and_another_unet() -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe, impl="eager")
    with ipa_kernels.accelerated(pipe):
        ipa_kernels.disable(pipe)
    assert ipa_kernels.explain(pipe).impl == "eager"
    ipa_kernels.disable(pipe)
    unet = pipe.unet

    def abandon() -> None:
        pipe.unet = None
        raise KeyError

    with pytest.raises(KeyError), ipa_kernels.accelerated(pipe):
        abandon()
    assert not traces(unet)


def test_a_copy_of_a_processor_follows_the_unet_it_is_put_into() -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe, impl="eager")
    saved = copy.deepcopy(pipe.unet.attn_processors)
    ipa_kernels.disable(pipe)
    pipe.unet.set_attn_processor(saved)
    ipa_kernels.enable(pipe, impl="triton")
    generate(pipe, ("base",))
    assert ipa_kernels.explain(pipe).triton > 0
    ipa_kernels.disable(pipe)
    assert not traces(pipe.unet)


def test_unusual_input_goes_to_stock_and_is_refused_by_triton() -> None:
    unet = build("sd", ("base",)).unet
    no_tokens = (torch.randn(1, 7, 64), [torch.randn(1, 1, 0, 64)])
    hidden = torch.randn(1, 16, 32)
    attention = unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2")
    with torch.no_grad():
        expected = attention(hidden, encoder_hidden_states=no_tokens)
        ipa_kernels.enable(unet)
        assert torch.equal(attention(hidden, encoder_hidden_states=no_tokens), expected)
        assert attention.processor._ipa_layer.impl == "stock"
        ipa_kernels.enable(unet, impl="triton")
        with pytest.raises(UnsupportedError, match=r"unusual input: image_keys\[0\]: expected at least one token"):
            attention(hidden, encoder_hidden_states=no_tokens)


def test_a_processor_moved_to_another_enabled_unet_stays_with_it() -> None:
    first, second = (build("sd", ("base",)).unet for _ in range(2))
    ipa_kernels.enable(first)
    ipa_kernels.enable(second)
    moved = first.attn_processors
    second.set_attn_processor(dict(moved))
    with torch.no_grad():
        forward(second)
    first.set_attn_processor(AttnProcessor2_0())
    ipa_kernels.disable(first)
    assert ipa_kernels.explain(second).eager == len(ipa_kernels.explain(second).layers) > 0
    ipa_kernels.disable(second)
    assert not traces(second)


def test_an_adapter_loaded_behind_a_compiled_unet_says_that_it_waits() -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    load(pipe, "plus")
    assert all("loaded after enable()" in layer.reason for layer in ipa_kernels.explain(pipe).layers)


def test_accelerated_restores_what_it_found() -> None:
    pipe = build("sd", ("base",))
    with ipa_kernels.accelerated(pipe) as report:
        assert {layer.calls for layer in report.layers} == {0}
        generate(pipe, ("base",))
    assert {layer.calls for layer in report.layers} == {2}, "the report is refreshed on exit"
    assert not traces(pipe.unet)

    ipa_kernels.enable(pipe, impl="eager")
    with ipa_kernels.accelerated(pipe, impl="triton"):
        assert ipa_kernels.explain(pipe).impl == "triton"
    assert ipa_kernels.explain(pipe).impl == "eager"

    ipa_kernels.disable(pipe)
    with pytest.raises(KeyError), ipa_kernels.accelerated(pipe):
        raise KeyError
    assert not traces(pipe.unet)


def test_the_report_is_readable_and_ready_for_json() -> None:
    pipe = build("sdxl", ("base",))
    ipa_kernels.enable(pipe)
    generate(pipe, ("base",))
    report = ipa_kernels.explain(pipe)
    assert isinstance(report, Report)
    names = [layer.name for layer in report.layers]
    assert all(isinstance(pipe.unet.get_submodule(name), Attention) for name in names)
    text = str(report)
    assert f"{len(names)} IP-Adapter layers: 0 triton, {len(names)} eager, 0 stock" in text
    assert text.count("\n") == 2, "layers with the same story share a line, the cache has another"
    decoded = json.loads(json.dumps(report.to_dict()))
    assert decoded["eager"] == len(names)
    assert decoded["layers"][0] == {**vars(report.layers[0])}
    # the image tokens, and the text and the image in each layer: computed in the first step, found in the second
    computed = 1 + 2 * len(names)
    assert decoded["cache"] == {"hits": computed, "misses": computed, "bytes": 0}
    pipe.unet.to(torch.float64)
    assert report.eager == len(names), "a report is a snapshot"


def test_each_reason_warns_once() -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    told = "not used in some or all layers; eager attention runs instead, with stock's result. Why: "
    with pytest.warns(FallbackWarning, match=told) as caught:
        generate(pipe, ("base",))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(pipe, ("base",))
        with ipa_kernels.accelerated(build("sd", ("base",)), impl="eager"):
            generate(pipe, ("base",))


def enable_with_a_foreign_processor(pipe: object) -> None:
    attention = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    attention.set_processor(AttnProcessor2_0())
    with ipa_kernels.accelerated(pipe):
        pass


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe: pipe(**arguments(pipe, ("base",))),
        lambda pipe: forward(pipe.unet),
        enable_with_a_foreign_processor,
    ],
    ids=["pipeline", "UNet", "with-block"],
)
def test_a_warning_points_at_the_line_that_called(call: Callable[[object], object]) -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    with pytest.warns(FallbackWarning) as caught:
        call(pipe)
    line = linecache.getline(caught[0].filename, caught[0].lineno)
    assert caught[0].filename == __file__
    assert any(words in line for words in ("pipe(**arguments", "return unet(latents", "with ipa_kernels.accelerated"))


def test_values_in_a_reason_do_not_make_it_another_one() -> None:
    unet = build("sd", ("base",)).unet
    ipa_kernels.enable(unet)

    class OfTheUser(float):
        """Whoever derives from float may multiply in a way of its own."""

    def run(scale: float) -> None:
        for processor in unet.attn_processors.values():
            if hasattr(processor, "to_k_ip"):
                processor.scale = [OfTheUser(scale)]
        forward(unet)

    with torch.no_grad():
        with pytest.warns(FallbackWarning) as caught:
            run(0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(0.2)
    assert [str(warning.message).split(":")[2].strip() for warning in caught] == ["adapter scale"]


def test_the_environment_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPA_KERNELS_DISABLE", "1")
    pipe = build("sd", ("base",))
    report = ipa_kernels.enable(pipe)
    assert "IPA_KERNELS_DISABLE=1" in str(report)
    assert not traces(pipe.unet)
    monkeypatch.delenv("IPA_KERNELS_DISABLE")
    ipa_kernels.enable(pipe)
    monkeypatch.setenv("IPA_KERNELS_DISABLE", "1")
    with ipa_kernels.accelerated(pipe, impl="triton") as report:
        assert "IPA_KERNELS_DISABLE=1" in report.note
        generate(pipe, ("base",))
    assert "IPA_KERNELS_DISABLE=1" in report.note
    assert {layer.calls for layer in report.layers} == {2}


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))], ids=["deepcopy", "pickle"])
def test_a_copy_stays_enabled_on_its_own(copier: object) -> None:
    pipe = build("sd", ("base",))
    stock = generate(pipe, ("base",))
    ipa_kernels.enable(pipe, impl="eager")
    generate(pipe, ("base",))
    original, pipe.unet = pipe.unet, copier(pipe.unet)
    report = ipa_kernels.explain(pipe)
    assert report.enabled
    assert report.impl == "eager"
    assert {layer.calls for layer in report.layers} == {0}
    assert torch.equal(generate(pipe, ("base",)), stock)
    assert {layer.calls for layer in ipa_kernels.explain(pipe).layers} == {2}
    assert {layer.calls for layer in ipa_kernels.explain(original).layers} == {2}, "the original counts its own calls"
    ipa_kernels.disable(pipe)
    assert not traces(pipe.unet)
    assert ipa_kernels.explain(original).enabled


def test_an_abandoned_unet_is_freed() -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    generate(pipe, ("base",))
    unet = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert unet() is None


def forward(unet: object, text: object = None, **options: object) -> torch.Tensor:
    """One step of a UNet, as a training loop calls it."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(1, 7, 64, generator=generator)
    embeds = [torch.randn(1, 1, 32, generator=generator)]
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    return unet(latents, 7, tokens, added_cond_kwargs={"image_embeds": embeds}, **options).sample


def test_an_attention_mask_goes_through_stock() -> None:
    unet = build("sd", ("base",)).unet
    mask = torch.ones(1, 7)
    mask[:, 4:] = 0
    with torch.no_grad():
        expected = forward(unet, encoder_attention_mask=mask)
        ipa_kernels.enable(unet)
        assert torch.equal(forward(unet, encoder_attention_mask=mask), expected)
        assert not torch.equal(forward(unet), expected)
    ipa_kernels.disable(unet)


def test_an_adapter_of_scale_zero_is_not_even_projected() -> None:
    pipe = build("sd", ("base", "plus"))
    pipe.set_ip_adapter_scale([0.0, 0.5])
    ipa_kernels.enable(pipe)
    projected: list[str] = []
    for name, module in pipe.unet.named_modules():
        if "_ip." in name:
            module.register_forward_hook(lambda *arguments, name=name: projected.append(name))
    generate(pipe, ("base", "plus"))
    assert {name.rsplit(".", 1)[1] for name in projected} == {"1"}


@pytest.mark.parametrize("target", [lambda pipe: pipe, lambda pipe: pipe.unet], ids=["pipeline", "UNet"])
def test_clear_cache_counts_from_zero_again_and_leaves_the_rest(target: Callable[[Any], Any]) -> None:
    pipe = build("sd", ("base",))
    before = {name: dict(vars(module)) for name, module in pipe.unet.named_modules()}
    ipa_kernels.clear_cache(target(pipe))
    assert {name: dict(vars(module)) for name, module in pipe.unet.named_modules()} == before, "it is not enabled"
    with torch.no_grad():
        expected = forward(pipe.unet)
        ipa_kernels.enable(pipe)
        forward(pipe.unet)
        assert ipa_kernels.explain(pipe).cache.misses > 0
        ipa_kernels.clear_cache(target(pipe))
        report = ipa_kernels.explain(pipe)
        assert (report.cache.hits, report.cache.misses, report.cache.bytes) == (0, 0, 0)
        assert report.enabled
        assert torch.equal(forward(pipe.unet), expected)
        assert ipa_kernels.explain(pipe).cache.misses > 0
