"""What is not seen, as the documentation says it, beside what the code does."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ipa_kernels
from ipa_kernels.integration import scale_table

from ..helpers.generate import generate
from ..helpers.pipelines import build

ROOT = Path(__file__).parents[2]
UNSEEN = (
    "Not seen is an edit in place through `.data` or a NumPy view, which leaves no trace in torch: of a weight, while a loop "
    "of your own keeps its prompt and image tensors; of such a tensor; and of a mask that you keep. `pipe(...)` makes new "
    "tensors of prompt and images, so that weights edited between two calls of it are seen. `clear_cache` is the remedy."
)
PLACES: dict[str, Callable[[], str]] = {
    "the docstring of enable": lambda: str(ipa_kernels.enable.__doc__),
    **{name: (ROOT / "docs" / name).read_text for name in ("api.md", "exact.md", "how-it-works.md")},
}


def words(text: str) -> str:
    """Without line breaks, and without what links add to the words of a page."""
    return " ".join(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).split())


@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_seen_is_said_alike(place: str) -> None:
    assert words(UNSEEN) in words(PLACES[place]())


def run(unet: Any, timesteps: range, text: Tensor, images: list[Tensor]) -> Tensor:
    """A loop of a user's own that keeps its embeddings: the sum of all predictions."""
    sample = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
    with torch.no_grad():
        return sum(unet(sample, t, text, added_cond_kwargs={"image_embeds": images}).sample for t in timesteps)  # type: ignore[return-value]


def double(pipe: Any) -> None:
    """Its values, in a way that no version shows."""
    for name, module in pipe.unet.named_modules():
        if name.endswith(("attn2.to_v", "to_v_ip.0")):
            module.weight.data.mul_(2)


@pytest.mark.parametrize("first", [900, 300])
def test_an_edit_through_data_between_two_runs(first: int) -> None:
    """Of a loop that keeps its tensors, wherever the second run begins: `clear_cache` is the remedy."""
    ours, twin = build("sd", ("base",)), build("sd", ("base",))
    text, images = torch.randn(2, 77, 64), [torch.randn(2, 1, 32)]
    ipa_kernels.enable(ours)
    found = []
    for pipe in (twin, ours):
        run(pipe.unet, range(900, 400, -100), text, images)
        double(pipe)
        ipa_kernels.clear_cache(pipe)
        found.append(run(pipe.unet, range(first, first - 300, -100), text, images))
    assert torch.equal(*found)


def test_an_edit_through_data_between_two_calls_of_a_pipeline() -> None:
    ours, twin = build("sd", ("base",)), build("sd", ("base",))
    ipa_kernels.enable(ours)
    found = []
    for pipe in (twin, ours):
        before = generate(pipe, ("base",), steps=2)
        double(pipe)
        found.append(generate(pipe, ("base",), steps=2))
        assert not torch.equal(before, found[-1])
    assert torch.equal(*found)


def test_eager_steps_pay_nothing_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is prepared, compiled or captured: no table of scales is looked at, let alone written and copied."""
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    calls: list[Any] = []
    update = scale_table.ScaleTable.update

    def counted(self: Any, *arguments: Any) -> None:
        calls.append(arguments)
        update(self, *arguments)

    monkeypatch.setattr(scale_table.ScaleTable, "update", counted)
    generate(pipe, ("base",), steps=3)
    assert len(calls) == 0
