"""The oracle against torch's own attention, and the ruler against errors of a known size."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch import Tensor

from ipa_kernels import reference
from ipa_kernels.testing.layer_cases import CASES


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


@pytest.mark.parametrize("where", ["stock", "truth"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_case_that_is_not_finite_proves_nothing_and_says_so(dtype: torch.dtype, value: float, where: str) -> None:
    """Whatever the result: stock's distance, from which allowances are made, is not a number then."""
    truth = torch.ones(1000, dtype=torch.float64)
    stock = torch.full((1000,), 1.1, dtype=dtype)
    (stock if where == "stock" else truth)[3] = value
    for actual in (torch.zeros_like(stock), torch.full_like(stock, 6e4), torch.ones_like(stock), stock):
        found = reference.compare(actual, stock, truth)
        assert found.proves_nothing
        assert not found.within
        assert "PROVES NOTHING" in str(found)
        assert not reference.kept([found])


def test_scores_that_are_not_finite_prove_nothing() -> None:
    """In float32 they are a factor of what is allowed."""
    truth, stock = torch.ones(1000, dtype=torch.float64), torch.full((1000,), 1.1)
    for score in (float("inf"), float("nan")):
        found = reference.compare(stock, stock, truth, score=score)
        assert found.proves_nothing
        assert not found.within
    assert reference.compare(stock, stock, truth, score=1e6).within


def test_an_exact_stock_allows_no_error() -> None:
    truth = torch.zeros(1000, dtype=torch.float64)
    stock = torch.zeros(1000, dtype=torch.float16)
    actual = stock.clone()
    assert reference.compare(actual, stock, truth).within
    actual[3] = 1e-7
    assert not reference.compare(actual, stock, truth).within


def test_the_ruler_wants_comparable_things() -> None:
    values = torch.zeros(4)
    with pytest.raises(ValueError, match=r"truth: expected torch\.float64"):
        reference.compare(values, values, values)
    with pytest.raises(ValueError, match="expected the same dtype"):
        reference.compare(values, values.half(), values.double())
    with pytest.raises(ValueError, match="expected the same shape"):
        reference.compare(values, values[:2], values.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_stocks_attention_is_that_of_diffusers_processor(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scales = [0.7, 0.0, -1.3]
    attention = Attention(32, cross_attention_dim=24, heads=4, dim_head=8)
    attention.set_processor(IPAdapterAttnProcessor2_0(32, 24, [4, 4, 4], scales))
    attention.to(dtype)
    processor = attention.processor
    hidden, text = torch.randn(2, 64, 32, dtype=dtype), torch.randn(2, 7, 24, dtype=dtype)
    images = [torch.randn(2, 1, 4, 24, dtype=dtype) for _ in scales]
    # as large as the picture, so that it is not resized
    masks = [torch.rand(1, 1, 8, 8).to(dtype), None, torch.rand(1, 1, 8, 8).to(dtype)]

    def heads(tokens: Tensor) -> Tensor:
        return tokens.flatten(1, -2).unflatten(-1, (4, 8)).transpose(1, 2)

    with torch.no_grad():
        expected = attention(hidden, (text, images), ip_adapter_masks=masks)
        out = reference.stock_attention(
            *map(heads, (attention.to_q(hidden), attention.to_k(text), attention.to_v(text))),
            [heads(to_k(image)) for to_k, image in zip(processor.to_k_ip, images, strict=True)],
            [heads(to_v(image)) for to_v, image in zip(processor.to_v_ip, images, strict=True)],
            image_scales=scales,
            image_masks=[None if mask is None else mask.reshape(1, 64) for mask in masks],
        )
        assert torch.equal(attention.to_out[0](out.transpose(1, 2).flatten(2)), expected)


@pytest.mark.parametrize(
    ("name", "scale", "text_only"),
    [
        ("sdxl_1024_64x64_text_only", 1.0, True),
        ("sd15_512_head40_two_masked", 1.0, False),
        ("sd15_512_head40_two_masked", 0.0, True),
    ],
)
def test_results_of_one_call_are_compared_with_its_truth(name: str, scale: float, text_only: bool) -> None:
    inputs = CASES[name].small().inputs(torch.float32)
    inputs = replace(inputs, image_scales=inputs.image_scales * scale)
    positional, keywords = inputs.arguments()
    exact, exact_keywords = inputs.to(torch.float64).arguments()
    truth = reference.decoupled_attention(*exact, **exact_keywords, scale=0.3)
    stock = truth.float()
    found = reference.compare_call({"a": stock, "b": stock * 1.01}, stock, *positional, **keywords, scale=0.3)
    score = reference.largest_score(inputs.query, (inputs.key, *inputs.image_keys), 0.3)
    assert found == {
        "a": reference.compare(stock, stock, truth, score=score, text_only=text_only),
        "b": reference.compare(stock * 1.01, stock, truth, score=score, text_only=text_only),
    }
    assert found["a"].within
    assert not found["b"].within
    halves = inputs.to(torch.float16)
    positional, keywords = halves.arguments()
    stock = reference.decoupled_attention(*positional, **keywords)
    compared = reference.compare_call({"a": stock}, stock, *positional, **keywords)["a"]
    assert compared.allowed_rms == pytest.approx((1.05 if text_only else 1.0) * compared.stock_rms)


def test_one_largest_error_of_three_draws_may_be_chance() -> None:
    good = reference.Comparison(rms=1.0, max=2.0, stock_rms=1.0, stock_max=2.0, allowed_rms=1.2, allowed_max=4.0)
    large, steady = replace(good, max=4.1), replace(good, rms=1.21)
    assert reference.kept([good])
    assert reference.kept([large, good, good])
    assert not reference.kept([large])
    assert not reference.kept([large, good])
    assert not reference.kept([large, good, large])
    assert not reference.kept([good, good, steady])
    assert not reference.kept([])
    nothing = replace(good, stock_max=float("inf"), allowed_max=float("inf"))
    assert not reference.kept([good, nothing, good])


@pytest.mark.parametrize(
    "scales", [[0.0, 0.0], [0.6, 0.0], torch.tensor([0.6, 0.0]), torch.tensor([[0.6, 0.0], [0.1, 0.0]])],
    ids=["none", "numbers", "tensor", "by row"],
)  # fmt: skip
def test_a_branch_of_scale_zero_allows_no_error(scales: list[float] | Tensor) -> None:
    """Its keys may hold anything: large scores of it are no reason for large errors of the others."""
    query, key = torch.randn(2, 2, 64, 8), torch.randn(2, 2, 5, 8)
    exact = query.double(), key.double(), key.double(), [key.double()] * 2, [key.double()] * 2
    truth = reference.decoupled_attention(*exact, image_scales=scales)
    # one large error, whose size an error of all may have, were it not for the rms
    stock = truth.float()
    stock[0, 0, 0, 0] += 1e-3
    results = {"right": truth.float(), "wrong": truth.float() + 1e-3}
    for far in (1e6, float("inf"), float("nan")):
        found = reference.compare_call(results, stock, query, key, key, [key, key * far], [key, key], image_scales=scales)
        assert found["right"].within
        assert not found["wrong"].within
