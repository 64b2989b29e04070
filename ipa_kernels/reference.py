"""The truth, stock's rounding of it, and the ruler that measures distances. torch only, written for reading.

    out = softmax(Q·Kᵗ·scale)·V + Σᵢ wᵢ · softmax(Q·Kᵢᵗ·scale)·Vᵢ        wᵢ(b, m) = image_scalesᵢ(b) · image_masksᵢ(b, m)

B batch, H heads, M queries, N keys of the text, Nᵢ keys of image branch i, D head dim (arXiv:2308.06721, section 3.2.2).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(Q·Kᵗ·scale + bias)·V, step by step in the dtype of the inputs."""
    scores = query @ key.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1) @ value


def decoupled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image_keys: Sequence[Tensor],
    image_values: Sequence[Tensor],
    *,
    image_scales: float | Sequence[float] | Tensor = 1.0,
    image_masks: Sequence[Tensor | None] | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`ipa_kernels.decoupled_attention` with the same arguments, unvalidated, in any float dtype; [B, H, M, D]."""
    batch = query.shape[0]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scales = torch.as_tensor(image_scales, dtype=query.dtype, device=query.device).expand(batch, len(image_keys))
    masks = image_masks if image_masks is not None else [None] * len(image_keys)

    out = attention(query, key, value, attn_mask, scale)
    for i, (image_key, image_value, mask) in enumerate(zip(image_keys, image_values, masks, strict=True)):
        weight = scales[:, i, None, None, None]
        image = weight * attention(query, image_key, image_value, None, scale)
        if mask is not None:
            image = image * mask.to(query.dtype).expand(batch, query.shape[2])[:, None, :, None]
        # selected, not multiplied: a branch of scale 0 contributes nothing even where it holds NaN
        out = torch.where(weight == 0, out, out + image)
    return out


def stock_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image_keys: Sequence[Tensor],
    image_values: Sequence[Tensor],
    *,
    image_scales: Sequence[float],
    image_masks: Sequence[Tensor | None],
) -> Tensor:
    """What stock diffusers computes from projected queries on (`IPAdapterAttnProcessor2_0`), each step rounded to the dtype."""
    out = F.scaled_dot_product_attention(query, key, value)
    for image_key, image_value, scale, mask in zip(image_keys, image_values, image_scales, image_masks, strict=True):
        if scale == 0:
            continue
        image = F.scaled_dot_product_attention(query, image_key, image_value)
        if mask is not None:
            image = image * mask.to(query.dtype)[:, None, :, None]
        out = out + scale * image
    return out


def largest_score(query: Tensor, keys: Sequence[Tensor], scale: float | None = None) -> float:
    """The largest |Q·Kᵗ·scale| over all branches, in float64."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = [(query.double() @ key.double().transpose(-1, -2) * scale).abs().max() for key in keys]
    # by torch, whose maximum is NaN where any is
    return float(torch.stack(scores).max())


@dataclass(frozen=True)
class Comparison:
    """Distances from float64 of a result and of stock's, and the largest distances that the result is allowed."""

    rms: float
    max: float
    stock_rms: float
    stock_max: float
    allowed_rms: float
    allowed_max: float

    @property
    def proves_nothing(self) -> bool:
        """Whether stock, float64 or the scores are not finite: what is allowed is then no measure of anything."""
        return not all(map(math.isfinite, (self.stock_rms, self.stock_max, self.allowed_rms, self.allowed_max)))

    @property
    def within(self) -> bool:
        """Whether the result is as close to float64 as promised; False where it is NaN, and where nothing is proved."""
        return not self.proves_nothing and self.rms <= self.allowed_rms and self.max <= self.allowed_max

    def __str__(self) -> str:
        verdict = "within the budget" if self.within else "EXCEEDS the budget"
        if self.proves_nothing:
            verdict = "PROVES NOTHING, as stock, float64 or the scores are not finite"
        return (
            f"rms {self.rms:.3e} (stock {self.stock_rms:.3e}, allowed {self.allowed_rms:.3e}), "
            f"max {self.max:.3e} (stock {self.stock_max:.3e}, allowed {self.allowed_max:.3e}): {verdict}"
        )


def compare(actual: Tensor, stock: Tensor, truth: Tensor, *, score: float = 1.0, text_only: bool = False) -> Comparison:
    """Measure `actual` against the float64 `truth`, beside what stock reaches in the same dtype.

    `actual` and `stock` share a dtype, and all three a shape; `score` is `largest_score` of the inputs and matters in
    float32 only; `text_only` says that no image branch contributes. The allowance is a statement about error statistics:
    use it over at least 1,000 values. Where stock, the truth or `score` is not finite, the comparison proves nothing.

    float16, bfloat16: rms ≤ 1.0 × stock's (text alone 1.05 ×), max ≤ 1.5 × stock's.
    float32: rms ≤ the larger of 1.2 × stock's and 4 eps · rms(truth) · max(1, score), max ≤ 2 × stock's.
    """
    if truth.dtype != torch.float64:
        raise ValueError(f"truth: expected torch.float64, got {truth.dtype}")
    if actual.dtype != stock.dtype:
        raise ValueError(f"actual and stock: expected the same dtype, got {actual.dtype} and {stock.dtype}")
    if not actual.shape == stock.shape == truth.shape:
        raise ValueError(
            "actual, stock and truth: expected the same shape, got "
            f"{tuple(actual.shape)}, {tuple(stock.shape)} and {tuple(truth.shape)}"
        )
    rms, largest = _distance(actual, truth)
    stock_rms, stock_largest = _distance(stock, truth)
    if actual.dtype == torch.float32:
        floor = 4 * torch.finfo(torch.float32).eps * float(truth.square().mean().sqrt()) * max(score, 1.0)
        # the floor first: where it is NaN, so is the maximum
        allowed_rms, allowed_max = max(floor, 1.2 * stock_rms), 2 * stock_largest
    else:
        allowed_rms, allowed_max = (1.05 if text_only else 1.0) * stock_rms, 1.5 * stock_largest
    return Comparison(rms, largest, stock_rms, stock_largest, allowed_rms, allowed_max)


def compare_call(
    results: Mapping[str, Tensor],
    stock: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image_keys: Sequence[Tensor],
    image_values: Sequence[Tensor],
    **options: Any,
) -> dict[str, Comparison]:
    """`compare` for results, by name, of one call of `decoupled_attention`; the truth is computed here, once for all."""
    exact = (query.double(), key.double(), value.double(), [k.double() for k in image_keys], [v.double() for v in image_values])
    truth = decoupled_attention(*exact, **options)
    # branches of scale 0 contribute nothing, errors included
    scales = torch.as_tensor(options.get("image_scales", 1.0)).expand(query.shape[0], len(image_keys))
    contributing = [image_key for image_key, scale in zip(image_keys, scales.any(0), strict=True) if scale]
    score = largest_score(query, (key, *contributing), options.get("scale"))
    return {name: compare(r, stock, truth, score=score, text_only=not contributing) for name, r in results.items()}


def kept(draws: Sequence[Comparison]) -> bool:
    """Whether the promise is kept, from one comparison, or from three or more on fresh inputs where one of them is not within.

    The rms of the errors is a steady figure and counts in every draw. The largest of them is not: in float32 its ratio to
    stock's largest has a standard deviation of 0.2 to 0.3 (log), so that one draw in some hundred exceeds the promised 2 by
    chance. Of three draws or more, one may; of fewer, none. None may prove nothing.
    """
    beyond = sum(not draw.within for draw in draws)
    steady = bool(draws) and all(draw.rms <= draw.allowed_rms and not draw.proves_nothing for draw in draws)
    return steady and beyond <= (len(draws) >= 3)


def _distance(actual: Tensor, truth: Tensor) -> tuple[float, float]:
    error = actual.double() - truth
    return float(error.square().mean().sqrt()), float(error.abs().max())
