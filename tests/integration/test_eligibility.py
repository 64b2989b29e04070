"""The reason for diffusers' own code fits the call that it is about."""

import pytest
import torch

import ipa_kernels
from ipa_kernels.testing import tiny_pipelines

from ..helpers.adapters import seeded
from ..helpers.generate import generate
from ..helpers.pipelines import build


def test_a_reference_for_each_of_several_prompts() -> None:
    """Diffusers repeats all of them for each prompt: 6 rows of text, 18 of images."""
    pipe, draw = build("sd", ("base",)), seeded(5)
    options = {
        "prompt_embeds": draw(3, 77, tiny_pipelines.CROSS_ATTENTION_DIM),
        "negative_prompt_embeds": draw(3, 77, tiny_pipelines.CROSS_ATTENTION_DIM),
        "latents": draw(3, 4, 8, 8),
        "ip_adapter_image_embeds": [draw(6, 1, tiny_pipelines.IMAGE_EMBED_DIM)],
    }
    expected = generate(pipe, ("base",), **options)
    ipa_kernels.enable(pipe)
    with pytest.warns(ipa_kernels.FallbackWarning, match=r"got \[6, 6, 18\]; .*once per prompt"):
        assert torch.equal(generate(pipe, ("base",), **options), expected)
    assert {layer.impl for layer in ipa_kernels.explain(pipe).layers} == {"stock"}
