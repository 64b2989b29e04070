"""Kernel or eager: what the kernel does not support, and why, every reason at once, from metadata alone."""

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..kernels import launch_table, launch_table_backward
from .validation import Problem, has_tangents, is_transformed, needs_gradient

if TYPE_CHECKING:
    from ..kernels.launch import Launch


class UnsupportedError(ValueError):
    """The kernel was demanded (`impl="triton"`) where it cannot run; the message lists every reason."""


F = TypeVar("F", bound=Callable[..., Any])


def _settled_when_traced(function: F) -> F:
    """`torch.compiler.assume_constant_result`, without its import of the compiler: a graph holds the result of the look-up."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


IMPLEMENTATIONS = ("auto", "triton", "eager")

_BITS = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32}


_BIAS = "attn_mask: the kernel takes no bias on the text branch; leave it out if it is all zeros"


@functools.cache
def _import_launch() -> "type[Launch]":
    from ..kernels.launch import Launch

    return Launch


def launch_class() -> "type[Launch] | None":
    """`ipa_kernels.kernels.launch.Launch`, or None where triton cannot be imported."""
    try:
        return _import_launch()
    except Exception:  # a triton that does not fit torch, Python or the system fails in ways of its own
        return None


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    if launch_class() is None:
        return False
    from ..kernels import launch

    return launch.INTERPRETED


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90" or "gfx942" of a CUDA or ROCm device."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def allows_tf32(device: torch.device) -> bool:
    """Whether torch allows TF32 in the float32 matrix products of this device, and the device has it."""
    # not allow_tf32: reading it raises once a user has set this newer switch
    return (
        device.type == "cuda"
        and torch.backends.cuda.matmul.fp32_precision == "tf32"
        and architecture(device) in launch_table.TF32
    )


def launch_config(device: torch.device, dtype: torch.dtype, head_dim: int, queries: int) -> launch_table.LaunchConfig | None:
    """The launch parameters for supported inputs."""
    if is_interpreted():
        return launch_table.INTERPRETED
    return launch_table.find(architecture(device), _BITS[dtype], head_dim, queries)


def backward_config(problem: Problem) -> launch_table.LaunchConfig | None:
    """The launch parameters of the backward for supported inputs."""
    query = problem.query
    if is_interpreted():
        return launch_table.INTERPRETED
    image_keys = max(problem.lengths[1:], default=0)
    return launch_table_backward.find(architecture(query.device), _BITS[query.dtype], query.shape[3], image_keys)


def layer_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Why the kernel cannot run a layer, as far as that is known before there are inputs; empty where it can."""
    reasons = []
    if launch_class() is None:
        reasons.append(
            "triton: cannot be imported, so there is no kernel (ipa-kernels doctor says why); "
            "pip install 'ipa-kernels[triton]', which installs it on Linux alone"
        )
    interpreted = is_interpreted()
    if device.type not in ("cpu", "cuda"):
        reasons.append(f"device {device}: the kernel runs on CUDA and ROCm GPUs; move the pipeline or the tensors to one")
    elif device.type == "cpu" and not interpreted:
        reasons.append("device cpu: the kernel needs a GPU; move the pipeline or the tensors to one, .to('cuda')")
    if interpreted and dtype == torch.bfloat16:
        reasons.append("dtype torch.bfloat16: Triton's interpreter computes bfloat16 wrongly; use float32 or float16 there")
    if dtype not in _BITS:
        reasons.append(f"dtype {dtype}: the kernel computes in float16, bfloat16 and float32; use one of these")
    if head_dim % 8 or head_dim > launch_table.LARGEST_HEAD_DIM:
        reasons.append(f"head dim {head_dim}: the kernel needs a multiple of 8 up to {launch_table.LARGEST_HEAD_DIM}")
    elif device.type == "cuda" and not interpreted and dtype in _BITS:
        refused = launch_table.refusal(architecture(device), _BITS[dtype], head_dim)
        if refused is not None:
            reasons.append(refused)
    return reasons


def automatic_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why `impl="auto"` prefers eager to a kernel that could run: it is not meant for use, or it is slower."""
    if is_interpreted():
        return ['Triton\'s interpreter: runs for impl="triton" only']
    if device.type == "cuda" and dtype == torch.float32 and not allows_tf32(device):
        arch = architecture(device)
        if arch not in launch_table.TF32:
            return [f"dtype torch.float32: no tensor cores for it on {arch}; use float16 or bfloat16"]
        switch = "torch.backends.cuda.matmul.fp32_precision = 'tf32'"
        return [f"dtype torch.float32: no tensor cores in IEEE precision; set {switch}"]
    return []


def slower_reasons(problem: Problem) -> list[str]:
    """Why `impl="auto"` prefers eager for the shape of this call, where the kernel could run."""
    query = problem.query
    if query.device.type != "cuda" or is_interpreted():
        return []
    batch, heads, queries, head_dim = query.shape
    config = launch_config(query.device, query.dtype, head_dim, queries)
    if config is None:
        return []
    blocks = batch * heads * -(-queries // config.block_m)
    reason = launch_table.slower(architecture(query.device), problem.lengths, blocks)
    return [] if reason is None else [reason]


def length_reasons(device: torch.device, dtype: torch.dtype, head_dim: int, image_keys: int) -> list[str]:
    """Why the table refuses image branches of up to so many keys, where it does not refuse the head dim already."""
    if device.type != "cuda" or dtype not in _BITS or is_interpreted():
        return []
    arch, bits = architecture(device), _BITS[dtype]
    if launch_table.refusal(arch, bits, head_dim) is not None:
        return []
    refused = launch_table.refusal(arch, bits, head_dim, image_keys)
    return [] if refused is None else [refused]


def call_reasons(problem: Problem) -> list[str]:
    """Why the kernel cannot run this very call; empty where it can."""
    query = problem.query
    reasons = layer_reasons(query.device, query.dtype, query.shape[3])
    image_keys = max(problem.lengths[1:], default=0)
    reasons += length_reasons(query.device, query.dtype, query.shape[3], image_keys)
    if problem.attn_mask is not None:
        reasons.append(_BIAS)
    if not 1e-30 < problem.softmax_scale < 1e30:
        reasons.append(f"scale {problem.softmax_scale}: the kernel needs a positive softmax scale within float32")
    reasons += _size_reasons(problem)
    if needs_gradient(problem):
        reasons += gradient_reasons(query.device, query.dtype, query.shape[3], image_keys)
    reasons += transform_reasons()
    for name, tensor in _named(problem):
        if tensor.shape[3] > 1 and tensor.stride(3) != 1:
            reasons.append(f"{name} strides {tuple(tensor.stride())}: the kernel needs a last stride of 1; use .contiguous()")
    weights = [("image_scales", problem.scales)] if isinstance(problem.scales, Tensor) else []
    weights += [(f"image_masks[{i}]", mask) for i, mask in enumerate(problem.masks) if mask is not None]
    for name, tensor in (*_named(problem), *weights):
        if tensor.is_neg():
            reasons.append(f"{name}: a lazily negated view; use .resolve_neg()")
    return reasons


def _size_reasons(problem: Problem) -> list[str]:
    """What does not fit into the numbers of a launch, or into 32 bits within a tile (`kernels.primitives`)."""
    batch, heads, _, head_dim = problem.query.shape
    reasons = []
    if batch > 65535:
        reasons.append(f"batch {batch}: a GPU grid ends at 65535; use smaller batches")
    if heads * head_dim >= 2**24:
        width = f"times the head dim, {head_dim}, that is {heads * head_dim}"
        reasons.append(f"heads {heads}: {width}, and the kernel's rows end below {2**24}; use fewer heads at a time")
    for name, tensor in _named(problem):
        # strides are in units of 16 bytes; with it the number of rows is below 2**31
        if tensor.shape[1:].numel() * tensor.element_size() >= 16 * 2**31:
            shape = list(tensor.shape)
            reasons.append(f"{name} {shape}: a row of the batch has 32 GiB or more; use fewer heads or rows at a time")
    return reasons


def transform_reasons() -> list[str]:
    """Why what is around a call, or around its backward, would not see through the kernel."""
    reasons = []
    if has_tangents():
        reasons.append("forward-mode differentiation: the kernel has no tangents; call it outside of the dual level")
    if is_transformed():
        reasons.append("torch.func: the kernel has no rules for its transforms; call it outside of them")
    return reasons


@_settled_when_traced
def _device_reasons(device: torch.device, dtype: torch.dtype, head_dim: int, impl: str, gradient: bool) -> tuple[str, ...]:
    reasons = layer_reasons(device, dtype, head_dim)
    if impl == "auto":
        reasons += automatic_reasons(device, dtype)
    if gradient and not reasons:
        reasons += gradient_reasons(device, dtype, head_dim, 0)
    return tuple(reasons)


def graph_reasons(problem: Problem, impl: str) -> list[str]:
    """Why a graph that is traced now has no kernel in it. Sizes and strides may be symbols: the op looks at them later."""
    query = problem.query
    head_dim = operator.index(query.shape[3])
    reasons = [*_device_reasons(query.device, query.dtype, head_dim, impl, needs_gradient(problem))]
    if problem.attn_mask is not None:
        reasons.append(_BIAS)
    return reasons


def gradient_reasons(device: torch.device, dtype: torch.dtype, head_dim: int, image_keys: int) -> list[str]:
    """Why the backward kernel cannot run where the forward's can, with image branches of up to so many keys."""
    if device.type != "cuda" or dtype not in _BITS or is_interpreted():
        return []
    reason = launch_table_backward.refusal(architecture(device), _BITS[dtype], head_dim, image_keys)
    return [] if reason is None else [f'gradient: {reason}; use torch.no_grad() if none is needed, else impl="eager"']


def _named(problem: Problem) -> list[tuple[str, Tensor]]:
    branches = ["", *(f"[{i}]" for i in range(len(problem.keys) - 1))]
    named = [("query", problem.query)]
    for i, branch in enumerate(branches):
        prefix = "image_" if i else ""
        suffix = f"s{branch}" if i else ""
        named.append((f"{prefix}key{suffix}", problem.keys[i]))
        named.append((f"{prefix}value{suffix}", problem.values[i]))
    return named


def describe(problem: Problem) -> str:
    """Shapes, dtype and device of a call, for messages."""
    lengths = ", ".join(str(length) for length in problem.lengths)
    return f"query {list(problem.query.shape)}, keys per branch ({lengths}), {problem.query.dtype}, {problem.query.device}"


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is one of the three names."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")


def choose(problem: Problem, impl: str) -> tuple[str, list[str]]:
    """("triton" or "eager", why not the kernel); raises UnsupportedError where "triton" is demanded and cannot be.

    In a graph that is traced, or without data, this is as far as the sizes do not tell.
    """
    check_impl(impl)
    if impl == "eager":
        return "eager", ['impl="eager"']
    traced = is_traced(problem)
    reasons = graph_reasons(problem, impl) if traced else call_reasons(problem)
    if impl == "auto" and not traced:
        reasons += automatic_reasons(problem.query.device, problem.query.dtype)
        reasons += [] if reasons else slower_reasons(problem)
    if impl == "triton" and reasons:
        raise UnsupportedError(f'impl="triton" cannot run {describe(problem)}: ' + "; ".join(reasons))
    return ("eager" if reasons else "triton"), reasons


def is_traced(problem: Problem) -> bool:
    """Whether a call is traced by a compiler, or has no data: then the kernel is one opaque op."""
    return torch.compiler.is_compiling() or is_fake(problem.query)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is one of `torch._subclasses.FakeTensor`, by name: importing that class takes seconds."""
    return type(tensor).__name__ == "FakeTensor"
