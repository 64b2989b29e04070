"""Processors of IP-Adapters that diffusers did not load: named in the report, refused where the kernel is demanded."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

import ipa_kernels
from ipa_kernels import FallbackWarning, UnsupportedError
from ipa_kernels.testing import tiny_pipelines

from ..helpers.adapters import seeded
from ..helpers.generate import generate, traces
from ..helpers.pipelines import build

TOKENS = 4


class IPAttnProcessor2_0(nn.Module):
    """As tencent-ailab/IP-Adapter has it, and InstantID: image tokens at the end of one tensor, one Linear for each of keys and
    values.
    """

    def __init__(self, hidden_size: int, cross_attention_dim: int, scale: float = 0.7) -> None:
        super().__init__()
        self.scale = scale
        self.num_tokens = TOKENS
        self.to_k_ip = nn.Linear(cross_attention_dim, hidden_size, bias=False)
        self.to_v_ip = nn.Linear(cross_attention_dim, hidden_size, bias=False)

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Any = None, temb: Any = None
    ) -> Tensor:
        text, image = encoder_hidden_states[:, :-TOKENS], encoder_hidden_states[:, -TOKENS:]

        def heads(states: Tensor) -> Tensor:
            return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        out = F.scaled_dot_product_attention(query, heads(attn.to_k(text)), heads(attn.to_v(text)))
        image = F.scaled_dot_product_attention(query, heads(self.to_k_ip(image)), heads(self.to_v_ip(image)))
        merged = (out + self.scale * image).transpose(1, 2).flatten(-2)
        found: Tensor = attn.to_out[1](attn.to_out[0](merged))
        return found


class InstantIDProcessor(IPAttnProcessor2_0):
    """A name that says nothing."""


class IPAttnProcessorOfOthers(nn.Module):
    """Keeps its projections under other names."""

    def __init__(self, hidden_size: int, cross_attention_dim: int) -> None:
        super().__init__()
        self.inner = IPAttnProcessor2_0(hidden_size, cross_attention_dim)

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        found: Tensor = self.inner(*arguments, **options)
        return found


class KeepsAttentionMaps:
    """A processor of a user's, without an adapter. "IP" is in many names: SkIPs, CLIP."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **options: Any) -> Tensor:
        found: Tensor = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states)
        return found


class CLIPGuidedProcessor(KeepsAttentionMaps):
    pass


def with_processors(kind: Any) -> Any:
    """A UNet in which each cross-attention has one of these; no adapter was loaded by diffusers."""
    torch.manual_seed(3)
    pipe = build("bare-unet")
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):
            takes_sizes = issubclass(kind, nn.Module)
            module.set_processor(kind(module.inner_dim, module.cross_attention_dim) if takes_sizes else kind())
    return pipe


def picture(pipe: Any, tokens: int) -> Tensor:
    draw = seeded(1)
    text = draw(2, 77 + tokens, tiny_pipelines.CROSS_ATTENTION_DIM)
    with torch.no_grad():
        found: Tensor = pipe.unet(draw(2, 4, 8, 8), 5, text).sample
    return found


FOREIGN = [IPAttnProcessor2_0, InstantIDProcessor, IPAttnProcessorOfOthers]


@pytest.mark.parametrize("kind", FOREIGN)
def test_processors_from_elsewhere_are_named(kind: type) -> None:
    pipe = with_processors(kind)
    expected = picture(pipe, TOKENS)
    with pytest.warns(FallbackWarning, match=rf"processor {kind.__name__}: .*load_ip_adapter") as caught:
        report = ipa_kernels.enable(pipe.unet)
    assert len([one for one in caught if one.category is FallbackWarning]) == 1
    assert (len(report.layers), report.stock) == (4, 4)
    assert report.note == ""
    assert all(kind.__name__ in layer.reason for layer in report.layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert torch.equal(picture(pipe, TOKENS), expected)
    ipa_kernels.disable(pipe.unet)
    assert not traces(pipe.unet)
    # not enabled, it is told all the same
    assert len(ipa_kernels.explain(pipe.unet).layers) == 4


@pytest.mark.parametrize("kind", FOREIGN)
def test_processors_from_elsewhere_are_refused_where_the_kernel_is_demanded(kind: type) -> None:
    pipe = with_processors(kind)
    with pytest.raises(UnsupportedError, match=rf"processor {kind.__name__}: .*\(4 layers, first down_blocks.0.*attn2\)"):
        ipa_kernels.enable(pipe.unet, impl="triton")
    assert not traces(pipe.unet)


@pytest.mark.parametrize("kind", FOREIGN)
def test_processors_from_elsewhere_that_come_later(kind: type) -> None:
    pipe, other = build("bare-unet"), with_processors(kind)
    for impl in ("auto", "triton"):
        ipa_kernels.enable(pipe.unet, impl=impl)
        pipe.unet.set_attn_processor(other.unet.attn_processors)
        if impl == "triton":
            with pytest.raises(UnsupportedError, match=rf"attn2: .*processor {kind.__name__}"):
                picture(pipe, TOKENS)
        else:
            with pytest.warns(FallbackWarning, match=f"processor {kind.__name__}"):
                assert torch.equal(picture(pipe, TOKENS), picture(other, TOKENS))
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        ipa_kernels.disable(pipe.unet)


@pytest.mark.parametrize("kind", [KeepsAttentionMaps, CLIPGuidedProcessor])
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_processors_of_a_user_without_an_adapter_are_nobodys_business(kind: type, impl: str) -> None:
    pipe = with_processors(kind)
    expected = picture(pipe, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        report = ipa_kernels.enable(pipe.unet, impl=impl)
        assert torch.equal(picture(pipe, 0), expected)
    assert report.layers == []
    assert report.note.startswith("no IP-Adapter is loaded")


def test_diffusers_adapter_in_some_layers_and_anothers_in_others() -> None:
    pipe = build("sd", ("base",))
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    torch.manual_seed(0)
    attention = pipe.unet.get_submodule(name)
    attention.set_processor(IPAttnProcessor2_0(attention.inner_dim, attention.inner_dim))
    attention.processor.forward = lambda attn, hidden, states=None, *rest, **options: AttnProcessor2_0()(attn, hidden)
    expected = generate(pipe, ("base",))
    ipa_kernels.enable(pipe)
    assert torch.equal(generate(pipe, ("base",)), expected)
    report = ipa_kernels.explain(pipe)
    assert [layer.name for layer in report.layers if layer.planned == "stock"] == [name]
    assert report.eager == 4
