"""One of a thing is not several: numbers in reports and messages."""

from typing import Any

import pytest
import torch

import ipa_kernels
from ipa_kernels.cli import verify_cases
from ipa_kernels.report import CacheReport, GraphReport, LayerReport, Report, plural

from .helpers.generate import generate
from .helpers.pipelines import build


@pytest.mark.parametrize("number", [0, 1, 2])
def test_plural(number: int) -> None:
    assert f"step{plural(number)}" == ("step" if number == 1 else "steps")
    assert f"entr{plural(number, 'ies', 'y')}" == ("entry" if number == 1 else "entries")


def test_a_report_of_one_of_each() -> None:
    layers = [LayerReport("a", "eager", "eager", "", 1)]
    report = Report("UNet", True, "auto", layers=layers, cache=CacheReport(1, 1, 1), prepared=1, graphs=GraphReport(1, 1))
    assert str(report).splitlines() == [
        "UNet: enabled, impl='auto'; 1 IP-Adapter layer: 0 triton, 1 eager, 0 stock",
        "     1 x eager  1 call each",
        "  cache: 1 hit, 1 miss, 1 byte",
        "  prepared: 1 byte",
        "  graphs: 1 captured, 1 replay",
    ]


def test_a_report_of_several_of_each() -> None:
    layers = [LayerReport("a", "eager", "eager", "", 2)] * 2
    report = Report("UNet", True, "auto", layers=layers, cache=CacheReport(2, 2, 2), prepared=2, graphs=GraphReport(2, 2))
    assert str(report).splitlines() == [
        "UNet: enabled, impl='auto'; 2 IP-Adapter layers: 0 triton, 2 eager, 0 stock",
        "     2 x eager  2 calls each",
        "  cache: 2 hits, 2 misses, 2 bytes",
        "  prepared: 2 bytes",
        "  graphs: 2 captured, 2 replays",
    ]


def test_a_refusal_of_one_layer() -> None:
    pipe = build("sd", ("base",))
    attention = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")

    class Own(torch.nn.Module):
        def forward(self, *arguments: Any, **options: Any) -> None:
            raise NotImplementedError

    attention.set_processor(Own())
    with pytest.raises(ipa_kernels.UnsupportedError, match=r"\(1 layer, first mid_block"):
        ipa_kernels.enable(pipe, impl="triton")


def test_a_generation_of_one_step() -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    generate(pipe, ("base",), steps=1)
    assert "1 call each" in str(ipa_kernels.explain(pipe))


def test_heads_are_not_multiplied() -> None:
    """4 heads of 16 channels: not 64 heads."""
    name, case = next(iter(verify_cases.CASES.items()))
    checked = verify_cases.verify_case(case.small(), torch.float32, torch.device("cpu"), "eager", 0)
    assert f"{case.small().heads} heads of {case.head_dim}, " in checked.shape, name
