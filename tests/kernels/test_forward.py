"""The kernel against the float64 oracle, never farther from it than stock diffusers is: the rule is `reference.compare`.

Without a GPU the kernel runs in Triton's interpreter, in float32 and float16. Every tensor is a view into a larger one that is
NaN elsewhere: a read outside the view cannot go unnoticed.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ipa_kernels import decoupled_attention, reference
from ipa_kernels.testing.layer_cases import CASES, Inputs

from ..helpers.kernel_inputs import DTYPES, fresh_seed, in_turns, random_inputs

HEAD_DIMS = [8, 24, 40, 64, 80, 88, 128, 160, 256]
QUERIES = [63, 65, 100]
KEYS = [1, 4, 15, 16, 17, 77, 81, 154, 257, 600]


# Rows of queries in a comparison: errors of one row are correlated.
ROWS = 500
ROWS_OF_ONE_QUERY = 64


def compare(inputs: Inputs, *, copies: int = 1, **options: float) -> tuple[Tensor, reference.Comparison]:
    """The kernel's result, and its distance from float64 beside stock's, which gets every query `copies` times."""
    positional, keywords = inputs.arguments()
    actual = decoupled_attention(*positional, **keywords, **options, impl="triton")
    masks = tuple(m if m is None else m.repeat_interleave(copies, -1) for m in inputs.image_masks)
    repeated = replace(inputs, query=inputs.query.repeat_interleave(copies, 2), image_masks=masks).arguments()
    stock = decoupled_attention(*repeated[0], **repeated[1], **options, impl="eager")[:, :, ::copies]
    assert actual.shape == inputs.query.shape
    assert actual.isfinite().all(), "a value was not written, or NaN was read from outside"
    return actual, reference.compare_call({"triton": actual}, stock, *positional, **keywords, **options)["triton"]


def assert_within_budget(draw: Callable[[], Inputs], *, copies: int = 1, **options: float) -> None:
    """The kernel is as close to float64 as promised, on fresh inputs: by `reference.kept`, in one draw or in three."""
    draws = [compare(draw(), copies=copies, **options)[1]]
    if not draws[0].within:
        draws += [compare(draw(), copies=copies, **options)[1] for _ in range(2)]
    assert reference.kept(draws), "; again: ".join(map(str, draws))


@pytest.mark.parametrize(("name", "dtype"), in_turns([(name,) for name in CASES]), ids=str)
def test_named_cases(name: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_within_budget(lambda: CASES[name].small().inputs(dtype, device, seed=fresh_seed()))


@pytest.mark.parametrize(
    ("head_dim", "length", "queries", "batch", "dtype"),
    in_turns(
        [
            # every head dim with every length; queries and batch take turns
            (head_dim, length, QUERIES[(i + j) % 3], 1 + j % 3)
            for (i, head_dim), (j, length) in itertools.product(enumerate(HEAD_DIMS), enumerate(KEYS))
        ],
        lambda n: n // len(KEYS) + n % len(KEYS),
    ),
    ids=str,
)
def test_odd_shapes(head_dim: int, length: int, queries: int, batch: int, dtype: torch.dtype, device: torch.device) -> None:
    heads = math.ceil(ROWS / (batch * queries))
    image = KEYS[(KEYS.index(length) + head_dim // 8) % len(KEYS)]
    assert_within_budget(lambda: random_inputs(batch, heads, queries, head_dim, (length, image), dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(77,), (600,), (77, 4, 257, 16), (154, 1, 81)], ids=str)
def test_numbers_of_branches(lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    assert_within_budget(lambda: random_inputs(2, 4, 65, 40, lengths, dtype, device))


@pytest.mark.parametrize(
    ("head_dim", "lengths", "dtype"),
    in_turns(list(zip(HEAD_DIMS, itertools.cycle([(77, 4), (600, 17)]), strict=False)), lambda n: n // 2),
    ids=str,
)
def test_one_query(head_dim: int, lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Stock gets 64 equal queries: for one, the CPU's float32 routines are others, that sum more exactly than for any more."""
    rows = ROWS_OF_ONE_QUERY // 2
    assert_within_budget(lambda: random_inputs(2, rows, 1, head_dim, lengths, dtype, device), copies=64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-1.5, 42.0, 1e-3])
def test_unusual_image_scales(scale: float, dtype: torch.dtype, device: torch.device) -> None:
    def draw() -> Inputs:
        inputs = random_inputs(2, 4, 65, 64, (77, 4, 257), dtype, device)
        inputs.image_scales[:, 0] = scale
        inputs.image_scales[0, 1] = scale
        return inputs

    assert_within_budget(draw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [16, 257])
@pytest.mark.parametrize(("weight", "mask"), [(1e5, None), (-1e5, 1e-3), (200.0, 6e4), (1e-6, None), (3e-5, 0.5)])
def test_weights_beyond_float16(
    weight: float, mask: float | None, length: int, dtype: torch.dtype, device: torch.device
) -> None:
    """1e5, and 200 times a mask of 6e4, overflow float16, 1e-6 vanishes there; their products with these values do not."""
    inputs = random_inputs(1, 4, 65, 64, (77, length), dtype, device, masked=False)
    inputs.image_scales.fill_(weight)
    masks = (None if mask is None else torch.full((65,), mask, dtype=dtype, device=device),)
    size = weight * (1.0 if mask is None else mask)
    image_values = tuple((value / size).clamp(-6e4, 6e4) for value in inputs.image_values)
    positional, _ = inputs.arguments()
    # no text to hide an error behind
    arguments = positional[0], positional[1], torch.zeros_like(positional[2]), positional[3], image_values
    actual = decoupled_attention(*arguments, image_scales=inputs.image_scales, image_masks=masks, impl="triton")
    exact, keywords = inputs.to(torch.float64).arguments()
    keywords["image_masks"] = tuple(None if m is None else m.double() for m in masks)
    truth = reference.decoupled_attention(
        exact[0], exact[1], torch.zeros_like(exact[2]), exact[3], [v.double() for v in image_values], **keywords
    )
    # in float32 the rounding of the scores is what counts, as in the budget of `reference.compare`
    score = reference.largest_score(inputs.query, inputs.image_keys) if dtype == torch.float32 else 1.0
    assert (actual.double() - truth).abs().max() < 4 * max(2.0, score) * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # numpy, in the interpreter, for the poisoned row
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_branch_of_scale_zero_contributes_nothing(dtype: torch.dtype, device: torch.device) -> None:
    inputs = random_inputs(3, 2, 65, 40, (77, 16, 4), dtype, device)
    without, _ = inputs.arguments()
    poison = torch.full_like(inputs.image_keys[0], float("nan"))
    scales = inputs.image_scales.clone()
    scales[:, 0] = 0
    alone = decoupled_attention(
        *without[:3], inputs.image_keys[1:], inputs.image_values[1:],
        image_scales=scales[:, 1:], image_masks=inputs.image_masks[1:], impl="triton",
    )  # fmt: skip
    poisoned = decoupled_attention(
        *without[:3], (poison, inputs.image_keys[1]), (poison, inputs.image_values[1]),
        image_scales=scales, image_masks=inputs.image_masks, impl="triton",
    )  # fmt: skip
    assert torch.equal(alone, poisoned)
    # per row of the batch: row 1 only
    scales[:, 0] = torch.tensor([0.5, 0.0, 0.5])
    mixed = decoupled_attention(
        *without[:3], (poison, inputs.image_keys[1]), (poison, inputs.image_values[1]),
        image_scales=scales, image_masks=inputs.image_masks, impl="triton",
    )  # fmt: skip
    assert torch.equal(mixed[1], alone[1])
    assert mixed[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(77, 16), (257, 154)], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_60000(sign: int, lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    def draw() -> Inputs:
        # integers times a power of two: the scores are exact in float32 in any order of summation, and what differs is not how
        # near-ties between scores of this size were rounded
        inputs = random_inputs(2, 4, 65, 64, lengths, dtype, device)
        keys = (inputs.key, *inputs.image_keys)
        for tensor in (inputs.query, *keys):
            tensor.mul_(2).round_()
        power = math.floor(math.log2(6.6e4 / reference.largest_score(inputs.query, keys)))
        inputs.query.mul_(sign * 2.0**power)
        assert 3e4 < reference.largest_score(inputs.query, keys) < 7e4
        return inputs

    assert_within_budget(draw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_image_scores_200_below_those_of_text(dtype: torch.dtype, device: torch.device) -> None:
    def draw() -> Inputs:
        inputs = random_inputs(2, 4, 65, 64, (77, 16), dtype, device)
        inputs.query[..., 0] = 20
        inputs.key[..., 0] = 40
        inputs.image_keys[0][..., 0] = -40
        return inputs

    assert_within_budget(draw)
    inputs = draw()
    with_image, _ = compare(inputs)
    text = decoupled_attention(inputs.query, inputs.key, inputs.value, (), (), impl="triton")
    assert not torch.equal(with_image, text), "the image branch vanished"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_branches_are_not_one_softmax(dtype: torch.dtype, device: torch.device) -> None:
    inputs = random_inputs(2, 2, 65, 64, (77, 16), dtype, device, masked=False)
    positional, _ = inputs.arguments()
    joint = decoupled_attention(*positional, impl="triton")
    halves = [[half for tensor in tensors for half in tensor.split(8, dim=2)] for tensors in positional[3:]]
    split = decoupled_attention(*positional[:3], *halves, impl="triton")
    assert (joint - split).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # numpy, for the rows past the last query
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("length", [77, 200])
def test_keys_with_scores_of_minus_infinity(length: int, device: torch.device) -> None:
    # a whole first block of them: the online softmax must not subtract infinity from infinity
    inputs = random_inputs(1, 2, 65, 64, (length, 4), torch.float32, device)
    inputs.query[..., 0] = inputs.query[..., 0].abs()
    inputs.key[:, :, :64, 0] = -float("inf")
    actual = decoupled_attention(*inputs.arguments()[0], impl="triton")
    without = (inputs.query, inputs.key[:, :, 64:], inputs.value[:, :, 64:], inputs.image_keys, inputs.image_values)
    torch.testing.assert_close(actual, decoupled_attention(*without, impl="eager"))


@pytest.mark.parametrize("scale", [0.03, 1.0])
def test_softmax_scale(scale: float, device: torch.device) -> None:
    assert_within_budget(lambda: random_inputs(2, 2, 65, 40, (77, 16), torch.float32, device), scale=scale)


@pytest.mark.parametrize("form", ["[M]", "[1, M]", "[B, M]", "every other of [B, 2M]"])
@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_forms_of_masks(form: str, mask_dtype: torch.dtype, device: torch.device) -> None:
    shape = {"[M]": (65,), "[1, M]": (1, 65), "[B, M]": (3, 65), "every other of [B, 2M]": (3, 130)}[form]

    def draw() -> Inputs:
        inputs = random_inputs(3, 2, 65, 40, (77, 16), torch.float32, device, masked=False)
        mask = torch.randn(shape, dtype=mask_dtype, device=device)
        return Inputs(**{**vars(inputs), "image_masks": (mask[:, ::2] if shape[-1] == 130 else mask,)})

    assert_within_budget(draw)


@pytest.mark.parametrize("scales", [0.5, [0.5, -1], (1, 2.0), "[n]", "[B, n]", "[n] float64", "[B, n] float16"], ids=str)
def test_forms_of_scales(scales: object, device: torch.device) -> None:
    inputs = random_inputs(3, 2, 65, 40, (77, 16, 4), torch.float32, device)
    if isinstance(scales, str):
        dtype = {"float64": torch.float64, "float16": torch.float16}.get(scales.split()[-1], torch.float32)
        scales = torch.tensor([0.5, -0.25] if scales.startswith("[n]") else [[0.5, 1], [2, -1], [0, 3]], dtype=dtype)
    positional, keywords = inputs.arguments()
    keywords["image_scales"] = scales
    actual = decoupled_attention(*positional, **keywords, impl="triton")
    truth = reference.decoupled_attention(*positional, **keywords)
    torch.testing.assert_close(actual, truth)


def test_batch_expanded_and_shared_inputs(device: torch.device) -> None:
    def draw() -> Inputs:
        one = random_inputs(1, 2, 65, 64, (77, 16), torch.float32, device)
        queries = random_inputs(3, 2, 65, 64, (77,), torch.float32, device).query
        inputs = Inputs(
            queries, one.key.expand(3, -1, -1, -1), one.value, (one.image_keys[0].expand(3, -1, -1, -1),), one.image_values,
            one.image_scales.expand(3, -1), one.image_masks,
        )  # fmt: skip
        assert inputs.key.stride(0) == 0
        return inputs

    assert_within_budget(draw)


def test_head_major_inputs(device: torch.device) -> None:
    inputs = random_inputs(2, 3, 65, 64, (77, 16), torch.float32, device)
    same = Inputs(
        inputs.query.contiguous(), inputs.key.contiguous(), inputs.value, tuple(k.contiguous() for k in inputs.image_keys),
        inputs.image_values, inputs.image_scales, inputs.image_masks,
    )  # fmt: skip
    assert torch.equal(compare(same)[0], compare(inputs)[0])


def test_the_result_is_stored_with_heads_beside_each_other(device: torch.device) -> None:
    inputs = random_inputs(2, 3, 65, 64, (77, 16), torch.float32, device)
    positional, keywords = inputs.arguments()
    for impl in ("triton", "eager"):
        assert decoupled_attention(*positional, **keywords, impl=impl).transpose(1, 2).is_contiguous()


def test_the_same_bits_every_time(device: torch.device) -> None:
    inputs = random_inputs(2, 2, 65, 40, (77, 16, 257), torch.float16, device)
    positional, keywords = inputs.arguments()
    first, *others = (decoupled_attention(*positional, **keywords, impl="triton") for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dimension", ["batch", "heads", "tokens"])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_offsets_beyond_32_bits(name: str, dimension: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # no stride passes 2**31, the last element does; the memory between the elements is never touched
    monkeypatch.undo()
    axis = ("batch", "heads", "tokens").index(dimension)
    inputs = random_inputs(3, 3, 9, 16, (17, 4), torch.float16, device)
    tensor = getattr(inputs, name)
    strides = list(tensor.contiguous().stride())
    strides[axis] = 2**31 // (tensor.shape[axis] - 1) + 64
    memory = torch.empty(2**31 + 2**13, dtype=tensor.dtype, device=device)
    spread = memory.as_strided(tensor.shape, strides).copy_(tensor)
    assert max(strides) < 2**31 < sum((size - 1) * stride for size, stride in zip(spread.shape, strides, strict=True))
    moved = Inputs(**{**vars(inputs), name: spread})
    expected = decoupled_attention(*inputs.arguments()[0], impl="triton")
    assert torch.equal(decoupled_attention(*moved.arguments()[0], impl="triton"), expected)
