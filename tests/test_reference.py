"""The oracle against torch's own attention, and the ruler against errors of a known size."""

import pytest
import torch
import torch.nn.functional as F

from ipa_kernels import reference
from ipa_kernels.cases import CASES


def test_the_text_branch_is_torchs_attention() -> None:
    inputs = CASES["sdxl_1024_64x64_text_only"].small().inputs(torch.float64)
    actual = reference.decoupled_attention(*inputs.arguments()[0])
    expected = F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_image_branches_are_weighted_attentions() -> None:
    inputs = CASES["sd15_512_head40_two_masked"].small().inputs(torch.float64)
    positional, keywords = inputs.arguments()
    expected = F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)
    for i in range(2):
        image = F.scaled_dot_product_attention(inputs.query, inputs.image_keys[i], inputs.image_values[i])
        weight = inputs.image_scales[:, i].double()[:, None, None, None] * inputs.image_masks[i][:, None, :, None]
        expected = expected + weight * image
    actual = reference.decoupled_attention(*positional, **keywords)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_one_softmax_over_all_keys_is_another_model() -> None:
    inputs = CASES["sd15_512_head40"].small().inputs(torch.float64)
    separate = reference.decoupled_attention(*inputs.arguments()[0])
    joint = reference.decoupled_attention(
        inputs.query,
        torch.cat([inputs.key, *inputs.image_keys], dim=2),
        torch.cat([inputs.value, *inputs.image_values], dim=2),
        (),
        (),
    )
    assert (separate - joint).abs().max() > 0.1


def test_scores_are_scaled_and_biased() -> None:
    query, key, value = (torch.randn(1, 1, n, 8, dtype=torch.float64) for n in (3, 5, 5))
    bias = torch.randn(3, 5, dtype=torch.float64)
    actual = reference.decoupled_attention(query, key, value, (), (), attn_mask=bias, scale=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.3)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert reference.largest_score(query, [key], 0.3) == pytest.approx(float((0.3 * query @ key.mT).abs().max()))


@pytest.mark.parametrize(
    ("dtype", "text_only", "factor", "within"),
    [
        (torch.float16, False, 0.99, True),
        (torch.float16, False, 1.01, False),
        (torch.float16, True, 1.04, True),
        (torch.float16, True, 1.06, False),
        (torch.bfloat16, False, 1.01, False),
        (torch.float32, False, 1.19, True),
        (torch.float32, False, 1.21, False),
    ],
    ids=str,
)
def test_the_budget_on_the_rms(dtype: torch.dtype, text_only: bool, factor: float, within: bool) -> None:
    # errors far above the grid of the dtype, so that their size is exact
    truth = torch.zeros(1000, dtype=torch.float64)
    sign = torch.ones(1000, dtype=torch.float64)
    sign[::2] = -1
    stock = sign.to(dtype)
    actual = (sign * factor).to(torch.float32).to(dtype)
    error = float(actual[1])
    result = reference.compare(actual, stock, truth, text_only=text_only)
    assert result.rms == pytest.approx(error)
    assert result.within == within
    assert ("within" in str(result)) == within


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1.5), (torch.float32, 2.0)], ids=str)
def test_the_budget_on_the_largest_error(dtype: torch.dtype, limit: float) -> None:
    truth = torch.zeros(10000, dtype=torch.float64)
    stock = torch.ones(10000, dtype=dtype)
    actual = torch.full((10000,), 0.5, dtype=dtype)
    actual[17] = limit
    assert reference.compare(actual, stock, truth).within
    actual[17] = limit * 1.01
    assert not reference.compare(actual, stock, truth).within


def test_the_floor_in_float32_grows_with_the_scores() -> None:
    truth = torch.ones(1000, dtype=torch.float64)
    stock = torch.ones(1000)
    stock[0] += 1e-3
    actual = torch.ones(1000) + 100 * torch.finfo(torch.float32).eps
    assert not reference.compare(actual, stock - stock + 1, truth, score=1).within
    assert reference.compare(actual, stock, truth, score=30).within


def test_nan_is_never_within() -> None:
    truth = torch.zeros(1000, dtype=torch.float64)
    stock = torch.ones(1000)
    actual = torch.zeros(1000)
    actual[3] = float("nan")
    assert not reference.compare(actual, stock, truth).within


def test_the_ruler_wants_comparable_things() -> None:
    values = torch.zeros(4)
    with pytest.raises(ValueError, match=r"truth: expected torch\.float64"):
        reference.compare(values, values, values)
    with pytest.raises(ValueError, match="expected the same dtype"):
        reference.compare(values, values.half(), values.double())
    with pytest.raises(ValueError, match="expected the same shape"):
        reference.compare(values, values[:2], values.double())
