"""Bad input to `decoupled_attention`: each kind has its own message that names the argument, what is expected, what came."""

import re

import pytest
import torch
from torch import Tensor

from ipa_kernels import UnsupportedError, decoupled_attention
from ipa_kernels.kernels import launch as kernel


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def call(**changed: object) -> Tensor:
    arguments = {
        "query": tensor(2, 3, 5, 8),
        "key": tensor(2, 3, 7, 8),
        "value": tensor(2, 3, 7, 8),
        "image_keys": [tensor(2, 3, 4, 8), tensor(1, 3, 2, 8)],
        "image_values": [tensor(2, 3, 4, 8), tensor(1, 3, 2, 8)],
        "image_scales": [0.5, 1.0],
        "image_masks": [None, tensor(5)],
    }
    return decoupled_attention(**{**arguments, **changed})


IMAGES = [tensor(2, 3, 4, 8), tensor(2, 3, 2, 8)]

BAD = {
    "query of rank 3": ({"query": tensor(2, 5, 24)}, ValueError, "query: expected the shape [B, H, M, D], got [2, 5, 24]"),
    "no query": ({"query": tensor(2, 3, 0, 8)}, ValueError, "query: expected at least one element"),
    "query is a list": ({"query": [1.0]}, TypeError, "query: expected a torch.Tensor [B, H, M, D], got list"),
    "key of rank 5": ({"key": tensor(1, 2, 3, 7, 8)}, ValueError, "key: expected the shape [B or 1, H, N, D]"),
    "key batch": ({"key": tensor(3, 3, 7, 8)}, ValueError, "key: expected the batch of query (2) or 1, got 3"),
    "key heads": ({"key": tensor(2, 4, 7, 8)}, ValueError, "key: expected the 3 heads of query, got 4"),
    "key head dim": ({"key": tensor(2, 3, 7, 16)}, ValueError, "key: expected the head dim of query (8), got 16"),
    "key dtype": (
        {"key": tensor(2, 3, 7, 8, dtype=torch.float16)},
        ValueError,
        "key: expected the dtype of query (torch.float32), got torch.float16",
    ),
    "key device": (
        {"key": tensor(2, 3, 7, 8, device="meta")},
        ValueError,
        "key: expected the device of query (cpu), got meta",
    ),
    "empty text": (
        {"key": tensor(2, 3, 0, 8), "value": tensor(2, 3, 0, 8)},
        ValueError,
        "key: expected at least one token, got [2, 3, 0, 8]",
    ),
    "value tokens": ({"value": tensor(2, 3, 6, 8)}, ValueError, "value: expected the 7 tokens of key, got 6"),
    "integer query": (
        {"query": torch.ones(2, 3, 5, 8, dtype=torch.int64)},
        ValueError,
        "query: expected a floating dtype, got torch.int64",
    ),
    "image keys in one tensor": (
        {"image_keys": tensor(2, 3, 4, 8)},
        TypeError,
        "image_keys: expected a sequence of tensors, one per image branch",
    ),
    "image keys in a number": ({"image_keys": torch.tensor(1.0)}, TypeError, "image_keys: expected a sequence of tensors, one"),
    "image keys of None": ({"image_keys": None}, TypeError, "image_keys: expected a sequence of tensors, got NoneType"),
    "image values missing": (
        {"image_values": IMAGES[:1]},
        ValueError,
        "image_values: expected one tensor for each of the 2 image_keys, got 1",
    ),
    "image key batch": (
        {"image_keys": [IMAGES[0], tensor(5, 3, 2, 8)]},
        ValueError,
        "image_keys[1]: expected the batch of query (2) or 1, got 5",
    ),
    "image value head dim": (
        {"image_values": [tensor(2, 3, 4, 16), IMAGES[1]]},
        ValueError,
        "image_values[0]: expected the head dim of query (8), got 16",
    ),
    "image value tokens": (
        {"image_values": [tensor(2, 3, 5, 8), IMAGES[1]]},
        ValueError,
        "image_values[0]: expected the 4 tokens of image_keys[0], got 5",
    ),
    "empty branch": (
        {"image_keys": [IMAGES[0], tensor(2, 3, 0, 8)], "image_values": [IMAGES[0], tensor(2, 3, 0, 8)]},
        ValueError,
        "image_keys[1]: expected at least one token",
    ),
    "number of scales": (
        {"image_scales": [1.0, 2.0, 3.0]},
        ValueError,
        "image_scales: expected one scale for each of the 2 image branches, got 3",
    ),
    "shape of scales": (
        {"image_scales": tensor(3, 2)},
        ValueError,
        "image_scales: expected the shape [2] or [2, 2] for 2 image branches, got [3, 2]",
    ),
    "integer scales": ({"image_scales": torch.tensor([1, 2])}, ValueError, "image_scales: expected a floating dtype"),
    "scales of strings": ({"image_scales": ["a", "b"]}, TypeError, "image_scales: expected a number"),
    "device of scales": (
        {"image_scales": tensor(2, device="meta")},
        ValueError,
        "image_scales: expected the device of query (cpu) or the CPU, got meta",
    ),
    "number of masks": (
        {"image_masks": [tensor(5)]},
        ValueError,
        "image_masks: expected one entry for each of the 2 image branches, got 1",
    ),
    "masks in one tensor": ({"image_masks": tensor(2, 5)}, TypeError, "image_masks: expected None or a sequence"),
    "length of a mask": (
        {"image_masks": [None, tensor(6)]},
        ValueError,
        "image_masks[1]: expected one value per query, [5], [1, 5] or [2, 5], got [6]",
    ),
    "batch of a mask": ({"image_masks": [tensor(3, 5), None]}, ValueError, "image_masks[0]: expected one value per query"),
    "boolean mask": ({"image_masks": [torch.ones(5) > 0, None]}, ValueError, "image_masks[0]: expected a floating dtype"),
    "mask on another device": (
        {"image_masks": [tensor(5, device="meta"), None]},
        ValueError,
        "image_masks[0]: expected the device of query (cpu), got meta",
    ),
    "mask that is a number": ({"image_masks": [1.0, None]}, TypeError, "image_masks[0]: expected None or a torch.Tensor"),
    "shape of attn_mask": (
        {"attn_mask": tensor(5, 6)},
        ValueError,
        "attn_mask: expected a shape that broadcasts to [2, 3, 5, 7], got [5, 6]",
    ),
    "rank of attn_mask": ({"attn_mask": tensor(1, 1, 1, 5, 7)}, ValueError, "attn_mask: expected a shape that broadcasts"),
    "boolean attn_mask": ({"attn_mask": torch.ones(5, 7) > 0}, ValueError, "attn_mask: expected a floating dtype"),
    "scale that is a string": ({"scale": "1"}, TypeError, "scale: expected None or a number, got str"),
    "unknown impl": ({"impl": "cuda"}, ValueError, "impl: expected one of 'auto', 'triton', 'eager', got 'cuda'"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("impl", ["auto", "triton", "eager"])
def test_bad_input_is_named(name: str, impl: str) -> None:
    changed, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)) as caught:
        call(**{"impl": impl, **changed})
    assert not isinstance(caught.value, UnsupportedError), "a wrong argument is not a missing feature"


def test_every_message_is_its_own() -> None:
    messages = [message for _, _, message in BAD.values()]
    assert len(set(messages)) == len(messages)


def test_the_good_call_is_good() -> None:
    assert call().shape == (2, 3, 5, 8)


@pytest.mark.parametrize("empty", [(), [], torch.empty(0)], ids=repr)
@pytest.mark.parametrize("scales", [1.0, (), torch.empty(0), torch.empty(2, 0)], ids=repr)
@pytest.mark.parametrize("masks", [None, (), torch.empty(0)], ids=repr)
@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_no_image_branch(empty: object, scales: object, masks: object, impl: str) -> None:
    arguments = {"image_keys": empty, "image_values": empty, "image_scales": scales, "image_masks": masks}
    query, key, value = tensor(2, 3, 5, 8), tensor(2, 3, 7, 8), tensor(2, 3, 7, 8)
    actual = decoupled_attention(query, key, value, **arguments, impl=impl)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(actual, expected)


def test_unsupported_lists_every_reason() -> None:
    odd = {"query": tensor(2, 3, 5, 12, dtype=torch.float64), "scale": -1.0, "attn_mask": tensor(5, 7)}
    for name, length in (("key", 7), ("value", 7)):
        odd[name] = tensor(2, 3, length, 24, dtype=torch.float64)[..., ::2]
    images = [tensor(2, 3, 4, 12, dtype=torch.float64)] * 2
    with pytest.raises(UnsupportedError) as caught:
        call(**odd, image_keys=images, image_values=images, impl="triton")
    message = str(caught.value)
    for reason in (
        "query [2, 3, 5, 12]",
        "torch.float64, cpu",
        "dtype torch.float64: the kernel computes in",
        "head dim 12: the kernel needs a multiple of 8 up to 256",
        "attn_mask: the kernel takes no bias",
        "scale -1.0: the kernel needs a positive softmax scale",
        "key strides (504, 168, 24, 2): the kernel needs a last stride of 1",
        "value strides",
    ):
        assert reason in message


def test_what_only_looks_harmless_is_refused() -> None:
    query = tensor(2, 3, 5, 8)
    with pytest.raises(UnsupportedError, match="scale 1e-50: the kernel needs"):
        call(scale=1e-50, impl="triton")
    with pytest.raises(UnsupportedError, match="query: a lazily negated view"):
        call(query=torch._neg_view(query), impl="triton")


def test_transforms_of_torch_func_are_a_reason() -> None:
    query = tensor(2, 3, 5, 8)

    def total(query: torch.Tensor, impl: str) -> torch.Tensor:
        return call(query=query, impl=impl).sum()

    with pytest.raises(UnsupportedError, match=r"torch\.func: the kernel has no rules"):
        torch.func.grad(total)(query, "triton")
    assert torch.func.grad(total)(query, "auto").isfinite().all()


def test_bfloat16_is_refused_by_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "INTERPRETED", True)
    query = tensor(2, 3, 5, 8, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="interpreter computes bfloat16 wrongly"):
        decoupled_attention(query, query, query, (), (), impl="triton")
