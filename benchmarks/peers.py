"""What decoupled cross-attention is compared with, on projected queries, keys and values.

Every peer is stock diffusers' order of operations around another attention: one call per branch, a multiply by the mask, a
multiply by the scale, an add. None of them can express the sum of two softmaxes in one call. A peer that cannot run says why.
"""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ipa_kernels.benchmarking.timing import first_line
from ipa_kernels.testing.layer_cases import Inputs

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""[B, H, M, D], [B, H, N, D], [B, H, N, D] to [B, H, M, D]."""

Run = Callable[[], Tensor]
"""One call with its inputs bound: [B, M, H·D]."""


def stock_order(
    attend: Attend,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[float],
    masks: Sequence[Tensor | None],
) -> Tensor:
    """[B, M, H·D] as diffusers 0.42 has it in `IPAdapterAttnProcessor2_0`, from the projected queries on; text comes first.

    masks: as stock repeats them, [B, M, H·D].
    """
    batch, heads, queries, head_dim = query.shape

    def branch(key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value).transpose(1, 2).reshape(batch, queries, heads * head_dim).to(query.dtype)

    out = branch(keys[0], values[0])
    for key, value, scale, mask in zip(keys[1:], values[1:], scales, masks, strict=True):
        image = branch(key, value)
        out = out + scale * (image if mask is None else image * mask)
    return out


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """With the backend that torch chooses, as stock calls it."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False)


@dataclass(frozen=True)
class Peer:
    """A way to run the attentions. package: what must be installed; compiled: whether all of it goes through torch.compile."""

    attend: Callable[[], Attend]
    package: str = "torch"
    compiled: bool = False
    head_dims: int | None = None
    """The largest head dim that it takes, where it does not refuse larger ones itself."""


def _sdpa_with(backend: SDPBackend) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(query, key, value)

    return attend


def _flex() -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def _xformers() -> Attend:
    from xformers.ops import memory_efficient_attention

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = memory_efficient_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)))
        return out.transpose(1, 2)

    return attend


def _sage() -> Attend:
    from sageattention import sageattn

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sageattn(query, key, value, tensor_layout="HND", is_causal=False)  # type: ignore[no-any-return]

    return attend


PEERS = {
    "stock_compiled": Peer(lambda: sdpa, compiled=True),
    "sdpa_flash": Peer(lambda: _sdpa_with(SDPBackend.FLASH_ATTENTION)),
    "sdpa_efficient": Peer(lambda: _sdpa_with(SDPBackend.EFFICIENT_ATTENTION)),
    "sdpa_cudnn": Peer(lambda: _sdpa_with(SDPBackend.CUDNN_ATTENTION)),
    "sdpa_math": Peer(lambda: _sdpa_with(SDPBackend.MATH)),
    "flex_compiled": Peer(_flex, compiled=True),
    "xformers": Peer(_xformers, package="xformers"),
    "sage": Peer(_sage, package="sageattention", head_dims=128),
}


def bind(order: Callable[..., Tensor], attend: Attend, inputs: Inputs) -> Run:
    """One call of `stock_order`, eager or compiled; what stock repeats per call (the masks) is made here, outside its time."""
    batch, heads, queries, head_dim = inputs.query.shape
    masks = [m if m is None else m[..., None].expand(batch, queries, heads * head_dim).clone() for m in inputs.image_masks]
    keys, values = [inputs.key, *inputs.image_keys], [inputs.value, *inputs.image_values]
    scales = inputs.image_scales[0].tolist()
    return lambda: order(attend, inputs.query, keys, values, scales, masks)


def runs(name: str, sets: Sequence[Inputs]) -> list[Run] | str:
    """One call per set of inputs, the first of which has been run once; or why this peer cannot run them.

    `torch.compiler.reset()` belongs before each shape: torch gives up compiling what was compiled for many.
    """
    peer = PEERS[name]
    head_dim = sets[0].query.shape[-1]
    if importlib.util.find_spec(peer.package) is None:
        return f"{peer.package}: not installed"
    if peer.head_dims is not None and head_dim > peer.head_dims:
        return f"head dim {head_dim}: {peer.package} takes at most {peer.head_dims}"
    order: Callable[..., Tensor] = stock_order
    if peer.compiled:
        # whole and for these shapes alone: a graph that breaks, or is run for others, would be timed as what it is not
        order = torch.compile(stock_order, fullgraph=True, dynamic=False)
    said: list[Any] = []
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            attend = peer.attend()
            bound = [bind(order, attend, inputs) for inputs in sets]
            bound[0]()
    except Exception as error:  # whatever a peer raises is its result
        return "; ".join([first_line(error), *dict.fromkeys(str(warning.message).splitlines()[0] for warning in said)])[:400]
    return bound
