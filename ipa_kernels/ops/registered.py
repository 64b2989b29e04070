"""`torch.ops.ipa_kernels.decoupled_attention`: the kernel as one opaque op, for compilers, exporters and fake tensors.

In eager mode nobody comes through here: see docs/decisions/0013-compiled.md for what the boundary costs.
"""

import torch
from torch import Tensor

from .arguments import Problem
from .decoupled_attention import choose, run

_SCHEMA = (
    "decoupled_attention(Tensor query, Tensor[] keys, Tensor[] values, Tensor? scales, Tensor?[] masks, float softmax_scale, "
    "bool rounds_scales, str impl) -> Tensor"
)

_LIBRARY = torch.library.Library("ipa_kernels", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(_SCHEMA)  # type: ignore[no-untyped-call]


def _attend(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    scales: Tensor | None,
    masks: list[Tensor | None],
    softmax_scale: float,
    rounds_scales: bool,
    impl: str,
) -> Tensor:
    """[B, H, M, D], stored [B, M, H, D]; arguments as in `Problem`, text first, validated when they were traced.

    impl: "triton", or "auto" where sizes that eager is faster for may still come.
    """
    problem = Problem(
        query, tuple(keys), tuple(values), () if scales is None else scales, tuple(masks), None, softmax_scale, rounds_scales
    )
    chosen, _ = choose(problem, impl)
    return run(problem, chosen)


def _shape(query: Tensor, *arguments: object) -> Tensor:
    batch, heads, queries, head_dim = query.shape
    return query.new_empty((batch, queries, heads, head_dim)).transpose(1, 2)


_LIBRARY.impl("decoupled_attention", _attend, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("ipa_kernels::decoupled_attention", _shape, lib=_LIBRARY)
