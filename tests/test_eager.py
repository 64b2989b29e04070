"""The eager twin: bit for bit what diffusers' processor computes, and the oracle's meaning for everything else."""

import importlib.util

import pytest
import torch

from ipa_kernels import decoupled_attention, reference
from ipa_kernels.cases import CASES, Case, Inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_stocks_order_of_operations(name: str, dtype: torch.dtype) -> None:
    case = CASES[name].small()
    inputs = case.inputs(dtype, seed=torch.seed() % 2**31)
    scales = [0.7, 1, -0.3][: len(case.images)]
    positional, keywords = inputs.arguments()
    keywords["image_scales"] = scales
    expected = reference.stock_attention(*positional, **keywords)
    assert torch.equal(decoupled_attention(*positional, **keywords, impl="eager"), expected)


def test_auto_is_eager_on_the_cpu() -> None:
    positional, keywords = CASES["sd15_512_head40"].small().inputs(torch.float32).arguments()
    eager = decoupled_attention(*positional, **keywords, impl="eager")
    assert torch.equal(decoupled_attention(*positional, **keywords), eager)
    if importlib.util.find_spec("triton"):
        assert not torch.equal(decoupled_attention(*positional, **keywords, impl="triton"), eager)


@pytest.mark.parametrize("bias", ["[N]", "[M, N]", "[B, 1, 1, N]", "[B, H, M, N]"])
def test_attn_mask(bias: str) -> None:
    inputs = small()
    batch, heads, queries, _ = inputs.query.shape
    keys = inputs.key.shape[2]
    shape = {
        "[N]": (keys,),
        "[M, N]": (queries, keys),
        "[B, 1, 1, N]": (batch, 1, 1, keys),
        "[B, H, M, N]": (batch, heads, queries, keys),
    }[bias]
    attn_mask = torch.randn(shape) * 3
    positional, keywords = inputs.arguments()
    actual = decoupled_attention(*positional, **keywords, attn_mask=attn_mask)
    torch.testing.assert_close(actual, reference.decoupled_attention(*positional, **keywords, attn_mask=attn_mask))


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.1, 3])
def test_softmax_scale(scale: float) -> None:
    positional, keywords = small().arguments()
    actual = decoupled_attention(*positional, **keywords, scale=scale, impl="eager")
    torch.testing.assert_close(actual, reference.decoupled_attention(*positional, **keywords, scale=scale))


@pytest.mark.parametrize("scales", [0, [0, 0.5], torch.tensor([0.0, 0.5]), torch.tensor([[0.0, 0.5], [0.0, 1.0]])], ids=repr)
def test_a_branch_of_scale_zero_may_hold_nan(scales: object) -> None:
    inputs = small()
    poison = torch.full_like(inputs.image_keys[0], float("nan"))
    poisoned = Inputs(
        **{
            **vars(inputs),
            "image_keys": (poison, inputs.image_keys[1]),
            "image_values": (poison, inputs.image_values[1]),
        }
    )
    positional, keywords = poisoned.arguments()
    keywords["image_scales"] = scales
    clean, _ = inputs.arguments()
    actual = decoupled_attention(*positional, **keywords, impl="eager")
    assert torch.equal(actual, decoupled_attention(*clean, **keywords, impl="eager"))


def test_shared_keys_are_expanded() -> None:
    inputs = small()
    shared = Inputs(
        inputs.query, inputs.key[:1], inputs.value[:1], tuple(k[:1] for k in inputs.image_keys),
        tuple(v[:1] for v in inputs.image_values), inputs.image_scales, inputs.image_masks,
    )  # fmt: skip
    positional, keywords = shared.arguments()
    actual = decoupled_attention(*positional, **keywords, impl="eager")
    torch.testing.assert_close(actual, reference.decoupled_attention(*positional, **keywords))


def small() -> Inputs:
    case = Case("two", heads=2, queries=33, head_dim=16, text=7, images=(4, 5), masked=True)
    return case.inputs(torch.float32, seed=torch.seed() % 2**31)
