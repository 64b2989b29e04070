"""What one compilation of the kernel is made for, and the source that the compiler is given: launches and reports share it.

Nothing is specialised on the values of arguments: every launch of a specialization runs the very code that was compiled, and
counted, without a GPU. What the kernel relies on instead (`launch` sees to it): bases and strides are multiples of 16 bytes.
"""

import functools
from dataclasses import dataclass
from typing import Any

import triton
from triton.compiler import ASTSource

from .forward import decoupled_attention_kernel
from .launch_table import LaunchConfig

POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}

UNALIGNED = ("scale_ptr", "mask_ptrs", "delta_ptrs")
"""Pointers that are read and written a number at a time."""

INTERPRETED = not isinstance(decoupled_attention_kernel, triton.runtime.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when this module was imported: kernels then run on the CPU, in numpy."""


@dataclass(frozen=True)
class Branch:
    """One softmax. whole: its number of keys where it is held whole, 0 where it is looped over. rest: of a loop, how many keys
    at most are left after the whole blocks, in steps of 16. mask: dtype of the mask, if any.
    """

    whole: int
    rest: int
    mask: str | None


@dataclass(frozen=True)
class Specialization:
    """Everything that one compilation depends on besides the device. The text is the first branch; dtypes by torch's names."""

    dtype: str
    head_dim: int
    branches: tuple[Branch, ...]
    tf32: bool
    config: LaunchConfig

    @functools.cached_property
    def vector(self) -> int:
        """The elements in 16 bytes."""
        return vector(self.dtype)

    @functools.cached_property
    def constants(self) -> dict[str, object]:
        """The constexpr arguments of the kernel, in its order."""
        return {
            "HEAD_DIM": self.head_dim,
            "LENGTHS": tuple(branch.whole for branch in self.branches),
            "RESTS": tuple(branch.rest for branch in self.branches),
            "VECTOR": self.vector,
            "BLOCK_M": self.config.block_m,
            "BLOCK_N": self.config.block_n,
            "PRECISION": "tf32" if self.tf32 else "ieee",
        }


def vector(dtype: str) -> int:
    """The elements in 16 bytes."""
    return 4 if dtype == "float32" else 8


@functools.cache
def specialize(
    dtype: str, head_dim: int, lengths: tuple[int, ...], masks: tuple[str | None, ...], tf32: bool, config: LaunchConfig
) -> Specialization:
    """The specialization for the lengths of all branches, text first, and the masks of the image branches.

    One image branch that must be looped over takes all others with it: a mixture needs the registers of both.
    """
    text, *images = lengths
    whole_images = max(images, default=0) <= config.whole_image_keys
    whole = (text <= config.whole_keys and whole_images, *(whole_images,) * len(images))
    branches = (
        Branch(length, 0, mask) if held else Branch(0, -(-(length % config.block_n) // 16) * 16, mask)
        for length, held, mask in zip(lengths, whole, (None, *masks), strict=True)
    )
    return Specialization(dtype, head_dim, tuple(branches), tf32, config)


def source(specialization: Specialization) -> ASTSource:
    """The kernel with the types of its arguments, for `triton.compile`."""
    return source_of(decoupled_attention_kernel, specialization, {"out_ptr": POINTERS[specialization.dtype]})


def source_of(kernel: Any, specialization: Specialization, own: dict[str, object]) -> ASTSource:
    """The source of a kernel that takes what the forward takes, and arguments of its `own` types; "constexpr" is a None."""
    n = len(specialization.branches)
    masks = tuple(branch.mask for branch in specialization.branches[1:])
    pointer = POINTERS[specialization.dtype]
    types: dict[str, object] = {
        **own,
        "q_ptr": pointer,
        "k_ptrs": (pointer,) * n,
        "v_ptrs": (pointer,) * n,
        "scale_ptr": "*fp32" if n > 1 else "constexpr",
        "mask_ptrs": tuple("constexpr" if mask is None else POINTERS[mask] for mask in masks),
        "q_strides": ("i32",) * 3,
        "k_strides": (("i32",) * 3,) * n,
        "v_strides": (("i32",) * 3,) * n,
        "scale_stride": "i32",
        "mask_strides": ("i32",) * (n - 1),
        "heads": "i32",
        "q_len": "i32",
        "lengths": ("i32",) * n,
        "qk_scale": "fp32",
        **dict.fromkeys(specialization.constants, "constexpr"),
    }
    signature = {name: types[name] for name in kernel.arg_names}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], object] = {}
    for place, name in enumerate(signature):
        kind = signature[name]
        for i, leaf in enumerate(kind) if isinstance(kind, tuple) else ((None, kind),):
            path = (place,) if i is None else (place, i)
            if leaf == "constexpr":
                constants[path] = specialization.constants.get(name)
            elif str(leaf).startswith("*") and name not in UNALIGNED:
                attributes[path] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
