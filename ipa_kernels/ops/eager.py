"""The eager twin: one scaled dot product attention per branch, in the order of operations of stock diffusers.

`diffusers.models.attention_processor.IPAdapterAttnProcessor2_0`: out = out + scale · (attention · mask), each step rounded to
the dtype of the query. On the CPU in float32 the result is stock's, bit for bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .validation import Problem, default_softmax_scale, has_tangents, is_transformed, needs_gradient


def decoupled_attention(problem: Problem) -> Tensor:
    """[B, H, M, D], stored [B, M, H, D]."""
    differentiable = needs_gradient(problem) or has_tangents() or is_transformed()
    # autograd may have saved a result, and one of torch.func's batches may not fit into it; otherwise it is nobody else's
    in_place = not (differentiable or torch.compiler.is_compiling())
    query = problem.query
    out = _attention(problem, query, problem.keys[0], problem.values[0], problem.attn_mask)
    for i, mask in enumerate(problem.masks):
        scale, key, value = _scale(problem, i), problem.keys[i + 1], problem.values[i + 1]
        if isinstance(scale, float) and scale == 0:
            continue
        weights = None if mask is None else mask.to(query.dtype)[:, None, :, None]
        if isinstance(scale, Tensor) and differentiable:
            # nothing but 0 comes of a branch of scale 0 then: adding it is exact, and gives the scale its true derivative
            image = _image_of_zero(problem, key, value, weights, scale == 0)
            out = out + (scale * image).to(image.dtype)
            continue
        image = _attention(problem, query, key, value, None)
        if weights is not None:
            image = image.mul_(weights) if in_place else image * weights
        if isinstance(scale, Tensor):
            # selected, not multiplied: a branch of scale 0 contributes nothing even where it holds NaN
            out = torch.where(scale == 0, out, out + (scale * image).to(image.dtype))
            continue
        if not in_place:
            out = out + scale * image
            continue
        # times 1 is exact, so that it can be left out
        out.add_(image if scale == 1 else image.mul_(scale))
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _image_of_zero(problem: Problem, key: Tensor, value: Tensor, weights: Tensor | None, zero: Tensor) -> Tensor:
    """The branch, finite and without gradients where `zero`: finite inputs may overflow, and 0 times that would be NaN."""

    def still(tensor: Tensor) -> Tensor:
        return torch.where(zero, tensor.detach(), tensor)

    image = _attention(problem, still(problem.query), still(key), still(value), None)
    if weights is not None:
        image = image * still(weights)
    return torch.where(zero, image.nan_to_num(0.0, 0.0, 0.0), image)


def _attention(problem: Problem, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    batch = query.shape[0]
    key, value = key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
    if bias is not None:
        bias = bias.to(query.dtype)
    # stock leaves the default to SDPA, which computes it in its own precision
    if problem.softmax_scale == default_softmax_scale(query.shape[-1]):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=problem.softmax_scale)


def _scale(problem: Problem, i: int) -> float | Tensor:
    scales = problem.scales
    if isinstance(scales, Tensor):
        dtype = problem.query.dtype if problem.rounds_scales else scales.dtype
        return scales[:, i, None, None, None].to(problem.query.device, dtype)
    return scales[i]
