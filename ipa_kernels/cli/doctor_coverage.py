"""What a device runs in the kernel and what not, and why: asked of the functions that decide it at run time."""

from bisect import bisect_left
from dataclasses import dataclass

import torch

from ..kernels.dtypes import dtype_name
from ..kernels.launch_table import ANY, LARGEST_HEAD_DIM
from ..ops.api import decoupled_attention
from ..ops.dispatch import automatic_reasons, gradient_reasons, layer_reasons, length_reasons
from ..reference import Comparison, compare
from ..reference import decoupled_attention as oracle
from ..testing.layer_cases import CASES

HEAD_DIMS = range(8, LARGEST_HEAD_DIM + 1, 8)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRIED = CASES["sdxl_1024_64x64"].small()
"""What `try_kernel` launches, in float16."""

_LONGEST = 2**16


Kind = tuple[str, int | None, tuple[str, ...]]


@dataclass(frozen=True)
class Group:
    """Dtypes and head dims that fare alike under `impl="auto"`.

    impl: "triton" or "eager". longest_image: tokens of the longest image branch that the kernel takes, None where any. reasons:
    why not the kernel; with a longest image branch, why not beyond it.
    """

    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    impl: str
    longest_image: int | None
    reasons: tuple[str, ...]


def coverage(device: torch.device, *, gradient: bool) -> list[Group]:
    """Every dtype and head dim in one group of its kind; with `gradient`, of calls that have to be differentiated."""
    alike: dict[tuple[tuple[Kind, tuple[int, ...]], ...], list[str]] = {}
    for dtype in DTYPES:
        kinds: dict[Kind, list[int]] = {}
        for head_dim in HEAD_DIMS:
            kinds.setdefault(_kind(device, dtype, head_dim, gradient), []).append(head_dim)
        ordered = sorted(
            ((kind, tuple(head_dims)) for kind, head_dims in kinds.items()), key=lambda item: item[0][0] == "eager"
        )
        alike.setdefault(tuple(ordered), []).append(dtype_name(dtype))
    return [Group(tuple(dtypes), head_dims, *kind) for kinds, dtypes in alike.items() for kind, head_dims in kinds]


def _kind(device: torch.device, dtype: torch.dtype, head_dim: int, gradient: bool) -> Kind:
    """(impl, longest image branch, reasons): the same for all head dims of a group, so the reasons do not name one."""
    reasons = layer_reasons(device, dtype, head_dim) + automatic_reasons(device, dtype)
    if gradient and not reasons:
        reasons = gradient_reasons(device, dtype, head_dim, 0)
    if reasons:
        return "eager", None, tuple(reason.replace(f"head dim {head_dim}: ", "") for reason in reasons)

    def refused(image_keys: int) -> list[str]:
        found = length_reasons(device, dtype, head_dim, image_keys)
        return found or (gradient_reasons(device, dtype, head_dim, image_keys) if gradient else [])

    if not refused(ANY):
        return "triton", None, ()
    first = bisect_left(range(_LONGEST), True, key=lambda image_keys: bool(refused(image_keys)))
    beyond = (reason.replace(f"{first} image keys: ", "").replace(f" at head dim {head_dim}", "") for reason in refused(first))
    return "triton", first - 1, tuple(beyond)


def try_kernel(device: torch.device) -> Comparison:
    """Compile and launch the kernel once, and measure the result; raises what the compiler, the driver or the op raises."""
    inputs = TRIED.inputs(torch.float16, device)
    positional, named = inputs.arguments()
    actual = decoupled_attention(*positional, **named, impl="triton")  # type: ignore[arg-type]
    stock = decoupled_attention(*positional, **named, impl="eager")  # type: ignore[arg-type]
    positional, named = inputs.to(torch.float64).arguments()
    return compare(actual, stock, oracle(*positional, **named))  # type: ignore[arg-type]
