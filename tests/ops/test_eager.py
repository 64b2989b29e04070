"""The eager twin: bit for bit what diffusers' processor computes, and the oracle's meaning for everything else."""

import importlib.util
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ipa_kernels import decoupled_attention, reference
from ipa_kernels.testing.layer_cases import CASES, Case, Inputs

from ..helpers.kernel_inputs import fresh_seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_stocks_order_of_operations(name: str, dtype: torch.dtype) -> None:
    case = CASES[name].small()
    inputs = case.inputs(dtype, seed=fresh_seed())
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


@pytest.mark.parametrize(
    ("dtype", "keys", "values", "mask"),
    [(torch.float16, 1, 1, 6e4), (torch.float32, 1e38, 1, 1), (torch.float32, 1, 1e20, 1e20), (torch.bfloat16, 1, 1e38, 6e4)],
    ids=repr,
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_branch_of_scale_zero_may_overflow(
    dtype: torch.dtype, keys: float, values: float, mask: float, compiled: bool
) -> None:
    inputs = small().to(dtype)
    large = replace(
        inputs,
        image_keys=tuple(key * keys for key in inputs.image_keys),
        image_values=tuple(value * values for value in inputs.image_values),
        image_scales=torch.zeros_like(inputs.image_scales),
        image_masks=tuple(torch.full((1, inputs.query.shape[2]), mask, dtype=dtype) for _ in inputs.image_keys),
    )
    large.query.requires_grad_()
    (query, key, value, *_), _ = large.arguments()
    positional, keywords = large.arguments()
    attend = torch.compile(decoupled_attention, backend="aot_eager") if compiled else decoupled_attention
    out, text = attend(*positional, **keywords, impl="eager"), decoupled_attention(query, key, value, [], [], impl="eager")
    assert torch.equal(out, text)
    (found,), (expected,) = (torch.autograd.grad(result.float().square().sum(), [query]) for result in (out, text))
    assert torch.equal(found, expected)


def test_shared_keys_are_expanded() -> None:
    inputs = small()
    shared = Inputs(
        inputs.query, inputs.key[:1], inputs.value[:1], tuple(k[:1] for k in inputs.image_keys),
        tuple(v[:1] for v in inputs.image_values), inputs.image_scales, inputs.image_masks,
    )  # fmt: skip
    positional, keywords = shared.arguments()
    actual = decoupled_attention(*positional, **keywords, impl="eager")
    torch.testing.assert_close(actual, reference.decoupled_attention(*positional, **keywords))


NO_RULE = "ignore:There is a performance drop because we have not yet implemented the batching rule"


def batched() -> dict[str, Tensor]:
    """Three draws of every tensor of a call with one image branch."""
    shapes = {
        "query": (2, 2, 5, 8), "key": (2, 2, 7, 8), "value": (1, 2, 7, 8), "image_key": (2, 2, 4, 8),
        "image_value": (1, 2, 4, 8), "image_scales": (1,), "mask": (5,), "attn_mask": (5, 7),
    }  # fmt: skip
    return {name: torch.randn(3, *shape) for name, shape in shapes.items()}


def attend(image_key: Tensor, image_value: Tensor, mask: Tensor, **rest: Any) -> Tensor:
    return decoupled_attention(image_keys=[image_key], image_values=[image_value], image_masks=[mask], impl="eager", **rest)


@pytest.mark.filterwarnings(NO_RULE)
@pytest.mark.parametrize("scale", [None, 1, 0.6])
def test_vmap_over_any_of_the_tensors_is_a_loop(scale: float | None) -> None:
    every = batched() if scale is None else {**batched(), "image_scales": scale}
    names = [name for name, tensor in every.items() if isinstance(tensor, Tensor)]
    for count in range(1, len(names) + 1):
        for over in itertools.combinations(names, count):
            rest = {name: given[0] if name in names else given for name, given in every.items() if name not in over}
            several = {name: every[name] for name in over}
            found = torch.func.vmap(lambda several, rest=rest: attend(**several, **rest))(several)
            loop = [attend(**{name: tensor[i] for name, tensor in several.items()}, **rest) for i in range(3)]
            torch.testing.assert_close(found, torch.stack(loop), msg=str(over))


def test_vmap_in_a_graph() -> None:
    every = batched()
    mask, rest = every.pop("mask"), {name: tensor[0] for name, tensor in every.items()}
    rest["image_scales"] = 0.6

    def over_masks(mask: Tensor) -> Tensor:
        return torch.func.vmap(lambda mask: attend(mask=mask, **rest))(mask)

    torch.testing.assert_close(torch.compile(over_masks, fullgraph=True, backend="eager")(mask), over_masks(mask))


@pytest.mark.filterwarnings(NO_RULE)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scale_of_zero_has_its_true_derivative_under_transforms() -> None:
    every = {name: tensor[0] for name, tensor in batched().items()}
    scale = every.pop("image_scales").zero_().requires_grad_()

    def total(scale: Tensor) -> Tensor:
        return attend(image_scales=scale, **every).sum()

    (expected,) = torch.autograd.grad(total(scale), scale)
    assert expected != 0
    scale = scale.detach()
    several = scale.expand(3, 1)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(total(forward_ad.make_dual(scale, torch.ones(1)))).tangent
    found = {
        "grad": torch.func.grad(total)(scale),
        "vmap(grad)": torch.func.vmap(torch.func.grad(total))(several)[1],
        "grad(vmap)": torch.func.grad(lambda scales: torch.func.vmap(total)(scales).sum())(several)[1],
        "jvp": torch.func.jvp(total, (scale,), (torch.ones(1),))[1][None],
        "dual level": dual[None],
    }
    for name, derivative in found.items():
        torch.testing.assert_close(derivative, expected, msg=name)


def small() -> Inputs:
    case = Case("two", heads=2, queries=33, head_dim=16, text=7, images=(4, 5), masked=True)
    return case.inputs(torch.float32, seed=fresh_seed())
