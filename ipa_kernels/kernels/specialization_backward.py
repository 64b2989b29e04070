"""What one compilation of the backward kernel is made for, as `specialization` with the gradients asked for, and its source."""

from dataclasses import dataclass

from triton.compiler import ASTSource

from .backward import decoupled_attention_backward_kernel
from .specialization import POINTERS, Specialization, source_of


@dataclass(frozen=True)
class Wanted:
    """Which gradients beside the query's: of keys and values, one flag per branch, text first; of the weight of a query, scale
    times mask, one per image branch.
    """

    keys: tuple[bool, ...]
    values: tuple[bool, ...]
    weights: tuple[bool, ...]


def backward_source(specialization: Specialization, wanted: Wanted) -> ASTSource:
    """The kernel with the types of its arguments, for `triton.compile`."""
    pointer = POINTERS[specialization.dtype]
    own: dict[str, object] = {
        "dq_ptr": pointer,
        "dk_ptrs": _sums(wanted.keys),
        "dv_ptrs": _sums(wanted.values),
        "delta_ptrs": _sums(wanted.weights),
        "g_ptr": pointer,
        "g_strides": ("i32",) * 3,
        "softmax_scale": "fp32",
    }
    return source_of(decoupled_attention_backward_kernel, specialization, own)


def _sums(wanted: tuple[bool, ...]) -> tuple[str, ...]:
    return tuple("*fp32" if asked else "constexpr" for asked in wanted)
