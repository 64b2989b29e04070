"""Adapter scales of every kind of number: what is set is what stock multiplies by. The table that compiled steps read."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ipa_kernels
from ipa_kernels.integration import scale_table

from ..helpers.controls import CONTROLS, Control
from ..helpers.generate import generate
from ..helpers.pipelines import build

CPU = torch.device("cpu")

NUMBERS: dict[str, Callable[[float], Any]] = {
    "np.float64": np.float64,
    "np.float32": np.float32,
    "np.float16": np.float16,
    "np.int64": lambda value: np.int64(round(3 * value)),
    "np.bool": lambda value: np.bool_(value > 0.5),
    "bool": lambda value: value > 0.5,
    "float64 tensor": lambda value: torch.tensor(value, dtype=torch.float64),
    "float32 tensor": torch.tensor,
    "float16 tensor": lambda value: torch.tensor(value, dtype=torch.float16),
    "bfloat16 tensor": lambda value: torch.tensor(value, dtype=torch.bfloat16),
    "integer tensor": lambda value: torch.tensor(round(3 * value)),
    "parameter": lambda value: torch.nn.Parameter(torch.tensor(value), requires_grad=False),
}
"""From a number to another kind of thing of about that value; none has more digits than float64."""

OTHERS: dict[str, Callable[[], Any]] = {
    "a tensor that requires grad": lambda: torch.tensor(0.7, requires_grad=True),
    "a tensor of one dimension": lambda: torch.tensor([0.7]),
    "an array": lambda: np.array(0.7),
    "an array of one": lambda: np.array([0.7]),
    "a fraction": lambda: Fraction(7, 10),
    "a complex tensor": lambda: torch.tensor(0.7 + 0j),
    "an integer beyond 64 bits": lambda: 10**30,
    "an integer beyond float64": lambda: 10**400,
}


def set_scales(pipe: Any, scale: Any) -> None:
    """Into the processors, as a callback of a user's does; diffusers' setter takes fewer kinds."""
    for processor in pipe.unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [scale]


def outcome(pipe: Any, control: Control) -> Tensor | str:
    try:
        return generate(pipe, ("base",), control, steps=2)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", ["alone", "per image"])
@pytest.mark.parametrize("name", NUMBERS)
def test_every_kind_of_number_is_a_scale(name: str, place: str, dtype: torch.dtype) -> None:
    number = NUMBERS[name]
    control = CONTROLS["one scale" if place == "alone" else "masks for two images"]
    pipe = build("sd", ("base",), dtype)
    set_scales(pipe, number(0.7123) if place == "alone" else [number(0.7123), 0.3])
    expected = generate(pipe, ("base",), control, steps=2)
    ipa_kernels.enable(pipe, impl="eager")
    assert torch.equal(generate(pipe, ("base",), control, steps=2), expected)
    report = ipa_kernels.explain(pipe)
    assert report.eager == len(report.layers), str(report)
    assert report.cache.hits > 0
    set_scales(pipe, 0.0 if place == "alone" else [0.0, 0.0])
    assert not torch.equal(generate(pipe, ("base",), control, steps=2), expected), "the scale makes no difference"


@pytest.mark.parametrize("name", ["np.float64", "np.bool", "float32 tensor"])
def test_the_kernel_takes_every_kind_of_number(name: str) -> None:
    pipe = build("sd", ("base",))
    set_scales(pipe, NUMBERS[name](0.7123))
    expected = generate(pipe, ("base",))
    report = ipa_kernels.enable(pipe, impl="triton")
    assert report.triton == len(report.layers)
    torch.testing.assert_close(generate(pipe, ("base",)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_number_is_left_to_stock(name: str) -> None:
    pipe = build("sd", ("base",))
    set_scales(pipe, OTHERS[name]())
    expected = outcome(pipe, Control())
    ipa_kernels.enable(pipe)
    actual = outcome(pipe, Control())
    assert torch.equal(actual, expected) if isinstance(expected, Tensor) else actual == expected
    reasons = [layer.reason for layer in ipa_kernels.explain(pipe).layers if layer.impl]
    assert reasons
    assert all(reason.startswith("adapter scale: got ") for reason in reasons), reasons


def test_a_scale_whose_gradient_is_asked_for_gets_stocks() -> None:
    pipe = build("sd", ("base",))
    gradients = []
    for _ in range(2):
        scale = torch.tensor(0.7, requires_grad=True)
        set_scales(pipe, scale)
        draw = torch.Generator().manual_seed(0)
        text, images = torch.randn(2, 77, 64, generator=draw), torch.randn(2, 1, 32, generator=draw)
        sample = torch.randn(2, 4, 8, 8, generator=draw)
        pipe.unet(sample, 5, text, added_cond_kwargs={"image_embeds": [images]}).sample.square().sum().backward()
        gradients.append(scale.grad)
        ipa_kernels.enable(pipe)
    assert gradients[0] != 0
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_scale_changed_in_the_middle_of_a_generation_is_seen(name: str) -> None:
    """By another object of the same kind; a tensor also in place."""
    number = NUMBERS[name]

    def callback(in_place: bool) -> Callable[..., Any]:
        def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if step == 2:
                for processor in pipe.unet.attn_processors.values():
                    if hasattr(processor, "to_k_ip") and in_place:
                        processor.scale[0].mul_(0)
                    elif hasattr(processor, "to_k_ip"):
                        processor.scale[0] = number(0.0)
            return tensors

        return change

    for in_place in {False, isinstance(number(0.5), Tensor)}:
        pictures = []
        pipe = build("sd", ("base",))
        for _ in range(2):
            set_scales(pipe, number(0.7123))
            pictures.append(generate(pipe, ("base",), steps=4, callback_on_step_end=callback(in_place)))
            ipa_kernels.enable(pipe)
        set_scales(pipe, number(0.7123))
        assert not torch.equal(generate(pipe, ("base",), steps=4), pictures[0]), "the change makes no difference"
        assert torch.equal(*pictures)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_kind_of_number_is_data_of_a_compiled_step(name: str) -> None:
    table, number = scale_table.ScaleTable(), NUMBERS[name](0.7123)
    table.update([number, 0.5], None, CPU)
    assert table.is_data
    assert table.tensor[:, 0].tolist() == pytest.approx([float(number), 0.5])
    table.update([[number, 0.5]], [torch.ones(1, 2, 8, 8)], CPU)
    assert table.is_data
    assert table.tensor[0, 1:3].tolist() == pytest.approx([float(number), 0.5])


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_number_is_no_data_of_a_compiled_step(name: str) -> None:
    table = scale_table.ScaleTable()
    table.update([OTHERS[name]()], None, CPU)
    assert not table.is_data


def test_a_tensor_on_another_device_is_not_waited_for() -> None:
    """On the meta device its value cannot be read at all."""
    assert scale_table.number(torch.tensor(0.5, device="meta")) is None


@pytest.mark.parametrize("fails", ["zeros", "tensor"])
@pytest.mark.parametrize("after", [[0.9, 0.2], [0.5], [0.5, 0.5]])
def test_a_table_that_could_not_be_written_is_not_taken_for_current(
    fails: str, after: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory where a second adapter needs a larger table; then the same step again, or another."""
    table = scale_table.ScaleTable()
    table.update([0.5], None, CPU)

    def fail(*arguments: object, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, fails, fail)
        with pytest.raises(torch.OutOfMemoryError):
            table.update([0.9, 0.2], None, CPU)
    table.update(after, None, CPU)
    assert table.is_data
    assert table.tensor[:, 0].tolist() == pytest.approx(after)
