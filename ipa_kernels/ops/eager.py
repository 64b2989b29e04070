"""The eager twin: one scaled dot product attention per branch, in the order of operations of stock diffusers.

`diffusers.models.attention_processor.IPAdapterAttnProcessor2_0`: out = out + scale · (attention · mask), each step rounded to
the dtype of the query. On the CPU in float32 the result is stock's, bit for bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Problem, default_softmax_scale


def decoupled_attention(problem: Problem) -> Tensor:
    """[B, H, M, D], stored [B, M, H, D]."""
    out = _attention(problem, 0, problem.attn_mask)
    for i, mask in enumerate(problem.masks):
        scale = _scale(problem, i)
        if isinstance(scale, float) and scale == 0:
            continue
        image = _attention(problem, i + 1, None)
        # autograd may have saved either; otherwise both are nobody else's
        in_place = not (torch.is_grad_enabled() and (out.requires_grad or image.requires_grad))
        if mask is not None:
            weights = mask.to(image.dtype)[:, None, :, None]
            image = image.mul_(weights) if in_place and not weights.requires_grad else image * weights
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


def _attention(problem: Problem, branch: int, bias: Tensor | None) -> Tensor:
    query = problem.query
    batch = query.shape[0]
    key, value = problem.keys[branch].expand(batch, -1, -1, -1), problem.values[branch].expand(batch, -1, -1, -1)
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
