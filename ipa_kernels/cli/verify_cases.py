"""The named cases (`NAMED`): random inputs through each implementation, against stock and float64. torch only."""

import difflib
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..ops import decoupled_attention
from ..ops.dispatch import call_reasons
from ..ops.validation import check_arguments
from ..testing.layer_cases import BY_ROW, CASES, Case
from .errors import UserError
from .verify_results import Checked, Finding, failure, layer_shape

NAMED = CASES | BY_ROW


def chosen_cases(names: Sequence[str] | None) -> list[Case]:
    """The cases of --case, or all. Raises UserError for a name that there is not."""
    for name in names or ():
        if name not in NAMED:
            near = difflib.get_close_matches(name, NAMED, n=3) or [known for known in NAMED if name in known]
            if not near:
                raise UserError(f"--case {name}: there is no such case; the cases are: {', '.join(NAMED)}")
            raise UserError(f"--case {name}: there is no such case; near it: {', '.join(near)}")
    return [NAMED[name] for name in dict.fromkeys(names or NAMED)]


def verify_case(case: Case, dtype: torch.dtype, device: torch.device, impl: str | None, seed: int) -> Checked:
    """One case in one dtype: the kernel where it runs, unless `impl` is "eager", and eager, unless `impl` is "triton"."""
    keys = "+".join(map(str, (case.text, *case.images)))
    shape = layer_shape(case.heads, case.head_dim, case.queries, keys)
    findings: dict[str, Finding] = {}
    no_kernel = "--impl eager"
    if impl != "eager":
        # neither its heads nor its queries can be a reason
        arguments = [*_arguments(case.small(), dtype, device, seed), None, None]
        no_kernel = "; ".join(call_reasons(check_arguments(*arguments)))
        if not no_kernel:
            findings["triton"] = _find(case, dtype, device, "triton", seed)
        elif impl == "triton":
            findings["triton"] = Finding(error=no_kernel)
    if impl != "triton":
        findings["eager"] = _find(case, dtype, device, "eager", seed)
    return Checked(case.name, f"{shape}{', masked' * case.masked}{', by row' * case.by_row}", dtype, findings, no_kernel)


def _find(case: Case, dtype: torch.dtype, device: torch.device, impl: str, seed: int) -> Finding:
    """Of one draw, or of three where that is not within."""
    must_equal = impl == "eager" and device.type == "cpu" and dtype == torch.float32
    try:
        with torch.no_grad():
            draws = [_draw(case, dtype, device, impl, seed)]
            if draws[0] is not None and not draws[0].within:
                draws += [_draw(case, dtype, device, impl, seed + more) for more in (1, 2)]
    except Exception as error:  # what raises is not verified; the next case may be
        return Finding(error=failure(error))
    return Finding(tuple(draw for draw in draws if draw is not None), must_equal)


def _draw(case: Case, dtype: torch.dtype, device: torch.device, impl: str, seed: int) -> reference.Comparison | None:
    """On the inputs of a seed; None where eager attention equals stock's bit for bit."""
    *positional, scales, masks = _arguments(case, dtype, device, seed)
    options = {"image_scales": scales, "image_masks": masks}
    # before stock: memory that a kernel left unwritten must not hold the result of another
    result = decoupled_attention(*positional, **options, impl=impl)
    stock = _stock(positional, scales, masks)
    if impl == "eager" and torch.equal(result, stock):
        return None
    return reference.compare_call({impl: result}, stock, *positional, **options)[impl]


def _arguments(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """In the order of `check_arguments`, other ones for every name; scales are numbers, as diffusers has them, or by row."""
    inputs = case.inputs(dtype, device, seed + zlib.crc32(case.name.encode()))
    tensors = inputs.query, inputs.key, inputs.value, inputs.image_keys, inputs.image_values
    return *tensors, inputs.image_scales if case.by_row else inputs.image_scales[0].tolist(), inputs.image_masks


def _stock(tensors: Sequence[Any], scales: Tensor | list[float], masks: Sequence[Tensor | None]) -> Tensor:
    """Of scales by row each row of what stock makes of all rows with the scales of that one: it has the same for all."""
    if not isinstance(scales, Tensor):
        return reference.stock_attention(*tensors, image_scales=scales, image_masks=masks)
    rows = enumerate(scales.tolist())
    return torch.stack([reference.stock_attention(*tensors, image_scales=own, image_masks=masks)[row] for row, own in rows])
