"""What is edited between two steps of a generation, or after a step was captured, where graphs read what was prepared."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from ..helpers.compiled import close, prepare
from ..helpers.generate import generate
from ..helpers.pipelines import build
from ..helpers.recorder import Recorder, pair, runs

BOTH = ("base", "plus")


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def attention(pipe: Any) -> Any:
    return pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2


WEIGHTS: dict[str, Callable[[Any], nn.Linear]] = {
    "to_k": lambda pipe: attention(pipe).to_k,
    "to_v": lambda pipe: attention(pipe).to_v,
    "to_k_ip": lambda pipe: attention(pipe).processor.to_k_ip[0],
    "to_v_ip of the second adapter": lambda pipe: attention(pipe).processor.to_v_ip[1],
    "image projection": lambda pipe: pipe.unet.encoder_hid_proj.image_projection_layers[0].image_embeds,
}


def drawn_with_an_edit(pipe: Any, edit: Callable[[], None] | None) -> Tensor:
    """Four steps; the edit comes after the second, with the same prompt, images and masks before and after."""

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 1 and edit is not None:
            edit()
        return tensors

    return generate(pipe, BOTH, steps=4, callback_on_step_end=change)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        # compiling takes seconds: one quick relative for each weight is captured, and one is compiled
        pytest.param(name, how, marks=pytest.mark.slow if how == "compiled" and name != "to_k" else ())
        for name in WEIGHTS
        for how in ("compiled", "captured")
    ],
)
def test_a_weight_that_a_callback_edits(name: str, how: str, recorded: list[Recorder]) -> None:
    """In place, on a UNet that was prepared."""
    ours, twin = pair() if how == "captured" else (build("sd", BOTH), build("sd", BOTH))
    if how == "compiled":
        prepare(ours)
        ours.unet.mid_block.compile(backend="eager")
    unedited = drawn_with_an_edit(twin, None)
    close(drawn_with_an_edit(ours, None), unedited)
    pictures = []
    for pipe in (twin, ours):
        weight = WEIGHTS[name](pipe).weight

        @torch.no_grad()
        def edit(weight: Tensor = weight) -> None:
            weight.mul_(-8)

        pictures.append(drawn_with_an_edit(pipe, edit))
    assert (pictures[0] - unedited).abs().max() > 1e-3 * unedited.abs().max(), "makes no difference: proves nothing"
    close(pictures[1], pictures[0])
    if how == "captured":
        assert runs(recorded) == [7], "what is edited in place is captured once"


class Gain:
    """Self-attention of a user, who sets how loud it is."""

    loudness = 1.0

    def __init__(self) -> None:
        self.gain = 0.5
        self.settings = {"gains": [1.0, 1.0]}
        self.tensor = torch.tensor(1.0)

    def __call__(self, attn: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        gain = self.gain * self.loudness * self.settings["gains"][1] * self.factor()
        return attn.to_v(hidden_states) * gain * self.tensor

    def factor(self) -> float:
        return 1.0


class Louder(Gain):
    def factor(self) -> float:
        return 3.0


class Slotted:
    """With no `__dict__` to look into."""

    __slots__ = ("gain",)

    def __init__(self) -> None:
        self.gain = 0.5

    def __call__(self, attn: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return attn.to_v(hidden_states) * self.gain


def a_number(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    processor.gain = 2.0


def in_a_container(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    processor.settings["gains"][1] = 3.0


def another_tensor(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    processor.tensor = torch.tensor(3.0)


def another_class(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    processor.__class__ = Louder


def a_method_of_its_class(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gain, "factor", lambda self: 3.0)


def a_call_of_its_class(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gain, "__call__", lambda self, attn, hidden_states, *rest, **named: attn.to_v(hidden_states) * 3)


def a_number_of_its_class(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gain, "loudness", 3.0)


EDITS = (
    a_number, in_a_container, another_tensor, another_class, a_method_of_its_class, a_call_of_its_class, a_number_of_its_class,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "edit"), [*((Gain, edit) for edit in EDITS), (Slotted, a_number)], ids=lambda value: value.__name__
)
def test_a_processor_of_a_user_that_is_edited_after_its_step_was_captured(
    kind: type, edit: Callable[..., None], recorded: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object stays: its attributes, its class or what its class holds change."""
    graphed, twin = pair()
    own = {}
    for pipe in (graphed, twin):
        own[pipe] = kind()
        pipe.unet.set_attn_processor(
            {
                name: own[pipe] if name.endswith("attn1.processor") else other
                for name, other in pipe.unet.attn_processors.items()
            }
        )
    before = generate(twin, BOTH)
    for _ in range(2):
        close(generate(graphed, BOTH), before)
    assert runs(recorded) == [3]
    for processor in own.values():
        edit(processor, monkeypatch)
    expected = generate(twin, BOTH)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max(), "makes no difference: proves nothing"
    for _ in range(2):
        close(generate(graphed, BOTH), expected)
    assert len(recorded) == 2, "it is captured anew"


def test_a_method_that_is_patched_after_its_step_was_captured(
    recorded: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that forward calls; no layer is given another prompt by it."""
    graphed, twin = pair()
    before = generate(twin, BOTH)
    close(generate(graphed, BOTH), before)
    inner: Any = Transformer2DModel._get_output_for_continuous_inputs
    monkeypatch.setattr(
        Transformer2DModel, "_get_output_for_continuous_inputs", lambda *rest, **named: inner(*rest, **named) * 2
    )
    expected = generate(twin, BOTH)
    assert not torch.allclose(expected, before)
    for _ in range(2):
        close(generate(graphed, BOTH), expected)
    assert len(recorded) == 2, "it is captured anew"
