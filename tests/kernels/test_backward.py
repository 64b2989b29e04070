"""The kernel's gradients against float64 autograd of the oracle, beside what stock's autograd reaches in the same dtype."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ipa_kernels import UnsupportedError, decoupled_attention, reference
from ipa_kernels.kernels import launch, launch_backward, launch_table_backward
from ipa_kernels.kernels.specialization_backward import Wanted, backward_source
from ipa_kernels.ops import dispatch
from ipa_kernels.testing.layer_cases import Inputs

from ..helpers.kernel_inputs import Recorder, in_turns, island, leaves, random_inputs

ENOUGH = 1000
"""The least number of values of which the statistics of errors say something."""

Attention = Callable[..., Tensor]


def gradients(
    attention: Attention, inputs: Inputs, upstream: Tensor, dtype: torch.dtype, *, wrt: set[str] | None = None, **options: Any
) -> dict[str, Tensor]:
    """Of every tensor of a call, or of those in `wrt`; scales stay in float32 unless all is float64. Shares no memory."""

    def leaf(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        known = torch.float32 if name == "scales" and dtype != torch.float64 else dtype
        # as it is stored, NaN all around it included
        own = tensor.detach().to(known) if tensor.dtype != known else tensor.detach()
        own.requires_grad_(wrt is None or name in wrt)
        if own.requires_grad:
            asked[name] = own
        return own

    asked: dict[str, Tensor] = {}
    own = Inputs(
        leaf("Q", inputs.query), leaf("K", inputs.key), leaf("V", inputs.value),
        tuple(leaf(f"K[{i}]", key) for i, key in enumerate(inputs.image_keys)),
        tuple(leaf(f"V[{i}]", value) for i, value in enumerate(inputs.image_values)),
        leaf("scales", inputs.image_scales),
        tuple(leaf(f"mask[{i}]", mask) for i, mask in enumerate(inputs.image_masks)),
    )  # fmt: skip
    positional, keywords = own.arguments()
    out = attention(*positional, **keywords, **options)
    found = torch.autograd.grad(out, list(asked.values()), upstream.to(dtype), allow_unused=True)
    return {name: gradient for name, gradient in zip(asked, found, strict=True) if gradient is not None}


def assert_within_budget(draw: Callable[[], tuple[Inputs, Tensor]], **options: float) -> None:
    """Every gradient is as close to float64 as promised, on fresh inputs.

    In float32 the largest error of one draw in some hundred is beyond the promised 2 by chance, and a call has up to ten
    gradients: it counts where that of the same gradient is in two more draws. The rms of the errors counts in every draw.
    """
    suspects = exceeding(*draw(), **options)
    for _ in range(2):
        if suspects:
            again = exceeding(*draw(), **options)
            suspects = {name: f"{found}; again: {again[name]}" for name, found in suspects.items() if name in again}
    assert not suspects, suspects


def exceeding(inputs: Inputs, upstream: Tensor, **options: float) -> dict[str, str]:
    """The gradients whose largest error, and that alone, is beyond the budget, and those of few values."""
    dtype = inputs.query.dtype
    actual = gradients(decoupled_attention, inputs, upstream, dtype, impl="triton", **options)
    stock = gradients(decoupled_attention, inputs, upstream, dtype, impl="eager", **options)
    truth = gradients(reference.decoupled_attention, inputs, upstream, torch.float64, **options)
    score = reference.largest_score(inputs.query, (inputs.key, *inputs.image_keys), options.get("scale"))
    # the oracle has no use for scales of no branch
    assert list(actual) == [*truth, *(() if inputs.image_keys else ("scales",))]
    found: dict[str, str] = {}
    for name, gradient in ((name, actual[name]) for name in truth):
        assert gradient.isfinite().all(), f"{name}: a value was not written, or NaN was read from outside"
        # of a single query, dK and dV are single products: their errors are roundings, as stock's
        if gradient.numel() >= ENOUGH and inputs.query.shape[2] > 1:
            compared = reference.compare(gradient, stock[name], truth[name], score=score)
            assert not compared.proves_nothing, f"{name}: {compared}"
            assert compared.rms <= compared.allowed_rms, f"{name}: {compared}"
            if not compared.within:
                found[name] = str(compared)
        else:
            # a sum of few values may be small beside its summands by chance, and its error large beside the sum
            error, size = (gradient.double() - truth[name]).abs().max(), truth[name].abs().max()
            assert torch.isfinite(size), f"{name}: float64 is not finite"
            if error > 32 * score * torch.finfo(gradient.dtype).eps * size:
                found[name] = f"error {error:.2e}, largest value {size:.2e}"
    return found


def draw(
    batch: int, heads: int, queries: int, head_dim: int, lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Inputs, Tensor]:
    """Inputs, and the gradient of the output: islands in a sea of NaN."""
    inputs = random_inputs(batch, heads, queries, head_dim, lengths, dtype, device)
    return inputs, island(torch.randn(inputs.query.shape, device=device).to(dtype))


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "head_dim", "lengths", "dtype"),
    in_turns(
        [
            # every head dim and every length of the forward's tests, as text or as image
            (2, 4, 65, 8, (77, 4)),
            (1, 3, 100, 24, (17, 257)),
            (3, 3, 63, 40, (154, 16)),
            (2, 4, 65, 64, (77, 16, 4, 81)),
            (1, 4, 100, 80, (257, 15)),
            (1, 4, 63, 88, (600, 1)),
            (1, 4, 65, 128, (1, 77)),
            (1, 2, 100, 160, (81, 17)),
            (1, 2, 65, 256, (4, 154)),
            (2, 4, 1, 40, (77, 4)),
            (2, 4, 65, 40, (77,)),
        ]
    ),
    ids=str,
)
def test_odd_shapes(
    batch: int, heads: int, queries: int, head_dim: int, lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    assert_within_budget(lambda: draw(batch, heads, queries, head_dim, lengths, dtype, device))


@pytest.mark.parametrize("scale", [0.03, 1.0])
def test_softmax_scale(scale: float, device: torch.device) -> None:
    assert_within_budget(lambda: draw(2, 2, 65, 40, (77, 16), torch.float32, device), scale=scale)


def assert_close_in_float16(inputs: Inputs, upstream: Tensor, wrt: set[str]) -> None:
    actual = gradients(decoupled_attention, inputs, upstream, torch.float16, wrt=wrt, impl="triton")
    truth = gradients(reference.decoupled_attention, inputs, upstream, torch.float64, wrt=wrt)
    for name, expected in truth.items():
        assert 2**-12 < expected.abs().max() < 6e4, f"{name}: choose other inputs"
        distance = (actual[name].double() - expected).abs().max() / expected.abs().max()
        assert distance <= 3 * torch.finfo(torch.float16).eps, f"{name}: {float(distance):.2e}"


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of a gradient that is not asked for
@pytest.mark.parametrize("lengths", [(17, 4), (17, 150)], ids=str)
@pytest.mark.parametrize(("size", "wrt", "power"), [(13, "Q", -9), (13, "K", 9), (-22, "Q", 13), (-22, "K", -13)])
def test_softmax_gradients_beyond_float16(
    size: int, wrt: str, power: int, lengths: tuple[int, ...], device: torch.device
) -> None:
    """With an upstream gradient of 2**13 they overflow float16, with 2**-22 they end in its subnormals. The keys, or the
    queries, are so small or so large that the gradients asked for do neither.
    """
    inputs, upstream = draw(1, 1, 65, 64, lengths, torch.float16, device)
    inputs.query.mul_(2.0**-power)
    for key in (inputs.key, *inputs.image_keys):
        key.mul_(2.0**power)
    asked = {"Q"} if wrt == "Q" else {"K", "K[0]"}
    assert_close_in_float16(inputs, upstream.mul_(2.0**size), asked)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("lengths", [(17, 4), (17, 150)], ids=str)
@pytest.mark.parametrize(("scale", "mask", "size"), [(1e5, None, -10), (-1e5, 1e-3, -3), (200.0, 6e4, -17), (1e-6, 0.5, 13)])
def test_weights_beyond_float16(
    scale: float, mask: float | None, size: int, lengths: tuple[int, ...], device: torch.device
) -> None:
    inputs, upstream = draw(1, 1, 65, 64, lengths, torch.float16, device)
    inputs.image_scales.fill_(scale)
    masks = (None if mask is None else torch.full((1, 65), mask, dtype=torch.float16, device=device),)
    assert_close_in_float16(replace(inputs, image_masks=masks), upstream.mul_(2.0**size), {"V[0]"})


COMBINATIONS = [
    {"Q"}, {"K[0]"}, {"V[0]"}, {"K[0]", "V[0]", "K[1]", "V[1]"}, {"K"}, {"V"}, {"Q", "K", "V"}, {"scales"}, {"mask[0]"},
    {"Q", "K[1]", "scales"}, {"mask[0]", "V[1]"},
]  # fmt: skip


@pytest.mark.parametrize("wrt", COMBINATIONS, ids=lambda wrt: "+".join(sorted(wrt)))
def test_only_what_is_asked_for_is_computed(wrt: set[str], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[Wanted] = []

    def spy(*arguments: Any) -> Any:
        wanted.append(arguments[-1])
        return backward(*arguments)

    backward = launch_backward.backward
    monkeypatch.setattr(launch_backward, "backward", spy)
    inputs, upstream = draw(2, 1, 33, 16, (17, 4, 20), torch.float32, device)
    everything = gradients(decoupled_attention, inputs, upstream, torch.float32, impl="triton")
    some = gradients(decoupled_attention, inputs, upstream, torch.float32, wrt=wrt, impl="triton")
    assert set(some) == wrt
    assert all(torch.equal(some[name], everything[name]) for name in wrt)
    assert wanted[0] == Wanted((True,) * 3, (True,) * 3, (True, True))
    branches = ("", "[0]", "[1]")
    assert wanted[1] == Wanted(
        tuple(f"K{branch}" in wrt for branch in branches),
        tuple(f"V{branch}" in wrt for branch in branches),
        tuple("scales" in wrt or f"mask{branch}" in wrt for branch in branches[1:]),
    )


@pytest.mark.parametrize("upstream", ["ones of one element", "every other channel", "[B, H, M, D]"])
def test_shared_expanded_and_strided_inputs(upstream: str, device: torch.device) -> None:
    # text: one row for all; image 0: one row, expanded; image 1: every other of many tokens, from a buffer of keys and values
    leaves = [
        torch.randn(3, 2, 65, 40), torch.randn(1, 2, 17, 40), torch.randn(1, 2, 17, 40),
        torch.randn(1, 2, 4, 40), torch.randn(1, 2, 4, 40), torch.randn(3, 40, 2, 2, 40),
        torch.randn(1, 2), torch.randn(1, 65),
    ]  # fmt: skip
    leaves = [tensor.to(device).requires_grad_() for tensor in leaves]
    grad = {
        "ones of one element": torch.ones(1, device=device).expand(3, 2, 65, 40),
        "every other channel": torch.randn(3, 2, 65, 80, device=device)[..., ::2],
        "[B, H, M, D]": torch.randn(3, 2, 65, 40, device=device),
    }[upstream]

    def attend(attention: Attention, leaves: list[Tensor], **options: str) -> Tensor:
        query, key, value, image_key, image_value, packed, scales, mask = leaves
        keys = image_key.expand(3, -1, -1, -1), packed[:, ::2, 0].transpose(1, 2)
        values = image_value.expand(3, -1, -1, -1), packed[:, ::2, 1].transpose(1, 2)
        masks = mask.expand(3, -1), None
        return attention(query, key, value, keys, values, image_scales=scales.expand(3, -1), image_masks=masks, **options)

    found = torch.autograd.grad(attend(decoupled_attention, leaves, impl="triton"), leaves, grad)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = torch.autograd.grad(attend(reference.decoupled_attention, exact), exact, grad.double())
    for actual, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("form", "scales"), [("[M]", "[n]"), ("[1, M]", "[B, n] float16"), ("[B, M] float16", "[1, n]")])
def test_gradients_of_all_forms_of_weights(form: str, scales: str, device: torch.device) -> None:
    inputs, upstream = draw(3, 2, 33, 24, (17, 4), torch.float32, device)
    shapes = {"[M]": (33,), "[1, M]": (1, 33), "[B, M]": (3, 33), "[n]": (1,), "[1, n]": (1, 1), "[B, n]": (3, 1)}
    dtypes = [torch.float16 if text.endswith("float16") else torch.float32 for text in (form, scales)]
    weights = [
        torch.randn(shapes[text.removesuffix(" float16")]).to(device, dtype).requires_grad_()
        for text, dtype in zip((form, scales), dtypes, strict=True)
    ]

    def attend(attention: Attention, mask: Tensor, scale: Tensor, **options: str) -> Tensor:
        positional, _ = inputs.arguments()
        return attention(*positional, image_scales=scale, image_masks=[mask], **options)

    found = torch.autograd.grad(attend(decoupled_attention, *weights, impl="triton"), weights, upstream)
    truth = torch.autograd.grad(attend(reference.decoupled_attention, *weights), weights, upstream)
    for actual, expected, weight in zip(found, truth, weights, strict=True):
        assert (actual.shape, actual.dtype) == (weight.shape, weight.dtype)
        tolerance = 4 * torch.finfo(weight.dtype).eps * float(expected.abs().max()) + 1e-4
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # numpy, in the interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("length", [16, 150])
@pytest.mark.parametrize("held", [math.nan, 1e38])
def test_a_branch_of_scale_zero(held: float, length: int, impl: str, device: torch.device) -> None:
    """Its keys, values and mask get exactly 0, even where they hold NaN or overflow, and give nothing to result and query."""
    inputs, upstream = draw(3, 1, 33, 24, (17, length), torch.float32, device)
    poison = torch.full_like(inputs.image_keys[0], held)
    inputs = replace(inputs, image_keys=(poison,), image_values=(poison,))
    inputs.image_scales.zero_()
    every = {"Q", "K", "V", "K[0]", "V[0]", "mask[0]"}
    for wrt in (every, {*every, "scales"}):
        found = gradients(decoupled_attention, inputs, upstream, torch.float32, wrt=wrt, impl=impl)
        text = replace(inputs, image_keys=(), image_values=(), image_scales=torch.empty(3, 0), image_masks=())
        alone = gradients(decoupled_attention, text, upstream, torch.float32, wrt={"Q", "K", "V"}, impl=impl)
        for name in ("K[0]", "V[0]", "mask[0]"):
            assert torch.equal(found[name], torch.zeros_like(found[name])), name
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, msg=name)


@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.parametrize("length", [16, 150])
def test_a_scale_of_zero_has_its_true_derivative(length: int, impl: str, device: torch.device) -> None:
    """A gate that starts at 0 learns: the output is linear in a scale, so that its derivative is the same everywhere."""
    inputs, upstream = draw(3, 1, 33, 24, (17, length), torch.float32, device)
    truth = gradients(reference.decoupled_attention, inputs, upstream, torch.float64, wrt={"scales"})
    inputs.image_scales[::2] = 0
    found = gradients(decoupled_attention, inputs, upstream, torch.float32, wrt={"scales", "K[0]"}, impl=impl)
    torch.testing.assert_close(found["scales"].double(), truth["scales"], rtol=1e-4, atol=1e-3)
    assert torch.equal(found["K[0]"][::2], torch.zeros_like(found["K[0]"][::2]))
    assert found["K[0]"][1].abs().amax(-1).min() > 0, "of each key; one number of it may be 0 by chance"


def test_gradcheck_of_the_eager_twin() -> None:
    shapes = [(2, 2, 3, 4), (2, 2, 5, 4), (1, 2, 5, 4), (1, 2, 2, 4), (2, 2, 2, 4), (2, 2, 3, 4), (2, 2, 3, 4), (2, 2), (2, 3)]
    leaves = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    leaves[7][0, 0] = 0
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def attend(*leaves: Tensor) -> Tensor:
        query, key, value, first_key, first_value, second_key, second_value, scales, mask = leaves
        keys, values = (first_key, second_key), (first_value, second_value)
        return decoupled_attention(query, key, value, keys, values, image_scales=scales, image_masks=(mask, None), impl="eager")

    assert torch.autograd.gradcheck(attend, leaves)


def test_the_same_bits_every_time(device: torch.device) -> None:
    inputs, upstream = draw(1, 1, 65, 40, (17, 4), torch.float16, device)
    first, *others = (gradients(decoupled_attention, inputs, upstream, torch.float16, impl="triton") for _ in range(20))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def small(device: torch.device) -> list[Tensor]:
    shapes = [(2, 2, 33, 24), (2, 2, 17, 24), (2, 2, 17, 24), (2, 2, 4, 24), (2, 2, 4, 24)]
    return [torch.randn(shape, device=device).requires_grad_() for shape in shapes]


def attend(*leaves: Tensor) -> Tensor:
    query, key, value, image_key, image_value = leaves
    return decoupled_attention(query, key, value, [image_key], [image_value], image_scales=0.5, impl="triton")


@pytest.mark.parametrize("upstream", ["negated view", "packed otherwise", "one number", "None"])
def test_gradients_of_the_output_as_torch_hands_them_over(upstream: str, device: torch.device) -> None:
    leaves = small(device)
    numbers = torch.randn(2, 2, 33, 24, device=device)

    def loss(out: Tensor) -> Tensor:
        given = {
            "negated view": torch._neg_view(numbers.to(out.dtype)),
            "packed otherwise": numbers.to(out.dtype).permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
            "one number": torch.ones((), dtype=out.dtype, device=device).expand(out.shape),
            "None": None,
        }[upstream]
        return _Handed.apply(out, given)

    found = torch.autograd.grad(loss(attend(*leaves)), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    query, key, value, image_key, image_value = exact
    out = reference.decoupled_attention(query, key, value, [image_key], [image_value], image_scales=0.5)
    truth = torch.autograd.grad(loss(out), exact, materialize_grads=True)
    for actual, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


class _Handed(torch.autograd.Function):
    """A number whose gradient is the given tensor as it is, or None."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, given: Tensor | None) -> Tensor:
        ctx.given = given
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return ctx.given, None


def test_a_backward_under_transforms_and_tangents_is_refused(device: torch.device) -> None:
    leaves = small(device)
    out = attend(*leaves)
    several = torch.ones(3, *out.shape, device=device)
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.vmap(lambda one: torch.autograd.grad(out, leaves, one, retain_graph=True))(several)
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode"):
        torch.autograd.grad(out, leaves, forward_ad.make_dual(several[0], several[0]))


def test_nothing_but_the_inputs_is_kept(device: torch.device) -> None:
    leaves = small(device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda nothing: nothing):  # type: ignore[arg-type, return-value]
        assert attend(*leaves).grad_fn is not None
        assert {tensor.data_ptr() for tensor in saved} == {leaf.data_ptr() for leaf in leaves}
        saved.clear()
        with torch.no_grad():
            assert attend(*leaves).grad_fn is None
        assert attend(*[leaf.detach() for leaf in leaves]).grad_fn is None
    assert not saved


def test_an_input_that_was_overwritten_is_an_error(device: torch.device) -> None:
    leaves = small(device)
    out = attend(*leaves)
    with torch.no_grad():
        leaves[3].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_double_backward_is_refused(device: torch.device) -> None:
    leaves = small(device)
    (first,) = torch.autograd.grad(attend(*leaves).square().sum(), leaves[:1], create_graph=True)
    (plain,) = torch.autograd.grad(attend(*leaves).square().sum(), leaves[:1])
    assert torch.equal(first, plain)
    with pytest.raises(UnsupportedError, match=r"double backward: .*eager"):
        first.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, device: torch.device) -> None:
    leaves = small(device)
    expected = torch.autograd.grad(attend(*leaves).square().sum(), leaves)
    checkpoint(attend, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(leaves, expected, strict=True))


def test_transforms_and_tangents_are_refused(device: torch.device) -> None:
    leaves = [leaf.detach() for leaf in small(device)]
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.vjp(attend, *leaves)
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode"):
        attend(forward_ad.make_dual(leaves[0], leaves[0]), *leaves[1:])


def test_what_the_table_refuses_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only with a gradient: the forward has a table of its own."""
    monkeypatch.setattr(dispatch, "architecture", lambda device: "gfx1100")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    query = torch.empty(1, 1, 8, 64, device="meta", dtype=torch.float16)
    problem = dispatch.Problem(query, (query,), (query,), (), (), None, 0.1)
    on_cuda = replace(problem, query=_OnCuda(query))  # type: ignore[arg-type]
    monkeypatch.setattr(dispatch, "needs_gradient", lambda problem: False)
    assert dispatch.call_reasons(on_cuda) == []
    monkeypatch.setattr(dispatch, "needs_gradient", lambda problem: True)
    (reason,) = dispatch.call_reasons(on_cuda)
    assert reason.startswith("gradient: device architecture gfx1100: not in the backward's launch table (sm_80")


class _OnCuda:
    """A tensor that says it is on a GPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return torch.device("cuda", 0) if name == "device" else getattr(self.tensor, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_launch_passes_what_was_compiled(dtype: torch.dtype, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(launch_backward, "INTERPRETED", False)
    recorder = Recorder()
    compiled: list[Any] = []

    def compile_for(*specialization: Any) -> Recorder:
        compiled.append(backward_source(*specialization[:2]))
        return recorder

    monkeypatch.setattr(launch_backward, "_compiled", compile_for)
    config = launch_table_backward.find("sm_90", 32 if dtype == torch.float32 else 16, 40)
    assert config is not None
    keys = tuple(torch.randn(batch, n, 3, 40).to(dtype).transpose(1, 2) for batch, n in ((1, 77), (2, 4), (2, 300)))
    masks = (torch.randn(1, 99), None) if masked else (None, None)
    query = torch.randn(2, 3, 99, 40).to(dtype)
    wanted = Wanted((False, True, True), (True, False, True), (masked, True))
    launch_backward.backward(query, query, keys, keys, torch.randn(1, 2), masks, 0.2, False, config, wanted)
    ((grid, arguments),), (asked,) = recorder.launches, compiled
    assert grid == (3 * -(-99 // config.block_m), 2, 1)
    for kind, value, constant in leaves(asked.signature.values(), arguments, asked.constants):
        if kind == "constexpr":
            assert value == constant
        elif kind.startswith("*"):
            assert {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[value.dtype] == kind
        else:
            assert type(value) is {"i32": int, "fp32": float}[kind]


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"])
@pytest.mark.parametrize("bits", [16, 32])
def test_a_shape_is_either_found_or_refused(arch: str, bits: int) -> None:
    for head_dim in range(8, 264, 8):
        for image_keys in (0, 16, 17, 10**6):
            refused = launch_table_backward.refusal(arch, bits, head_dim, image_keys)
            assert (launch_table_backward.find(arch, bits, head_dim, image_keys) is None) == (refused is not None)
            assert refused is None or re.search(arch, refused)
