"""The public op: validate, choose an implementation, allocate."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import autograd, eager
from .dispatch import choose, is_fake, is_traced
from .validation import Problem, check_arguments, needs_gradient
from .weights import filled, make_launch


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
    impl: str = "auto",
) -> Tensor:
    r"""Decoupled cross-attention: softmax(Q·Kᵗ·scale)·V + Σᵢ scaleᵢ·maskᵢ · softmax(Q·Kᵢᵗ·scale)·Vᵢ.

    Each branch has its own softmax (arXiv:2308.06721, section 3.2.2; diffusers `IPAdapterAttnProcessor2_0`).

    Args:
        query: ``[B, H, M, D]``, float16, bfloat16 or float32 (float64 runs eagerly), as in SDPA.
        key, value: ``[B or 1, H, N, D]``, the text branch; dtype and device of ``query``.
        image_keys, image_values: sequences of ``[B or 1, H, Nᵢ, D]``, one per image branch; may be empty.
        image_scales: a number for all branches, a sequence of numbers, or a floating tensor ``[n]`` or ``[B, n]`` on the
            device of ``query`` or the CPU. The kernel reads it as float32; eager rounds a tensor to the dtype of ``query``. A
            branch whose scale is 0 contributes exactly nothing, whatever it holds.
        image_masks: None, or one entry per image branch: None or a floating tensor ``[M]`` or ``[B or 1, M]``, a weight per
            query; any value is allowed.
        attn_mask: a floating bias that is added to the text branch's scores, broadcastable to ``[B, H, M, N]``.
        scale: the softmax scale; ``1/sqrt(D)`` by default.
        impl: ``"auto"`` is the kernel on a supported GPU, else eager; ``"triton"`` is the kernel or an error; ``"eager"`` is
            SDPA per branch, in the order of operations of stock diffusers.

    Differentiable in all of its tensors. The gradient of the kernel is a kernel that keeps the inputs alone; it has no gradient
    of its own. A branch of scale 0 gets a gradient of exactly 0, and gives its scale the true derivative, so that it can learn;
    then what the branch holds counts.

    Returns:
        ``[B, H, M, D]``, stored ``[B, M, H, D]``: transposing back to ``[B, M, H·D]`` is free.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument has the wrong shape, dtype, device or number of entries; or ``impl`` is unknown.
        UnsupportedError: ``impl="triton"`` and the kernel cannot run; the message lists every reason.
    """
    problem = check_arguments(query, key, value, image_keys, image_values, image_scales, image_masks, attn_mask, scale)
    chosen, _ = choose(problem, impl)
    return traced_op(problem, impl) if chosen == "triton" and is_traced(problem) else run(problem, chosen)


def run(problem: Problem, impl: str) -> Tensor:
    """Run the implementation that `choose` named."""
    if impl != "triton":
        return eager.decoupled_attention(problem)
    if is_fake(problem.query):
        return traced_op(problem, "auto")
    if not needs_gradient(problem):
        return make_launch(problem)(problem.query)
    with torch.no_grad():
        launch = make_launch(problem)
    return autograd.attend(launch, problem)


def traced_op(problem: Problem, impl: str) -> Tensor:
    """The kernel in a graph, as the op of `torch_library`; where "auto" finds its sizes to be for eager, that runs inside."""
    scales = problem.scales
    if problem.masks and not isinstance(scales, Tensor):
        scales = filled(scales, problem.query)
    return torch.ops.ipa_kernels.decoupled_attention(  # type: ignore[no-any-return]
        problem.query,
        list(problem.keys),
        list(problem.values),
        scales if problem.masks else None,
        [mask for mask in problem.masks if mask is not None],
        [mask is not None for mask in problem.masks],
        problem.softmax_scale,
        problem.rounds_scales,
        impl,
    )
