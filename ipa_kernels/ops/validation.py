"""Validation: from what a caller passes to one `Problem` that both implementations take. Each error names the argument."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A validated call. Branch 0 is the text; image branch i is `keys[i + 1]`.

    keys, values: [B or 1, H, N, D]; scales: one float per image branch, or a tensor [B or 1, n]; masks: [B or 1, M] or None,
    one per image branch; attn_mask: [B or 1, H or 1, M or 1, N or 1] or None; softmax_scale: multiplies Q·Kᵗ. rounds_scales:
    whether eager rounds a tensor of scales to the dtype of the query, as stock does with one; numbers are not rounded.
    """

    query: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    scales: tuple[float, ...] | Tensor
    masks: tuple[Tensor | None, ...]
    attn_mask: Tensor | None
    softmax_scale: float
    rounds_scales: bool = True

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of keys of each branch."""
        return tuple(key.shape[2] for key in self.keys)

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor of the call."""
        scales = (self.scales,) if isinstance(self.scales, Tensor) else ()
        masks = (m for m in (*self.masks, self.attn_mask) if m is not None)
        return (self.query, *self.keys, *self.values, *scales, *masks)

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Problem":
        """The same with others in their places, in the order of `tensors()`."""
        rest = iter(tensors)
        return replace(
            self,
            query=next(rest),
            keys=tuple(next(rest) for _ in self.keys),
            values=tuple(next(rest) for _ in self.values),
            scales=next(rest) if isinstance(self.scales, Tensor) else self.scales,
            masks=tuple(None if mask is None else next(rest) for mask in self.masks),
            attn_mask=None if self.attn_mask is None else next(rest),
        )


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image_keys: Sequence[Tensor],
    image_values: Sequence[Tensor],
    image_scales: float | Sequence[float] | Tensor,
    image_masks: Sequence[Tensor | None] | None,
    attn_mask: Tensor | None,
    scale: float | None,
) -> Problem:
    """Raise TypeError for a thing of the wrong kind, ValueError for one with the wrong contents."""
    _check_tensor("query", query, "[B, H, M, D]")
    if 0 in query.shape:
        raise ValueError(f"query: expected at least one element in every dimension of [B, H, M, D], got {_shape(query)}")
    _check_like_query("key", key, query)
    _check_like_query("value", value, query)
    _check_pair("value", value, "key", key)

    image_keys = _sequence("image_keys", image_keys)
    image_values = _sequence("image_values", image_values)
    if len(image_keys) != len(image_values):
        raise ValueError(
            f"image_values: expected one tensor for each of the {len(image_keys)} image_keys, got {len(image_values)}"
        )
    for i, (image_key, image_value) in enumerate(zip(image_keys, image_values, strict=True)):
        _check_like_query(f"image_keys[{i}]", image_key, query)
        _check_like_query(f"image_values[{i}]", image_value, query)
        _check_pair(f"image_values[{i}]", image_value, f"image_keys[{i}]", image_key)

    n = len(image_keys)
    return Problem(
        query,
        (key, *image_keys),
        (value, *image_values),
        _check_scales(image_scales, n, query),
        _check_masks(image_masks, n, query),
        _check_attn_mask(attn_mask, query, key),
        _check_softmax_scale(scale, query),
    )


def needs_gradient(problem: Problem) -> bool:
    """Whether autograd records this call."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in problem.tensors())


def has_tangents() -> bool:
    """Whether a dual level of forward-mode differentiation is around this call."""
    return torch.autograd.forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether a transform of torch.func is around this call; False where a compiler traces it, which does not tell."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def default_softmax_scale(head_dim: int) -> float:
    """1/sqrt(D), as in SDPA."""
    return 1 / math.sqrt(head_dim)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _check_tensor(name: str, tensor: object, layout: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor {layout}, got {type(tensor).__name__}")
    if tensor.ndim != layout.count(",") + 1:
        raise ValueError(f"{name}: expected the shape {layout}, got {_shape(tensor)}")
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")


def _check_like_query(name: str, tensor: Tensor, query: Tensor) -> None:
    _check_tensor(name, tensor, "[B or 1, H, N, D]")
    batch, heads, _, head_dim = query.shape
    if tensor.shape[0] not in (batch, 1):
        raise ValueError(f"{name}: expected the batch of query ({batch}) or 1, got {tensor.shape[0]}")
    if tensor.shape[1] != heads:
        raise ValueError(f"{name}: expected the {heads} heads of query, got {tensor.shape[1]}")
    if tensor.shape[2] == 0:
        raise ValueError(f"{name}: expected at least one token, got {_shape(tensor)}; leave an empty branch out")
    if tensor.shape[3] != head_dim:
        raise ValueError(f"{name}: expected the head dim of query ({head_dim}), got {tensor.shape[3]}")
    if tensor.dtype != query.dtype:
        raise ValueError(f"{name}: expected the dtype of query ({query.dtype}), got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name}: expected the device of query ({query.device}), got {tensor.device}")


def _check_pair(name: str, value: Tensor, key_name: str, key: Tensor) -> None:
    if value.shape[2] != key.shape[2]:
        raise ValueError(f"{name}: expected the {key.shape[2]} tokens of {key_name}, got {value.shape[2]}")


def _sequence(name: str, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if isinstance(tensors, Tensor) and tensors.numel() > 0:
        raise TypeError(f"{name}: expected a sequence of tensors, one per image branch, got one Tensor {_shape(tensors)}")
    if not isinstance(tensors, Tensor | Sequence):
        raise TypeError(f"{name}: expected a sequence of tensors, got {type(tensors).__name__}")
    return tuple(tensors)


def _check_scales(scales: float | Sequence[float] | Tensor, n: int, query: Tensor) -> tuple[float, ...] | Tensor:
    batch = query.shape[0]
    if isinstance(scales, Tensor):
        if not scales.dtype.is_floating_point:
            raise ValueError(f"image_scales: expected a floating dtype, got {scales.dtype}")
        if scales.ndim not in (1, 2) or scales.shape[-1] != n or (scales.ndim == 2 and scales.shape[0] not in (batch, 1)):
            raise ValueError(
                f"image_scales: expected the shape [{n}] or [{batch}, {n}] for {n} image branches, got {_shape(scales)}"
            )
        if scales.device != query.device and scales.device.type != "cpu":
            raise ValueError(f"image_scales: expected the device of query ({query.device}) or the CPU, got {scales.device}")
        return scales if scales.ndim == 2 else scales.unsqueeze(0)
    if isinstance(scales, Real):
        return (float(scales),) * n
    if not isinstance(scales, Sequence) or not all(isinstance(s, Real) for s in scales):
        raise TypeError(f"image_scales: expected a number, a sequence of numbers or a tensor, got {scales!r}")
    if len(scales) != n:
        raise ValueError(f"image_scales: expected one scale for each of the {n} image branches, got {len(scales)}")
    return tuple(float(s) for s in scales)


def _check_masks(masks: Sequence[Tensor | None] | None, n: int, query: Tensor) -> tuple[Tensor | None, ...]:
    if masks is None:
        return (None,) * n
    if not isinstance(masks, Tensor | Sequence) or (isinstance(masks, Tensor) and masks.numel() > 0):
        raise TypeError(f"image_masks: expected None or a sequence of tensors and None, got {type(masks).__name__}")
    if len(masks) != n:
        raise ValueError(f"image_masks: expected one entry for each of the {n} image branches, got {len(masks)}")
    return tuple(_check_mask(f"image_masks[{i}]", mask, query) for i, mask in enumerate(masks))


def _check_mask(name: str, mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None:
        return None
    batch, _, queries, _ = query.shape
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected None or a torch.Tensor, got {type(mask).__name__}")
    if mask.ndim not in (1, 2) or mask.shape[-1] != queries or (mask.ndim == 2 and mask.shape[0] not in (batch, 1)):
        raise ValueError(
            f"{name}: expected one value per query, [{queries}], [1, {queries}] or [{batch}, {queries}], got {_shape(mask)}"
        )
    if not mask.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating dtype, got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"{name}: expected the device of query ({query.device}), got {mask.device}")
    return mask if mask.ndim == 2 else mask.unsqueeze(0)


def _check_attn_mask(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if attn_mask is None:
        return None
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask: expected None or a torch.Tensor, got {type(attn_mask).__name__}")
    scores = (*query.shape[:3], key.shape[2])
    shape = (1,) * (4 - attn_mask.ndim) + tuple(attn_mask.shape)
    if len(shape) != 4 or any(size not in (1, full) for size, full in zip(shape, scores, strict=True)):
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {list(scores)}, got {_shape(attn_mask)}")
    if not attn_mask.dtype.is_floating_point:
        raise ValueError(f"attn_mask: expected a floating dtype (it is added to the scores), got {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask: expected the device of query ({query.device}), got {attn_mask.device}")
    return attn_mask.reshape(shape)


def _check_softmax_scale(scale: float | None, query: Tensor) -> float:
    if scale is None:
        return default_softmax_scale(query.shape[-1])
    if not isinstance(scale, Real):
        raise TypeError(f"scale: expected None or a number, got {type(scale).__name__}")
    return float(scale)
