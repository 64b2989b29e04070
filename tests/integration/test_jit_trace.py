"""`torch.jit.trace` of an enabled UNet: sizes are tensors there, which are neither compared nor shown."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import ipa_kernels

from ..helpers.adapters import seeded
from ..helpers.controls import binary
from ..helpers.pipelines import build


class Step(torch.nn.Module):
    """What a user traces: a step of a UNet as a function of tensors."""

    def __init__(self, unet: Any, masked: bool) -> None:
        super().__init__()
        self.unet = unet
        self.masked = masked

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        options = {"cross_attention_kwargs": {"ip_adapter_masks": [mask]}} if self.masked else {}
        found: Tensor = self.unet(
            sample, timestep, text, added_cond_kwargs={"image_embeds": [images]}, return_dict=False, **options
        )[0]
        return found


def inputs(timestep: Tensor) -> tuple[Tensor, ...]:
    draw = seeded(2)
    return draw(2, 4, 8, 8), timestep, draw(2, 77, 64), draw(2, 1, 32), binary()


def traced(step: Step, arguments: tuple[Tensor, ...]) -> Any:
    """Traced, with no word of ours about it but the one that says what runs."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        found = torch.jit.trace(step, arguments, check_trace=False)
    tracer = [warning for warning in caught if issubclass(warning.category, torch.jit.TracerWarning)]
    diffusers = [warning for warning in tracer if "/diffusers/" in warning.filename or "functional.py" in warning.filename]
    assert [f"{warning.filename}:{warning.lineno}" for warning in tracer if warning not in diffusers] == []
    return found


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize(
    "timestep", [torch.tensor(5), torch.tensor([7, 5]), torch.arange(9)[4]], ids=["one", "rows", "element"]
)
def test_a_traced_step_is_stocks_and_says_why(timestep: Tensor, masked: bool) -> None:
    unet = build("sd", ("base",)).unet.requires_grad_(False)
    step, arguments = Step(unet, masked), inputs(timestep)
    with torch.no_grad():
        expected = step(*arguments)
        assert torch.equal(traced(step, arguments)(*arguments), expected)
        ipa_kernels.enable(unet)
        step(*arguments)
        recorded = traced(step, arguments)
        assert torch.equal(recorded(*arguments), expected)
        reasons = {layer.reason for layer in ipa_kernels.explain(unet).layers}
        assert len(reasons) == 1
        assert "torch.jit.trace: " in reasons.pop()
        # before and after it a step is what it ever is
        assert torch.equal(step(*arguments), expected)
        assert {layer.impl for layer in ipa_kernels.explain(unet).layers} == {"eager"}


def test_the_kernel_is_not_traced_where_it_is_demanded() -> None:
    unet = build("sd", ("base",)).unet.requires_grad_(False)
    ipa_kernels.enable(unet, impl="triton")
    with pytest.raises(ipa_kernels.UnsupportedError, match=r"attn2: .* cannot run .*torch.jit.trace: ") as caught:
        traced(Step(unet, False), inputs(torch.tensor(5)))
    assert "tensor(" not in str(caught.value)
    assert "batch sizes" not in str(caught.value)
